"""The processes of a run: one, or one per device under `torchrun`."""
import datetime
import itertools
import os
import secrets
import socket
import sys
import time
import zlib

import torch
import torch.distributed as dist

from data.command import own_command
from data.errors import UserError

PATIENCE = datetime.timedelta(minutes=30)      # how long a process waits for another one,
FOR_MAIN = datetime.timedelta(days=7)          # ... and for what rank 0 does alone, such as reading the data
TOKEN = ".shared"                              # a file in the run's directory, while it is looked for
SHARED_WITHIN = 10                             # seconds until a file is seen through a network's disk
objects: dist.ProcessGroup | None = None       # all processes, on the CPU, for Python objects
aside: dist.ProcessGroup | None = None         # the same for what runs in the background


def start_processes(deterministic: bool) -> None:
    """Under torchrun, join the process group: nccl on CUDA, gloo on the CPU; and two of gloo for objects."""
    global objects, aside
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # micro-batches of changing lengths would leave holes in a GPU's memory
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "LOCAL_RANK" in os.environ:
        if torch.cuda.is_available():
            choose_gpu(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
        objects = dist.new_group(backend="gloo", timeout=FOR_MAIN)
        aside = dist.new_group(backend="gloo", timeout=FOR_MAIN)


def choose_gpu(rank: int) -> None:
    """Use the GPU with the number of this process among those of its machine; UserError where there is
    none."""
    count = torch.cuda.device_count()
    if rank >= count:
        raise UserError(f"torchrun: it starts more processes on this machine than it has GPUs, {count}; "
                        f"fix: --nproc-per-node {count}")
    torch.cuda.set_device(rank)


def stop_processes() -> None:
    """Leave the process group. All ranks call this where they end together, and none after an error: NCCL
    waits for the other ranks, which may be in the middle of an update."""
    # vLLM has groups of its own within this one, and ends them all when the process ends
    if dist.is_initialized() and "vllm" not in sys.modules:
        dist.destroy_process_group()


def from_main(function, *arguments, group: dist.ProcessGroup | None = None):
    """Call `function(*arguments)` on rank 0 only; every rank returns its result, or raises its UserError. Any
    other exception is raised on rank 0, and the other ranks exit without a message instead of waiting.
    `group`: the processes, where this does not run in the main thread."""
    if not dist.is_initialized():
        return function(*arguments)
    box, fault = [None], None
    if dist.get_rank() == 0:
        box[0], fault = outcome(function, *arguments)
    dist.broadcast_object_list(box, group=group or objects)
    raise_failure(box, fault)
    return box[0]


def outcome(function, *arguments) -> tuple:
    """(what the function returns, None), or (what the other processes raise in its place, its exception)."""
    try:
        return function(*arguments), None
    except UserError as error:
        return error, error
    except Exception as error:
        return SystemExit(1), error


def raise_failure(results: list, own: Exception | None) -> None:
    """Raise this process's own exception, or the first that another one has put among its `results`."""
    if own:
        raise own
    for result in results:
        if isinstance(result, (UserError, SystemExit)):
            raise result


def from_all_ranks(values: list, group: dist.ProcessGroup | None = None) -> list:
    """The lists of all ranks, one after the other, on every rank."""
    if not dist.is_initialized():
        return values
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, values, group=group or objects)
    return list(itertools.chain(*parts))


def on_any_rank(values: list, device) -> list:
    """What any rank has in its list, each value once, in the same order on every rank. Where the lists are
    the same that costs two numbers."""
    _, world = distributed()
    digest = zlib.crc32(repr(values).encode()) % 2 ** 20
    total, squares = sum_over_ranks([float(digest), float(digest ** 2)], device)
    if squares * world == total ** 2:      # they have no variance
        return values
    return list(dict.fromkeys(from_all_ranks(values)))


def from_shares(function, count: int) -> list:
    """[function(share) of every rank], on every rank. The shares are ranges, range(count) cut in the
    order of the ranks. Exceptions as in `from_main`."""
    rank, world = distributed()
    start, end = count * rank // world, count * (rank + 1) // world
    mine, fault = outcome(function, range(start, end))
    parts = from_all_ranks([mine])
    raise_failure(parts, fault)
    return parts


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


def check_shared(directory: str) -> None:
    """UserError where some process does not see the directory as rank 0 does, by a file that rank 0 puts into
    it for a moment: machines need a disk that they share."""
    rank, world = distributed()
    if world == 1:
        return
    path = os.path.join(directory, TOKEN)
    written = from_main(write_token, path)
    end = time.monotonic() + SHARED_WITHIN
    while token_at(path) != written and time.monotonic() < end:
        time.sleep(0.1)
    blind = [] if token_at(path) == written else [f"rank {rank} on {socket.gethostname()}"]
    blind = from_all_ranks(blind)
    from_main(os.unlink, path)
    if blind:
        raise UserError(f"output: {directory} is not the same directory for {' and '.join(blind[:3])} as for "
                        "rank 0; fix: choose an output on a disk that all machines share")


def write_token(path: str) -> str:
    text = secrets.token_hex(8)
    with open(path, "w") as file:
        file.write(text)
    return text


def token_at(path: str) -> str | None:
    try:
        with open(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def check_copies(copies: int, world: int) -> None:
    """UserError where so many copies of a model cannot be of the same size."""
    if world % copies:
        raise UserError(f"replicate is {copies}, which does not divide the number of processes, {world}; "
                        "fix: replicate=1, or the number of machines")


def command(words: list[str]) -> str:
    """The command that starts this program again with the arguments `words`, under torchrun if it runs under
    torchrun now."""
    if "LOCAL_RANK" not in os.environ:
        return own_command(words)
    local = os.environ.get("LOCAL_WORLD_SIZE")
    if local == os.environ.get("WORLD_SIZE"):
        return own_command(words, f"torchrun --nproc-per-node {local}")
    return own_command(words, "the same torchrun command on every machine, with")
