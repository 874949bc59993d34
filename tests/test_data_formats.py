"""Labels, margins and the shapes of other projects, against expectations written by hand."""
import math
from types import SimpleNamespace

import pytest
from helpers import byte_tokenizer, messages, refused, write_jsonl

from data.dataset import build_dataset, load_datasets
from data.formats import parse

TOKENIZER = byte_tokenizer()
Q, GOOD, BAD = messages("q"), messages("q", "good")[1:], messages("q", "bad")[1:]
SYSTEM = [{"role": "system", "content": "s"}]


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


# ---- labels ----

@pytest.mark.parametrize("row, prompt, response, label", [
    ({"prompt": "q", "completion": "a", "label": True}, "q", "a", True),
    ({"prompt": "q", "response": "a", "label": 0}, "q", "a", False),
    ({"prompt": "q", "response": "a", "label": 1.0}, "q", "a", True),
    ({"prompt": Q, "completion": GOOD, "kto_tag": False}, Q, GOOD, False),
    ({"messages": Q + GOOD, "label": True}, Q, GOOD, True),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "good"}], "kto_tag": True}, Q, GOOD, True),
    ({"instruction": "q", "input": "", "output": "good", "label": False}, Q, GOOD, False),
    ({"messages": Q + GOOD, "chosen": "x", "rejected": "y", "prompt": "z", "label": True}, Q, GOOD, True),
])
def test_labelled_rows(row, prompt, response, label):
    text = parse(row, "x.jsonl:1", "labelled")
    assert (text.prompt, text.responses, text.extras) == (prompt, [response], {"label": label})
    assert type(text.extras["label"]) is bool and text.shape.endswith(next(name for name in ("label", "kto_tag") if name in row))
    text = parse(row, "x.jsonl:1", "responses")            # sft trains the desirable ones of the file
    column = text.shape.split(" + ")[-1]
    assert (text.responses, text.extras, text.label) == ([response], {"label": label}, column)


@pytest.mark.parametrize("label", [2, -1, 0.5, "true", "1", "yes", [], {}, math.nan])
def test_labels_that_are_none(label):
    row = {"prompt": "q", "completion": "a", "label": label}
    message = refused(parse, row, "x.jsonl:7", "labelled")
    assert "x.jsonl:7" in message and "0 or 1" in message and repr(label) in message
    text = parse(row, "x.jsonl:7", "responses")                              # a label of something else
    assert (text.responses, text.extras, text.label) == (["a"], {}, "label")


def test_text_has_no_use_for_labels():
    assert parse({"text": "A film.", "label": 0}, "x.jsonl:1", "responses").responses == ["A film."]


def test_a_row_without_label():
    message = refused(parse, {"prompt": "q", "completion": "a"}, "x.jsonl:7", "labelled")
    assert "unknown columns in x.jsonl:7: found prompt, completion" in message and "+ label" in message


def test_labels_in_csv_are_words(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,completion,label\nq,a,true\nq,b,False\nq,c,1\nq,d,0\n")
    dataset = build(tmp_path / "x.csv", "labelled")
    assert [example.extras for example in dataset.examples] == [{"label": label} for label in (True, False, True, False)]
    assert (dataset.report["desirable"], dataset.report["undesirable"]) == (2, 2)
    (tmp_path / "y.csv").write_text("prompt,completion,label\nq,a,good\n")
    assert "'good'" in (message := refused(build, tmp_path / "y.csv", "labelled")) and "y.csv:2" in message


def test_pairs_are_two_labelled_rows_each(tmp_path):
    rows = [{"prompt": f"q{i}", "chosen": f"good{i}", "rejected": f"bad{i}", "margin": 1} for i in range(3)]
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    dataset = build(path, "labelled")
    assert [(*decoded(example), example.extras, example.where) for example in dataset.examples] == [
        (f"q{i}", f"{word}{i}", {"label": word == "good"}, f"{path}:{i + 1}") for i in range(3) for word in ("good", "bad")]
    assert dataset.report["read"] == 3 and dataset.report["used"] == 6 and dataset.report["shape"] == (
        "3 rows read as prompt + chosen + rejected")
    assert [decoded(example)[1] for example in build(path, "responses").examples] == ["good0", "good1", "good2"]


def test_one_class_only(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "a", "label": i == 4} for i in range(5)]
    only = write_jsonl(tmp_path / "only.jsonl", rows[:4])
    assert "only undesirable labels in" in (message := refused(load, "labelled", data=only)) and "only.jsonl" in message
    assert "only desirable labels" in refused(load, "labelled", data=write_jsonl(tmp_path / "one.jsonl", rows[4:]))
    both = write_jsonl(tmp_path / "both.jsonl", rows)
    train, evaluation, reports, _ = load("labelled", data=both, eval_data=only)    # one class is no fault of evaluation data
    assert len(train) == 5 and len(evaluation) == 4 and reports["train"]["desirable"] == 1 and reports["eval"]["undesirable"] == 4


def test_undesirable_rows_are_dropped_and_counted_for_sft(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"prompt": f"q{i}", "completion": "a", "label": i % 3 == 0} for i in range(9)])
    train, _, reports, notices = load("responses", data=path)
    assert [decoded(example)[0] for example in train] == ["q0", "q3", "q6"]
    assert reports["train"]["dropped"] == {"label is false or 0 (undesirable)": 6}
    assert any("6 of 9 rows dropped" in notice and "undesirable" in notice for notice in notices)


# ---- margins ----

def test_margins(tmp_path):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for values in [1, -0.5, 0], ["2", "1e-3", "0"]:
        path = write_jsonl(tmp_path / "x.jsonl", [pair | {"margin": value} for value in values])
        assert [example.extras for example in build(path, "pairs").examples] == [{"margin": float(value)} for value in values]
    assert build(write_jsonl(tmp_path / "y.jsonl", [pair | {"margin": None}] * 2), "pairs").examples[0].extras == {}
    for value in "high", "inf", True, [1]:
        path = write_jsonl(tmp_path / "z.jsonl", [pair | {"margin": 1}, pair | {"margin": value}])
        assert "margin" in (message := refused(build, path, "pairs")) and f"{path}:2" in message and "finite number" in message
    path = write_jsonl(tmp_path / "w.jsonl", [pair, pair, pair | {"margin": 1}, pair])
    assert f"{path}:3 has a margin, unlike {path}:1" in refused(build, path, "pairs")
    path = write_jsonl(tmp_path / "v.jsonl", [pair | {"margin": 1}, pair])
    assert f"{path}:2 has no margin" in refused(build, path, "pairs")


# ---- shapes ----

HISTORY = [["old", "reply"]]
PAST = messages("old", "reply")
ULTRA = {"prompt": "q", "prompt_id": "1", "chosen": Q + GOOD, "rejected": Q + BAD, "messages": Q + GOOD, "score_chosen": 8.0,
         "score_rejected": 7.0}
ORPO = {"source": "x", "chosen": PAST + Q + GOOD, "rejected": PAST + Q + BAD, "prompt": "q", "question": "q"}
SHAREGPT = [{"from": "human", "value": "q"}]
VERL = {"data_source": "openai/gsm8k", "prompt": [{"role": "user", "content": "q step by step"}], "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "7"}, "extra_info": {"question": "q", "answer": "good", "index": 0}}


@pytest.mark.parametrize("row, prompt", [
    ({"instruction": "q", "input": "", "output": "good", "system": "", "history": []}, Q),
    ({"instruction": "q", "output": "good", "system": "s", "history": HISTORY}, SYSTEM + PAST + Q),
    ({"instruction": "q", "input": "more", "output": "good", "history": None}, messages("q\nmore")),
    ({"query": "q", "response": "good"}, Q),
    ({"query": "q", "response": "good", "system": "s", "history": HISTORY}, SYSTEM + PAST + Q),
    ({"messages": Q + GOOD, "rejected_response": "bad"}, Q),
    ({"conversations": SHAREGPT + [{"from": "gpt", "value": "good"}], "system": "s", "tools": "[]"}, SYSTEM + Q),
    ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT, {"from": "gpt", "value": "good"}], "system": "s"}, SYSTEM + Q),
    ({"conversation": [{"human": "old", "assistant": "reply"}, {"human": "q", "assistant": "good"}]}, messages("old")),
    ({"conversation": [{"system": "s", "human": "q", "assistant": "good"}]}, SYSTEM + Q),
    ({"prompt": "q", "response": "good", "system": "s"}, SYSTEM + Q),
    ({"question": "q", "answer": "good", "system": None, "tools": []}, "q"),
    (ULTRA, Q),
    (ORPO, PAST + Q),
    (VERL, messages("q step by step")),
    ({"instruction": "q", "input": "more", "chosen": "good", "rejected": "bad"}, messages("q\nmore")),
    ({"question": "q", "response_j": "good", "response_k": "bad"}, "q"),
])
def test_responses(row, prompt):
    text = parse(row, "x:1", "responses")
    last = text.responses[0] if isinstance(prompt, str) else text.responses[0][-1:]
    assert (text.prompt, last) == (prompt, "good" if isinstance(prompt, str) else GOOD) and not text.raw


@pytest.mark.parametrize("row, prompt", [
    ({"instruction": "q", "input": "", "chosen": "good", "rejected": "bad", "output": "x"}, Q),
    ({"instruction": "q", "input": "more", "system": "s", "history": HISTORY, "chosen": "good", "rejected": "bad"},
     SYSTEM + PAST + messages("q\nmore")),
    ({"query": "q", "response": "good", "rejected_response": "bad", "history": HISTORY}, PAST + Q),
    ({"messages": SYSTEM + PAST + Q + GOOD, "rejected_response": "bad"}, SYSTEM + PAST + Q),
    ({"messages": Q + GOOD, "rejected_response": BAD}, Q),
    ({"messages": Q + GOOD, "rejected_messages": Q + BAD}, Q),
    ({"conversations": SHAREGPT, "system": "s", "chosen": {"from": "gpt", "value": "good"},
      "rejected": {"from": "gpt", "value": "bad"}}, SYSTEM + Q),
    (ULTRA | {"messages": messages("other", "x")}, Q),                        # a pair's columns win over messages
    (ORPO, PAST + Q),
    ({name: value for name, value in ORPO.items() if name != "prompt"}, PAST + Q),
    ({"prompt": PAST + Q, "chosen": GOOD, "rejected": BAD}, PAST + Q),
    ({"prompt": " q ", "chosen": Q + GOOD, "rejected": Q + BAD}, Q),            # full conversations need no prompt column
    ({"question": "q", "response_j": "good", "response_k": "bad", "qid": 1}, "q"),
    ({"system": "s", "question": "q", "chosen": "good", "rejected": "bad"}, SYSTEM + Q),
])
def test_pairs(row, prompt):
    text = parse(row, "x:1", "pairs")
    assert (text.prompt, text.responses) == (prompt, ["good", "bad"] if isinstance(prompt, str) else [GOOD, BAD])
    assert parse(row, "x:1", "labelled").responses == text.responses


@pytest.mark.parametrize("row, says", [
    ({"prompt": "q", "response": "a", "tools": "[{}]"}, "tools[0] is not a tool"),
    ({"messages": SYSTEM + Q + GOOD, "system": "other"}, "another system turn"),
    ({"instruction": "q", "output": "a", "system": 3}, "system is int"),
    ({"query": "q", "response": "a", "history": [["x"]]}, "history[0] is not a pair"),
    ({"query": "q", "response": "a", "history": "x"}, "history[0] is not a pair"),
    ({"instruction": "q", "input": 3, "output": "a"}, "input is int"),
    ({"prompt": Q, "reward_model": {"ground_truth": "7"}, "extra_info": {"index": 1}}, "unknown columns"),
    ({"chosen": "q a", "rejected": "q b"}, "no prompt"),                    # a common prefix could end anywhere
])
def test_rows_that_are_refused(row, says):
    assert says in (message := refused(parse, row, "x.jsonl:3", "pairs" if "chosen" in row else "responses")) and "x.jsonl:3" in message


def test_the_log_says_how_the_columns_were_understood(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 1200 + [{"messages": Q + GOOD, "rejected_response": "bad"}] * 2
    path = write_jsonl(tmp_path / "x.jsonl", rows)
    *_, notices = load(data=path)
    assert notices[0] == f"{path}: 1,200 rows read as prompt + chosen + rejected, 2 rows read as messages + rejected_response"
    assert sum("rows read as" in notice for notice in notices) == 1
    assert load("responses", data=path)[3][0] == f"{path}: 1,200 rows read as prompt + chosen, 2 rows read as messages"
