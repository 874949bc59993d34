"""Loss, gradient norm, rewards and log-probs of sft and dpo equal TRL's over six updates. `benchmark/vs_trl.py` holds the same
against the real tokenizer and real HH pairs; both sides run here through its functions."""
import importlib.util
import signal

import pytest
import torch

from benchmark import vs_trl

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128,
         "vocab_size": 260}


@pytest.fixture(autouse=True)
def restore_process():
    """The engine catches signals; the rest of the test run should not."""
    threads, handlers = torch.get_num_threads(), {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed: pip install -r requirements-dev.txt")
@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_metrics_equal_trl(algorithm, tmp_path):
    job = {"algorithm": algorithm, "data": None, "tokenizer": None, "pairs": 24, "batch": 4, "lr": 1e-3, "shape": SHAPE,
           "work": str(tmp_path), "model": f"{tmp_path}/model", "ours_rows": f"{tmp_path}/ours.jsonl", "trl_rows": f"{tmp_path}/trl.jsonl",
           "precision": "fp32", "overrides": ["micro_batch_tokens=1000"],      # several micro-batches per update on our side
           "per_device": 4, "precompute": False}
    vs_trl.prepare(job)
    ours, theirs = vs_trl.train_ours(job), vs_trl.train_trl(job)
    assert ours["ids"] == theirs["ids"]
    assert len(ours["metrics"]) == 6
    wrong = [row for row in vs_trl.disagreements(ours, theirs, algorithm == "dpo") if row[-1] > 1]
    assert not wrong, wrong
