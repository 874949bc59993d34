"""Several processes are one run: they make the same collective calls in the same order and end together."""
import ast
import functools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import robust_helpers as child
import torch
from helpers import ROOT, assert_same_weights, tiny_model, tracked
from safetensors.torch import load_file, save_file

from data import errors
from data.command import BY_ALIGN
from data.errors import RunError
from engine import checkpoint, ranks, restore, sealed
from engine.loop import Engine

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

# ---- no collective in a loop whose order differs between processes

COLLECTIVES = {"all_gather", "all_gather_object", "all_reduce", "barrier", "broadcast",
               "broadcast_object_list", "scatter", "clip_grad_norm_", "distribute_tensor", "full_tensor",
               "gather_object", "unshard"}
SETS = {"set", "frozenset", "union", "difference", "intersection", "symmetric_difference",
        "listdir", "scandir", "glob", "iglob", "iterdir", "rglob"}      # files, in the order of a disk
KEEPING = {"list", "tuple", "enumerate", "zip", "reversed", "iter", "map", "filter", "fromkeys"}
# Python's own classes have these methods
METHODS = {"update", "get", "append", "add", "join", "write", "mean", "sum", "items"}


def called(node):
    """The last part of the name of a called function; None where it has none."""
    return getattr(node.func, "attr", getattr(node.func, "id", None))


@functools.cache
def calls(node):
    """The functions called in a piece of code, and those handed to a call, which may call them."""
    found = [part for part in ast.walk(node) if isinstance(part, ast.Call)]
    names = {called(call) for call in found}
    for call in found:
        for argument in call.args:
            if isinstance(argument, (ast.Name, ast.Attribute)):
                names.add(getattr(argument, "attr", getattr(argument, "id", None)))
    return names


def functions(trees):
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def collective_names(trees):
    """The collectives, and the functions of the project that reach one."""
    names, size = set(COLLECTIVES), 0
    while size < len(names):
        size = len(names)
        reaching = {function.name for function in functions(trees) if calls(function) & names}
        names |= reaching - METHODS
    return names


def unordered(node, names):
    """Whether an expression is a set, or holds one's order; `names` are the variables that are one."""
    if isinstance(node, (ast.Set, ast.SetComp)):
        return True
    if isinstance(node, ast.Name):
        return node.id in names
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Sub, ast.BitOr, ast.BitAnd, ast.BitXor)):
        sides = node.left, node.right
        views = any(isinstance(side, ast.Call) and called(side) in ("keys", "items") for side in sides)
        return views or any(unordered(side, names) for side in sides)
    if isinstance(node, ast.Call):
        kept = called(node) in KEEPING and any(unordered(part, names) for part in node.args)
        return kept or called(node) in SETS
    if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.DictComp)):
        return any(unordered(part.iter, names) for part in node.generators)
    return isinstance(node, ast.IfExp) and (unordered(node.body, names) or unordered(node.orelse, names))


def disordered_collectives(trees, names):
    """Lines with a loop or a comprehension over a set in which a collective is called."""
    found = []
    for tree in trees:
        sets = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and unordered(node.value, sets):
                sets |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for node in ast.walk(tree):
            loops = [node] if isinstance(node, ast.For) else getattr(node, "generators", [])
            if any(unordered(loop.iter, sets) for loop in loops):
                body = node.body if isinstance(node, ast.For) else [node]
                found += [node.lineno for part in body if calls(part) & names]
    return found


OLD = '''
def load_optimizer(state, parameter):
    for key in state.keys() - {"step"}:
        state[key] = distribute_tensor(state[key], parameter.device_mesh, parameter.placements)
'''
SHARE = "def share(x): dist.broadcast(x)\n"
ALIKE = ["for name in set(names): share(name)",
         "{name: share(name) for name in {'a', 'b'}}",
         "wanted = a.keys() & b\nfor x in list(wanted): x.full_tensor()",
         "for i, name in enumerate(os.listdir(folder)): share(name)",
         "[dist.all_reduce(x) for x in frozenset(xs)]"]
RIGHT = ["for name in sorted(set(names)): share(name)",
         "for name in ('a', 'b'): share(name)",
         "for name in set(names): print(name)"]


def test_no_collective_in_a_loop_over_a_set():
    """Ranks iterate a set in different orders: one would send what another takes for something else."""
    everything = [*tracked("*.py"), *tracked("*/*.py")]
    paths = [path for path in everything if path.parent.name not in ("tests", "benchmark")]
    trees = {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in paths}
    names = collective_names(trees.values())
    known = {"from_main", "sum_over_ranks", "share_of", "writer_of", "write_by_all", "stop_requested"}
    assert known <= names
    found = {path: disordered_collectives([tree], names) for path, tree in trees.items()}
    assert "engine/checkpoint.py" in found
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize("text", [OLD, *ALIKE, *RIGHT])
def test_a_loop_over_a_set_is_found(text):
    trees = [ast.parse(SHARE + text)]
    found = disordered_collectives(trees, collective_names(trees))
    assert len(found) == (0 if text in RIGHT else 1)


# ---- what a checkpoint must hold

@pytest.fixture
def trained():
    """A layer that a few updates of AdamW trained, and its optimizer."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
    for _ in range(3):
        layer(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer, optimizer


def saved_moments(trained):
    layer, optimizer = trained
    moments = {}
    for name, parameter in layer.named_parameters():
        moments |= {f"{name}:{key}": value for key, value in optimizer.state[parameter].items()}
    return moments


def load_into_a_fresh_one(moments, folder):
    """-> the moments, as `saved_moments` gives them, of another optimizer that loaded these from `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(moments, folder / "optimizer.safetensors")
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    restore.load_optimizer(str(folder), layer, optimizer)
    return saved_moments((layer, optimizer))


def test_moments_come_back(trained, tmp_path):
    moments = saved_moments(trained)
    assert len(moments) == 6
    assert_same_weights(load_into_a_fresh_one(moments, tmp_path), moments)


WRONG = [({"bias:step": None}, r"optimizer\.safetensors lacks bias:step"),
         ({"weight:exp_avg_sq": None}, r"optimizer\.safetensors lacks weight:exp_avg_sq"),
         ({"weight:exp_avg": torch.zeros(3, 2)}, r"weight:exp_avg of shape \[3, 2\] instead of \[2, 3\]"),
         ({"wieght:exp_avg": torch.zeros(2, 3)}, "wieght:exp_avg, which belongs to no trained weight"),
         ({"weight:max_exp_avg_sq": torch.zeros(2, 3)},
          "weight:max_exp_avg_sq, which belongs to no trained weight"),
         ({"bias:exp_avg": torch.tensor([0.0, torch.nan])}, "bias:exp_avg holds numbers that are not finite"),
         ({"bias:exp_avg_sq": torch.tensor([0.0, -1e-9])},
          "bias:exp_avg_sq holds numbers that are negative or not"),
         ({"weight:step": torch.tensor(torch.inf)}, "weight:step holds numbers that are not finite")]


@pytest.mark.parametrize("changes, says", WRONG, ids=[next(iter(changes)) for changes, _ in WRONG])
def test_moments_that_no_run_can_go_on_from(changes, says, trained, tmp_path):
    """One line that names the checkpoint, and another one where there is another."""
    moments = {key: value for key, value in (saved_moments(trained) | changes).items() if value is not None}
    folder = tmp_path / "run" / "checkpoints" / "step-000004"
    for fix in ("start again in another output", "resume from another checkpoint (resume="):
        with pytest.raises(RunError, match=says) as refused:
            load_into_a_fresh_one(moments, folder)
        line = str(refused.value)
        assert str(folder) in line and f"; fix: {fix}" in line and "\n" not in line
        (folder.parent / "step-000002").mkdir(exist_ok=True)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A project of sft whose run was killed after update 3."""
    folder = tmp_path_factory.mktemp("interrupted")
    child.project(folder, "sft", tiny_model(folder / "model"), shuffle="false", eval_every=100)
    assert child.train(folder, patch=child.kill_after_save, arguments=(3,)).code == -signal.SIGKILL
    return folder


def test_not_finite_after_resuming(interrupted):
    """The first update names the checkpoint, the second one its rows."""
    result = child.train(interrupted, patch=child.infinite_loss, arguments=(4,))
    error = result.err.splitlines()[-1]
    assert result.code == 1
    assert "in update 4, the first after resuming from run/checkpoints/step-000003, before" in error
    assert error.endswith("; fix: resume from another checkpoint (resume=run/checkpoints/step-000002)")
    assert "data.jsonl" not in error
    result = child.train(interrupted, patch=child.infinite_loss, arguments=(5,))
    says = r"in update 5, before .*; rows: .*data\.jsonl:5, .*; fix: lower lr"
    assert result.code == 1 and re.search(says, result.err)
    assert checkpoint.newest(interrupted / "run", print).endswith("step-000004")


def test_weights_that_no_run_can_go_on_from(interrupted):
    path = checkpoint.newest(interrupted / "run", print)
    weights = load_file(f"{path}/model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    files = {name: Path(path, name).read_bytes() for name in os.listdir(path) if name != sealed.MANIFEST}

    def write(folder):
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        save_file(weights, os.path.join(folder, "model.safetensors"), {"format": "pt"})
    sealed.write_sealed(path, write)
    result = child.train(interrupted)
    error = result.err.splitlines()[-1]
    assert result.code == 2 and "Traceback" not in result.err
    assert error.startswith("error: model: run/checkpoints/step-000004 holds NaN in model.norm.weight; fix: ")


# ---- one end for all

ALIGN = {BY_ALIGN: "1"}
TORCHRUN = {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize("environment, program, says", [
    ({}, "train.py", "python train.py c.yml 'name=a b'"),
    ({}, "../project/train.py", "python ../project/train.py c.yml 'name=a b'"),
    (TORCHRUN, "train.py", "torchrun --nproc-per-node 4 train.py c.yml 'name=a b'"),
    (TORCHRUN | {"WORLD_SIZE": "8"}, "train.py",
     "the same torchrun command on every machine, with train.py c.yml 'name=a b'"),
    (ALIGN, "/site/train.py", "align train c.yml 'name=a b'"),
    (ALIGN | TORCHRUN, "/site/train.py",
     "torchrun --nproc-per-node 4 -m minimal_llm_alignment train c.yml 'name=a b'"),
    (ALIGN | TORCHRUN | {"WORLD_SIZE": "8"}, "/site/train.py",
     "the same torchrun command on every machine, with -m minimal_llm_alignment train c.yml 'name=a b'")])
def test_the_command_to_go_on(environment, program, says, monkeypatch):
    for name in (BY_ALIGN, "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [program, "other"])
    assert ranks.command(["c.yml", "name=a b"]) == says


def test_more_processes_than_gpus(monkeypatch):
    """The third of three processes has no GPU: a line says so, where CUDA would have a traceback."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **options: None)
    monkeypatch.setattr(torch.distributed, "new_group", lambda **options: None)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        ranks.start_processes(deterministic=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(errors.UserError, match="more processes on this machine than it has GPUs, 2; "
                       "fix: --nproc-per-node 2$"):
        ranks.start_processes(deterministic=False)
    assert chosen == [0, 1]


def test_one_line_of_all_processes(tmp_path, monkeypatch, capsys):
    """The same error is one line, another one has its own; a traceback shows only where no process has told
    its reason."""
    def end(rank, error):
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        monkeypatch.setattr(sys, "argv", ["train.py"])
        (tmp_path / str(rank)).mkdir(exist_ok=True)

        def main(_):
            raise error
        with pytest.raises(SystemExit) as ended:
            errors.run_program(main)
        return ended.value.code

    with pytest.raises(RuntimeError, match="a bug"):
        end(0, RuntimeError("a bug"))
    assert [end(rank, errors.UserError("bad; fix: x")) for rank in range(3)] == [2, 2, 2]
    assert end(3, RunError("full; fix: y")) == 1 and end(4, RuntimeError("connection closed by peer")) == 1
    assert capsys.readouterr().err == "error: bad; fix: x\nerror: full; fix: y\n"
    assert '"py_callstack": "error: bad; fix: x"' in (tmp_path / "2" / "error.json").read_text()


LEFT = "left-{}"      # a file in the working directory of a rank, once it leaves the process group


def leave_as_nccl(rank, port, count, fails):
    """To leave the group waits for the other rank, as with NCCL. Rank 1 may fail in update 2."""
    def leave():
        Path(LEFT.format(rank)).touch()
        end = time.monotonic() + 60
        while not Path(f"../rank{1 - rank}", LEFT.format(1 - rank)).exists():
            assert time.monotonic() < end
            time.sleep(0.05)

    def fail():
        raise RuntimeError("out of memory")

    child.join(rank, port, count)
    torch.distributed.destroy_process_group = leave
    if fails and rank == 1:
        child.before(Engine, "clip_gradients", fail, lambda engine: engine.step.index == 2)


@pytest.mark.parametrize("fails", [False, True])
def test_only_ranks_that_end_together_leave_the_group(interrupted, tmp_path, fails):
    """A rank that fails says why at once and ends, and so does the one that waited for it in an update."""
    child.project(tmp_path, "sft", interrupted / "model", max_steps=3, output=tmp_path / "run")
    done = child.train_on_ranks(tmp_path / "config.yml", patch=leave_as_nccl, arguments=(fails,))
    assert [rank.code for rank in done] == ([1, 1] if fails else [0, 0]), done[1].err
    left = [Path(tmp_path, f"rank{rank}", LEFT.format(rank)).exists() for rank in (0, 1)]
    assert left == [not fails, not fails]
    assert ("RuntimeError: out of memory" in done[1].err) == fails


LINGERING = """
import threading, time
from data.errors import run_program

def main(words):
    threading.Thread(target=time.sleep, args=(60,)).start()
    raise RuntimeError("out of memory")

run_program(main)
"""


def test_a_rank_that_fails_leaves_its_threads_behind():
    """Python would wait for them, and they may wait for other ranks."""
    environment = {**os.environ, "LOCAL_RANK": "0"}
    environment.pop("TORCHELASTIC_ERROR_FILE", None)
    command = [sys.executable, "-c", LINGERING]
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=30, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: out of memory\n")


def test_a_stop_under_torchrun(interrupted, tmp_path):
    """One process gets SIGTERM twice at once, as from a scheduler and from torchrun. The update is saved,
    although torchrun would end rank 0 as soon as this one leaves, and the printed command is torchrun's."""
    child.project(tmp_path, "sft", interrupted / "model", save_every="null")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(ROOT / "tests" / "stopped_rank.py"), "config.yml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, timeout=200, text=True, capture_output=True, env=environment)
    line = f"stopped by SIGTERM; continue with: torchrun --nproc-per-node 2 {ROOT}/train.py config.yml"
    assert done.stderr.splitlines().count(line) == 1 and f"  traceback : {line}" in done.stderr.splitlines()
    assert done.returncode == 1 and done.stderr.count("Traceback") == 1           # torchrun's own, always
    path = checkpoint.newest(tmp_path / "run", print)
    assert path.endswith("step-000002") and line in (tmp_path / "run" / "events.log").read_text()
