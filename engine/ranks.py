"""The processes of a run: one, or one per device under `torchrun`."""
import datetime
import itertools
import os
import shlex
import sys

import torch
import torch.distributed as dist

from data.errors import UserError

PATIENCE = datetime.timedelta(minutes=30)      # how long a process waits for another one,
FOR_MAIN = datetime.timedelta(days=7)          # ... and for what rank 0 does alone, such as reading the data
objects: dist.ProcessGroup | None = None       # all processes, on the CPU, for Python objects


def start_processes(deterministic: bool) -> None:
    """Under torchrun, join the process group: nccl on CUDA, gloo on the CPU; and one of gloo for objects."""
    global objects
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        objects = dist.new_group(backend="gloo", timeout=FOR_MAIN)


def stop_processes() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def from_main(function, *arguments):
    """Call `function(*arguments)` on rank 0 only; every rank returns its result, or raises its UserError. Any
    other exception is raised on rank 0, and the other ranks exit without a message instead of waiting."""
    if not dist.is_initialized():
        return function(*arguments)
    box = [None]
    fault = None
    if dist.get_rank() == 0:
        try:
            box = [function(*arguments)]
        except UserError as error:
            box = [error]
            fault = error
        except Exception as error:
            box = [SystemExit(1)]
            fault = error
    dist.broadcast_object_list(box, group=objects)
    if fault:
        raise fault
    if isinstance(box[0], (UserError, SystemExit)):
        raise box[0]
    return box[0]


def from_all_ranks(values: list) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if not dist.is_initialized():
        return values
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values, group=objects)
    return list(itertools.chain(*parts))


def distributed() -> tuple[int, int]:
    """(rank, world size); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_over_ranks(values: list[float], device) -> list[float]:
    """Element-wise sum of a list of numbers over all ranks, in float64."""
    if not dist.is_initialized():
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def command(words: list[str]) -> str:
    """The command that starts this program again with the arguments `words`, under torchrun if it runs under
    torchrun now."""
    program = shlex.join([sys.argv[0], *words])
    if "LOCAL_RANK" not in os.environ:
        return f"python {program}"
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local == os.environ.get("WORLD_SIZE"):
        return f"torchrun --nproc-per-node {local} {program}"
    return f"the same torchrun command on every machine, with {program}"
