"""Prompts for online algorithms: which rows give one, their columns, prompt templates, and their reports."""
from types import SimpleNamespace

import pytest
from helpers import REWARDS, byte_tokenizer, messages, refused, write_jsonl

from data.dataset import build_dataset, load_datasets, overlap, split_off
from data.errors import UserError
from data.formats import parse, read_template
from data.hub import hub_rows
from engine.options import Sampling
from rewards.functions import check_rewards

TOKENIZER, PLAIN = byte_tokenizer(), byte_tokenizer(chat_template=False)
Q, S = messages("q"), [{"role": "system", "content": "s"}]
ANSWER = messages("", "a")[1:]
R1_ZERO = "A conversation between User and Assistant. The User asks a question, and the Assistant solves it. The Assistant first " \
          "thinks about the reasoning process in the mind and then provides the User with the answer. The reasoning process is " \
          "enclosed within <think> </think> and answer is enclosed within <answer> </answer> tags, respectively, i.e., <think> " \
          "reasoning process here </think> <answer> answer here </answer>.\nUser: {}\nAssistant: <think>"
HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: "


def build(tmp_path, rows, max_length=1000, tokenizer=TOKENIZER, **options):
    return build_dataset(write_jsonl(tmp_path / "x.jsonl", rows), "prompts", tokenizer, max_length, **options)


def load(tmp_path, rows, tokenizer=TOKENIZER, prompt_template=None, max_completion_length=0, **config):
    """load_datasets -> (train, eval, reports, notices)."""
    notices = []
    common = SimpleNamespace(**{"data": write_jsonl(tmp_path / "x.jsonl", rows), "eval_data": None, "eval_fraction": 0.0, "seed": 0,
                                "system_prompt": None, "columns": None,
                                "max_length": 1000, "truncate": "none", "hh": "messages"} | config)
    config = Sampling(f"{REWARDS}:none", prompt_template=prompt_template,
                      max_completion_length=max_completion_length)
    train, held_out, reports = load_datasets(
        common, "prompts", tokenizer, notices.append,
        prompt_template=prompt_template, max_completion_length=max_completion_length)
    for examples in filter(len, (train, held_out)):
        check_rewards(config, examples)
    return train, held_out, reports, notices


@pytest.mark.parametrize("row, prompt", [
    ({"prompt": "q "}, "q "),
    ({"prompt": Q, "answer": "20"}, Q),
    ({"prompt": Q + ANSWER}, Q + ANSWER),                  # the beginning of the answer
    ({"prompt": Q[0]}, Q),
    ({"prompt": "q", "completion": "a", "label": "bad"}, "q"),
    ({"prompt": "q", "completion": ANSWER}, Q),
    ({"prompt": "q", "response": None, "messages": None}, "q"),
    ({"question": "q", "answer": "1 #### 2"}, "q"),
    ({"instruction": "q", "input": "", "output": "a"}, Q),
    ({"instruction": "q", "input": "i"}, messages("q\ni")),
    ({"query": "r", "history": [["q", "a"]]}, messages("q", "a", "r")),
    ({"query": "q", "system": "s"}, S + Q),
    ({"question": "q", "system": "s"}, S + Q),
    ({"messages": messages("q", "a", "r")}, messages("q", "a", "r")),
    ({"messages": messages("q", "a", "r", "b") + ANSWER}, messages("q", "a", "r")),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, Q),
    ({"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": 1}, Q),
    ({"messages": Q + ANSWER, "rejected_response": "b"}, Q),
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "q"),
    ({"prompt": "q", "chosen": Q + ANSWER, "rejected": Q + ANSWER}, Q),
    ({"chosen": messages("q", "a", "r", "b"), "rejected": messages("q", "a", "r", "c")}, messages("q", "a", "r")),
    ({"chosen": HH + "b", "rejected": HH + "c"}, messages("q", "a", "r")),
])
def test_rows_with_a_prompt(row, prompt):
    text = parse(row, "x:1", "prompts")
    assert (text.prompt, text.responses, text.extras) == (prompt, [], {"prompt": prompt, "columns": row})


def test_rows_without_a_prompt():
    assert parse({"messages": ANSWER}, "x:1", "prompts") == "first turn is the assistant's"
    for row in ({"text": "q"}, {"answer": "a"}, {}, {"prompt": None}):
        assert "unknown columns in x:1" in refused(parse, row, "x:1", "prompts")
    for row in ({"prompt": " "}, {"question": ""}, {"prompt": messages(" ")}):
        assert "the prompt is empty in x:1" in refused(parse, row, "x:1", "prompts")
    for row in ({"prompt": 3}, {"messages": "q"}, {"chosen": "a", "rejected": "b"}, {"prompt": []}, {"prompt": "q", "tools": "[1]"}):
        assert "x:1" in refused(parse, row, "x:1", "prompts")


def test_the_gold_answer_of_verls_rows_is_a_column():
    row = {"data_source": "openai/gsm8k", "prompt": Q, "reward_model": {"style": "rule", "ground_truth": "72"},
           "extra_info": {"answer": "a #### 72", "question": "q", "split": "train"}}
    assert parse(row, "x:1", "prompts").extras == {"prompt": Q, "columns": row | {"ground_truth": "72"}}
    assert parse(row | {"ground_truth": "7"}, "x:1", "prompts").extras["columns"]["ground_truth"] == "7"


def test_examples(tmp_path):
    rows = [{"prompt": Q, "answer": "1"}, {"prompt": "q", "answer": "2"}, {"prompt": Q, "answer": "3"}]
    dataset = build(tmp_path, rows)
    assert [TOKENIZER.decode(example.prompt) for example in dataset.examples] == [
        text := "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", "q", text]
    assert [example.extras["columns"] for example in dataset.examples] == rows and dataset.examples[0].responses == []
    report = dataset.report
    assert (report["used"], report["duplicates"], report["stop_inside"], report["shape"]) == (3, 1, 0, "3 rows read as prompt")
    assert report["response_length"]["max"] == 0 and report["total"] == report["prompt_length"]
    assert report["prompt_length"]["max"] == len(dataset.examples[0].prompt)


def test_max_length_is_the_prompts(tmp_path):
    rows = [{"prompt": "q" * length} for length in (9, 10, 11, 12)]
    dataset = build(tmp_path, rows, max_length=10)
    assert [len(example.prompt) for example in dataset.examples] == [9, 10]
    assert dataset.report["dropped"] == {"longer than max_length": 2}
    assert "raise max_length" in refused(build, tmp_path, rows, max_length=1)
    cut = build(tmp_path, [{"prompt": "0123456789abc"}], max_length=10, truncate="prompt").examples[0]
    assert TOKENIZER.decode(cut.prompt) == "3456789abc" and cut.extras["prompt"] == "0123456789abc"


def test_parts_of_a_dataset(tmp_path):
    rows = [{"prompt": f"q{i % 8}", "answer": str(i)} for i in range(16)]
    train, evaluation = split_off(build(tmp_path, rows), 0.25, 0)
    assert len(train.examples) == 12 and overlap(train, evaluation) == (0, 0) and overlap(train, train) == (12, 12)
    train, evaluation, reports, notices = load(tmp_path, rows, eval_fraction=0.25)
    assert (len(train), len(evaluation), reports["eval"]["used"]) == (12, 4, 4)
    assert any("8 examples occur more than once; they are kept" in notice for notice in notices)
    data = [{"path": write_jsonl(tmp_path / "y.jsonl", rows), "weight": 0.5}, {"path": write_jsonl(tmp_path / "z.jsonl", rows[:4])}]
    train, _, reports, _ = load(tmp_path, rows, data=data)
    assert len(train) == 12 and reports["train"]["used"] == 12


# ---- templates ----

def test_r1_zero_is_the_published_prompt():
    assert read_template("r1_zero") == R1_ZERO.format("{question}")


@pytest.mark.parametrize("row", [{"prompt": "q?"}, {"question": "q?", "answer": "1"}, {"messages": messages("q?", "a")},
                                 {"prompt": messages("q?")}, {"instruction": "q?"}, {"query": "q?"},
                                 {"chosen": "\n\nHuman: q?\n\nAssistant: a"}])
@pytest.mark.parametrize("tokenizer", [TOKENIZER, PLAIN], ids=["chat", "plain"])
def test_a_template_takes_the_question_as_plain_text(tmp_path, row, tokenizer):
    (example,), _, reports, _ = load(tmp_path, [row], tokenizer, "r1_zero")
    assert tokenizer.decode(example.prompt) == example.extras["prompt"] and example.extras["prompt"] == R1_ZERO.format("q?")
    assert example.extras["columns"] == row and "put into prompt_template" in reports["train"]["shape"]


def test_a_template_of_ones_own(tmp_path):
    (tmp_path / "mine.txt").write_text("Q: {question} {x}\n")
    rows = [{"question": "{question} {0}"}, {"question": "q", "system": "s"}]
    train, _, reports, _ = load(tmp_path, rows, prompt_template=str(tmp_path / "mine.txt"))
    assert [example.extras["prompt"] for example in train] == ["Q: {question} {0} {x}\n", "Q: q {x}\n"]
    assert "1 rows read as system + question, without its system turn, put into" in reports["train"]["shape"]


def test_templates_that_cannot_be_used(tmp_path):
    assert "'r1zero' is neither one of r1_zero nor" in refused(load, tmp_path, [{"prompt": "q"}], prompt_template="r1zero")
    assert "give r1_zero" in refused(read_template, "r1zero") and "prompt_template" in refused(read_template, str(tmp_path))
    (tmp_path / "none.prompt").write_text("{Question}")
    assert "no {question} in" in refused(read_template, str(tmp_path / "none.prompt"))
    (tmp_path / "latin.prompt").write_bytes(b"\xe9 {question}")
    assert "UTF-8" in refused(read_template, str(tmp_path / "latin.prompt"))
    for row in ({"messages": messages("q", "a", "r")}, {"query": "r", "history": [["q", "a"]]}, {"chosen": HH + "b"}):
        assert "more than one user turn in" in refused(load, tmp_path, [row], prompt_template="r1_zero")


# ---- the hub ----

def test_gsm8k_by_its_short_name(monkeypatch, tmp_path):
    import datasets
    rows, calls = [{"question": "q", "answer": "1 + 1 = 2\n#### 2"}], []
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: calls.append((arguments, options)) or rows)
    monkeypatch.chdir(tmp_path)
    for name in ("gsm8k", "gsm8k:test", "openai/gsm8k:test", "gsm8k/socratic:test"):
        list(hub_rows(name))
    assert calls == [(("openai/gsm8k", subset), {"split": split}) for subset, split in (
        ("main", "train"), ("main", "test"), ("main", "test"), ("socratic", "test"))]
    example, = build_dataset("gsm8k:test", "prompts", TOKENIZER, 99).examples
    assert (example.where, example.extras) == ("openai/gsm8k/main:test:1", {"prompt": Q, "columns": rows[0]})
    example, = build_dataset("gsm8k", "responses", TOKENIZER, 99).examples
    assert TOKENIZER.decode(example.responses[0].tokens, skip_special_tokens=True) == rows[0]["answer"]


@pytest.mark.parametrize("name, row", [("shp", {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 4,
                                                "score_B": 1}),
                                       ("se", {"question": "<p>q</p>", "answers": [{"text": "<p>a</p>", "pm_score": 1}] * 2})])
def test_prompts_of_scored_datasets(monkeypatch, name, row):
    import datasets
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: [row])
    example, = build_dataset(name, "prompts", TOKENIZER, 99, template="Q: {question}").examples
    assert example.extras["prompt"] == "Q: q"


def test_a_prompt_leaves_room_for_its_completion(tmp_path):
    rows = [{"prompt": "p" * length} for length in (3, 10, 11)]                        # bytes are tokens
    train, _, reports, _ = load(tmp_path, rows, byte_tokenizer(False), max_length=30, max_completion_length=20)
    assert [len(example.prompt) for example in train] == [3, 10]
    assert reports["train"]["dropped"] == {"longer than max_length": 1}
    with pytest.raises(UserError, match="max_completion_length is 30, which leaves no room for a prompt in max_length 30"):
        load(tmp_path, rows, byte_tokenizer(False), max_length=30, max_completion_length=30)
