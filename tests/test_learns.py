"""The embedded default learns: levels to reach, on held-out problems, from the base's 36 % sampled at
temperature 1. Half of an epoch is enough for them."""
import importlib.util

import pytest
import torch
from helpers import ROOT, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

spec = importlib.util.spec_from_file_location("measure", ROOT / "example" / "tiny" / "measure.py")
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)


def shares(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return measure.measure(model, AutoTokenizer.from_pretrained(path), measure.read_rows(200))


def test_the_base_is_capable_but_unaligned():
    base = shares(ROOT / "example" / "tiny" / "model")
    assert 0.2 <= base["sampled"]["accuracy"] <= 0.5 and base["greedy"]["accuracy"] >= 0.9


@pytest.mark.parametrize("algorithm, level, updates", [
    ("dpo", 0.75, 32), ("apo", 0.75, 30), ("sft", 0.8, 32), ("grpo", 0.75, 6)])
def test_training_elicits_the_skill(tmp_path, monkeypatch, algorithm, level, updates):
    monkeypatch.chdir(ROOT)
    words = [f"output={tmp_path / 'run'}", f"max_steps={updates}", "eval_data=null", "log_every=1000"]
    train_here(f"example/tiny-{algorithm}.yml", *words)
    trained = shares(tmp_path / "run" / "final")
    assert trained["sampled"]["accuracy"] >= level and trained["greedy"]["accuracy"] >= 0.9
