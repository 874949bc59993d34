"""sample.py: the completions it keeps, files that train.py reads, the loops sample -> sft, sample -> dpo."""
import json
import os
import re
import subprocess

import pytest
from helpers import (
    CHATML,
    REWARDS,
    ROOT,
    byte_tokenizer,
    messages,
    metrics,
    prompt_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)

import evaluate
import sample
from data.dataset import build_dataset
from data.errors import RunError, UserError
from engine.config import load_config
from engine.results import read_settings

Q = messages("q")


def group(id, *completions, prompt=Q):
    """Rows of one prompt from (text, reward) or (text, reward, whether it ended by itself)."""
    rows = []
    for text, reward, *finished in completions:
        rows.append({
            "id": id,
            "prompt": prompt,
            "generation": text,
            "metrics": {"reward": reward},
            "finished": all(finished),
        })
    return rows


def prompts_of(dataset):
    return {example.prompt.tobytes() for example in dataset.examples}


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_best_and_worst_of_hand_made_completions():
    rows = group(0, ("a", 0.0), ("b", 1.0), ("c", 1.0), ("d", -1.0))
    rows += group(1, ("x", 2.0), ("y", 0.5), prompt="p ")
    best, pairs, counts = sample.select(rows, None)
    assert best == [
        {"prompt": Q, "completion": messages("q", "b")[1:], "reward": 1.0},
        {"prompt": "p ", "response": "x", "reward": 2.0},
    ]
    chosen = messages("q", "b")[1:]
    rejected = messages("q", "d")[1:]
    assert pairs == [
        {"prompt": Q, "chosen": chosen, "rejected": rejected, "rewards": [1.0, -1.0]},
        {"prompt": "p ", "chosen": "x", "rejected": "y", "rewards": [2.0, 0.5]},
    ]
    assert counts["prompts"] == 2 and counts["completions"] == 6
    assert counts["mean reward"] == 3.5 / 6 and counts["mean reward of sft.jsonl"] == 1.5


def test_what_is_left_out_is_counted():
    rows = group(0, ("truncated", 9.0, False), ("b", 1.0), ("c", 0.0))
    rows += group(1, ("truncated", 1.0, False), ("truncated", 0.0, False))
    rows += group(2, ("same", 1.0), ("as", 1.0))
    rows += group(3, (" ", 5.0), ("b", None), ("c", 0.5))
    rows += group(4, ("a", 0.0), ("b", 0.2))
    best, pairs, counts = sample.select(rows, None)
    assert [row["completion"][0]["content"] for row in best] == ["b", "same", "c", "b"] and len(pairs) == 2
    known = {
        "not finished": 3,
        "empty": 1,
        "without reward": 1,
        "prompts without a choice": 1,
        "prompts with equal rewards": 2,
        "prompts below min_reward": 0,
    }
    assert counts.items() >= known.items()
    best, pairs, counts = sample.select(rows, 0.5)
    assert [row["reward"] for row in best] == [1.0, 1.0, 0.5] and len(pairs) == 1
    assert counts["prompts below min_reward"] == 1


def test_files_are_read_by_train(tmp_path, capsys):
    """Conversations and plain strings, real completions; with another min_reward nothing is sampled again."""
    model = tiny_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(9))
    out = tmp_path / "out"
    words = [model, f"data={data}", f"reward={REWARDS}:varied", f"output={out}", "n=4",
             "max_completion_length=100"]
    sample.main(words)
    rows = read(out / "samples_results.jsonl")
    best, pairs, counts = sample.select(rows, None)
    summary = json.loads((out / "summary.json").read_text())
    del summary["settings"]
    assert len(rows) == 36 and counts == summary
    tokenizer = byte_tokenizer()
    for name, kind, expected in [("sft", "responses", best), ("preference", "pairs", pairs)]:
        dataset = build_dataset(str(out / f"{name}.jsonl"), kind, tokenizer, 512)
        assert len(dataset.examples) == len(expected) > 5 and not dataset.report["dropped"]
        assert all(example.responses[0].tokens[-1] == 258 for example in dataset.examples)
    sft = build_dataset(str(out / "sft.jsonl"), "responses", tokenizer, 512)
    prompts = build_dataset(data, "prompts", tokenizer, 512)
    assert prompts_of(sft) <= prompts_of(prompts)
    before = (out / "samples_results.jsonl").read_bytes()
    sample.main([*words, "min_reward=0.9"])
    assert (out / "samples_results.jsonl").read_bytes() == before
    assert all(row["reward"] >= 0.9 for row in read(out / "sft.jsonl"))
    with pytest.raises(RunError, match="no completion is kept .*min_reward"):
        sample.main([*words, "min_reward=2"])
    with pytest.raises(UserError, match=r"\(temperature differ\)"):
        sample.main([*words, "temperature=0.7"])


TOOL_TEMPLATE = "{% if tools %}<|im_start|>tools {{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML
TOOL = {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("row", [
    {"prompt": messages("q"), "tools": [TOOL], "answer": "4"},
    {"prompt": messages("q", "2+2 is "), "answer": "4"},
    {"prompt": messages("q", "a", "and then?"), "tools": json.dumps([TOOL]), "answer": "4"},
    {"question": "q", "system": "Be kind.", "answer": "4"}])
def test_what_was_sampled_is_trained_token_by_token(tmp_path, row):
    """With tools, with the beginning of the assistant's turn, and behind turns that were not sampled: the ids
    of the prompt and those of the completion, which are the bytes of its text."""
    model = tiny_model(tmp_path / "model", chat_template=TOOL_TEMPLATE)
    data = write_jsonl(tmp_path / "prompts.jsonl", [row])
    sample.main([model, f"data={data}", f"reward={REWARDS}:varied", f"output={tmp_path}/out", "n=16",
                 "max_completion_length=200"])
    tokenizer = byte_tokenizer(TOOL_TEMPLATE)
    prompt, = prompts_of(build_dataset(data, "prompts", tokenizer, 512))
    rows = read(tmp_path / "out" / "samples_results.jsonl")
    finished = [row["generation"] for row in rows if row["finished"]]
    for name, kind in [("sft", "responses"), ("preference", "pairs")]:
        example, = build_dataset(str(tmp_path / "out" / f"{name}.jsonl"), kind, tokenizer, 512).examples
        assert example.prompt.tobytes() == prompt
        for response in example.responses:
            assert response.trained.all() and response.tokens[-1] == 258
            assert tokenizer.decode(response.tokens[:-1]) in finished


@pytest.mark.parametrize("algorithm, file", [("sft", "sft.jsonl"), ("dpo", "preference.jsonl")])
def test_training_on_what_was_kept(kept, monkeypatch, algorithm, file):
    """The loop on a small part of the embedded data: the loss of the rows that were kept decreases."""
    monkeypatch.chdir(ROOT)
    config = write_config(kept / f"{algorithm}.yml", algorithm=algorithm, model="example/tiny/model",
                          data=kept / file, eval_data=kept / file, output=kept / algorithm, lr=1e-4,
                          batch_size=8, epochs=2, max_length=256)
    train_here(config)
    first, *_, last = metrics(kept / algorithm, "eval")
    assert last["loss"] < 0.9 * first["loss"]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        sample.main(["example/tiny/model", "data=example/tiny/prompts.jsonl", "reward=r1_zero",
                     "min_reward=1", "limit=24", "n=4", "max_completion_length=80", f"output={folder}"])
    best = read(folder / "sft.jsonl")
    assert 12 <= len(best) <= 24
    assert all("</think> <answer>" in row["completion"][0]["content"] for row in best)
    return folder


@pytest.mark.parametrize("keys, message", [
    ("n=1", "n .* is 1, which leaves no choice"),
    ("temperature=0", "temperature 0"),
    ("min_rewards=1", "fix: write min_reward"),
])
def test_refused(tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        sample.main([str(tmp_path), "data=x.jsonl", "reward=gsm8k", keys])


def test_a_missing_reward_is_refused(tmp_path):
    with pytest.raises(UserError, match="reward is missing"):
        sample.main([str(tmp_path), "data=x.jsonl"])


@pytest.fixture
def calls_of(tmp_path):
    """calls_of(a command that runs example/iterative-dpo.sh) -> the words of each program that it starts. The
    programs are not run."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$*" >> "$(dirname "$0")/calls"\n')
    stub.chmod(0o755)
    variables = dict(PATH=f"{tmp_path}:{os.environ['PATH']}", OUTPUT="out", ROUNDS="2")

    def calls_of(command):
        subprocess.run(["bash", "-c", command], env=variables, cwd=ROOT, check=True)
        return [line.split() for line in (tmp_path / "calls").read_text().splitlines()]

    return calls_of


def test_the_command_for_another_model(calls_of):
    """The rounds are compared on the data that the model is trained for."""
    text = (ROOT / "example" / "iterative-dpo.sh").read_text().replace("\\\n#", "")
    command, = re.findall(r"^# +(MODEL=.*)", text, re.MULTILINE)
    data = {"evaluate.py": "data=gsm8k:test", "sample.py": "data=gsm8k"}
    for program, *words in calls_of(command):
        assert program == "train.py" or {data[program], "reward=gsm8k"} < set(words)


def test_the_chain_of_iterative_dpo(calls_of):
    """Each round begins with what the one before learned; the programs know all keys."""
    calls = calls_of("bash example/iterative-dpo.sh lr=1e-5")
    programs = [call[0] for call in calls]
    assert programs == ["evaluate.py", *["sample.py", "train.py", "evaluate.py"] * 2]
    start = "example/tiny/model"
    assert [call[1] for call in calls if call[0] == "evaluate.py"] == [start, "out/dpo-1", "out/dpo-2"]
    assert [call[1] for call in calls if call[0] == "sample.py"] == [start, "out/dpo-1"]
    for number, (_, config, *words) in enumerate([call for call in calls if call[0] == "train.py"], start=1):
        common = load_config([str(ROOT / config), *words]).common
        assert (common.model, common.lr) == ([start, "out/dpo-1"][number - 1], 1e-5)
        assert (common.data, common.output) == (f"out/sampled-{number}/preference.jsonl", f"out/dpo-{number}")
    for program, *words in calls:
        if program != "train.py":
            kind = sample.Config if program == "sample.py" else evaluate.Config
            assert read_settings(words, kind, program).reward == "r1_zero"
