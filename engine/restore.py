"""What a run reads from the checkpoint that it continues from: moments, and what the algorithm remembered.

Every rank reads its own rows of each tensor, whatever number of ranks has written them.
"""
import os
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from data.errors import RunError
from engine.checkpoint import OPTIMIZER, REMEMBERED, instead_of
from engine.ranks import sum_over_ranks
from engine.shares import local_part, trained
from model.load import first_line, is_finite
from model.state import files_of

MOMENTS = "exp_avg", "exp_avg_sq"            # AdamW's names


class Saved(NamedTuple):
    """A tensor in a file, which is read when it is asked for."""
    file: safe_open
    name: str

    @property
    def shape(self) -> tuple:
        return tuple(self.file.get_slice(self.name).get_shape())

    def like(self, live: torch.Tensor) -> torch.Tensor:
        """The tensor on the device of `live`, and sharded as that is."""
        if not isinstance(live, DTensor):
            return self.file.get_tensor(self.name).to(live.device)
        first, last = own_rows(live)
        # safetensors refuses an empty slice
        rows = self.file.get_slice(self.name)[first:max(last, first + 1)][:last - first]
        return DTensor.from_local(
            rows.to(live.device), live.device_mesh, live.placements, shape=live.shape, stride=live.stride())


def own_rows(live: DTensor) -> tuple[int, int]:
    """The first of this rank's rows of a tensor that FSDP2 has sharded, and the end of them."""
    first, last = 0, live.shape[0]
    for dim, placement in enumerate(live.placements):
        if placement.is_shard():
            rows = -(-live.shape[0] // live.device_mesh.size(dim))
            first = min(live.device_mesh.get_local_rank(dim) * rows, live.shape[0])
            last = min(first + rows, live.shape[0])
    return first, last


def load_optimizer(directory: str, policy, optimizer) -> None:
    """Put the saved moments back beside the parameters, sharded as those are. RunError on every rank where
    the moments do not fit the parameters or hold impossible numbers."""
    parameters, loaded = trained(policy), {}
    for name, state in fitting_moments(directory, parameters).items():
        parameter = parameters[name]
        for key, saved in state.items():
            # the step goes to the parameter's device, too: the fused AdamW keeps it there
            live = parameter if key in MOMENTS else local_part(parameter)
            state[key] = loaded[f"{name}:{key}"] = saved.like(live)
        optimizer.state[parameter] = state
    check_numbers(directory, parameters | loaded)


def fitting_moments(directory: str, parameters: dict) -> dict:
    """{parameter's name: {"step", "exp_avg", "exp_avg_sq"}} as saved. Parameters that never had a gradient,
    such as the LM head of a reward model, have no entry. RunError where the file does not fit the
    parameters."""
    path = os.path.join(directory, OPTIMIZER)
    states = {}
    for key, saved in saved_tensors(directory, OPTIMIZER).items():
        name, _, kind = key.rpartition(":")
        if name not in parameters or kind not in ("step", *MOMENTS):
            raise unfit(path, f"holds {key}, which belongs to no trained weight of this model")
        check_shape(path, key, saved, parameters[name].shape if kind in MOMENTS else ())
        states.setdefault(name, {})[kind] = saved
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
    saved = saved_tensors(directory, REMEMBERED)
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
            live.copy_(saved[name].like(live))


def saved_tensors(directory: str, name: str) -> dict[str, Saved]:
    """The tensors of a file of a checkpoint, or of the files that several ranks wrote in its place; RunError
    where it cannot be read."""
    found = {}
    try:
        for path in files_of(directory, name):
            file = safe_open(path, "pt")
            found |= {key: Saved(file, key) for key in file.keys()}
    except (OSError, SafetensorError) as error:
        raise unfit(path, f"cannot be read ({first_line(error)})") from error
    return found


def check_shape(path: str, name: str, tensor: Saved, shape) -> None:
    if tensor.shape != tuple(shape):
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
