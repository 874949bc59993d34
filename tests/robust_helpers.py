"""`train.py`, or another script, as a process that can be killed, get signals and be patched,
without six seconds of imports."""
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import helpers

ROOT = Path(__file__).resolve().parents[1]
BASE = dict(batch_size=4, max_length=200, lr=1e-3, save_every=1, eval_every=2, epochs=2)    # 10 rows: 3 updates per epoch

OUT, ERR = "stdout.txt", "stderr.txt"

_server = multiprocessing.get_context("forkserver")
PRELOADED = ["robust_warm", "train", "evaluate", "sample", "engine.build",
             "algorithms.dpo", "algorithms.sft", "data.dataset"]
_server.set_forkserver_preload(PRELOADED)


def preload(*modules):
    """Of use before the first process is started only."""
    _server.set_forkserver_preload([*PRELOADED, *modules])


def train(directory, *words, patch=None, arguments=()):
    """`python train.py config.yml words...` in `directory`. `patch(*arguments)`, a function of a module, runs there first.

    -> its exit code (negative: the signal that killed it) and what it printed: .code, .err, .out"""
    words = ["config.yml", *map(str, words)]
    process = start(directory, "train.py", words, patch, arguments)
    process.join(100)
    assert process.exitcode is not None, f"train.py {words} hangs: {Path(directory, ERR).read_text()}"
    out = Path(directory, OUT).read_text()
    err = Path(directory, ERR).read_text()
    return SimpleNamespace(code=process.exitcode, out=out, err=err)


def start(directory, script, words, patch=None, arguments=()):
    """`python SCRIPT words...` in `directory`, as the first process of a session of its own; what it prints
    goes to OUT and ERR there. ERR appears when the script starts."""
    for name in (OUT, ERR):
        Path(directory, name).unlink(missing_ok=True)
    process = _server.Process(target=_child, args=(str(directory), script, words, patch, arguments))
    # the server inherits this when the first process starts it
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]), HF_HUB_OFFLINE="1"):
        process.start()
    return process


def _child(directory, script, words, patch, arguments):
    import torch
    torch.set_num_threads(1)
    os.setsid()
    os.chdir(directory)
    signal.signal(signal.SIGINT, signal.default_int_handler)      # a shell that runs pytest in the background has it ignored
    for path, stream in ((OUT, 1), (ERR, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), stream)
    if patch:
        patch(*arguments)
    sys.argv = [script, *words]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def join(rank, port, count):
    """The environment that torchrun gives a rank."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_on_ranks(config, *words, count=2, patch=join, arguments=()):
    """What torchrun does with train.py, without its seconds of imports: `count` processes, each in a
    directory of its own with a copy of `config`. `patch(rank, port, count, *arguments)` runs first, and calls
    `join`.

    -> of each rank what `train` gives"""
    port = free_port()
    folders = [config.with_name(f"rank{rank}") for rank in range(count)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        shutil.copy(config, folder / "config.yml")

    def start_rank(rank):
        return train(folders[rank], *words, patch=patch, arguments=(rank, port, count, *arguments))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start_rank, range(count)))


def project(directory, algorithm, model, **values):
    """Write config.yml and its data into `directory`: 10 rows to train on, 4 to evaluate."""
    directory.mkdir(exist_ok=True)
    rows = helpers.rows_for(algorithm)
    data = {"data": helpers.write_jsonl(directory / "data.jsonl", rows(10)),
            "eval_data": helpers.write_jsonl(directory / "eval.jsonl", rows(4, 50))}
    keys = helpers.ONLINE.get(algorithm) or helpers.keys_for(algorithm)
    values = {"algorithm": algorithm, "model": model, **data, "output": "run", **BASE, **keys, **values}
    helpers.write_config(directory / "config.yml", **values)
    return directory


def contents(folder):
    """Every file under a directory by its path, as bytes; without the claim that a killed process leaves."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# ---- patches: what goes wrong in the child

def before(owner, name, action, when=lambda *arguments: True):
    """Do `action()` before a call of `owner.name` whose arguments satisfy `when`."""
    original = getattr(owner, name)

    def patched(*arguments, **options):
        if when(*arguments):
            action()
        return original(*arguments, **options)
    setattr(owner, name, patched)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def kill_after_save(step):
    from engine.loop import Engine
    save = Engine.save

    def patched(engine, index, is_left=False):
        save(engine, index, is_left)
        if index == step:
            os.kill(os.getpid(), signal.SIGKILL)
    Engine.save = patched


def kill_at_call(name, count):
    """SIGKILL instead of the `count`-th call of engine.sealed's os.`name`."""
    calls = []

    def due(*_):
        calls.append(name)
        return len(calls) == count
    before(os, name, send(signal.SIGKILL), due)


def signal_in_update(number, step, times=1):
    from engine.loop import Engine
    before(Engine, "clip_gradients", lambda: [send(number)() for _ in range(times)], lambda engine: engine.step.index == step)


def signal_in_reference_pass(number):
    from engine import frozen
    before(frozen, "compute_logps", send(number))


def signal_while_loading(number):
    from engine import build
    before(build, "build_policy", send(number))


def full_disk(step):
    """From the save of `step` on, no file may grow beyond 20,000 bytes: the weights do not fit."""
    import resource

    from engine.loop import Engine
    limit = (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])

    def shrink():
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    before(Engine, "save", shrink, lambda engine, index, *_: index == step)


def full_disk_for_metrics(step):
    from engine.loop import Engine

    def fill():
        os.rename("run/metrics.jsonl", "metrics.before")
        os.symlink("/dev/full", "run/metrics.jsonl")
    before(Engine, "clip_gradients", fill, lambda engine: engine.step.index == step)


def infinite_loss(step):
    from engine.step import Step
    log = Step.log

    def patched(self, losses, metrics, split="train"):
        log(self, losses * float("nan") if (self.index, split) == (step, "train") else losses, metrics, split)
    Step.log = patched
