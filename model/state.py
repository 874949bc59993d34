"""Weights by name, as they are saved: plain tensors on the CPU, or for a trial tensors without numbers
(meta)."""
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


def precision(state: dict) -> torch.dtype:
    """The dtype of the weights, which all have the same."""
    for tensor in state.values():
        if tensor.is_floating_point():
            return tensor.dtype
    raise ValueError("a state without weights")


def inside_lm(state: dict) -> dict:
    """The weights of a policy's LM by their names inside the LM."""
    weights = {}
    for name, tensor in state.items():
        if name.startswith("lm."):
            weights[name.removeprefix("lm.")] = tensor
    return weights
