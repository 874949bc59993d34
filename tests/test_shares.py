"""Several ranks write a checkpoint and the final model together, in the background, and any number of ranks
reads them.

A small model is written by rank 0 alone; here every rank writes its share, however small."""
import errno
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from helpers import metrics, train_here
from robust_helpers import join, train_on_ranks
from safetensors.torch import load_file, save_file
from test_distributed import config  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from engine import background, checkpoint, restore, sealed, shares
from engine.loop import Engine
from model.state import files_of

KEYS = dict(max_steps=4, eval_data="null", eval_every=1000)


# ---- patches, in each of two processes

def share(*place):
    join(*place)
    shares.ALONE = 0


def in_save(step, action):
    """Share, and do `action(rank, function's name)` before the functions of this update's save."""
    def wrap(name, function):
        def wrapped(directory, *arguments, **options):
            if f"step-{step:06d}" in str(directory) and threading.current_thread() is background.thread:
                action(int(os.environ["RANK"]), name)
            return function(directory, *arguments, **options)
        return wrapped
    for module, name in ((sealed, "seal"), (shares, "join"), (sealed, "put_in_place")):
        setattr(module, name, wrap(name, getattr(module, name)))


def kill_in_save(place, dies, where):
    def action(this, name):
        if (this, name) == (dies, where):
            os.kill(os.getpid(), signal.SIGKILL)
    share(*place)
    in_save(2, action)


def kill_first(*place):
    kill_in_save(place, 1, "seal")


def kill_before_join(*place):
    kill_in_save(place, 0, "join")


def kill_before_rename(*place):
    kill_in_save(place, 0, "put_in_place")


def full_disk(*place):
    def action(this, name):
        if (this, name) == (1, "seal"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    share(*place)
    in_save(2, action)


def slow_disk(*place):
    """The save of update 2 waits until update 3 has been logged: for ever, if training waited for it."""
    def action(this, name):
        end = time.monotonic() + 60
        while name == "put_in_place" and not is_logged(3):
            assert time.monotonic() < end
            time.sleep(0.05)

    def is_logged(step):
        found, = Path.cwd().parent.glob("slow_disk/run/metrics.jsonl")
        return any(json.loads(line)["step"] == step for line in found.read_text().splitlines())
    share(*place)
    in_save(2, action)


# ---- what is written

def tensors(folder):
    """All tensors in a directory, by the file's name without a number and their own."""
    found = {}
    for path in folder.glob("*.safetensors"):
        stem = shares.NUMBERED.sub("", path.name)
        found |= {f"{stem}/{name}": tensor for name, tensor in load_file(path).items()}
    return found


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def run_of(path):
    return path.with_suffix("") / "run"


@pytest.fixture(scope="module", params=["dpo", "rm", "ppo"])
def pair(request, config):  # noqa: F811
    """(algorithm, the run of two ranks that share the writing, the same one where rank 0 writes all)"""
    algorithm = request.param
    paths = [config(f"{name}-{algorithm}", algorithm, **KEYS) for name in ("shared", "alone")]
    for path, patch in zip(paths, (share, join)):
        done = train_on_ranks(path, patch=patch)
        assert [rank.code for rank in done] == [0, 0], done[0].err
    return algorithm, *map(run_of, paths)


def test_what_ranks_write_together_is_what_one_writes(pair):
    algorithm, ours, theirs = pair
    directories = [f"checkpoints/step-{step:06d}" for step in range(1, 5)] + ["final"]
    directories += ["classifier"] if algorithm == "rm" else []
    for name in directories:
        assert sealed.broken(ours / name) is None
        assert_equal(tensors(ours / name), tensors(theirs / name))
        both = set(sealed.files_below(ours / name)) - {"model.safetensors.index.json"}
        numbered = {shares.NUMBERED.sub(".safetensors", file) for file in both}
        assert numbered == set(sealed.files_below(theirs / name))
    kinds = ["model", "optimizer"] + (["critic"] if algorithm == "ppo" else [])
    last = ours / "checkpoints/step-000004"
    for kind in kinds:
        sizes = [os.path.getsize(path) for path in files_of(str(last), f"{kind}.safetensors")]
        assert len(sizes) == 2 and max(sizes) < 0.75 * sum(sizes)
    lm = AutoModelForCausalLM.from_pretrained(ours / "final")
    for name, tensor in AutoModelForCausalLM.from_pretrained(theirs / "final").state_dict().items():
        assert torch.equal(tensor, lm.state_dict()[name])
    if algorithm == "rm":
        classifier = AutoModelForSequenceClassification.from_pretrained(ours / "classifier")
        head = load_file(ours / "final" / "value_head.safetensors")["v_head.summary.weight"]
        assert torch.equal(classifier.score.weight, head)


def test_one_process_goes_on_from_what_two_wrote(pair, config):  # noqa: F811
    """Its numbers are those of two processes, to rounding."""
    algorithm, ours, _ = pair
    path = config(f"one-{algorithm}", algorithm, **KEYS)
    run = run_of(path)
    shutil.copytree(ours, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "classifier", ignore_errors=True)
    for step in (3, 4):
        shutil.rmtree(run / f"checkpoints/step-{step:06d}")
    settings = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(settings.replace(str(ours), str(run)))
    train_here(path)
    assert json.loads((run / "run.json").read_text())["resumed_from_step"] == 2
    for one, two in zip(metrics(run), metrics(ours), strict=True):
        assert one.pop("split") == two.pop("split") and one == pytest.approx(two, rel=1e-4, abs=1e-4)


# ---- what goes wrong meanwhile

@pytest.fixture(scope="module")
def whole(config):  # noqa: F811
    path = config("whole", "dpo", **KEYS)
    assert [rank.code for rank in train_on_ranks(path, patch=share)] == [0, 0]
    return run_of(path)


@pytest.mark.parametrize("patch", [kill_first, kill_before_join, kill_before_rename])
def test_a_kill_in_the_background_leaves_the_checkpoint_before(patch, config, whole):  # noqa: F811
    path = config(patch.__name__, "dpo", **KEYS)
    codes = [rank.code for rank in train_on_ranks(path, patch=patch)]
    assert -signal.SIGKILL in codes and 0 not in codes
    run = run_of(path)
    assert checkpoint.newest(run, pytest.fail).endswith("step-000001") and not (run / "final").exists()
    assert [rank.code for rank in train_on_ranks(path, patch=share)] == [0, 0]
    assert json.loads((run / "run.json").read_text())["resumed_from_step"] == 1
    assert metrics(run) == metrics(whole) and not list(run.rglob("*.tmp-*"))
    assert_equal(tensors(run / "final"), tensors(whole / "final"))


def test_a_full_disk_of_one_rank_ends_all(config):  # noqa: F811
    """The save fails in the background; the next one, or the end, tells it."""
    path = config("full_disk", "dpo", **KEYS)
    done = train_on_ranks(path, patch=full_disk)
    assert [rank.code for rank in done] == [1, 1]
    for rank in done:
        line = rank.err.splitlines()[-1]
        assert line.startswith("error: cannot write ") and "step-000002" in line
        assert line.endswith("untouched; fix: free disk space and run the same command again")
        assert "Traceback" not in rank.err
    run = run_of(path)
    assert checkpoint.newest(run, pytest.fail).endswith("step-000001") and not list(run.rglob("*.tmp-*"))


def test_training_goes_on_while_a_checkpoint_is_written(config, whole):  # noqa: F811
    path = config("slow_disk", "dpo", **KEYS | {"save_every": 2})
    assert [rank.code for rank in train_on_ranks(path, patch=slow_disk)] == [0, 0]
    run = run_of(path)
    assert [checkpoint.step_of(name) for name in checkpoint.checkpoints(run)] == [2, 4]
    for step in (2, 4):
        name = f"checkpoints/step-{step:06d}"
        assert sealed.broken(run / name) is None
        assert_equal(tensors(run / name), tensors(whole / name))      # as they were then, not later


def other_directory(*place):
    """The main thread is in another directory while the save of update 2 is put in its place."""
    share(*place)
    here = Path.cwd().parent / "common"
    (here / "other").mkdir(parents=True, exist_ok=True)
    shutil.copy("config.yml", here)
    os.chdir(here)
    clip, ready = Engine.clip_gradients, threading.Event()

    def action(this, name):
        if name == "put_in_place":
            ready.wait(60)

    def clip_elsewhere(engine):
        clip(engine)
        if engine.step.index == 3:
            os.chdir(here / "other")
            ready.set()
            background.join()
            os.chdir(here)
    in_save(2, action)
    if place[0] == 0:
        Engine.clip_gradients = clip_elsewhere
    else:
        ready.set()


def test_the_working_directory_may_be_another_meanwhile(config, whole):  # noqa: F811
    path = config("elsewhere", "dpo", **KEYS | {"output": "run"})
    assert [rank.code for rank in train_on_ranks(path, patch=other_directory)] == [0, 0]
    run = path.with_name("common") / "run"
    assert [checkpoint.step_of(name) for name in checkpoint.checkpoints(run)] == [1, 2, 3, 4]
    assert_equal(tensors(run / "checkpoints/step-000002"), tensors(whole / "checkpoints/step-000002"))


def test_a_reward_model_whose_adapter_is_merged(config):  # noqa: F811
    """Only rank 0 has the plain model; all agree on which directories they write."""
    pytest.importorskip("peft")
    path = config("merged", "rm", **KEYS | {"lora_r": 2, "merge": "true", "max_steps": 1})
    assert [rank.code for rank in train_on_ranks(path)] == [0, 0]
    for name, kind in (("final", AutoModelForCausalLM), ("classifier", AutoModelForSequenceClassification)):
        kind.from_pretrained(run_of(path) / name)
        assert sealed.broken(run_of(path) / name) is None


# ---- who writes and reads what

def test_shares_are_even_and_layers_stay_together(monkeypatch):
    """Sixteen ranks, 28 layers and what is outside of them, one unit: nobody has more than two layers."""
    monkeypatch.setattr(shares, "ALONE", 0)
    sizes = [28] * 28 + [90]
    units = [{f"{i}-{k}": torch.zeros(size, device="meta") for k in range(2)} for i, size in enumerate(sizes)]
    owners = shares.owners_of(units, 16)
    loads = [0] * 16
    for unit in units:
        ranks = {owners[id(tensor)] for tensor in unit.values()}
        assert len(ranks) == 1
        loads[ranks.pop()] += shares.num_bytes(unit)
    assert min(loads) > 0 and max(loads) == 4 * 2 * 90
    monkeypatch.setattr(shares, "ALONE", 4 * 2 * sum(sizes))
    assert shares.owners_of(units, 16) == {}


def test_parts_are_joined_as_transformers_shards_a_model(tmp_path):
    """Rank 0 has no weight of the LM here, and rank 1 two files; files without weights are in any part."""
    files = {0: {"critic": "a", "trainer.json": "{}"},
             1: {"model-00001-of-00002": "b", "model-00002-of-00002": "c",
                 "config.json": "{}", "more/x.json": "1"},
             2: {"model": "d", "critic": "e", "config.json": "{}"}}
    for rank, part in files.items():
        folder = tmp_path / f"part-{rank:05d}"
        (folder / "more").mkdir(parents=True)
        for name, content in part.items():
            if name.endswith("json"):
                (folder / name).write_text(content)
            else:
                save_file({content: torch.tensor([float(rank)])}, folder / f"{name}.safetensors")
        sealed.seal(folder)
    sealed.seal(tmp_path, known=shares.join(tmp_path, 3))
    assert sealed.broken(tmp_path) is None
    numbered = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    critics = [f"critic-0000{i}-of-00002.safetensors" for i in (1, 2)]
    others = ["manifest.json", "trainer.json", "config.json", "more/x.json", shares.INDEX]
    assert sealed.files_below(tmp_path) == sorted(numbered + critics + others)
    index = json.loads((tmp_path / shares.INDEX).read_text())["weight_map"]
    assert index == dict(zip("bcd", numbered))
    assert [load_file(tmp_path / index[name])[name].item() for name in "bcd"] == [1.0, 1.0, 2.0]


@pytest.mark.parametrize("rows, ranks", [(7, 3), (4, 4), (2, 4), (1, 2), (8, 2)])
def test_a_rank_reads_its_own_rows(rows, ranks):
    """Those of torch.chunk, which FSDP2 uses; a rank may have none."""
    whole_rows = list(range(rows))
    chunks = [list(chunk) for chunk in torch.arange(rows).chunk(ranks)]
    chunks += [[]] * (ranks - len(chunks))
    for rank, chunk in enumerate(chunks):
        class Mesh:
            def size(self, dim):
                return ranks

            def get_local_rank(self, dim, rank=rank):
                return rank

        class Live:
            shape, device_mesh, placements = (rows, 3), Mesh(), [torch.distributed.tensor.Shard(0)]
        first, last = restore.own_rows(Live())
        assert whole_rows[first:last] == [int(row) for row in chunk]


def test_an_error_in_the_background_is_raised_once():
    def fail():
        raise ValueError("full")
    background.start(fail)
    with pytest.raises(ValueError, match="full"):
        background.wait()
    background.wait()
