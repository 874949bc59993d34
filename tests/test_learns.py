"""The embedded default learns: levels to reach, on held-out problems, from the base's 36 % sampled at
temperature 1. 24 of the 62 updates of an epoch are enough for them."""
import importlib.util

import pytest
import torch
from helpers import ROOT, metrics, train_here
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


def trained(folder, algorithm, updates, *words):
    """The directory of a run of an example, with fewer updates."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        words = [f"output={folder / algorithm}", f"max_steps={updates}", "eval_data=null", *words]
        train_here(f"example/tiny-{algorithm}.yml", *words)
    return folder / algorithm


def assert_reaches(run, level):
    reached = shares(run / "final")
    assert reached["sampled"]["accuracy"] >= level and reached["greedy"]["accuracy"] >= 0.9


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs"), "sft", 16, "log_every=1000")


def test_supervised_fine_tuning_elicits_the_skill(sft_run):
    assert_reaches(sft_run, 0.8)


@pytest.mark.parametrize("algorithm, level, updates", [
    ("dpo", 0.75, 24), ("apo", 0.75, 24), ("grpo", 0.75, 3)])
def test_training_elicits_the_skill(tmp_path, algorithm, level, updates):
    assert_reaches(trained(tmp_path, algorithm, updates, "log_every=1000"), level)


def test_a_student_learns_what_its_teacher_knows(tmp_path, sft_run):
    """Its own answers and the teacher's distribution are enough: no reward, no reference answer. The
    divergence is that on its own answers."""
    run = trained(tmp_path, "distill", 8, f"teacher={sft_run}", "log_every=1")
    assert_reaches(run, 0.75)
    losses = [row["loss"] for row in metrics(run)]
    assert losses[0] > 0.1 and max(losses[-3:]) < 0.03
