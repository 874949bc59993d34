"""Tokens kept beside the runs: what is read back equals what was written, a later run reads no row, anything
that changes the tokens makes a new directory, and many rows are shared by processes."""
import contextlib
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import (
    ROOT,
    byte_tokenizer,
    final_weights,
    labelled_rows,
    messages,
    metrics,
    pair_rows,
    prompt_rows,
    sft_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)

from data import dataset, reading
from data.dataset import build_dataset
from data.pack import Example, Response
from data.store import Examples, extremes, sizes_of, split_place
from engine.reference import Table, lacking, response_keys

TOKENIZER = byte_tokenizer()


def same(ours: Example, theirs: Example) -> bool:
    """Every number, its type, and the extras."""
    arrays = [(ours.prompt, theirs.prompt)]
    for one, other in zip(ours.responses, theirs.responses, strict=True):
        arrays += [(one.tokens, other.tokens), (one.trained, other.trained)]
    for one, other in arrays:
        if one.dtype != other.dtype or one.tolist() != other.tolist():
            return False
    if ours.extras.keys() != theirs.extras.keys():
        return False
    for name, value in ours.extras.items():
        other = theirs.extras[name]
        if type(value) is not type(other):
            return False
        if torch.is_tensor(value) and not (value.dtype == other.dtype and torch.equal(value, other)):
            return False
        if not torch.is_tensor(value) and value != other:
            return False
    return ours.where == theirs.where


def made(count, num_responses=2, seed=0):
    """Examples of random lengths, with tokens that are not trained and extras of every kind."""
    draw = np.random.default_rng(seed)
    examples = []
    for i in range(count):
        responses = []
        for _ in range(num_responses):
            length = int(draw.integers(1, 9))
            trained = draw.random(length) < 0.7
            responses.append(Response(draw.integers(0, 300, length).astype(np.int32), trained))
        weight = torch.tensor(draw.random(num_responses), dtype=torch.float32)
        extras = {"weight": weight, "label": bool(i % 2), "margin": 0.1 * i}
        prompt = draw.integers(0, 300, int(draw.integers(1, 7))).astype(np.int32)
        examples.append(Example(prompt, responses, f"a:b{i % 3}.jsonl:{i}" if i % 4 else "a place", extras))
    return examples


# ---- what is read back

@pytest.mark.parametrize("num_responses", [0, 1, 2, 5])
def test_what_is_written_is_read_back(num_responses, tmp_path):
    examples = made(20, num_responses)
    flat = Examples.of(examples)
    flat.write(tmp_path / "all")
    stored = Examples.read(tmp_path / "all")
    for read in (flat, stored):
        assert len(read) == 20 and all(map(same, read, examples)) and same(read[-1], examples[-1])
        assert all(map(same, read[3:9], examples[3:9])) and same(read[np.int64(4)], examples[4])
        with pytest.raises(IndexError):
            read[20]
        sizes = [example.size() for example in examples]
        assert sizes_of(read).tolist() == sizes_of(examples).tolist() == sizes
        assert sizes_of(read, False).tolist() == [example.size(False) for example in examples]
        assert all(map(same, extremes(read), extremes(examples)))
        keys = [key for example in examples for key in response_keys(example)]
        assert read.all_keys().shape == (20, num_responses)
        assert read.all_keys().ravel().tolist() == [key.rstrip(b"\0") for key in keys]


def test_parts_are_read_back(tmp_path):
    """A part in another order, without one of the extras, joined with others: written, it holds no more."""
    examples = made(12)
    part = Examples.of(examples).take([5, 1, 1, 10]).take([3, 1, 0]).without(["label"])
    joined = Examples.joined([part, Examples.of(made(4, seed=1))])
    expected = [examples[10], examples[1], examples[5], *made(4, seed=1)]
    for example in expected[:3]:
        del example.extras["label"]
    joined.write(tmp_path / "joined")
    for found in (joined, Examples.read(tmp_path / "joined")):
        assert all(map(same, found, expected)) and len(found) == 7
    stored = Examples.read(tmp_path / "joined")
    assert len(stored.arrays["tokens"]) == sum(example.size() for example in expected)
    nothing = part.take([])
    nothing.write(tmp_path / "nothing")
    assert list(nothing) == list(Examples.read(tmp_path / "nothing")) == []
    assert nothing.all_keys().shape == (0, 2)


@pytest.mark.parametrize("where, expected", [
    ("a.jsonl:12", ("a.jsonl:", 12)),
    ("a/b:test:7", ("a/b:test:", 7)),
    ("a.parquet:row 20", ("a.parquet:row ", 20)),
    ("a.jsonl:012", ("a.jsonl:0", 12)),
    ("a.jsonl:0", ("a.jsonl:", 0)),
    ("a.jsonl", ("a.jsonl", -1)),
    ("7", ("", 7)),
    ("x:9999999999", ("x:9999999999", -1)),      # no int32
    ("x:٣", ("x:٣", -1)),
])
def test_places(where, expected):
    assert split_place(where) == expected
    assert Examples.of([Example(np.array([1], np.int32), [], where)])[0].where == where


def test_the_table_of_log_probs(tmp_path):
    """Against a dict: parts that overlap, of which the older counts, keys that end in zeros, missing ones."""
    draw = np.random.default_rng(0)
    keys = [draw.bytes(14) + bytes(2) for _ in range(30)]
    parts, expected = [], {}
    for start in (0, 10):
        chosen = sorted(keys[start:start + 15])
        values = [torch.tensor(draw.random(int(draw.integers(1, 5))), dtype=torch.float32) for _ in chosen]
        starts = np.cumsum([0, *map(len, values)])
        parts.append({"keys": np.array(chosen, "S16"), "starts": starts, "logps": torch.cat(values).numpy()})
        expected = dict(zip(chosen, values)) | expected
    table = Table(parts)
    assert table.lacks(np.array(keys, "S16")).tolist() == [key not in expected for key in keys]
    for key, logps in zip(keys[:25], table.logps(keys[:25])):
        assert torch.equal(logps, expected[key])
    assert Table([]).lacks(np.array(keys, "S16")).all()


def test_what_the_table_lacks():
    """Against a loop with a set: repeated rows are computed once, as are rows that share one response with
    those before."""
    examples = made(6)
    third = examples[2]
    alike = Example(third.prompt, [third.responses[0]] * 2, "x:1", third.extras)
    rows = [examples[0], examples[1], examples[0], alike]
    groups = [Examples.of(rows), Examples.of(examples)]
    known = response_keys(examples[4])
    starts = np.array([0, 1, 2])
    part = {"keys": np.array(sorted(known), "S16"), "starts": starts, "logps": np.zeros(2, np.float32)}
    table = Table([part])
    seen, expected = set(known), []
    for group in groups:
        expected.append([])
        for example in group:
            if not seen.issuperset(response_keys(example)):
                expected[-1].append(example)
                seen.update(response_keys(example))
    missing, there, wanted = lacking(groups, table)
    for ours, theirs in zip(missing, expected, strict=True):
        assert len(ours) == len(theirs) and all(map(same, ours, theirs))
    assert (there, wanted) == (len(known), len(seen))


# ---- the rows of a file by several processes

@contextlib.contextmanager
def few_open_files(more=64):
    """A limit of so many more open files: torch would send every tensor of a column as one."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("kind, rows", [
    ("pairs", [row | {"weight": i} for i, row in enumerate(pair_rows(120))]),
    ("responses", [{"messages": messages("q", "a" * i, "r", "b")} for i in range(1, 50)]),
])
def test_processes_that_help_change_nothing(kind, rows, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "x.jsonl", [*rows, rows[0]])
    monkeypatch.setattr(reading, "CHUNK", 7)
    monkeypatch.setattr(reading, "ALONE", 100)
    alone = build_dataset(path, kind, TOKENIZER, 80)
    monkeypatch.setattr(reading, "ALONE", 2)
    with few_open_files():
        shared = build_dataset(path, kind, TOKENIZER, 80)
    assert shared.report == alone.report and shared.notices == alone.notices and len(shared.examples) > 14
    assert len(shared.examples) == len(alone.examples) and all(map(same, shared.examples, alone.examples))


def test_the_first_bad_row_is_named_by_a_process_that_helps(tmp_path, monkeypatch):
    rows = pair_rows(30)
    del rows[25]["chosen"], rows[28]["chosen"]
    monkeypatch.setattr(reading, "CHUNK", 3)
    monkeypatch.setattr(reading, "ALONE", 1)
    with pytest.raises(dataset.UserError, match=r"x\.jsonl:26"):
        build_dataset(write_jsonl(tmp_path / "x.jsonl", rows), "pairs", TOKENIZER, 200)


ENDLESS = """
import multiprocessing
import sys

sys.path.insert(0, {root!r})

if __name__ == "__main__":
    from transformers import AutoTokenizer

    from data import reading
    reading.CHUNK = reading.ALONE = 1
    rows = ((f"x:{{i}}", {{"text": "abc"}}) for i in iter(int, 1))
    how = reading.Reading("x", "responses", 9, "assistant", "none", "messages", {{}}, None, False, False)
    for number, _ in enumerate(reading.read_chunks(rows, how, AutoTokenizer.from_pretrained({model!r}))):
        if number == 1:
            print(*[child.pid for child in multiprocessing.active_children()], flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self"), reason="needs /proc")
def test_processes_that_help_end_with_a_killed_one(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS.format(root=str(ROOT), model=tiny_model(tmp_path / "model")))
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    helpers = process.stdout.readline().split()
    process.kill()
    process.wait()
    assert len(helpers) >= 2
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in helpers) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in helpers)


# ---- runs

@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """train(name, key=value, ...) -> .path, .printed, .read: how often rows were read from files."""
    model = tiny_model(tmp_path / "model")
    calls = []
    original = dataset.load_datasets

    def spy(*arguments):
        calls.append(1)
        return original(*arguments)
    monkeypatch.setattr(dataset, "load_datasets", spy)
    write_jsonl(tmp_path / "x.jsonl", sft_rows(10))
    write_jsonl(tmp_path / "eval.jsonl", sft_rows(3, 10))

    def train(name, **values):
        options = {
            "algorithm": "sft",
            "model": model,
            "data": tmp_path / "x.jsonl",
            "output": tmp_path / "runs" / name,
            "batch_size": 4,
            "max_steps": 2,
            "lr": 1e-3,
            "max_length": 256,
            "save_every": "null",
            **values,
        }
        calls.clear()
        train_here(write_config(tmp_path / f"{name}.yml", **options))
        printed = capsys.readouterr().err
        return SimpleNamespace(path=tmp_path / "runs" / name, printed=printed, read=len(calls))
    return train


def folders(tmp_path):
    return sorted((tmp_path / "runs" / ".tokens").iterdir())


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto", "grpo"])
def test_a_later_run_reads_no_row(algorithm, train, tmp_path):
    rows = {"sft": sft_rows, "dpo": pair_rows, "kto": labelled_rows, "grpo": prompt_rows}[algorithm]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows(10), rows(1)[0]])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", rows(4, 10))
    keys = {"algorithm": algorithm, "data": path, "eval_data": held_out}
    if algorithm == "grpo":
        rewards = tmp_path / "rewards.py"
        rewards.write_text("def reward(prompts, completions, **columns):\n"
                           "    return [len(set(text)) for text in completions]\n")
        keys |= {"reward": f"{rewards}:reward", "num_generations": 2, "max_completion_length": 6}
    first = train("first", **keys)
    again = train("again", **keys)
    assert (first.read, again.read) == (1, 0) and len(folders(tmp_path)) == 1
    shutil.rmtree(folders(tmp_path)[0])
    third = train("third", **keys)
    assert third.read == 1
    weights = final_weights(first.path)
    for run in (again, third):
        assert metrics(run.path) == metrics(first.path)
        assert all(torch.equal(weights[name], tensor) for name, tensor in final_weights(run.path).items())
        reports = [json.loads((path / "run.json").read_text())["data"] for path in (run.path, first.path)]
        assert reports[0] == reports[1]
        ours = [line for line in run.printed.splitlines() if "jsonl" in line]
        theirs = [line for line in first.printed.splitlines() if "jsonl" in line]
        assert ours == theirs and any("occur more than once" in line for line in ours)


def test_what_changes_tokens_makes_a_new_directory(train, tmp_path):
    """And what does not, makes none: another seed where nothing is drawn, another learning rate, an algorithm
    that reads the same."""
    train("first")
    for i, keys in enumerate([{}, {"lr": 1e-4}, {"seed": 5}, {"algorithm": "dft"}, {"batch_size": 2}]):
        assert train(f"same{i}", **keys).read == 0, keys
    assert len(folders(tmp_path)) == 1
    template = tmp_path / "t.jinja"
    template.write_text("X" + TOKENIZER.chat_template)
    held_out = [{"path": str(tmp_path / "eval.jsonl"), "weight": 0.5}]
    changes = [{"eval_data": held_out}, {"eval_data": held_out, "seed": 5}, {"max_length": 255},
               {"eval_fraction": 0.3}, {"eval_fraction": 0.3, "seed": 5}, {"chat_template": template},
               {"train_on": "all"}, {"system_prompt": "Be brief."}, {"truncate": "prompt"}]
    for i, keys in enumerate(changes, 2):
        assert train(f"other{i}", **keys).read == 1, keys
        assert len(folders(tmp_path)) == i
    write_jsonl(tmp_path / "x.jsonl", sft_rows(10, 1))
    changed = train("changed")
    assert changed.read == 1 and metrics(changed.path) != metrics(tmp_path / "runs" / "first")
    other = tiny_model(tmp_path / "other")
    settings = tmp_path / "other" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("<|im_end|>", "<|im_start|>"))
    assert train("tokenizer", model=other).read == 1


def test_a_damaged_store_is_made_again(train, tmp_path):
    first = train("first")
    folder, = folders(tmp_path)
    tokens = folder / "train" / "tokens.npy"
    content = bytearray(tokens.read_bytes())
    content[-2] ^= 1
    tokens.write_bytes(content)
    again = train("again")
    assert again.read == 1 and again.printed.count("are ignored: ") == 1 and "is damaged" in again.printed
    assert metrics(again.path) == metrics(first.path) and train("third").read == 0


def test_a_file_that_changes_while_it_is_read_is_not_kept(train, tmp_path, monkeypatch):
    original = dataset.load_datasets

    def grow(*arguments):
        found = original(*arguments)
        write_jsonl(tmp_path / "x.jsonl", sft_rows(10, 1))
        return found
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "load_datasets", grow)
        first = train("first")
    assert "not kept for later runs: a file was changed while it was read" in first.printed
    assert train("again").read == 1 and len(folders(tmp_path)) == 1


def test_values_that_json_does_not_keep(train, tmp_path):
    """A date of a parquet file reaches the reward as it is; one line says that the tokens are not kept."""
    rewards = tmp_path / "rewards.py"
    rewards.write_text("def reward(prompts, completions, day, **columns):\n"
                       "    pairs = zip(day, completions)\n"
                       "    return [date.year % 7 + len(set(text)) for date, text in pairs]\n")
    days = pyarrow.array(range(10), pyarrow.date32())
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": [f"q{i}" for i in range(10)], "day": days}), path)
    keys = {"algorithm": "grpo", "data": path, "reward": f"{rewards}:reward", "num_generations": 2}
    keys["max_completion_length"] = 6
    first, again = train("first", **keys), train("again", **keys)
    line = "data: their tokens are not kept for later runs: "
    assert first.printed.count(line) == 1
    assert "x.parquet:row 1 holds values that JSON does not keep" in first.printed
    assert metrics(first.path) == metrics(again.path)
    assert not (tmp_path / "runs" / ".tokens").is_dir() or not folders(tmp_path)


def test_the_size_on_disk(tmp_path):
    """At most 5 bytes per token for pairs of 160 tokens."""
    rows = [{"prompt": "p" * 80, "chosen": f"{i:039d}", "rejected": f"{i + 1:039d}"} for i in range(2000)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    examples = build_dataset(path, "pairs", byte_tokenizer(chat_template=False), 999).examples
    examples.write(tmp_path / "all")
    size = sum(path.stat().st_size for path in (tmp_path / "all").iterdir())
    tokens = int(sizes_of(examples).sum())
    assert tokens == 160 * 2000 and size <= 5 * tokens
