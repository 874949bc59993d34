"""A sealed directory that all ranks write together: each writes, hashes and syncs its share of the tensors.

A rank writes whole tensors, all of some decoder layers, into `part-<rank>` inside the temporary directory.
Rank 0 then moves the files of all parts together, as one model in several files, which any number of ranks
can read and `from_pretrained` loads.
"""
import json
import os
import re
import shutil
import time
from collections import defaultdict

import torch
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from data.errors import RunError
from engine import sealed
from engine.ranks import SHARED_WITHIN, distributed, from_all_ranks, from_main, outcome, raise_failure
from engine.sealed import WEIGHTS
from model import lora
from model.compiled import by_layer
from model.state import each_once, num_bytes

ALONE = 5 * 10 ** 9                    # bytes that rank 0 writes alone: a small model stays one file
NUMBERED = re.compile(r"(-\d{5}-of-\d{5})?\.safetensors")
MODEL = "model"                        # model.safetensors, the file that has an index where it is several
INDEX = "model.safetensors.index.json"


def deal(policy: nn.Module, world: int) -> dict[int, int]:
    """{id of a weight: the rank that writes it}; a weight without an entry is rank 0's. Decoder layers are
    dealt as wholes, the largest first, each to the rank that has the fewest bytes."""
    if lora.settings(policy.lm):       # peft's format is one file
        return {}
    return owners_of(by_layer(policy, saved_tensors(policy)), world)


def deal_each(tensors: dict, world: int) -> dict[int, int]:
    """As `deal`, for tensors that have nothing to do with each other."""
    return owners_of([{name: tensor} for name, tensor in tensors.items()], world)


def owners_of(units: list[dict], world: int) -> dict[int, int]:
    """{id of a tensor: the rank that writes it} for units that are not to be divided."""
    owners = {}
    loads = [0] * world
    if sum(map(num_bytes, units)) <= ALONE:
        return owners
    for unit in sorted(units, key=num_bytes, reverse=True):
        rank = loads.index(min(loads))
        loads[rank] += num_bytes(unit)
        for tensor in unit.values():
            owners[id(tensor)] = rank
    return owners


def share_of(tensors: dict, owners: dict[int, int], is_copy: bool = False) -> dict:
    """Those of the tensors that this rank writes, on the CPU; sharded ones are gathered from all ranks, one
    after the other (a collective call). `is_copy`: they share no memory with the tensors."""
    rank, _ = distributed()

    def gathered(tensor):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        return whole.detach().to("cpu", copy=is_copy) if owners.get(id(tensor), 0) == rank else None

    found = each_once(gathered, tensors)
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def trained(policy) -> dict:
    """The trained parameters by name."""
    return {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}


def saved_tensors(policy) -> dict:
    """The policy's tensors that are saved, sharded as they are: all, or with an adapter the trained ones."""
    return trained(policy) if lora.settings(policy.lm) else policy.state_dict(keep_vars=True)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


# ---- write -------------------------------------------------------------------------------------------

def write_by_all(directory: str, write, group=None) -> None:
    """Call `write(its own temporary directory)` on every rank, join what they wrote, seal it and move it to
    `directory` in one rename. Where a rank fails, all raise. `group`: the processes, where this does not run
    in the main thread."""
    rank, world = distributed()
    if world == 1:
        sealed.write_sealed(directory, write)
        return
    temporary = from_main(sealed.temporary_beside, directory, group=group)
    part = part_of(temporary, rank)

    def write_part():
        os.makedirs(part)
        write(part)
        sealed.seal(part)

    result, fault = outcome(sealed.explained, directory, write_part)
    results = from_all_ranks([result], group)
    try:
        raise_failure(results, fault)
        from_main(sealed.explained, directory, finish, temporary, directory, world, group=group)
    finally:
        if rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def part_of(temporary: str, rank: int) -> str:
    return os.path.join(temporary, f"part-{rank:05d}")


def finish(temporary: str, directory: str, world: int) -> None:
    """Join the parts in `temporary`, seal it and move it to `directory`."""
    sealed.seal(temporary, known=join(temporary, world))
    sealed.put_in_place(temporary, directory)


def join(temporary: str, world: int) -> dict:
    """Move the files of all parts into `temporary`, those with weights under numbers; their entries in the
    manifest."""
    entries = {}
    files = defaultdict(list)          # the name of several files without their number: [(path, entry)]
    for rank in range(world):
        part = part_of(temporary, rank)
        for name, entry in manifest_of(part).items():
            path = os.path.join(part, name)
            if name.endswith(WEIGHTS):
                files[NUMBERED.sub("", name)].append((path, entry))
            elif name != INDEX and name not in entries:      # all ranks write the same
                os.renames(path, os.path.join(temporary, name))
                entries[name] = entry
    place = {}                         # name of a weight: its file
    for stem, found in files.items():
        for i, (path, entry) in enumerate(found, 1):
            name = f"{stem}-{i:05d}-of-{len(found):05d}{WEIGHTS}" if len(found) > 1 else stem + WEIGHTS
            os.rename(path, os.path.join(temporary, name))
            entries[name] = entry
            if stem == MODEL:
                place |= dict.fromkeys(names_in(os.path.join(temporary, name)), name)
    if len(set(place.values())) > 1:
        total = sum(os.path.getsize(os.path.join(temporary, name)) for name in set(place.values()))
        with open(os.path.join(temporary, INDEX), "w") as file:
            json.dump({"metadata": {"total_size": total}, "weight_map": place}, file, indent=1)
    for rank in range(world):
        shutil.rmtree(part_of(temporary, rank), ignore_errors=True)
    return entries


def manifest_of(part: str) -> dict:
    """The manifest of a part, which a network's disk may show late."""
    end = time.monotonic() + SHARED_WITHIN
    while (found := sealed.read_manifest(part)) is None:
        if time.monotonic() > end:
            raise RunError(f"{part}, which another rank has written, cannot be read by rank 0; "
                           "fix: choose an output on a disk that all machines share")
        time.sleep(0.1)
    return found


def names_in(path: str) -> list[str]:
    """The names of the tensors in a file."""
    with safe_open(path, "pt") as file:
        return list(file.keys())
