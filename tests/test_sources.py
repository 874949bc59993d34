"""Several sources and their weights, duplicates, held-out rows."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import byte_tokenizer, refused, write_jsonl

from data.dataset import build_dataset, load_datasets, split_off
from engine.config import as_yaml, describe, load_config

TOKENIZER = byte_tokenizer()


def build(path, kind, **options):
    return build_dataset(path, kind, TOKENIZER, 1000, **options)


def decoded(example):
    return tuple(TOKENIZER.decode(ids, skip_special_tokens=True) for ids in (example.prompt, *(r.tokens for r in example.responses)))


def load(kind="pairs", seed=0, **config):
    """load_datasets -> (train, eval, reports, notices)."""
    notices = []
    values = {"eval_data": None, "eval_fraction": 0.0, "seed": seed, "max_length": 1000, "truncate": "none",
              "hh": "messages", "system_prompt": None, "columns": None}
    common = SimpleNamespace(**values | config)
    return *load_datasets(common, kind, TOKENIZER, notices.append), notices


# ---- several sources ----

@pytest.fixture
def files(tmp_path):
    def pairs(letter, count, **names):
        keys = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"} | names
        return [{keys["prompt"]: f"{letter}{i}", keys["chosen"]: "good", keys["rejected"]: "bad"} for i in range(count)]
    return [write_jsonl(tmp_path / "a.jsonl", pairs("a", 10)),
            write_jsonl(tmp_path / "b.jsonl", pairs("b", 4, chosen="best", rejected="worst"))]


def prompts(examples):
    return [decoded(example)[0] for example in examples]


def test_sources_one_after_the_other(files):
    a, b = files
    columns = {"chosen": "best", "rejected": "worst"}
    train, _, reports, notices = load(data=[{"path": a}, {"path": b, "columns": columns}])
    assert prompts(train) == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(4)]
    report = reports["train"]
    assert (report["read"], report["used"], report["source"]) == (14, 14, f"{a} + {b}")
    assert [part["used"] for part in report["sources"]] == [10, 4] and len(set(report["sha256"])) == 2
    assert [part["sha256"] for part in report["sources"]] == report["sha256"] and json.loads(json.dumps(report)) == report
    assert [notice.split(":")[0] for notice in notices if "rows read as" in notice] == [a, b]
    assert load(data=[{"path": a}])[2]["train"]["used"] == 10
    message = refused(load, data=[{"path": b, "columns": columns | {"chosen": "bests"}}])
    assert f"no column 'bests' in {b}:1, nearest: best" in message


@pytest.mark.parametrize("weight, count", [(1, 10), (0.5, 5), (2, 20), (2.3, 23), (0.01, 1)])
def test_weights(files, weight, count):
    a, b = files
    columns = {"chosen": "best", "rejected": "worst"}

    def names(seed):
        return prompts(load(data=[{"path": a, "weight": weight}, {"path": b, "columns": columns}], seed=seed)[0])
    drawn = names(0)
    whole = int(weight) * 10
    assert drawn[:whole] == [f"a{i}" for i in range(10)] * int(weight) and drawn[count:] == [f"b{i}" for i in range(4)]
    rest = drawn[whole:count]
    assert len(rest) == len(set(rest)) == count - whole and rest == sorted(rest) and set(rest) <= {f"a{i}" for i in range(10)}
    assert names(0) == drawn and (weight in (1, 2) or any(names(seed) != drawn for seed in range(1, 6)))


def test_weights_keep_a_pairs_labelled_rows_together(files):
    train, *_ = load("labelled", data=[{"path": files[0], "weight": 0.5}])
    assert [example.extras["label"] for example in train] == [True, False] * 5
    assert prompts(train)[::2] == prompts(train)[1::2]


def test_sources_for_evaluation(files):
    a, _ = files
    train, evaluation, reports, notices = load(data=a, eval_data=[{"path": a, "weight": 0.2}])
    assert len(evaluation) == 2 and reports["eval"]["sources"][0]["weight"] == 0.2
    assert any("2 of 2 evaluation rows are training rows too; 2 have the prompt of one" in notice for notice in notices)


SOURCES = """algorithm: dpo
model: m
data:
  - path: pairs.jsonl
    weight: 2
    columns: {chosen: good, rejected: bad}
  - path: hh/harmless-base
    split: test
eval_data: [{path: "中文: 1.jsonl", weight: 5e-1}]
"""


def config(tmp_path, text, *words):
    (tmp_path / "x.yml").write_text(text, encoding="utf-8")
    return load_config([str(tmp_path / "x.yml"), *words])


def test_configured_sources(tmp_path):
    run = config(tmp_path, SOURCES)
    assert run.common.data == [{"path": "pairs.jsonl", "weight": 2.0, "columns": {"chosen": "good", "rejected": "bad"}},
                               {"path": "hh/harmless-base", "split": "test"}]
    assert run.common.eval_data == [{"path": "中文: 1.jsonl", "weight": 0.5}]
    text = as_yaml(run.common, run.config)
    assert text.startswith("algorithm: dpo\nmodel: m\ndata:\n- path: pairs.jsonl\n  weight: 2.0\n  columns:\n    chosen: good\n")
    again = config(tmp_path, text)
    assert again.common == run.common and as_yaml(again.common, again.config) == text
    line = next(line for line in describe(run) if line.startswith("data = "))
    assert "[{path: pairs.jsonl, weight: 2.0, columns: {chosen: good, rejected: bad}}, {path: hh/harmless-base, split: test}]" in line
    assert line.endswith("x.yml:3)")
    assert config(tmp_path, SOURCES, "data=one.jsonl").common.data == "one.jsonl"
    assert config(tmp_path, SOURCES, "eval_data=null").common.eval_data is None


@pytest.mark.parametrize("entry, says", [
    ("{pth: x}", "unknown key 'pth' of data[0] in {}:3; fix: write path"), ("{path: x, seed: 1}", "fix: use path, split"),
    ("{weight: 1}", "data[0] has no path in {}:3"), ("{path: x, path: y}", "duplicate key 'path'"), ("{path: [x]}", "data[0].path"),
    ("{path: x, weight: 0}", "data[0].weight is '0' in {}:3; fix: give a number above 0"), ("{path: x, weight: some}", "'some'"),
    ("{path: x, weight: inf}", "'inf'"), ("{path: x, weight: }", "''"), ("{path: }", "data[0].path is ''"),
    ("{path: x, columns: good}", "data[0].columns"), ("{path: x, columns: {chosen: [good]}}", "mapping of names"),
    ("{path: a/b:test, split: test}", "has a split in its path"), ("x.jsonl", "nested value of 'data' in {}:3: data[0] is not a mapping"),
])
def test_sources_that_are_refused(tmp_path, entry, says):
    message = refused(config, tmp_path, f"algorithm: dpo\nmodel: m\ndata: [{entry}]\n")
    assert says.format(tmp_path / "x.yml") in message and "x.yml:3" in message
    assert "empty list" in refused(config, tmp_path, "algorithm: dpo\nmodel: m\ndata: []\n")
    assert "nested" in refused(config, tmp_path, f"algorithm: dpo\nmodel: [{entry}]\ndata: x\n")


# ---- duplicates and held-out rows ----

def test_duplicates_are_counted_once_and_kept(tmp_path):
    rows = [{"prompt": f"q{i % 3}", "chosen": "a", "rejected": "b"} for i in range(7)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    train, _, reports, notices = load(data=path)
    assert len(train) == 7 and reports["train"]["duplicates"] == 4
    assert [notice for notice in notices if "more than once" in notice] == [
        f"{path}: 4 examples occur more than once, prompt and responses alike; they are kept"]
    other = write_jsonl(tmp_path / "y.jsonl", rows[:1] + [{"prompt": "new", "chosen": "a", "rejected": "b"}])
    _, _, reports, notices = load(data=[{"path": path, "weight": 2}, {"path": other}])
    assert reports["train"]["duplicates"] == 5 and sum("more than once" in notice for notice in notices) == 1    # weights are no fault


def test_held_out_prompts_are_not_trained(tmp_path):
    rows = [{"prompt": f"q{i % 20}", "chosen": f"a{i}", "rejected": "b"} for i in range(100)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    for kind, size in ("pairs", 100), ("labelled", 200), ("responses", 100):
        for seed in range(3):
            train, evaluation, reports, notices = load(kind, data=path, eval_fraction=0.1, seed=seed)
            assert not set(prompts(train)) & set(prompts(evaluation)) and len(evaluation) == size // 10
            assert len(train) + len(evaluation) == size and not any("evaluation rows" in notice for notice in notices)
    assert prompts(load(data=path, eval_fraction=0.1)[1]) == prompts(load(data=path, eval_fraction=0.1)[1])


def test_shared_prompts_are_told_of_even_if_no_row_is_shared(tmp_path):
    pair = {"prompt": "same", "chosen": "a", "rejected": "b"}
    a = write_jsonl(tmp_path / "a.jsonl", [pair])
    b = write_jsonl(tmp_path / "b.jsonl", [pair | {"chosen": "c"}, pair | {"prompt": "new"}])
    notices = load(data=a, eval_data=b)[3]
    assert [notice for notice in notices if "evaluation rows" in notice] == [
        "warning: 0 of 2 evaluation rows are training rows too; 1 have the prompt of one"]


def test_a_large_prompt_does_not_swallow_the_held_out_share(tmp_path):
    rows = [{"prompt": "big", "chosen": f"a{i}", "rejected": "b"} for i in range(60)]
    rows += [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    dataset = build(write_jsonl(tmp_path / "x.jsonl", rows), "pairs")
    sizes = [len(split_off(dataset, 0.1, seed)[1].examples) for seed in range(20)]
    assert sizes.count(10) >= 18 and all(size in (10, 60) for size in sizes)     # 60: the big prompt was drawn first


def test_raw_text_has_no_prompt_to_group_by(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"the text number {i}"} for i in range(10)])
    train, evaluation, _, notices = load("responses", data=path, eval_fraction=0.2)
    assert (len(train), len(evaluation)) == (8, 2) and not any("warning" in notice for notice in notices)
    assert np.array_equal(train[0].prompt, evaluation[0].prompt)
