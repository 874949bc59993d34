"""Weights by name, as they are saved: plain tensors on the CPU, or for a trial tensors without numbers
(meta)."""
import copy
import glob
import os

import torch


def each_once(function, tensors: dict) -> dict:
    """`function` of every tensor; tied weights, which are one tensor under two names, stay one."""
    made = {}
    results = {}
    for name, tensor in tensors.items():
        key = id(tensor)
        if key not in made:
            made[key] = function(tensor)
        results[name] = made[key]
    return results


def written(state: dict) -> dict:
    """The tensors of a state that are written to a file: all of them, or none of a trial's, which have no
    numbers."""
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def num_bytes(state: dict) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in state.values()}.values())


def save_pretrained(lm, weights: dict, directory: str) -> None:
    """`lm.save_pretrained` with these weights, on every rank: by itself, it writes on rank 0 only."""
    own = copy.copy(lm)      # the same modules: another thread may save them, too
    own.should_save_on_this_rank = lambda is_main_process: True
    own.save_pretrained(directory, state_dict=written(weights), max_shard_size="5GB")


def files_of(directory: str, name: str) -> list[str]:
    """The paths of the file `name`, or of the files `...-00001-of-00008...` that several ranks wrote in its
    place."""
    stem, ending = os.path.splitext(name)
    numbered = sorted(glob.glob(os.path.join(glob.escape(directory), f"{stem}-?????-of-?????{ending}")))
    return numbered or [os.path.join(directory, name)]


def precision(state: dict) -> torch.dtype:
    """The dtype of the weights: that of the largest, since small ones may be kept in fp32."""
    floating = [tensor for tensor in state.values() if tensor.is_floating_point()]
    return max(floating, key=torch.numel).dtype


def inside_lm(state: dict) -> dict:
    """The weights of a policy's LM by their names inside the LM."""
    weights = {}
    for name, tensor in state.items():
        if name.startswith("lm."):
            weights[name.removeprefix("lm.")] = tensor
    return weights
