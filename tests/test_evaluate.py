"""evaluate.py: what it writes, averages and intervals, an interrupted evaluation, preferences, bad input."""
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    REWARDS,
    ROOT,
    byte_tokenizer,
    messages,
    metrics,
    pair_rows,
    prompt_rows,
    refused,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

import evaluate
from data.errors import UserError
from engine import evaluation, results
from engine.results import name_of
from model import lora
from model.build import build_policy
from model.keys import ModelKeys
from model.sampler import Completion

QUESTIONS = []
for i in range(6):
    answer = f"{i} + {i} = {2 * i}\n#### {2 * i}"
    QUESTIONS.append({"question": f"What is {i} plus {i}?", "answer": answer})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two random models, with and without a chat template, and data."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model(folder / "chat")
    tiny_model(folder / "base", chat_template=False)
    tiny_model(folder / "other", seed=1)
    write_jsonl(folder / "gsm8k-test.jsonl", QUESTIONS)
    write_jsonl(folder / "prompts.jsonl", prompt_rows(7))
    write_jsonl(folder / "pairs.jsonl", pair_rows(9))
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    """run(model, data, key=value ...) -> (rows, summary, what it printed)."""
    def run(model, data, output="out", **keys):
        keys = {"max_completion_length": 10, "output": tmp_path / output, **keys}
        words = [f"{key}={value}" for key, value in keys.items()]
        evaluate.main([str(folder / model), f"data={folder / data}", *words])
        stem = tmp_path / output / f"{name_of(data)}_eval"
        lines = Path(f"{stem}_results.jsonl").read_text().splitlines()
        summary = json.loads(Path(f"{stem}_summary.json").read_text())
        return list(map(json.loads, lines)), summary, "".join(capsys.readouterr())
    return run


def written(monkeypatch, texts, finished=True):
    """Let the model write `texts`, in turn."""
    tokenizer = byte_tokenizer()
    texts = itertools.cycle(texts)

    def completion():
        tokens = np.array(tokenizer(next(texts)).input_ids + [258], np.int32)
        return Completion(tokens, np.zeros(len(tokens), np.float32), finished)

    def sample(policy, _, prompts, keys, copies, sampling, report=None):
        groups = []
        for _ in prompts:
            groups.append([completion() for _ in range(copies)])
        return groups

    monkeypatch.setattr(results, "sample", sample)


# ---- averages ----

def completion(id, reward, **metrics):
    return {"id": id, "metrics": {**metrics, "reward": reward}, "tokens": 10 * (id + 1), "finished": id > 0}


def test_summary_of_hand_made_results():
    rows = [
        completion(0, 1.0, format_reward=1.0, answer_reward=1.0),
        completion(1, 0.0, format_reward=1.0, answer_reward=0.0),
        completion(2, 0.0, format_reward=0.0, answer_reward=0.0),
        completion(3, 0.0, format_reward=1.0, answer_reward=0.0),
    ]
    summary = evaluate.summary_of_completions(rows)
    known = {
        "num_examples": 4,
        "format_rate": 0.75,
        "accuracy": 0.25,
        "avg_reward": 0.25,
        "mean_tokens": 25.0,
        "finished_rate": 0.75,
    }
    assert summary.items() >= known.items()
    assert "pass@1" not in summary and "num_samples" not in summary


def test_a_completion_without_a_reward_counts_nowhere():
    summary = evaluate.summary_of_completions([completion(0, 0.5), completion(1, None), completion(2, 1.5)])
    assert summary["avg_reward"] == 1.0 and summary["without_reward"] == 1 and "accuracy" not in summary
    half = 1.959964 * math.sqrt(0.5 / 2)
    assert summary["avg_reward_95"] == pytest.approx([1 - half, 1 + half])
    with pytest.raises(UserError, match="returned None for every"):
        evaluate.summary_of_completions([completion(0, None)])


@pytest.mark.parametrize("right, count", [(0, 200), (3, 10), (10, 10), (61, 1319)])
def test_wilson_interval_ends_where_a_test_would_just_reject(right, count):
    """Its ends are the true shares p at which the share seen lies 1.96 standard deviations of p away."""
    share = right / count
    low, high = evaluate.rate("x", [1.0] * right + [0.0] * (count - right), count)["x_95"]
    assert 0 <= low <= share <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        if abs(end - share) > 1e-9:
            assert abs(share - end) / math.sqrt(end * (1 - end) / count) == pytest.approx(1.959964)


def test_pass_at_k_is_the_share_of_all_choices():
    cases = [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 1, 4), (6, 0, 6), (4, 4, 2), (8, 3, 6)]
    for n, right, k in cases:
        choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert evaluate.pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_k_of_several_prompts():
    rewards = [(1.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0)]
    rows = []
    for i, group in enumerate(rewards):
        rows += [completion(i, reward) for reward in group]
    summary = evaluate.summary_of_completions(rows)
    assert summary["num_examples"] == 3 and summary["num_samples"] == 12
    assert summary["accuracy"] == summary["pass@1"] == pytest.approx(5 / 12)
    assert summary["pass@2"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert summary["pass@4"] == pytest.approx(2 / 3)
    # the completions of a prompt are not independent
    once = evaluate.rate("x", [1.0] * 5 + [0.0] * 7, 3)["x_95"]
    assert summary["accuracy_95"] == once


# ---- prompts and completions ----

def test_hand_made_generations_are_scored_exactly(run, monkeypatch):
    texts = {      # text -> rewards of format and answer
        " zero </think> <answer> 0 </answer>": (1.0, 1.0),
        "2</think> <answer>3</answer>": (1.0, 0.0),
        "4</think><answer>4</answer>": (0.0, 0.0),
        "6": (0.0, 0.0),
        "</think>  <answer>$8.00</answer>": (1.0, 1.0),
        "</think> <answer>10 eggs</answer>": (1.0, 0.0),
    }
    written(monkeypatch, texts)
    rows, summary, shown = run("base", "gsm8k-test.jsonl", reward="r1_zero")
    for i, (row, (text, (form, answer))) in enumerate(zip(rows, texts.items(), strict=True)):
        assert row["metrics"] == {"format_reward": form, "answer_reward": answer, "reward": answer}
        assert row["id"] == i and row["gold_answer"] == str(2 * i)
        assert row["generation"] == text              # without the stop token
    assert rows[1]["prompt"].endswith("User: What is 1 plus 1?\nAssistant: <think>")
    assert (summary["num_examples"], summary["format_rate"], summary["accuracy"]) == (6, 4 / 6, 2 / 6)
    assert summary["settings"]["stop"] == "</answer>"
    assert summary["results_path"].endswith("out/gsm8k_eval_results.jsonl")
    assert "prompt_template r1_zero, stop </answer>" in shown and "accuracy         0.3333   (95 %: " in shown


def test_several_rewards_and_functions(run, monkeypatch):
    written(monkeypatch, ["0", "b", "2"])
    reward = f"gsm8k, {REWARDS}:some"
    rows, summary, _ = run("chat", "prompts.jsonl", reward=reward, reward_weights="2,1", n=3)
    assert len(rows) == 21 and rows[0]["metrics"].keys() == {"reward", "rewards/gsm8k", "rewards/some"}
    for row in rows:
        last, other = row["metrics"]["rewards/gsm8k"], row["metrics"]["rewards/some"]
        assert last == float(row["generation"] == row["gold_answer"])
        assert row["metrics"]["reward"] == pytest.approx(2 * last + (other or 0)) and row["sample"] < 3
    assert {row["metrics"]["rewards/some"] is None for row in rows} == {True, False}
    assert summary["num_samples"] == 21


ALPACA = [{"instruction": "Say a.", "output": "of another model", "dataset": "helpful_base"},
          {"instruction": "Say b.", "output": "of another model", "dataset": "koala"}]


def test_alpaca_format(run, folder, tmp_path, monkeypatch):
    """What AlpacaEval's --model_outputs takes: a JSON list, one entry per instruction."""
    written(monkeypatch, ["A \u00e9\n", "more", "B", "more"])
    write_jsonl(folder / "alpaca.jsonl", ALPACA)
    rows, summary, shown = run("chat", "alpaca.jsonl", dump="alpaca", n=2)
    assert len(rows) == 4 and summary["finished_rate"] == 1 and "avg_reward" not in summary
    path = tmp_path / "out" / "alpaca_alpaca.json"
    assert f"alpaca   {path}" in shown
    generator = str(folder / "chat")
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"instruction": "Say a.", "output": "A \u00e9\n", "generator": generator, "dataset": "helpful_base"},
        {"instruction": "Say b.", "output": "B", "generator": generator, "dataset": "koala"}]


def test_alpaca_format_of_other_rows(run, tmp_path):
    """With a reward as well; rows without a column `dataset` have the data's name."""
    _, summary, _ = run("chat", "gsm8k-test.jsonl", dump="alpaca", reward="gsm8k")
    found = json.loads((tmp_path / "out" / "gsm8k_alpaca.json").read_text(encoding="utf-8"))
    assert "accuracy" in summary and len(found) == len(QUESTIONS)
    assert [row["instruction"] for row in found] == [row["question"] for row in QUESTIONS]
    assert {row["dataset"] for row in found} == {"gsm8k"}


def test_which_prompt_is_used(run, folder):
    question = "What is 0 plus 0?"
    keys = dict(reward="r1_zero", limit=1)
    assert run("chat", "gsm8k-test.jsonl", "a", **keys)[0][0]["prompt"] == messages(question)
    template = run("chat", "gsm8k-test.jsonl", "b", prompt_template="r1_zero", **keys)[0][0]["prompt"]
    assert template.endswith(f"User: {question}\nAssistant: <think>")
    assert run("base", "gsm8k-test.jsonl", "c", **keys)[0][0]["prompt"] == template
    assert run("base", "gsm8k-test.jsonl", "d", prompt_template="null", **keys)[0][0]["prompt"] == question
    rows, summary, _ = run("base", "gsm8k-test.jsonl", "e", reward="gsm8k", limit=1)
    assert rows[0]["prompt"] == question and summary["settings"]["stop"] is None


def test_a_run_is_asked_as_it_was_trained(run, folder):
    """`prompt_template`, `stop` and `max_completion_length` of its configuration hold where the command line
    says nothing."""
    (folder / "some.prompt").write_text("Q: {question} A:")
    trained = folder / "trained"
    shutil.copytree(folder / "chat", trained)
    keys = {"prompt_template": folder / "some.prompt", "stop": "END", "max_completion_length": 7}
    write_config(trained / "config.yaml", **keys)
    shutil.copytree(folder / "chat", trained / "final")
    for model in ("trained", "trained/final"):
        rows, summary, shown = run(model, "gsm8k-test.jsonl", model.replace("/", "-"), reward="r1_zero",
                                   limit=1, max_completion_length="null")
        assert rows[0]["prompt"] == "Q: What is 0 plus 0? A:" and summary["settings"]["stop"] == "END"
        assert summary["settings"]["max_completion_length"] == 7 and rows[0]["tokens"] <= 7
        assert "some.prompt, stop END; completions of up to 7 tokens\n" in shown


def test_what_is_too_long_with_the_chat_template_is_told(run):
    """The longest question, 18 bytes, fits as plain text but not as a turn of 62 bytes: 10 of max_length are
    kept for the completion."""
    with pytest.raises(UserError, match="none of the 6 rows .* longer than max_length .* raise max_length"):
        run("chat", "gsm8k-test.jsonl", reward="r1_zero", max_length=40)


def test_greedy_is_what_the_library_generates(run, folder):
    rows, _, _ = run("chat", "prompts.jsonl", reward=f"{REWARDS}:varied", temperature=0)
    tokenizer = byte_tokenizer()
    lm = AutoModelForCausalLM.from_pretrained(folder / "chat")
    for row in rows:
        text = row["prompt"]
        if not isinstance(text, str):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text).input_ids])
        output = lm.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=258, pad_token_id=256)
        generated = output[0, ids.shape[1]:]
        assert row["generation"] == tokenizer.decode(generated, skip_special_tokens=True)


def test_continued_results_are_those_of_one_go(run, tmp_path, monkeypatch):
    """A kill in the middle of a line, and a limit that is raised; a whole evaluation loads no model."""
    keys = dict(reward=f"{REWARDS}:varied", n=2, rollout_batch_size=4)
    whole, _, _ = run("chat", "prompts.jsonl", **keys)
    file = tmp_path / "out" / "prompts_eval_results.jsonl"
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    in_line_10 = "".join(lines[:9]) + lines[9][:20]
    for cut in (in_line_10, "".join(lines[:3]), lines[0][:-1], "", text[:-1], lines[0] + "\0\0\0"):
        file.write_text(cut)
        assert run("chat", "prompts.jsonl", **keys)[0] == whole and file.read_text() == text
    first, summary, _ = run("chat", "prompts.jsonl", "limited", limit=3, **keys)
    assert first == whole[:6] and summary["num_examples"] == 3
    again, _, shown = run("chat", "prompts.jsonl", "limited", **keys)
    assert again == whole and "2 of 7 rows are done already" in shown
    with pytest.raises(UserError, match="holds results of 7 rows, limit is 3; fix: "):
        run("chat", "prompts.jsonl", "limited", limit=3, **keys)
    monkeypatch.setattr(results, "load_frozen", None)
    assert run("chat", "prompts.jsonl", "limited", **keys)[0] == whole


@pytest.mark.parametrize("key, before, after, told", [
    ("digests of model", {"m": {"files": {"x": "1"}}}, {"m": {"files": {"x": "1", "y": "2"}}}, False),
    ("digests of model", {"m": {"files": {"x": "1"}}}, {"m": {"files": {"x": "2"}}}, True),
    ("digests of reward", {"f": "1"}, {"f": "2"}, True),
    ("digests of reward", {"f": "1"}, None, True),
    ("temperature", 0.5, 0.5, False)])
def test_which_settings_differ(key, before, after, told):
    """The cache may have got more files of the same hub model."""
    assert results.differ(key, before, after) == told


def test_other_settings_in_the_same_output(run, folder):
    keys = dict(reward="r1_zero", limit=2)
    run("chat", "gsm8k-test.jsonl", **keys)
    with pytest.raises(UserError, match=r"other settings \(temperature, top_k differ\); fix: "):
        run("chat", "gsm8k-test.jsonl", temperature=0.5, top_k=3, **keys)
    with pytest.raises(UserError, match=r"\(digests of model, model differ\)"):
        run("other", "gsm8k-test.jsonl", **keys)
    (folder / "changing").mkdir()
    write_jsonl(folder / "changing" / "gsm8k-test.jsonl", QUESTIONS[:3])
    run("chat", "changing/gsm8k-test.jsonl", "third", **keys)
    write_jsonl(folder / "changing" / "gsm8k-test.jsonl", QUESTIONS[:2])
    with pytest.raises(UserError, match=r"\(data_sha256 differ\)"):
        run("chat", "changing/gsm8k-test.jsonl", "third", **keys)


def test_data_names():
    names = {
        "gsm8k": "gsm8k",
        "openai/gsm8k:test": "gsm8k",
        "data/gsm8k-test.jsonl": "gsm8k",
        "a/prompts.jsonl.gz": "prompts",
        "test.jsonl": "test",
        "owner/some.data:train": "some.data",
        "eval-prompts.jsonl": "eval-prompts",
    }
    for data, name in names.items():
        assert name_of(data) == name


# ---- pairs ----

@torch.no_grad()
def summed_logps(lm, examples):
    """[chosen, rejected] for each pair, by the model's own forward."""
    found = []
    for example in examples:
        for response in example.responses:
            ids = torch.tensor([[*example.prompt, *response.tokens]])
            logps = lm(ids).logits[0, :-1].log_softmax(-1)
            of_tokens = logps.gather(1, ids[0, 1:, None])
            found.append(float(of_tokens[len(example.prompt) - 1:].sum()))
    return np.array(found).reshape(-1, 2)


def test_preferences_against_the_plain_forward(run, folder):
    from data.dataset import build_dataset
    examples = build_dataset(str(folder / "pairs.jsonl"), "pairs", byte_tokenizer(), 512).examples
    chat = AutoModelForCausalLM.from_pretrained(folder / "chat")
    logps = summed_logps(chat, examples)
    rows, summary, _ = run("chat", "pairs.jsonl")
    scores = [[row["metrics"]["chosen"], row["metrics"]["rejected"]] for row in rows]
    assert np.array(scores) == pytest.approx(logps, rel=1e-4)
    assert summary["accuracy"] == np.mean(logps[:, 0] > logps[:, 1]) and 0 < summary["accuracy"] < 1
    assert rows[2]["chosen"] == "it is 2 it is 2 it is 2 <|im_end|>"

    rows, summary, _ = run("chat", "pairs.jsonl", "implicit", reference=folder / "other")
    rewards = logps - summed_logps(AutoModelForCausalLM.from_pretrained(folder / "other"), examples)
    margins = rewards[:, 0] - rewards[:, 1]
    assert [row["metrics"]["margin"] for row in rows] == pytest.approx(margins, rel=1e-3, abs=1e-3)
    assert summary["accuracy"] == np.mean(margins > 0)


def run_with(folder, name, **keys):
    """A run directory without training: the configuration and a final model."""
    write_config(folder / "config.yml", **keys)
    shutil.copytree(folder / "chat", folder / name / "final")
    shutil.copytree(folder / "chat", folder / name / "checkpoints" / "step-000001")
    (folder / "config.yml").rename(folder / name / "config.yaml")


def test_pairs_are_read_as_the_run_read_them(run, folder):
    """Strings as turns where the run had a system prompt, transcripts as text where it had `hh: text`."""
    start = "\n\nHuman: Hi\n\nAssistant:"
    write_jsonl(folder / "strings.jsonl", [{"prompt": "Hi", "chosen": "yes", "rejected": "no"}])
    write_jsonl(folder / "hh.jsonl", [{"chosen": f"{start} yes", "rejected": f"{start} no"}])
    run_with(folder, "system", algorithm="orpo", model=folder / "chat", system_prompt="Be brief.")
    run_with(folder, "raw", algorithm="orpo", model=folder / "chat", hh="text")
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    prompts = {("system", "strings.jsonl"): turn, ("raw", "strings.jsonl"): "Hi",
               ("system", "hh.jsonl"): turn, ("raw", "hh.jsonl"): start}
    for (model, data), prompt in prompts.items():
        (row,), _, _ = run(model, data, f"{model}-{data}")
        assert row["prompt"] == prompt and row["chosen"].strip() == "yes<|im_end|>"


def test_the_reference_of_a_run_is_found_and_the_accuracy_named(run, folder):
    """A run's own reference, or its start model; none for an algorithm without, and none where asked so."""
    start = folder / "other"
    tiny_model(folder / "third", seed=2)
    run_with(folder, "dpo", algorithm="dpo", model=start, reference="null")
    run_with(folder, "named", algorithm="dpo", model=folder / "third", reference=start)
    run_with(folder, "orpo", algorithm="orpo", model=start)
    run_with(folder, "free", algorithm="dpo", model=start, reference="null", reference_free="true")
    run_with(folder, "grpo", algorithm="grpo", model=start, reference="null", beta=0, reward="gsm8k")
    run_with(folder, "own", algorithm="of-a-copy", model=start, reference="null")
    _, wanted, _ = run("chat", "pairs.jsonl", "wanted", reference=start)
    _, plain, _ = run("chat", "pairs.jsonl", "plain")
    assert wanted["avg_margin"] != plain["avg_margin"]
    assert plain["preferred_by"] == "log-prob (no reference)"
    for model in ("dpo", "dpo/final", "dpo/checkpoints/step-000001", "named", "own"):
        _, summary, shown = run(model, "pairs.jsonl", model.replace("/", "-"))
        assert summary["avg_margin"] == wanted["avg_margin"]
        assert summary["preferred_by"] == f"implicit reward (log-prob minus that of {start})"
        assert f"reference: {start}, the run's own" in shown
    for model, keys in (("orpo", {}), ("free", {}), ("grpo", {}), ("dpo", {"reference": "null"})):
        _, summary, shown = run(model, "pairs.jsonl", f"plain-{model}", **keys)
        assert summary["avg_margin"] == plain["avg_margin"]
        assert "preferred_by     log-prob (no reference)" in shown
    run_with(folder, "moved", algorithm="dpo", model=folder / "gone", reference="null")
    with pytest.raises(UserError, match="reference: there is no directory .*gone"):
        run("moved", "pairs.jsonl", "moved")


def test_a_margin_within_rounding_is_a_tie(run, folder):
    rows, summary, _ = run("chat", "pairs.jsonl", "same", reference=folder / "chat")
    assert summary["accuracy"] == 0 and summary["ties"] == 9
    chat = AutoModelForCausalLM.from_pretrained(folder / "chat")
    chat.model.norm.weight.data *= 1 - 1e-6                      # as another CPU might compute it
    chat.save_pretrained(folder / "nearly")
    byte_tokenizer().save_pretrained(folder / "nearly")
    rows, summary, _ = run("chat", "pairs.jsonl", "nearly", reference=folder / "nearly")
    assert summary["accuracy"] == 0 and summary["ties"] == 9
    assert any(row["metrics"]["margin"] > 0 for row in rows)


def test_a_reward_model_scores_pairs_and_completions_and_writes_none(run, folder):
    pairs = folder / "pairs.jsonl"
    config = write_config(folder / "rm.yml", algorithm="rm", model=folder / "chat", data=pairs,
                          eval_data=pairs, output=folder / "rm", batch_size=3, lr=1e-2, max_length=256)
    train_here(config)
    rows, summary, _ = run("rm", "pairs.jsonl", "pairs")
    last = metrics(folder / "rm", "eval")[-1]
    assert summary["accuracy"] == pytest.approx(last["accuracy"])
    rows, summary, _ = run("chat", "prompts.jsonl", "completions", reward=folder / "rm")
    assert len({row["metrics"]["reward"] for row in rows}) > 3
    assert summary["avg_reward_95"][0] < summary["avg_reward"]
    with pytest.raises(UserError, match="is a reward model, which writes no text; fix: "):
        run("rm", "prompts.jsonl", reward="gsm8k")


@pytest.mark.parametrize("algorithm, name, scale", [("dpo", "rewards/margins", 0.1), ("rm", "margin", 1)])
def test_a_lora_run_is_scored_as_it_scores_itself(run, folder, algorithm, name, scale):
    """An adapter's directory has no config.json. `scale` is dpo's beta."""
    pytest.importorskip("peft")
    pairs, path = folder / "pairs.jsonl", folder / f"lora-{algorithm}"
    train_here(write_config(
        folder / "lora.yml", algorithm=algorithm, model=folder / "chat", data=pairs, eval_data=pairs,
        output=path, batch_size=3, lr=1e-2, max_length=256, lora_r=2))
    assert not (path / "final" / "config.json").exists()
    last = metrics(path, "eval")[-1]
    for model in (path, path / "final"):
        rows, summary, _ = run(model, "pairs.jsonl", f"{algorithm}-{model.name}")
        assert scale * summary["avg_margin"] == pytest.approx(last[name], rel=1e-4, abs=1e-4)
        assert len({row["metrics"]["margin"] for row in rows}) > 3


def untrained_adapter(folder, base):
    """An adapter that changes nothing."""
    pytest.importorskip("peft")
    lm = build_policy(str(base), byte_tokenizer(), ModelKeys(lora_r=2)).lm
    trained = {name: weight for name, weight in lm.named_parameters() if weight.requires_grad}
    folder.mkdir()
    lora.save(lm, trained, str(folder))
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_an_adapter_and_its_reference_have_one_arithmetic(run, folder, tmp_path, monkeypatch):
    """The GPU's, stood in for: the base of an adapter in bf16, other models in fp32."""
    def rounding(*arguments, trains_adapter, **options):
        policy = build_policy(*arguments, trains_adapter=trains_adapter, **options)
        for weight in policy.lm.parameters():
            if trains_adapter:
                weight.data = weight.data.bfloat16().float()
        return policy

    monkeypatch.setattr(evaluation, "build_policy", rounding)
    pair = untrained_adapter(tmp_path / "adapter", folder / "chat"), folder / "chat"
    for i, (model, reference) in enumerate((pair, pair[::-1], pair[:1] * 2)):
        rows, summary, _ = run(model, "pairs.jsonl", f"adapter-{i}", reference=reference)
        assert {row["metrics"]["margin"] for row in rows} == {0.0} and summary["ties"] == 9
    plain, _, _ = run("chat", "pairs.jsonl", "fp32")
    rounded, _, _ = run(pair[0], "pairs.jsonl", "bf16")
    assert plain[0]["metrics"]["margin"] != rounded[0]["metrics"]["margin"]


# ---- bad input ----

@pytest.mark.parametrize("keys, message", [
    ("", "no reward for .*whose rows are not pairs; fix: add reward="),
    ("rewards=r1_zero", "unknown key 'rewards' .*fix: write reward"),
    ("output_dir=x", "unknown key 'output_dir' .*fix: write output"),
    ("reward=r1zero", "'r1zero' in reward is neither.*r1_zero"),
    ("reward=r1_zero temperature=hot", "temperature .*fix: give a number"),
    ("reward=r1_zero temperature=0 n=4", "n .*temperature 0"),
    ("reward=r1_zero limit=0", "limit .* is 0; fix: give 1 or more"),
    ("reward=r1_zero max_length=1000", "knows only 512 positions; fix: lower max_length"),
    ("reward=r1_zero reference=x", "reference .*only used with pair data"),
    ("reward=r1_zero output=../x", "output .*fix: "),
])
def test_refused(run, keys, message):
    values = dict(word.split("=") for word in keys.split())
    text = refused(run, "chat", "gsm8k-test.jsonl", **values)
    assert re.search(message, text)


@pytest.mark.parametrize("model, data, message", [
    ("none", "gsm8k-test.jsonl", "model: .*; fix: "),
    ("chat", "gsm8k-tests.jsonl", "no file .*gsm8k-tests.jsonl .*nearest.*; fix: "),
    ("chat", "pairs.jsonl", "no gold answer in .*pairs.jsonl:1.*; fix: "),
])
def test_refused_model_or_data(run, model, data, message):
    assert re.search(message, refused(run, model, data, reward="r1_zero"))


def test_only_the_rows_within_the_limit_must_have_gold_answers_that_verify(run, tmp_path):
    rows = [{"question": "2 + 2?", "answer": "4"}, {"question": "2 + 2?", "answer": "none"}]
    data = write_jsonl(tmp_path / "gold.jsonl", rows)
    assert len(run("chat", data, "first", reward="gsm8k", limit=1)[0]) == 1
    message = r"gsm8k cannot verify the gold answers of 1 of 2 rows, in .*gold.jsonl:2 \('none'\)"
    with pytest.raises(UserError, match=message):
        run("chat", data, "both", reward="gsm8k")


def test_an_output_that_is_a_file(run, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="output: .*cannot be used"):
        run("chat", "pairs.jsonl")


def test_bad_input_from_a_shell():
    command = [sys.executable, "evaluate.py", "data=x.jsonl"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == ("error: model is missing in the command line; "
                           "fix: python evaluate.py MODEL data=... reward=...\n")


def test_help_names_every_key_once(capsys):
    evaluate.main(["--help"])
    shown = capsys.readouterr().out
    assert all(shown.count(f"\n    {field.name}: ") == 1 for field in fields(evaluate.Config))


def test_well_known_data_means_its_test_split(monkeypatch, tmp_path):
    class Asked(Exception):
        pass

    def complete(settings, path, name, notice):
        raise Asked(settings.data, name, settings.output)

    monkeypatch.setattr(evaluate, "complete", complete)
    cases = [
        (["runs/m", "data=gsm8k"], ("gsm8k:test", "gsm8k_eval", "runs/eval/m-gsm8k")),
        (["a/b", "data=openai/gsm8k:train", "output=x"], ("openai/gsm8k:train", "gsm8k_eval", "x")),
    ]
    for words, asked in cases:
        with pytest.raises(Asked) as caught:
            evaluate.main([*words, "reward=r1_zero"])
        assert caught.value.args == asked


@pytest.mark.parametrize("data, is_said", [
    ("openai/gsm8k", True), ("hh/harmless-base", True), ("openai/gsm8k:train", False), ("gsm8k", False),
    ("rows.jsonl", False)])
def test_the_split_of_a_name_without_one_is_said(monkeypatch, capsys, data, is_said):
    def complete(*arguments):
        raise UserError("enough; fix: none")

    monkeypatch.setattr(evaluate, "complete", complete)
    with pytest.raises(UserError, match="enough"):
        evaluate.main(["runs/m", f"data={data}", "reward=r1_zero"])
    said = f"{data}: the split train is scored" in capsys.readouterr().err
    assert said == is_said


def test_a_prompt_with_a_token_that_the_embedding_has_not(tmp_path):
    model = tiny_model(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(model)
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "an <image_soft_token>", "answer": "1"}]
    data = write_jsonl(tmp_path / "prompts.jsonl", rows)
    words = [model, f"data={data}", "reward=r1_zero", f"output={tmp_path}/out", "max_completion_length=4"]
    message = refused(evaluate.main, words)
    assert message.startswith(f"model: {data}:2 spells out <image_soft_token>, a token for which ")
