"""`benchmark/table.py`: its rows, its intervals, and what it measures, against plain formulations."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import robust_helpers as child
import torch
from helpers import ROOT, metrics
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmark import measure, shared, table
from model.sampler import Completion

MODEL = str(ROOT / "example" / "tiny" / "model")
TINY = ["--recipe", "tiny"]


def run_table(*words):
    command = [sys.executable, "benchmark/table.py", *TINY, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_algorithm_has_a_row_and_two_have_weights():
    assert table.rows_of(table.read_args([])).keys() >= {"base", "sft, on the chosen answers", "ppo"}
    rows = table.rows_of(table.read_args(TINY))
    files = {path.stem for path in (ROOT / "algorithms").glob("*.py")} - {"__init__"}
    assert {row.algorithm for row in rows.values()} - {None} == files
    weights = [name for name in rows if "beta" in name]      # the recipe's own weight, 0.5, has no second row
    assert weights == ["dpo, beta 0.1", "dpo, beta 2", "orpo, beta 0.1", "orpo, beta 2"]
    assert rows["sft, random of 8"].selects == "random"


def test_every_row_and_seed_has_a_file_of_its_own():
    made = table.Table(table.read_args([]))
    files = {made.part(row, seed) for row in made.rows for seed in made.args.seeds}
    assert len(files) == len(made.rows) * len(made.args.seeds)


def test_a_file_of_pairs_needs_no_problems(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("")
    args = table.read_args([*TINY, "--data", str(pairs), "--eval-data", str(pairs)])
    rows = table.rows_of(args)
    assert "grpo" not in rows and "sft, best of 8" not in rows and "orpo" in rows
    words = table.Table(args).data_words(rows["sft"], 0)
    assert words == [f"data={pairs}", "eval_data=null"]


def test_a_directory_of_data_replaces_the_files_of_the_recipe(tmp_path):
    args = table.read_args([*TINY, "--data", str(tmp_path)])
    made = table.Table(args)
    words = made.data_words(made.rows["ppo"], 0)
    assert words == [f"data={tmp_path}/prompts.jsonl", f"eval_data={tmp_path}/eval-prompts.jsonl"]
    assert made.data_words(made.rows["kto"], 0)[0] == f"data={tmp_path}/feedback.jsonl"
    assert made.job("m", 3)["sampling"]["data"] == f"{tmp_path}/eval-prompts.jsonl"


def test_the_table_shows_means_and_intervals():
    """0.5, 0.6 and 0.7: standard deviation 0.1, t of 2 degrees of freedom 4.303."""
    seeds = [{"strict": 0.5, "seconds": 10.0}, {"strict": 0.6, "seconds": 12.0}, {"strict": 0.7}]
    text = table.as_markdown({"base": [{"strict": 0.25}], "dpo": seeds, "ipo": []})
    spread = 100 * 0.1 / 3 ** 0.5 * 4.303
    assert text.splitlines() == [
        "| | seconds | strict % |",
        "|---|---:|---:|",
        "| base | - | 25.0 |",
        f"| dpo | 11 | 60.0 ± {spread:.1f} |",
        "| ipo | - | - |",
    ]


def test_strict_and_lenient_accuracy(monkeypatch, tmp_path):
    """The gold answers are 4: in the format, outside of it, wrong, and in the format but cut off."""
    texts = [
        ("<think>2+2=4</think> <answer>4</answer>", True),
        ("it is 4", True),
        ("<think>2+2=5</think> <answer>5</answer>", True),
        ("<think>2+2=4</think> <answer>4</answer>", False),
    ]
    rows = []
    for name in ("Tom", "Ann", "Eva", "Leo"):
        rows.append({"prompt": [{"role": "user", "content": f"{name}: 2 + 2?"}], "answer": "4"})
    data = tmp_path / "problems.jsonl"
    shared.write_rows(data, rows)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def sample(policy, _, prompts, keys, copies, sampling):
        found = []
        for text, finished in texts:
            ids = tokenizer(text).input_ids
            if finished:
                ids.append(tokenizer.eos_token_id)
            logps = np.full(len(ids), -0.5, np.float32)
            found.append([Completion(np.array(ids, np.int32), logps, finished)])
        return found

    monkeypatch.setattr(measure, "sample", sample)
    sampling = {"data": str(data), "reward": "r1_zero", "max_completion_length": 60}
    job = {"model": MODEL, "seed": 0, "limit": None, "sampling": sampling}
    found = measure.shares(*measure.sampled_answers(None, tokenizer, job, 1.0))
    assert (found["strict"], found["lenient"]) == (0.25, 0.75)


@torch.no_grad()
def test_the_text_loss_is_that_of_the_plain_forward():
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lm = AutoModelForCausalLM.from_pretrained(MODEL)
    losses = []
    for paragraph in measure.TEXT.read_text(encoding="utf-8").split("\n\n"):
        ids = tokenizer(paragraph.strip(), return_tensors="pt").input_ids
        logits = lm(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    wanted = float(torch.cat(losses).mean())
    found = measure.measure({"model": MODEL, "start": MODEL, "sampling": None, "pairs": None})
    assert found == {"text loss": pytest.approx(wanted, rel=1e-4)}


def called(command, folder):
    """What `Table.call` does, without its seconds of imports."""
    script, *words = command
    process = child.start(folder, script, words, patch=os.chdir, arguments=(ROOT,))
    process.join(100)
    assert process.exitcode == 0, (folder / child.ERR).read_text()
    lines = (folder / child.OUT).read_text().splitlines()
    return lines[-1] if lines else ""


def test_parts_are_kept_and_a_table_goes_on(tmp_path, monkeypatch, capsys):
    """Two rows of two updates: base, by the command as a whole, and sft on the best of two answers of the
    start model, whose scripts the fork server starts."""
    output = tmp_path / "table"
    words = ["--seeds", 0, "--problems", 8, "--k", 2, "--jobs", 1, "--output", output]
    words += ["--data", small_data(tmp_path), "max_steps=2", "batch_size=4"]
    done = run_table(*words, "base")
    assert done.returncode == 0, done.stderr
    kept = (output / "base-0.json").read_bytes()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(table.Table, "call", lambda _, command: called(command, tmp_path))
    table.main([*TINY, *map(str, words), "base", "sft, best of 2"])
    shown = capsys.readouterr()
    assert (output / "base-0.json").read_bytes() == kept and "base, seed" not in shown.err
    assert shown.out == (output / "table.md").read_text()
    rows = json.loads((output / "table.json").read_text())["rows"]
    assert rows["sft, best of 2"][0].keys() >= {"strict", "greedy lenient", "pairs", "KL", "seconds"}
    folder = output / "sft-best_of_2-0"
    assert metrics(folder)[-1]["step"] == 2 and not (folder / "final").exists()
    best = shared.read_jsonl(output / "samples-0" / "best.jsonl")
    other = shared.read_jsonl(output / "samples-0" / "random.jsonl")
    for good, drawn in zip(best, other, strict=True):
        assert good["prompt"] == drawn["prompt"] and good["reward"] >= drawn["reward"]
    done = run_table(*words, "base", "lr=1")
    assert "other settings; fix: give another --output" in done.stderr


def small_data(folder):
    """The recipe's files with their first 12 rows."""
    data = folder / "data"
    data.mkdir()
    for path in (ROOT / "example" / "tiny").glob("*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        (data / path.name).write_text("".join(lines[:12]), encoding="utf-8")
    return data
