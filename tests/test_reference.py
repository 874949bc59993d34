"""The table of the reference's log-probs: computed once, used by every later run that needs the same ones,
and never a wrong one."""
import os
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    assert_same_weights,
    final_weights,
    labelled_rows,
    metrics,
    pair_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)

from engine import frozen
from engine.loop import Engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def train(model, tmp_path, monkeypatch, capsys):
    """train(folder/name, algorithm, key=value, ...) -> .path, .computed (rows for which the reference ran),
    .printed"""
    computed = []
    original = frozen.compute_logps

    def spy(engine, model, examples, *more):
        computed.append(sum(map(len, examples)))
        return original(engine, model, examples, *more)
    monkeypatch.setattr(frozen, "compute_logps", spy)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(10))

    def train(place, algorithm, **values):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        options = {
            "algorithm": algorithm,
            "model": model,
            "data": pairs,
            "output": tmp_path / place,
            "batch_size": 4,
            "epochs": 2,
            "lr": 1e-3,
            "max_length": 256,
            "schedule": "constant",
            "warmup": 0,
            "save_every": "null",
            "log_every": 1,
            **values,
        }
        computed.clear()
        name = place.replace("/", "-")
        train_here(write_config(tmp_path / f"{name}.yml", **options))
        printed = capsys.readouterr().err
        return SimpleNamespace(path=tmp_path / place, computed=sum(computed), printed=printed)
    return train


def parts(folder):
    return sorted((folder / ".reference").glob("*/table-*"))


def assert_same_run(ours, theirs):
    assert metrics(ours.path) == metrics(theirs.path)
    assert_same_weights(final_weights(ours.path), final_weights(theirs.path))


def damage(part):
    path = part / "logps.npy"
    content = bytearray(path.read_bytes())
    content[-3] ^= 8
    path.write_bytes(content)


def test_a_later_run_computes_nothing(train, tmp_path):
    """Another algorithm, another beta, another cut: the same numbers as where there was no table."""
    assert train("runs/dpo", "dpo").computed == 10
    stored, = parts(tmp_path / "runs")
    later = [
        ("again", "dpo", {}),
        ("beta", "dpo", {"beta": 0.5}),
        ("ipo", "ipo", {}),
        ("cut", "ipo", {"seed": 7}),
    ]
    for name, algorithm, values in later:
        run = train(f"runs/{name}", algorithm, **values)
        assert run.computed == 0 and "reference log-probs: 20 of 20 responses from " in run.printed
        alone = train(f"{name}/run", algorithm, **values)
        assert alone.computed == 10
        assert_same_run(run, alone)
    assert parts(tmp_path / "runs") == [stored]


def test_what_is_stored(train, tmp_path):
    """Log-probs per token, in fp32: the first update logs their sums, as the policy is the reference."""
    run = train("runs/dpo", "dpo", batch_size=10)
    part, = parts(tmp_path / "runs")
    names = ["keys.npy", "logps.npy", "manifest.json", "starts.npy"]
    assert sorted(path.name for path in part.iterdir()) == names
    table = {name: np.load(part / f"{name}.npy") for name in ("keys", "logps", "starts")}
    assert table["keys"].shape == (20,) and table["keys"].dtype == "S16"
    assert table["logps"].dtype == np.float32
    assert len(table["starts"]) == 21 and table["starts"][-1] == len(table["logps"])
    first = metrics(run.path)[0]
    logged = first["logps/chosen"] + first["logps/rejected"]
    assert table["logps"].sum().item() / 10 == pytest.approx(logged, rel=1e-6)


def test_a_damaged_part_is_computed_again(train, tmp_path):
    alone = train("alone/dpo", "dpo")
    train("runs/first", "dpo")
    part, = parts(tmp_path / "runs")
    damage(part)
    run = train("runs/second", "dpo")
    assert run.computed == 10 and "is damaged" in run.printed
    assert run.printed.count("reference log-probs ignored: ") == 1
    assert_same_run(run, alone)
    third = train("runs/third", "dpo")                 # the damaged part was replaced
    assert third.computed == 0 and "ignored" not in third.printed


# in a container a run and its repetition have the same number
@pytest.mark.parametrize("process", ["another", "same"])
def test_a_part_that_was_being_written_is_passed_over(train, tmp_path, process):
    train("runs/first", "dpo")
    part, = parts(tmp_path / "runs")
    part.rename(f"{part}.tmp-{os.getpid() if process == 'same' else 1234567}")
    run = train("runs/second", "dpo")
    assert run.computed == 10 and "ignored" not in run.printed


def test_another_model_or_precision_has_its_own_table(train, tmp_path, model):
    train("runs/first", "dpo")
    other = tiny_model(tmp_path / "other", seed=1)
    for values in ({"model": other}, {"precision": "bf16"}, {"reference": other, "beta": 0.2}):
        run = train("runs/" + "-".join(values), "dpo", **values)
        # the other model's table serves as a reference, too
        assert run.computed == (0 if "reference" in values else 10)
    assert len({part.parent.name for part in parts(tmp_path / "runs")}) == 3
    copy = shutil.copytree(model, tmp_path / "copy")      # the same files elsewhere are the same model
    assert train("runs/copy", "dpo", model=copy).computed == 0


def test_changed_weights_are_another_model(train, tmp_path, model):
    copy = shutil.copytree(model, tmp_path / "copy")
    train("runs/first", "dpo", model=copy)
    tiny_model(copy, seed=2)
    run = train("runs/second", "dpo", model=copy)
    assert run.computed == 10 and len(parts(tmp_path / "runs")) == 2
    assert metrics(run.path)[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_missing_ones_are_filled(train, tmp_path):
    """Five rows are known, five are new; kto then needs only its mismatched pairs."""
    train("runs/first", "dpo")
    overlapping = write_jsonl(tmp_path / "overlapping.jsonl", pair_rows(10, 5))
    run = train("runs/second", "dpo", data=overlapping)
    assert run.computed == 5 and "reference log-probs: 10 of 20 responses" in run.printed
    assert len(parts(tmp_path / "runs")) == 2
    alone = train("alone/second", "dpo", data=overlapping)
    for ours, theirs in zip(metrics(run.path), metrics(alone.path), strict=True):
        assert ours.pop("split") == theirs.pop("split") and ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
    third = train("runs/third", "dpo", data=overlapping)
    assert third.computed == 0
    assert_same_run(third, run)
    assert "20 of " in train("runs/kto", "kto").printed


def test_less_than_an_epoch_needs_less(train):
    assert train("runs/short", "dpo", max_steps=1).computed == 4
    assert train("runs/long", "dpo").computed == 6


@pytest.mark.parametrize("algorithm, rows", [("dpo", pair_rows), ("kto", labelled_rows)])
def test_a_lost_table_is_computed_again_on_resuming(train, tmp_path, monkeypatch, algorithm, rows):
    data = write_jsonl(tmp_path / "rows.jsonl", rows(10))
    whole = train("whole/run", algorithm, data=data)
    with monkeypatch.context() as patch:
        original = Engine.clip_gradients

        def stop(engine):
            original(engine)
            engine.signals.number = 15 if engine.step.index == 4 else None
        patch.setattr(Engine, "clip_gradients", stop)
        with pytest.raises(SystemExit):
            train("part/run", algorithm, data=data)
    shutil.rmtree(tmp_path / "part" / ".reference")
    part = train("part/run", algorithm, data=data)
    assert part.computed == whole.computed
    assert "resumed from" in part.printed and "step-000004" in part.printed
    assert_same_run(part, whole)
