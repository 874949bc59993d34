"""`benchmark/gpu.py --cpu` runs every section; no measured time is asserted."""
import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from benchmark import gpu

SECTIONS = ["env", "check", "train", "peer", "decode", "profile"]


def numbers_in(value):
    """Every number in a parsed line of JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        found = []
        for part in value:
            found += numbers_in(part)
        return found
    return [value] if isinstance(value, float | int) else []


def test_every_section_runs_and_its_rows_are_in_the_table_and_the_json(tmp_path):
    stored = tmp_path / "gpu.json"
    command = [sys.executable, "benchmark/gpu.py", "--cpu", "--output", str(stored)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    report = json.loads(lines[-1])
    assert json.loads(stored.read_text()) == report
    assert list(report) == SECTIONS
    numbers = numbers_in(report)
    assert numbers and all(map(math.isfinite, numbers))
    table = [line for line in lines if line.startswith("| ")]
    widths = {line.count(" | ") for line in table}
    assert table[0].startswith("| section | model | case | form | ms |") and len(widths) == 1
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table[1:]]
    expected = []
    for name, section in report.items():
        assert section["rows"], name
        expected += [name] * len(section["rows"])
    assert rows == expected
    theirs = json.loads((tmp_path / "gpu.trl.json").read_text())["rows"]
    assert theirs and all(row in report["peer"]["rows"] for row in theirs)
    assert all(row["forecast GB"] >= 0 for row in report["train"]["rows"] if "peak GB" in row)


def test_warm_updates_take_none_of_the_time_for_those_that_are_timed(monkeypatch):
    """A first update that compiles takes longer than all that are timed may."""
    scale = gpu.CPU._replace(warm=2, timed=3)
    trainee = gpu.new_trainee(scale, scale.shape("0.5B"))
    monkeypatch.setattr(gpu, "MOST_SECONDS", 0.1)

    def slow_at_first():
        seconds = itertools.chain([0.2, 0.2], itertools.repeat(0.01))

        def update(*_):
            time.sleep(done := next(seconds))
            return [], done
        return update

    monkeypatch.setattr(gpu, "update", slow_at_first())
    updates = gpu.timed_updates(trainee, "dpo", 512, scale)
    assert [update.host for update in updates] == [0.01] * 3
    assert all(0.01 <= update.seconds < 0.1 for update in updates)
    monkeypatch.setattr(gpu, "update", slow_at_first())
    examples = gpu.drawn_micro_batch(np.random.default_rng(0), "dpo", 512, scale, 512)
    numbers = gpu.profile_numbers(trainee, "varlen", examples, scale)
    assert numbers["host ms"] == pytest.approx(10) and 10 <= numbers["ms"] < 100


def test_a_compiled_row_begins_only_where_there_is_time_to_compile(monkeypatch):
    monkeypatch.setattr(gpu.Section, "compiled", set())
    label = {"model": "0.5B", "case": "dpo", "form": "compiled"}
    late = gpu.Section("train", seconds=30)
    assert late.measure(label, dict) is None and late.left_out == ["0.5B, dpo, compiled: no time left"]
    assert late.measure(label | {"form": "varlen"}, dict) is not None
    assert gpu.Section("train", seconds=90).measure(label, dict) is not None
    assert late.measure(label, dict) is not None            # its layers are compiled now
    over = gpu.Section("train", seconds=0)
    assert over.measure(label, dict) is None


def test_the_budget_begins_with_the_process():
    """What is left of it when torch is imported is less than what is kept back."""
    command = [sys.executable, "benchmark/gpu.py", "--cpu", "--only", "env", "--budget", "30.3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    section = json.loads(done.stdout.splitlines()[-1])["env"]
    assert done.returncode == 0 and section["rows"] == [] and section["left_out"]


def test_what_is_trained_before_the_7b_model():
    kinds = {}
    for name, cases in itertools.takewhile(lambda line: line[0] != "7B", gpu.TRAINED):
        assert name not in kinds                            # each model is built once
        kinds[name] = {algorithm for algorithm, _, _ in cases}
    assert kinds == {"1.5B": {"dpo", "sft", "grpo"}, "0.5B": {"dpo", "sft", "grpo"}}


def test_a_policy_decodes_in_the_form_of_a_real_run(monkeypatch):
    forms = set()
    monkeypatch.setattr(gpu, "our_decoding", lambda policy, *_: forms.add(policy.form.attention) or {})
    monkeypatch.setattr(gpu, "generate_decoding", lambda *_: {})
    section = gpu.Section("decode", seconds=60)
    gpu.decode(section, gpu.CPU)
    assert forms == {"varlen"} and section.errors == []


def test_the_forecast_is_that_of_fp32_weights_gradients_and_moments():
    """16 bytes per parameter of Qwen2.5-0.5B, 494 million, and what the tokens take."""
    found = gpu.forecast_memory(gpu.CPU, gpu.SHAPES["0.5B"], "varlen", "dpo", 8192)
    fewer = gpu.forecast_memory(gpu.CPU, gpu.SHAPES["0.5B"], "varlen", "dpo", 16)
    assert fewer == pytest.approx(16 * 0.494, abs=1) and found > fewer + 1


def test_one_layout_of_the_check_has_a_prefix_of_all_prompts():
    policy = gpu.new_policy(gpu.CPU, gpu.NARROW)
    prefixes = {}
    for name, examples in gpu.layouts(gpu.CPU, 512).items():
        prefixes[name] = policy.collate(examples).prefix
    assert {name: prefix for name, prefix in prefixes.items() if prefix} == {"pairs behind a prefix": 40}


def test_rows_of_a_process_that_is_ended_are_kept(monkeypatch, tmp_path):
    row = {"case": "TRL, 16 per forward", "ms": 2.0}

    def ended(command, timeout, **_):
        results = json.loads(command[-1])["results"]
        Path(results).write_text(json.dumps({"rows": [row], "left_out": [], "errors": []}))
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(gpu.subprocess, "run", ended)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    section = gpu.Section("peer", 60, tmp_path / "gpu.json")
    assert gpu.run_trl(section, gpu.CPU, []) == section.rows == [row]
    assert section.left_out == ["TRL's other cases: its process was ended after its time"]
    cases = gpu.trl_variants(gpu.GPU)
    assert [case["per_device"] for case in cases] == [16, 16, 8, 8]
    assert ["use_liger_kernel" in case for case in cases] == [False, True, False, True]


def test_a_row_is_stored_when_it_is_there(monkeypatch, tmp_path):
    """A kill in the middle of a section loses no row."""
    stored = tmp_path / "gpu.json"
    seen = []

    def one_row(section, scale):
        section.add({"case": "first"})
        seen.extend(json.loads(stored.read_text())["env"]["rows"])

    monkeypatch.setitem(gpu.SECTIONS, "env", one_row)
    gpu.run_section("env", 60, gpu.CPU, {}, stored)
    assert seen == [{"case": "first"}]
