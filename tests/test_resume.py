"""A run that is killed, stopped or refused loses nothing: what continues it ends bit for bit where it would have ended."""
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import robust_helpers as child
import torch
from helpers import ALGORITHMS, CLOCK, ONLINE, final_weights, sft_rows, tiny_model, train_here, trained_weights, write_jsonl
from safetensors.torch import load_file, save_file

from engine import checkpoint, sealed
from engine.logs import Run
from engine.loop import Engine

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


SIX = {"grpo": {"max_steps": 6}}      # four updates from one rollout and two from the next


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, model):
    """Algorithm -> the run directory of six updates without interruption."""
    runs = {}
    for algorithm in ("sft", "dpo", "grpo"):
        directory = child.project(tmp_path_factory.mktemp(algorithm), algorithm, model, **SIX.get(algorithm, {}))
        result = child.train(directory)
        assert result.code == 0 and "resumed" not in result.err, result.err
        runs[algorithm] = directory / "run"
    return runs


def rows(run):
    """Lines of metrics.jsonl, without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def same_tensors(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_run(ours, theirs):
    assert same_tensors(trained_weights(ours), trained_weights(theirs))
    last = [checkpoint.checkpoints(run)[-1] for run in (ours, theirs)]
    assert os.path.basename(last[0]) == os.path.basename(last[1])
    assert same_tensors(*(load_file(f"{path}/optimizer.safetensors") for path in last))
    assert checkpoint.load_trainer(last[0]) == checkpoint.load_trainer(last[1])
    assert rows(ours) == rows(theirs)


def leftovers(run):
    return [str(path) for path in Path(run).rglob("*tmp*")]


# ---- killed

@pytest.mark.parametrize("algorithm", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("step", [2, 3, 4])    # in the first epoch, at its end, in the second; of grpo in a rollout's reuse and at its end
def test_killed_and_continued(algorithm, step, model, uninterrupted, tmp_path):
    child.project(tmp_path, algorithm, model, **SIX.get(algorithm, {}))
    killed = child.train(tmp_path, patch=child.kill_after_save, arguments=(step,))
    assert killed.code == -signal.SIGKILL and not (tmp_path / "run" / "final").exists()
    continued = child.train(tmp_path)
    assert continued.code == 0 and f"resumed from run/checkpoints/step-{step:06d}" in continued.err
    assert ("28 of 28 responses from .reference/" in continued.err) == (algorithm == "dpo") and "rows/s" not in continued.err
    assert_same_run(tmp_path / "run", uninterrupted[algorithm])


@pytest.fixture
def train(model, tmp_path, monkeypatch):
    """train(name, algorithm, last, key=value, ...) -> the directory of a run in this process, started or continued, which a signal ends
    after update `last`."""
    def train(name, algorithm, last=None, **values):
        folder = child.project(tmp_path / name, algorithm, model, output=tmp_path / name / "run", **values)
        with monkeypatch.context() as patch:
            clip = Engine.clip_gradients

            def stop(engine):
                clip(engine)
                engine.signals.number = signal.SIGTERM if engine.step.index == last else None
            patch.setattr(Engine, "clip_gradients", stop)
            try:
                train_here(folder / "config.yml")
            except SystemExit as stopped:
                assert stopped.code == 143
        return folder / "run"
    return train


def resumed_from(run):
    return json.loads((run / "run.json").read_text())["resumed_from_step"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_stopped_and_continued(algorithm, train):
    """For every algorithm: six updates = three + a stop + three, bit for bit."""
    part, whole = train("part", algorithm, 3, save_every=3), train("whole", algorithm, save_every=3)
    assert checkpoint.load_trainer(checkpoint.checkpoints(part)[-1])["step"] == 3 and not (part / "final").exists()
    train("part", algorithm, save_every=3)
    assert resumed_from(part) == 3
    assert_same_run(part, whole)


@pytest.mark.parametrize("algorithm", ONLINE)
def test_stopped_and_continued_with_a_rollout(algorithm, train):
    """One epoch, three rollouts with four updates each: stopped in the reuse of the first and at the end of the second."""
    keys = dict(epochs=1, save_every=6, eval_every=3, temperature=0.9)
    whole = train("whole", algorithm, **keys)
    assert [row["step"] for row in rows(whole) if row["split"] == "train"] == list(range(1, 13))
    previous = 0
    for last in (2, 8, None):
        part = train("part", algorithm, last, **keys)
        assert resumed_from(part) == previous
        previous = last
    assert_same_run(part, whole)


def test_a_chosen_algorithm_resumes_exactly(chosen_algorithm, train):
    """Of any file in algorithms/: stopped after each of the first updates, and within a rollout's reuse, it
    ends bit for bit as without a stop."""
    keys = dict(epochs=2, max_steps=6, save_every=1, keep=10)
    whole = train("whole", chosen_algorithm, **keys)
    for last in (1, 3, 4):
        name = f"stopped-{last}"
        train(name, chosen_algorithm, last, **keys)
        part = train(name, chosen_algorithm, **keys)
        assert resumed_from(part) == last
        assert_same_run(part, whole)


def test_more_updates_from_a_rollout(train):
    """A run that max_steps ended in the middle of a rollout goes on with it."""
    keys = dict(schedule="constant", warmup=0, eval_every=100)
    train("twice", "grpo", **keys, max_steps=6)
    more, once = train("twice", "grpo", **keys, max_steps=9), train("once", "grpo", **keys, max_steps=9)
    assert resumed_from(more) == 6 and same_tensors(*map(final_weights, (more, once)))
    assert [row for row in rows(more) if row["split"] == "train"] == [row for row in rows(once) if row["split"] == "train"]


@pytest.mark.parametrize("call, count", [("fsync", 1), ("fsync", 20), ("fsync", 21), ("rename", 1), ("rename", 2), ("rename", 3)])
def test_killed_while_saving(call, count, model, uninterrupted, tmp_path):
    """Whatever the call of a save at which the process dies, the same command goes on and ends the same."""
    child.project(tmp_path, "dpo", model)
    assert child.train(tmp_path, patch=child.kill_at_call, arguments=(call, count)).code == -signal.SIGKILL
    assert leftovers(tmp_path)                    # of the first calls in .reference/, where they are passed over
    assert child.train(tmp_path).code == 0
    assert not leftovers(tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted["dpo"])


def sealed_step(directory, step):
    def write(temporary):
        save_file({"weight": torch.full((64,), float(step))}, f"{temporary}/model.safetensors")
        Path(temporary, "trainer.json").write_text(json.dumps({"step": step}))
    sealed.write_sealed(directory, write)


def save(run, step):
    sealed_step(f"{run}/checkpoints/step-{step:06d}", step)
    checkpoint.clean(run, keep=2)


SYSTEM_CALLS = {"open", "close", "write", "flush", "__exit__", "mkdir", "chmod", "fsync", "rename", "unlink", "rmdir",
                "serialize_file"}


def test_killed_before_every_call_of_a_save(tmp_path):
    """A process dies before the first, the second, ... call of a save and its rotation that reaches the disk. After each, a
    whole checkpoint is the newest, no half one counts, and the next save leaves nothing behind."""
    template, run = tmp_path / "template", tmp_path / "run"
    for step in (3, 6):
        save(template, step)

    def save_until(count):
        """In a forked process; False if it was killed."""
        calls = []

        def profile(frame, event, argument):
            if event == "c_call" and argument.__name__ in SYSTEM_CALLS:
                calls.append(argument)
                if len(calls) == count:
                    os.kill(os.getpid(), signal.SIGKILL)
        if (pid := os.fork()) == 0:
            sys.setprofile(profile)
            save(run, 9)
            os._exit(0)
        return os.WIFEXITED(os.waitpid(pid, 0)[1])

    seen = set()
    for count in itertools.count(1):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        ended = save_until(count)
        found = checkpoint.newest(run, lambda text: None)
        step = checkpoint.load_trainer(found)["step"]
        assert step in (6, 9) and found.endswith(f"step-{step:06d}")
        assert torch.equal(load_file(f"{found}/model.safetensors")["weight"], torch.full((64,), float(step)))
        for path in checkpoint.checkpoints(run):      # one that is being removed may be half there, and is known to be
            assert sealed.broken(path) is None or checkpoint.step_of(path) == 3, count
        seen.add(step)
        checkpoint.tidy(run)
        for path in checkpoint.checkpoints(run):
            if checkpoint.step_of(path) > step:
                checkpoint.remove(path)
        assert not leftovers(run)
        save(run, 12)
        assert checkpoint.newest(run, lambda text: None).endswith("step-000012")
        if ended:
            break
    assert seen == {6, 9} and count > 30
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == [9, 12]


def test_replacing_a_sealed_directory_keeps_a_whole_one(tmp_path):
    sealed_step(tmp_path / "final", 1)
    sealed_step(tmp_path / "final", 2)
    assert checkpoint.load_trainer(tmp_path / "final") == {"step": 2}
    assert sealed.broken(tmp_path / "final") is None
    assert os.listdir(tmp_path) == ["final"]


# ---- damaged

def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_every_damaged_file_is_named(uninterrupted, tmp_path):
    newest = checkpoint.checkpoints(uninterrupted["sft"])[-1]
    names = sorted(os.listdir(newest))
    assert {"model.safetensors", "optimizer.safetensors", "trainer.json", "config.json", "tokenizer.json",
            "manifest.json"} <= set(names)
    for name in names:
        for damage in (truncate, flip, os.remove, lambda path: path.write_bytes(b"")):
            shutil.copytree(newest, tmp_path / "step", dirs_exist_ok=True)
            damage(tmp_path / "step" / name)
            fault = sealed.broken(tmp_path / "step")
            assert fault and (str(tmp_path / "step" / name) in fault or name == "manifest.json"), (name, fault)


def test_no_bit_of_a_manifest_can_be_wrong(tmp_path):
    sealed_step(tmp_path / "step", 1)
    manifest = tmp_path / "step" / "manifest.json"
    content = manifest.read_bytes()
    data = {key: tuple(value.values()) for key, value in json.loads(content).items()}
    for position in range(len(content)):
        for bit in random.Random(position).sample(range(8), 2):
            manifest.write_bytes(content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1:])
            # whole only where the change has no meaning: white space
            if sealed.broken(tmp_path / "step") is None:
                assert {key: tuple(value.values()) for key, value in json.loads(manifest.read_bytes()).items()} == data


def interrupted(tmp_path, model, algorithm="sft", step=4):
    """A project whose run was killed after `step`."""
    child.project(tmp_path, algorithm, model)
    assert child.train(tmp_path, patch=child.kill_after_save, arguments=(step,)).code == -signal.SIGKILL
    return tmp_path / "run"


def test_auto_passes_over_a_damaged_checkpoint(model, uninterrupted, tmp_path):
    run = interrupted(tmp_path, model)
    truncate(run / "checkpoints" / "step-000004" / "optimizer.safetensors")
    result = child.train(tmp_path, patch=child.kill_after_save, arguments=(4,))
    assert "checkpoint ignored: run/checkpoints/step-000004/optimizer.safetensors has " in result.err
    assert "resumed from run/checkpoints/step-000003" in result.err
    assert checkpoint.newest(run, lambda text: None).endswith("step-000004")     # the damaged one was replaced
    assert child.train(tmp_path).code == 0
    assert_same_run(run, uninterrupted["sft"])


def test_damaged_checkpoints_do_not_push_out_whole_ones(tmp_path):
    """`keep` counts what can be continued from: a run that falls back to step 3 removes the broken 8 and 9
    once it has saved 4."""
    for step in (3, 8, 9):
        sealed_step(f"{tmp_path}/checkpoints/step-{step:06d}", step)
    for step in (8, 9):
        truncate(tmp_path / "checkpoints" / f"step-{step:06d}" / "model.safetensors")
    (tmp_path / "run.json").write_text('{"data": {}}')
    start = checkpoint.newest(tmp_path, lambda text: None)
    run = Run(str(tmp_path))
    run.begin("", {}, {}, checkpoint.load_trainer(start)["step"])
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [3, 8, 9]
    sealed_step(f"{tmp_path}/checkpoints/step-000004", 4)
    run.replace(str(tmp_path), f"{tmp_path}/checkpoints/step-000004")
    save(tmp_path, 5)
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(tmp_path)] == [4, 5]


def test_no_whole_checkpoint_is_refused(model, uninterrupted, tmp_path):
    """One chmod or a half-made copy damages all of them at once: nothing is deleted, and a restored one is
    continued."""
    run = interrupted(tmp_path, model, step=2)
    for path in checkpoint.checkpoints(run):
        os.rename(f"{path}/manifest.json", f"{path}/manifest.json.bak")
    before = child.contents(run)
    result = child.train(tmp_path)
    error = result.err.splitlines()[-1]
    assert result.code == 2 and error.startswith("error: output: no checkpoint of run is whole")
    assert "resume=never" in error
    assert child.contents(run) == before
    newest = checkpoint.checkpoints(run)[-1]
    os.rename(f"{newest}/manifest.json.bak", f"{newest}/manifest.json")
    assert child.train(tmp_path).code == 0
    assert_same_run(run, uninterrupted["sft"])


def test_a_named_checkpoint_must_be_whole(model, uninterrupted, tmp_path):
    run = interrupted(tmp_path, model)
    flip(run / "checkpoints" / "step-000004" / "model.safetensors")
    before = sorted(map(str, run.rglob("*")))
    result = child.train(tmp_path, "resume=run/checkpoints/step-000004")
    assert result.code == 2 and re.fullmatch(r"error: .*step-000004/model\.safetensors is damaged.*; fix: .*\n", result.err)
    assert sorted(map(str, run.rglob("*"))) == before
    result = child.train(tmp_path, "resume=run/checkpoints/step-000003/")
    assert result.code == 0 and "resumed from run/checkpoints/step-000003" in result.err
    assert_same_run(run, uninterrupted["sft"])


@pytest.mark.parametrize("path, says", [("nowhere", "neither a run nor a checkpoint"), (".", "neither a run nor"),
                                        ("run/checkpoints/step-000009", "manifest.json is missing")])
def test_a_named_checkpoint_must_exist(path, says, model, tmp_path):
    child.project(tmp_path, "sft", model)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((tmp_path / "config.yml").read_text())
    result = child.train(tmp_path, f"resume={path}")
    assert result.code == 2 and says in result.err and result.err.count("\n") == 1


def test_a_lost_reference_table_is_computed_again(model, uninterrupted, tmp_path):
    run = interrupted(tmp_path, model, "dpo")
    part, = (tmp_path / ".reference").glob("*/table-*")
    flip(part / "logps.npy")
    result = child.train(tmp_path)
    assert result.code == 0 and "reference log-probs ignored: " in result.err
    assert "logps.npy is damaged" in result.err
    assert_same_run(run, uninterrupted["dpo"])


# ---- full disk, non-finite numbers

@pytest.mark.parametrize("patch, what", [(child.full_disk, "checkpoints/step-000004"),
                                         (child.full_disk_for_metrics, "metrics.jsonl")])
def test_full_disk(patch, what, model, uninterrupted, tmp_path):
    child.project(tmp_path, "sft", model)
    result = child.train(tmp_path, patch=patch, arguments=(4,))
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 1 and "Traceback" not in result.err
    assert len(errors) == 1 and errors[0] == result.err.splitlines()[-1] and f"cannot write run/{what}" in errors[0]
    run = tmp_path / "run"
    assert checkpoint.newest(run, lambda text: None).endswith("step-000003") and not leftovers(run)
    if (tmp_path / "metrics.before").exists():
        os.replace(tmp_path / "metrics.before", run / "metrics.jsonl")
    assert child.train(tmp_path).code == 0
    assert_same_run(run, uninterrupted["sft"])


def test_not_finite(model, tmp_path):
    child.project(tmp_path, "sft", model, shuffle="false", eval_every=100)
    result = child.train(tmp_path, patch=child.infinite_loss, arguments=(3,))
    assert result.code == 1 and "Traceback" not in result.err
    error, = [line for line in result.err.splitlines() if line.startswith("error: ")]
    step = int(re.search(r"in update (\d+), before the weights were touched", error)[1])
    first = 1 + (step - 1) % 3 * 4
    assert f"rows: {tmp_path}/data.jsonl:{first}" in error and f"last checkpoint: run/checkpoints/step-{step - 1:06d};" in error
    run = tmp_path / "run"
    newest = checkpoint.newest(run, lambda text: None)
    assert checkpoint.load_trainer(newest)["step"] == step - 1 and not (run / "final").exists()
    assert all(tensor.isfinite().all() for tensor in load_file(f"{newest}/model.safetensors").values())
    assert max(row["step"] for row in rows(run)) == step - 1


# ---- signals

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal(number, code, model, uninterrupted, tmp_path):
    child.project(tmp_path, "sft", model, save_every="null")
    result = child.train(tmp_path, "--log-every=1", patch=child.signal_in_update, arguments=(number, 2))
    assert result.code == code and "Traceback" not in result.err
    assert result.err.splitlines()[-1] == (
        f"stopped by {number.name}; continue with: python {child.ROOT}/train.py config.yml --log-every=1")
    assert [os.path.basename(path) for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000002"]
    assert child.train(tmp_path, "--log-every=1", "save_every=1").code == 0
    assert_same_run(tmp_path / "run", uninterrupted["sft"])


def test_second_signal(model, tmp_path):
    child.project(tmp_path, "sft", model, save_every="null")
    result = child.train(tmp_path, patch=child.signal_in_update, arguments=(signal.SIGTERM, 2, 2))
    assert result.code == 143 and "stopped by" not in result.err and not checkpoint.checkpoints(tmp_path / "run")


def test_signal_in_the_last_update_changes_nothing(model, uninterrupted, tmp_path):
    child.project(tmp_path, "sft", model)
    assert child.train(tmp_path, patch=child.signal_in_update, arguments=(signal.SIGTERM, 6)).code == 0
    assert_same_run(tmp_path / "run", uninterrupted["sft"])


def test_signal_before_the_first_update(model, uninterrupted, tmp_path):
    child.project(tmp_path, "dpo", model)
    result = child.train(tmp_path, patch=child.signal_while_loading, arguments=(signal.SIGINT,))
    assert result.code == 130 and "Traceback" not in result.err and not (tmp_path / "run").exists()
    result = child.train(tmp_path, patch=child.signal_in_reference_pass, arguments=(signal.SIGTERM,))
    assert result.code == 143 and "stopped by SIGTERM; continue with" in result.err
    assert child.train(tmp_path).code == 0
    assert_same_run(tmp_path / "run", uninterrupted["dpo"])


def test_the_printed_command_continues_this_run(model, tmp_path):
    """Also one started with resume=never, beside an unfinished run of the same configuration."""
    child.project(tmp_path, "sft", model, output="null")
    for words, directory in (([], "runs/config"), (["resume=never"], "runs/config-2")):
        result = child.train(tmp_path, *words, patch=child.signal_in_update, arguments=(signal.SIGTERM, 2))
        assert result.code == 143 and (tmp_path / directory / "checkpoints" / "step-000002").is_dir()
    command = result.err.splitlines()[-1].partition("train.py config.yml ")[2].split()
    result = child.train(tmp_path, *command)
    assert result.code == 0 and "resumed from runs/config-2/checkpoints/step-000002" in result.err


# ---- what may change between two parts of a run

def test_another_configuration(model, tmp_path):
    run = interrupted(tmp_path, model, step=2)
    before = sorted(map(str, run.rglob("*")))
    for word in ("resume=auto", "resume=run"):
        result = child.train(tmp_path, "lr=1e-4", "seed=3", word)
        assert result.code == 2 and "(lr, seed differ)" in result.err and result.err.count("\n") == 1
    assert sorted(map(str, run.rglob("*"))) == before


def test_default_outputs(model, tmp_path):
    """runs/<stem>; -2 where that has another configuration; a finished run is never continued by default."""
    child.project(tmp_path, "sft", model, output="null", max_steps=1)
    for words, directory in (([], "runs/config"), (["lr=1e-4"], "runs/config-2"), ([], "runs/config-3")):
        result = child.train(tmp_path, *words)
        assert result.code == 0 and f"run {directory}\n" in result.err


def test_more_updates(model, tmp_path):
    options = dict(schedule="constant", warmup=0)
    runs = []
    for name, lengths in (("once", [6]), ("twice", [3, 6])):
        directory = child.project(tmp_path / name, "dpo", model, **options)
        for steps in lengths:
            result = child.train(directory, f"max_steps={steps}")
            assert result.code == 0
        runs.append(directory / "run")
    assert "resumed from run/checkpoints/step-000003" in result.err and "max_steps: 6" in (runs[1] / "config.yaml").read_text()
    assert same_tensors(*map(final_weights, runs))


@pytest.mark.parametrize("name", ["data.jsonl", "eval.jsonl"])
def test_a_changed_data_file_is_refused(name, model, tmp_path):
    run = interrupted(tmp_path, model, step=2)
    write_jsonl(tmp_path / name, sft_rows(10, 20))
    before = child.contents(run)
    result = child.train(tmp_path)
    *notices, error = result.err.splitlines()
    assert result.code == 2 and re.fullmatch(rf"error: .*{name} has changed since the run in run started; fix: .*", error)
    assert all("rows read as" in notice or "plain strings" in notice for notice in notices)
    assert child.contents(run) == before


def test_keep(uninterrupted):
    for run in uninterrupted.values():
        assert [os.path.basename(path) for path in checkpoint.checkpoints(run)] == ["step-000005", "step-000006"]
