"""The embedded default learns: levels to reach, on held-out problems, from the base's 36 % sampled at temperature 1."""
import importlib.util

import pytest
import torch
from helpers import ROOT, train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

spec = importlib.util.spec_from_file_location("measure", ROOT / "example" / "tiny" / "measure.py")
measure = importlib.util.module_from_spec(spec)
spec.loader.exec_module(measure)


@pytest.fixture(autouse=True)
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def shares(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return measure.measure(model, AutoTokenizer.from_pretrained(path), measure.read_rows(200))


def test_the_base_is_capable_but_unaligned():
    base = shares(ROOT / "example" / "tiny" / "model")
    assert 0.2 <= base["sampled"]["accuracy"] <= 0.5 and base["greedy"]["accuracy"] >= 0.9


@pytest.mark.parametrize("algorithm, level, less", [
    ("dpo", 0.75, []), ("apo", 0.75, ["max_steps=30", "eval_data=null"]), ("sft", 0.8, []),
    ("grpo", 0.75, ["max_steps=6", "eval_data=null"])])
def test_training_elicits_the_skill(tmp_path, monkeypatch, algorithm, level, less):
    monkeypatch.chdir(ROOT)
    train_here(f"example/tiny-{algorithm}.yml", f"output={tmp_path / 'run'}", "eval_every=1000", "log_every=1000", *less)
    trained = shares(tmp_path / "run" / "final")
    assert trained["sampled"]["accuracy"] >= level and trained["greedy"]["accuracy"] >= 0.9
