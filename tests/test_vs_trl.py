"""`benchmark/vs_trl.py` compares like with like: for every algorithm both sides see the same token ids and agree over three updates."""
import importlib.util
import signal
import sys

import pytest

from benchmark import vs_trl

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
         "vocab_size": 260}
pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install -r requirements-dev.txt")


@pytest.fixture(autouse=True)
def restore_signals():
    """The engine catches signals; the rest of the test run should not."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def job_of(algorithm, directory, **changes):
    return {"algorithm": algorithm, "data": None, "tokenizer": None, "pairs": 12, "batch": 4, "lr": 1e-3, "shape": SHAPE,
            "work": str(directory), "model": f"{directory}/model", "ours_rows": f"{directory}/ours.jsonl",
            "trl_rows": f"{directory}/trl.jsonl", "precision": "fp32", "overrides": ["micro_batch_tokens=600"],     # several per update
            "per_device": 4, "precompute": False} | changes


# one run for each algorithm, and those in which TRL's loss depends on how an update is cut into forwards
@pytest.mark.parametrize(("algorithm", "changes"), [
    *((algorithm, {}) for algorithm in vs_trl.PEERS), ("kto", {"precompute": True}),
    ("kto", {"per_device": 2}), ("cpo", {"per_device": 1}), ("simpo", {"per_device": 1}), ("rm", {"per_device": 1})])
def test_both_sides_agree(algorithm, changes, tmp_path):
    job = job_of(algorithm, tmp_path, **changes)
    vs_trl.prepare(job)
    ours, theirs = vs_trl.train_ours(job), vs_trl.train_trl(job)
    assert ours["ids"] == theirs["ids"]
    assert len(ours["metrics"]) == 3
    rows = vs_trl.disagreements(job, ours, theirs)
    assert [row for row in rows if not row[-1] <= 1] == []
    same_loss = algorithm != "orpo" and (algorithm not in ("kto", "cpo") or job["per_device"] == 4)
    assert {update for update, *_ in rows} == ({1, 2, 3} if same_loss else {1})
    assert ("loss" in [name for _, name, *_ in rows]) == same_loss


def test_grpo_makes_trls_update_from_trls_completions(tmp_path, monkeypatch):
    from engine import rollouts
    from model.sampler import Stops
    monkeypatch.setitem(sys.modules, "vs_trl", vs_trl)                                 # as which the script knows it
    from benchmark import vs_trl_grpo
    for owner, name in ((rollouts, "sample"), (rollouts.Rollouts, "old_logps"), (Stops, "__call__")):
        monkeypatch.setattr(owner, name, getattr(owner, name))                         # put back what the benchmark replaces
    job = job_of("grpo", tmp_path) | {"prompts": 2, "group": 4, "length": 12, "rollouts": 1, "stop_share": 0.1, "per_device": 8,
                                      "rows": f"{tmp_path}/prompts.jsonl"}
    vs_trl_grpo.prepare(job)
    theirs = vs_trl_grpo.train_trl(job)
    ours = vs_trl_grpo.train_ours(job | {"replay": theirs["completions"]})
    assert ours["prompts"] == theirs["prompts"]
    assert len({len(ids) for group in theirs["completions"] for ids in group}) > 1
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=vs_trl.TOLERANCE)
