"""`benchmark/time_to_90.py` stops at the target, and its phases add up; no time is asserted."""
import subprocess
import sys

import pytest
from helpers import ROOT, metrics, write_jsonl

from benchmark import shared, time_to_90


@pytest.fixture
def run(tmp_path):
    """run(target) -> (exit code, the cells of its row, stderr); two held-out problems."""
    rows = shared.read_jsonl(str(ROOT / "example" / "tiny" / "eval-prompts.jsonl"))
    held_out = write_jsonl(tmp_path / "held-out.jsonl", rows[:2])
    common = ["--recipe", "example/tiny-grpo.yml", "--threads", "1", "--output", str(tmp_path / "run")]
    words = ["batch_size=2", "num_generations=2", "max_steps=2", "eval_every=1", f"eval_data={held_out}"]

    def run(target):
        command = [sys.executable, "benchmark/time_to_90.py", *common, "--target", str(target), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        titles, _, values = done.stdout.splitlines()[:3]
        names = titles.strip("| ").split(" | ")
        cells = values.strip("| ").split(" | ")
        return done.returncode, dict(zip(names, cells, strict=True)), done.stderr

    return run


def test_it_ends_with_the_first_evaluation_that_passes(run, tmp_path):
    code, cells, _ = run(0.0)
    assert code == 0 and cells["updates"] == "0" and cells["held out"].endswith("of 2")
    assert len(metrics(tmp_path / "run", "eval")) == 1
    assert not metrics(tmp_path / "run")      # no update was made
    code, cells, shown = run(1.1)
    assert code == 1 and cells["updates"] == "2" and "110% was not reached; fix: raise max_steps" in shown
    assert len(metrics(tmp_path / "run-2", "eval")) == 3 and len(metrics(tmp_path / "run-2")) == 2


def test_phases_add_up_and_an_evaluation_keeps_what_it_calls(monkeypatch):
    """A clock that ticks by hand: loading 5, sampling 2, update 1, evaluation 3 (its sampling included)."""
    now = [100.0]
    monkeypatch.setattr(time_to_90.time, "time", lambda: now[0])

    def takes(seconds):
        now[0] += seconds

    clock = time_to_90.Clock(100.0)
    takes(5)
    sample = clock.timed(takes, "sampling")
    sample(2)
    takes(1)
    clock.timed(sample, "evaluation")(3)
    clock.enter("end")
    assert clock.seconds == {"loading": 5, "sampling": 2, "update": 1, "evaluation": 3}
    result = {"seconds": clock.seconds, "evaluations": [[0, 0.25], [8, 0.9]], "problems": 200}
    cells = time_to_90.line_of(result, 2).strip("| ").split(" | ")
    found = dict(zip(time_to_90.COLUMNS, cells, strict=True))
    assert (found["total"], found["training"], found["updates"]) == ("11", "8", "8")
    assert found["held out"] == "90.0% of 200" and found["saving"] == "0.0"
