"""A run's checkpoints: which there are, and what is in them.

Each is a sealed directory (sealed.py). Weights and optimizer state are safetensors, the rest is JSON: loading
never unpickles.
"""
import functools
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable

import torch
from safetensors.torch import save_file

from data.files import digest_of
from engine.ranks import distributed
from engine.sealed import MANIFEST, WEIGHTS, broken, write_sealed
from engine.shares import deal, deal_each, saved_tensors, share_of, write_by_all
from model import gguf, lora, modelscope, processor
from model.actor_critic import CRITIC
from model.load import RUNS, is_gguf
from model.reward_model import HEAD_BIAS, HEAD_WEIGHT, VALUE_HEAD
from model.state import each_once, inside_lm, precision, save_pretrained, written

OPTIMIZER = "optimizer.safetensors"
ROLLOUT = "rollout.safetensors"              # in a checkpoint between two updates of the same rollout
REMEMBERED = "remembered.safetensors"        # in a checkpoint: what the algorithm keeps between updates


def checkpoints(run_directory: str) -> list[str]:
    """Paths of a run's checkpoints, oldest first, whole or not."""
    folder = os.path.join(run_directory, "checkpoints")
    paths = []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith("step-") and name[5:].isdigit():
            paths.append(os.path.join(folder, name))
    return sorted(paths, key=step_of)


def step_of(path: str) -> int:
    return int(path.rpartition("step-")[2])


def newest(run_directory: str, notice) -> str | None:
    """The newest whole checkpoint; broken ones are passed over with a notice that names the bad file."""
    for path in reversed(checkpoints(run_directory)):
        fault = broken(path)
        if fault is None:
            return path
        notice(f"checkpoint ignored: {fault}")
    return None


def finished(run_directory: str) -> bool:
    """Whether a run has its final model. The user may edit the other files in `final/`, or add some: the run
    stays finished."""
    return weights_fault(os.path.join(run_directory, "final")) is None


def weights_fault(directory: str) -> str | None:
    """What is wrong with the weights of a sealed directory; None if they are whole, even if its other files
    are not."""
    if os.path.isfile(os.path.join(directory, MANIFEST)):
        return broken(directory, WEIGHTS)
    held = os.listdir(directory) if os.path.isdir(directory) else []
    has_weights = any(name.endswith(WEIGHTS) for name in held)
    return None if has_weights else f"{directory} holds no weights"


def model_path(name: str, notice) -> str:
    """The directory with the model of a run: its `final/`, else its newest whole checkpoint. A GGUF file
    is converted into a directory, a model of ModelScope is downloaded into one; any other name is returned
    unchanged. A notice tells if a run's model is not its final model as the run wrote it."""
    if name.startswith(modelscope.PREFIX):
        return modelscope.directory_of(name, notice)
    if is_gguf(name):
        return converted(name, notice)
    final = os.path.join(name, "final")
    fault = weights_fault(final)
    if fault is None:
        edited = broken(final)
        if edited:
            notice(f"{final} is not as the run wrote it ({edited}); it is used as it is")
        return final
    path = newest(name, notice)
    if path:
        why = fault if os.path.isdir(final) else "this run has no final model"
        notice(f"{why}; {path} is used instead")
    return path or name


def converted(file: str, notice) -> str:
    """The directory beside the runs with the model in a GGUF file; it is written where there is none yet."""
    directory = os.path.join(RUNS, ".gguf", digest_of(file)[:16])
    if broken(directory) is not None:
        notice(f"{file} is converted once, into {directory}")
        tokenizer, lm = gguf.load(file, notice)
        write_sealed(directory, lambda temporary: gguf.save(tokenizer, lm, temporary))
    return directory


def tidy(run_directory: str) -> None:
    """Remove what an interrupted save left behind. If it had moved the old directory away, but had not put
    the new one in its place, put the old one back."""
    for folder in (run_directory, os.path.join(run_directory, "checkpoints")):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        for name in names:
            target, mark, _ = name.partition(".tmp-")
            path = os.path.join(folder, name)
            place = os.path.join(folder, target)
            if mark and name.endswith("-old") and not os.path.exists(place):
                os.rename(path, place)
            elif mark:
                shutil.rmtree(path, ignore_errors=True)


def clean(run_directory: str, keep: int) -> None:
    """Remove what an interrupted save left behind, and all but the newest `keep` checkpoints."""
    tidy(run_directory)
    for path in checkpoints(run_directory)[:-keep]:
        remove(path)


def remove(path: str) -> None:
    """Remove a checkpoint. It is renamed first: a process that dies here leaves no half checkpoint."""
    leftover = f"{path}.tmp-{secrets.token_hex(4)}"
    try:
        os.rename(path, leftover)
    except OSError:
        return                      # the disk refuses; a checkpoint too many hurts nobody
    shutil.rmtree(leftover, ignore_errors=True)


def outline(policy) -> dict:
    """The policy's weights as saved, without their numbers: tensors on the meta device, which the functions
    below leave out of what they write. So a trial writes everything but the weights."""
    def empty(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return each_once(empty, saved_tensors(policy))


def in_dtype(lm, state: dict, dtype: torch.dtype) -> dict:
    """An LM's weights rounded to `dtype`. Those that transformers loads in fp32 whatever dtype is asked for,
    such as biases of a router, and a reward model's head stay as they are: a few kilobytes."""
    def rounded(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    patterns = ["^value_head.weight$", *lm._keep_in_fp32_modules_strict]
    kept = re.compile("|".join(patterns))
    exact = {name: tensor for name, tensor in state.items() if kept.search(name)}
    return each_once(rounded, state) | exact


def save_model(lm, tokenizer, state: dict, directory: str) -> None:
    """The LM as transformers saves it, with its processor, or its adapter as peft does, a reward model's head
    beside it, and the tokenizer. `state` may be this rank's share of the weights."""
    weights = inside_lm(state)
    tokenizer.save_pretrained(directory)
    if weights and lora.settings(lm):
        lora.save(lm, weights, directory)
    elif weights:
        save_pretrained(lm, weights, directory)
        processor.save(lm, directory)
        if precision(weights) != lm.dtype:               # transformers has written that of the LM in memory
            lm.config.dtype = precision(weights)
            lm.config.save_pretrained(directory)
    if "value_head.weight" in state:
        # other projects' heads have a bias, and they read it; ours has none
        head = {HEAD_WEIGHT: state["value_head.weight"], HEAD_BIAS: torch.zeros(1)}
        save_file(written(head), os.path.join(directory, VALUE_HEAD))


def writer_of(directory: str, policy, tokenizer, optimizer, trainer: dict, stored: dict,
              remembered: dict | None = None, is_copy: bool = False) -> Callable:
    """Gather what a checkpoint holds, a collective call, and return the function that writes it. All ranks
    call that, with their group of processes if they do so in the background; where one fails, all raise.
    `is_copy`: what it writes shares no memory with the tensors."""
    world = distributed()[1]
    owners = deal(policy, world)
    weights = share_of(saved_tensors(policy), owners, is_copy)
    moments = {}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}:{key}"] = value
            owners[id(value)] = owners.get(id(parameter), 0)
    moments = share_of(moments, owners, is_copy)
    remembered = remembered or {}
    kept = share_of(remembered, deal_each(remembered, world), is_copy)
    stored = share_of(stored, {}, is_copy)

    def write(temporary):
        write_checkpoint(temporary, policy.lm, tokenizer, weights, moments, trainer, stored, kept)

    return functools.partial(write_by_all, directory, write)


def write_checkpoint(directory, lm, tokenizer, weights: dict, moments: dict, trainer: dict, stored: dict,
                     remembered: dict | None = None) -> None:
    """Model, tokenizer, optimizer state (by parameter name, so any world size can load it), `trainer.json`
    and, if there are any, the tensors `stored` of a rollout and those that the algorithm has `remembered`; of
    all tensors this rank's share."""
    save_model(lm, tokenizer, weights, directory)
    critic = {name: tensor for name, tensor in weights.items() if name.startswith("critic_")}
    # safetensors refuses views of one storage
    separate = {name: tensor.contiguous().clone() for name, tensor in (remembered or {}).items()}
    files = {CRITIC: critic, OPTIMIZER: moments, ROLLOUT: stored, REMEMBERED: separate}
    for name, tensors in files.items():
        if tensors:
            save_file(written(tensors), os.path.join(directory, name))
    with open(os.path.join(directory, "trainer.json"), "w") as file:
        json.dump(trainer, file)


def instead_of(directory: str) -> str:
    """The fix where a run cannot go on from the checkpoint in `directory`."""
    run = os.path.dirname(os.path.dirname(os.path.normpath(directory)))
    others = [path for path in checkpoints(run) if path != os.path.normpath(directory)]
    if others:
        return f"resume from another checkpoint (resume={others[-1]})"
    return "start again in another output"


def load_trainer(directory: str | None) -> dict:
    """What a checkpoint says of the run's position; the start of a run where there is none."""
    if directory is None:
        return {"step": 0}
    with open(os.path.join(directory, "trainer.json")) as file:
        return json.load(file)
