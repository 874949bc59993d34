"""Sealed directories: a checkpoint is whole or it is ignored.

Files are written to a temporary directory beside their place, synced, sealed by `manifest.json` (size and
sha256 of every file, written last) and renamed. A reader trusts only a directory whose manifest holds.
Weights and optimizer state are safetensors, the rest is JSON: loading never unpickles.
"""
import errno
import json
import os
import re
import secrets
import shutil

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

from data.errors import RunError, UserError
from data.files import digest_of, sha256
from engine.ranks import distributed, from_main, sum_over_ranks
from model import gguf, lora
from model.actor_critic import CRITIC
from model.load import RUNS, first_line, is_finite, is_gguf
from model.reward_model import HEAD_BIAS, HEAD_WEIGHT, VALUE_HEAD
from model.state import each_once, inside_lm, precision, written

MANIFEST = "manifest.json"
WEIGHTS = ".safetensors"
ROLLOUT = "rollout.safetensors"              # in a checkpoint between two updates of the same rollout
REMEMBERED = "remembered.safetensors"        # in a checkpoint: what the algorithm keeps between updates
MOMENTS = "exp_avg", "exp_avg_sq"            # AdamW's names


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sealed(directory: str, write, trial: bool = False) -> None:
    """Call `write(temporary directory)`, seal what it wrote and move it to `directory` in one rename; a
    `trial` removes it instead. RunError whatever fails; what stood there before stays until its replacement
    is complete."""
    directory = os.path.normpath(directory)
    # not the process's number: containers share disks, and number 1
    temporary = f"{directory}.tmp-{secrets.token_hex(4)}"
    previous = f"{temporary}-old"
    try:
        os.makedirs(temporary)
        write(temporary)
        seal(temporary, durable=not trial)
        if trial:
            shutil.rmtree(temporary)
            return
        if os.path.isdir(directory):
            os.rename(directory, previous)
        os.rename(temporary, directory)
        sync(os.path.dirname(directory) or ".")
        shutil.rmtree(previous, ignore_errors=True)
    except Exception as error:     # the disk fails, or a tokenizer or configuration cannot be written
        if os.path.isdir(previous) and not os.path.exists(directory):
            os.rename(previous, directory)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, UserError):
            raise
        kept = "this was tried before the first update" if trial else "earlier checkpoints are untouched"
        raise RunError(f"cannot write {directory} ({first_line(error)}); {kept}; "
                       f"fix: {remedy(error)}") from error


def seal(directory: str, durable: bool = True) -> None:
    """Make everything below `directory` readable for others, list it in the manifest, which is written last,
    and put it on the disk; where it need not be `durable`, the directories only."""
    manifest = {}
    for name in files_below(directory):
        path = os.path.join(directory, name)
        os.chmod(path, 0o644)     # safetensors writes 0600: unreadable for another user's server
        if durable:
            sync(path)
        manifest[name] = {"bytes": os.path.getsize(path), "sha256": sha256(path)}
    path = os.path.join(directory, MANIFEST)
    with open(path, "w") as file:
        json.dump(manifest, file, indent=1)
    if durable:
        sync(path)
    for folder, _, _ in os.walk(directory):
        if folder != directory:
            os.chmod(folder, 0o755)
        sync(folder)


def files_below(directory: str) -> list[str]:
    """The paths of all files in `directory` and its subdirectories, relative to it, in order."""
    found = []
    for folder, _, names in os.walk(directory):
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)


def remedy(error: Exception) -> str:
    """What helps where a save failed. safetensors names the system's error in its text only."""
    named = re.search(r"os error (\d+)", str(error))
    number = int(named[1]) if named else getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free disk space and run the same command again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make its directory writable and run the same command again"
    if number is not None:
        return "check that nothing else moves or removes this directory, then run the same command again"
    if isinstance(error, MemoryError):
        return "free memory and run the same command again"
    return "correct the files of the start model (its tokenizer and configuration) that this error speaks of"


def read_manifest(directory: str) -> dict[str, tuple[int, str]] | None:
    """{file: (bytes, sha256)} of a sealed directory; None if there is no such manifest."""
    try:
        with open(os.path.join(directory, MANIFEST)) as file:
            entries = json.load(file).items()
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # a flipped bit can leave valid JSON of another shape
        return None


def broken(directory: str, ending: str = "") -> str | None:
    """What is wrong with a sealed directory, naming the file; None if it is whole. With `ending` only the
    files that end so are checked."""
    manifest = read_manifest(directory)
    if manifest is None:
        return f"{os.path.join(directory, MANIFEST)} is missing or unreadable"
    for name, (size, digest) in manifest.items():
        path = os.path.join(directory, name)
        if not name.endswith(ending):
            continue
        if not os.path.isfile(path):
            return f"{path} is missing"
        if os.path.getsize(path) != size:
            return f"{path} has {os.path.getsize(path)} bytes instead of {size}"
        if digest_of(path) != digest:
            return f"{path} is damaged (its sha256 differs from the manifest)"
    return None


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
    is converted into a directory; any other name is returned unchanged. A notice tells if a run's model is
    not its final model as the run wrote it."""
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


def set_aside(directory: str) -> str | None:
    """If files of a sealed directory were edited, added or damaged, rename it to make room for its successor.
    Returns its new path, or None."""
    if not os.path.isdir(directory):
        return None
    added = set(files_below(directory)) - {MANIFEST, *(read_manifest(directory) or {})}
    if not added and broken(directory) is None:
        return None
    number = 1
    while os.path.exists(f"{directory}-{number}"):
        number += 1
    try:
        os.rename(directory, f"{directory}-{number}")
    except OSError as error:
        raise RunError(f"cannot rename {directory}, in which files were changed ({error.strerror}); "
                       "fix: move it away and run the same command again") from error
    return f"{directory}-{number}"


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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU of rank 0; a sharded one is gathered from all ranks first (a collective call). None
    on the other ranks: eight processes of one machine need not hold eight copies of a model."""
    tensor = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()
    return tensor.cpu() if distributed()[0] == 0 else None


def trained(policy) -> dict:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def saved_tensors(policy) -> dict:
    """The policy's tensors that are saved, sharded as they are: all, or with an adapter the trained ones."""
    return trained(policy) if lora.settings(policy.lm) else policy.state_dict(keep_vars=True)


def model_state(policy) -> dict:
    """The policy's weights as saved: whole, on rank 0 (gathering them is a collective call), in training
    precision; of a policy with an adapter the trained ones."""
    return each_once(whole, saved_tensors(policy))


def outline(policy) -> dict:
    """`model_state` without its numbers: tensors on the meta device, which the functions below leave out of
    what they write. So a trial writes everything but the weights."""
    def empty(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return each_once(empty, saved_tensors(policy))


def num_bytes(state: dict) -> int:
    return sum({id(tensor): tensor.nbytes for tensor in state.values()}.values())


def in_dtype(state: dict, dtype: torch.dtype) -> dict:
    """Weights rounded to `dtype`. A reward model's head, a few kilobytes, stays as it is."""
    def rounded(tensor):
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    head = {name: tensor for name, tensor in state.items() if name == "value_head.weight"}
    return each_once(rounded, state) | head


def save_model(lm, tokenizer, state: dict, directory: str) -> None:
    """The LM as transformers saves it, or its adapter as peft does, a reward model's head beside it, and the
    tokenizer."""
    weights = inside_lm(state)
    if lora.settings(lm):
        lora.save(lm, weights, directory)
    else:
        lm.save_pretrained(directory, state_dict=written(weights), max_shard_size="5GB")
        if precision(weights) != lm.dtype:               # transformers has written that of the LM in memory
            lm.config.dtype = precision(weights)
            lm.config.save_pretrained(directory)
    if "value_head.weight" in state:
        # other projects' heads have a bias, and they read it; ours has none
        head = {HEAD_WEIGHT: state["value_head.weight"], HEAD_BIAS: torch.zeros(1)}
        save_file(written(head), os.path.join(directory, VALUE_HEAD))
    tokenizer.save_pretrained(directory)


def save_checkpoint(directory: str, policy, tokenizer, optimizer, trainer: dict, stored: dict,
                    remembered: dict | None = None) -> None:
    """Seal a checkpoint, on rank 0; where that fails, all ranks raise. Gathering is a collective call."""
    weights = model_state(policy)
    moments = {}
    for name, parameter in policy.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            moments[f"{name}:{key}"] = whole(value)
    kept = each_once(whole, remembered or {})

    def write(temporary):
        write_checkpoint(temporary, policy.lm, tokenizer, weights, moments, trainer, stored, kept)

    # the others wait: after a signal torchrun would end rank 0 as soon as one of them leaves
    from_main(write_sealed, directory, write)


def write_checkpoint(directory, lm, tokenizer, weights: dict, moments: dict, trainer: dict, stored: dict,
                     remembered: dict | None = None) -> None:
    """Model, tokenizer, optimizer state (by parameter name, so any world size can load it), `trainer.json`
    and, if there are any, the tensors `stored` of a rollout and those that the algorithm has `remembered`."""
    save_model(lm, tokenizer, weights, directory)
    critic = {name: tensor for name, tensor in weights.items() if name.startswith("critic_")}
    if critic:
        save_file(written(critic), os.path.join(directory, CRITIC))
    save_file(moments, os.path.join(directory, "optimizer.safetensors"))
    if stored:
        save_file(stored, os.path.join(directory, ROLLOUT))
    if remembered:                                # safetensors refuses views of one storage
        separate = {name: tensor.contiguous().clone() for name, tensor in remembered.items()}
        save_file(separate, os.path.join(directory, REMEMBERED))
    with open(os.path.join(directory, "trainer.json"), "w") as file:
        json.dump(trainer, file)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def sharded_like(tensor: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """A whole tensor on the device of `live` and sharded as that is. Every rank cuts its part out, so none
    waits for another."""
    tensor = tensor.to(live.device)
    if not isinstance(live, DTensor):
        return tensor
    # src_data_rank=None: no collective call; clone: a part may be a view, which keeps the whole in memory
    return distribute_tensor(tensor, live.device_mesh, live.placements, src_data_rank=None).clone()


def load_optimizer(directory: str, policy, optimizer) -> None:
    """Put the saved moments back beside the parameters, sharded as those are. RunError on every rank where
    the moments do not fit the parameters or hold impossible numbers."""
    parameters, loaded = trained(policy), {}
    for name, state in fitting_moments(directory, parameters).items():
        parameter = parameters[name]
        for key, tensor in state.items():
            # the step goes to the parameter's device, too: the fused AdamW keeps it there
            tensor = sharded_like(tensor, parameter) if key in MOMENTS else tensor.to(parameter.device)
            state[key] = loaded[f"{name}:{key}"] = tensor
        optimizer.state[parameter] = state
    check_numbers(directory, parameters | loaded)


def fitting_moments(directory: str, parameters: dict) -> dict:
    """{parameter's name: {"step", "exp_avg", "exp_avg_sq"}} as saved, on the CPU. Parameters that never had a
    gradient, such as the LM head of a reward model, have no entry. RunError where the file does not fit the
    parameters."""
    path = os.path.join(directory, "optimizer.safetensors")
    states = {}
    for key, tensor in read_tensors(path).items():
        name, _, kind = key.rpartition(":")
        if name not in parameters or kind not in ("step", *MOMENTS):
            raise unfit(path, f"holds {key}, which belongs to no trained weight of this model")
        check_shape(path, key, tensor, parameters[name].shape if kind in MOMENTS else ())
        states.setdefault(name, {})[kind] = tensor
    for name, state in states.items():
        for kind in ("step", *MOMENTS):
            if kind not in state:
                raise unfit(path, f"lacks {name}:{kind}")
    if not states:
        raise unfit(path, "holds no moments")
    return states


def recall(directory: str, tensors: dict[str, torch.Tensor]) -> None:
    """Copy what a checkpoint has of remembered tensors into `tensors`, in place and sharded as these are. The
    file may hold other groups of names (`ema/...`), but of each group in `tensors` it must hold the same
    names. RunError on every rank, with nothing copied, where the file, a name or a shape does not fit."""
    if not tensors:
        return
    path = os.path.join(directory, REMEMBERED)
    saved = read_tensors(path)
    groups = {name.partition("/")[0] for name in tensors}
    for name in saved:
        if name not in tensors and name.partition("/")[0] in groups:
            raise unfit(path, f"holds {name}, which the algorithm does not remember")
    for name, live in tensors.items():
        if name not in saved:
            raise unfit(path, f"lacks {name}, which the algorithm remembers")
        check_shape(path, name, saved[name], live.shape)
    with torch.no_grad():
        for name, live in tensors.items():
            live.copy_(sharded_like(saved[name], live))


def read_tensors(path: str) -> dict:
    """The tensors of a file of a checkpoint; RunError where it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise unfit(path, f"cannot be read ({first_line(error)})") from error


def check_shape(path: str, name: str, tensor: torch.Tensor, shape) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise unfit(path, f"holds {name} of shape {list(tensor.shape)} instead of {list(shape)}")


def unfit(path: str, fault: str) -> RunError:
    """For a file of a checkpoint that does not fit the run."""
    fix = instead_of(os.path.dirname(path))
    return RunError(f"{path} {fault}, so the run cannot go on from it; fix: {fix}")


def check_numbers(directory: str, tensors: dict) -> None:
    """RunError, on every rank, where one of a checkpoint's `tensors` (by name) is not finite, or a mean of
    squares is negative. Each rank looks at its own part."""
    if not tensors:
        return
    bad = []
    for name, tensor in tensors.items():
        part = local_part(tensor)
        negative = name.endswith(":exp_avg_sq") and (part < 0).any()
        bad.append(float(negative or not is_finite(part)))
    for name, count in zip(tensors, sum_over_ranks(bad, part.device)):
        if count:
            kind = "negative or not finite" if name.endswith(":exp_avg_sq") else "not finite"
            raise RunError(f"checkpoint {directory}: {name} holds numbers that are {kind}, so the run cannot "
                           f"go on from it; fix: {instead_of(directory)}")


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
