"""evaluate.py: what it writes, averages and intervals, an interrupted evaluation, preferences, bad input."""
import itertools
import json
import math
import shutil
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import REWARDS, ROOT, byte_tokenizer, messages, pair_rows, prompt_rows, tiny_model, train_here, write_config, write_jsonl
from transformers import AutoModelForCausalLM

import evaluate
from data.errors import UserError
from engine import results
from engine.results import name_of
from model.sampler import Completion

QUESTIONS = [{"question": f"What is {i} plus {i}?", "answer": f"{i} + {i} = {2 * i}\n#### {2 * i}"} for i in range(6)]


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
        words = [f"{key}={value}" for key, value in {"max_completion_length": 10, "output": tmp_path / output, **keys}.items()]
        evaluate.main([str(folder / model), f"data={folder / data}", *words])
        name = name_of(data)
        lines = (tmp_path / output / f"{name}_eval_results.jsonl").read_text().splitlines()
        summary = json.loads((tmp_path / output / f"{name}_eval_summary.json").read_text())
        return list(map(json.loads, lines)), summary, "".join(capsys.readouterr())
    return run


def written(monkeypatch, texts, finished=True):
    """Let the model write `texts`, in turn."""
    tokenizer, texts = byte_tokenizer(), itertools.cycle(texts)

    def sample(policy, _, prompts, keys, copies, sampling, report=None):
        ids = [[np.array(tokenizer(next(texts)).input_ids + [258], np.int32) for _ in range(copies)] for _ in prompts]
        return [[Completion(tokens, np.zeros(len(tokens), np.float32), finished) for tokens in group] for group in ids]

    monkeypatch.setattr(results, "sample", sample)


# ---- averages ----

def completion(id, reward, **metrics):
    return {"id": id, "metrics": {**metrics, "reward": reward}, "tokens": 10 * (id + 1), "finished": id > 0}


def test_summary_of_hand_made_results():
    rows = [completion(0, 1.0, format_reward=1.0, answer_reward=1.0), completion(1, 0.0, format_reward=1.0, answer_reward=0.0),
            completion(2, 0.0, format_reward=0.0, answer_reward=0.0), completion(3, 0.0, format_reward=1.0, answer_reward=0.0)]
    summary = evaluate.summary_of_completions(rows)
    assert [summary[key] for key in ("num_examples", "format_rate", "accuracy", "avg_reward", "mean_tokens", "finished_rate")] == [
        4, 0.75, 0.25, 0.25, 25.0, 0.75]
    assert "pass@1" not in summary and "num_samples" not in summary


def test_what_nothing_judged_counts_nowhere():
    summary = evaluate.summary_of_completions([completion(0, 0.5), completion(1, None), completion(2, 1.5)])
    assert summary["avg_reward"] == 1.0 and summary["without_reward"] == 1 and "accuracy" not in summary
    assert summary["avg_reward_95"] == pytest.approx([1 - 1.959964 * math.sqrt(0.5 / 2), 1 + 1.959964 * math.sqrt(0.5 / 2)])
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
    for n, right, k in [(1, 0, 1), (1, 1, 1), (5, 2, 1), (5, 2, 3), (6, 1, 4), (6, 0, 6), (4, 4, 2), (8, 3, 6)]:
        choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
        assert evaluate.pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))
    rows = [completion(i, float(right)) for i, rights in enumerate([(1, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1)]) for right in rights]
    summary = evaluate.summary_of_completions(rows)
    assert summary["num_examples"] == 3 and summary["num_samples"] == 12 and summary["accuracy"] == pytest.approx(5 / 12)
    assert [summary[f"pass@{k}"] for k in (1, 2, 4)] == pytest.approx([5 / 12, (0.5 + 0 + 1) / 3, 2 / 3])
    once = evaluate.rate("x", [1.0] * 5 + [0.0] * 7, 3)["x_95"]                # the completions of a prompt are not independent
    assert summary["accuracy_95"] == once


# ---- prompts and completions ----

def test_hand_made_generations_are_scored_exactly(run, monkeypatch):
    written(monkeypatch, [" zero </think> <answer> 0 </answer>", "2</think> <answer>3</answer>", "4</think><answer>4</answer>", "6",
                          "</think>  <answer>$8.00</answer>", "</think> <answer>10 eggs</answer>"])
    rows, summary, shown = run("base", "gsm8k-test.jsonl", reward="r1_zero")
    assert [row["metrics"] for row in rows] == [{"format_reward": f, "answer_reward": a, "reward": a} for f, a in [
        (1.0, 1.0), (1.0, 0.0), (0.0, 0.0), (0.0, 0.0), (1.0, 1.0), (1.0, 0.0)]]
    assert [row["gold_answer"] for row in rows] == ["0", "2", "4", "6", "8", "10"] and [row["id"] for row in rows] == list(range(6))
    assert rows[1]["generation"] == "2</think> <answer>3</answer>"              # without the stop token
    assert rows[1]["prompt"].endswith("User: What is 1 plus 1?\nAssistant: <think>")
    assert (summary["num_examples"], summary["format_rate"], summary["accuracy"]) == (6, 4 / 6, 2 / 6)
    assert summary["settings"]["stop"] == "</answer>" and summary["results_path"].endswith("out/gsm8k_eval_results.jsonl")
    assert "prompt_template r1_zero, stop </answer>" in shown and "accuracy         0.3333   (95 %: " in shown


def test_several_rewards_and_functions(run, monkeypatch):
    written(monkeypatch, ["0", "b", "2"])
    rows, summary, _ = run("chat", "prompts.jsonl", reward=f"gsm8k, {REWARDS}:some", reward_weights="2,1", n=3)
    assert len(rows) == 21 and rows[0]["metrics"].keys() == {"reward", "rewards/gsm8k", "rewards/some"}
    for row in rows:
        last, other = row["metrics"]["rewards/gsm8k"], row["metrics"]["rewards/some"]
        assert last == float(row["generation"] == row["gold_answer"])
        assert row["metrics"]["reward"] == pytest.approx(2 * last + (other or 0)) and row["sample"] < 3
    assert {row["metrics"]["rewards/some"] is None for row in rows} == {True, False} and summary["num_samples"] == 21


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
    """`prompt_template` and `stop` of its configuration hold where the command line says nothing."""
    (folder / "some.prompt").write_text("Q: {question} A:")
    trained = folder / "trained"
    shutil.copytree(folder / "chat", trained)
    (trained / "config.yaml").write_text(f"prompt_template: {folder / 'some.prompt'}\nstop: END\n")
    shutil.copytree(folder / "chat", trained / "final")
    for model in ("trained", "trained/final"):
        rows, summary, _ = run(model, "gsm8k-test.jsonl", model.replace("/", "-"), reward="r1_zero", limit=1)
        assert rows[0]["prompt"] == "Q: What is 0 plus 0? A:" and summary["settings"]["stop"] == "END"


def test_what_is_too_long_with_the_chat_template_is_told(run):
    """The longest question, 18 bytes, fits as it is but not as a turn of 62; of max_length 10 are the completion's."""
    with pytest.raises(UserError, match="none of the 6 rows .* longer than max_length .* raise max_length"):
        run("chat", "gsm8k-test.jsonl", reward="r1_zero", max_length=40)


def test_greedy_is_what_the_library_generates(run, folder):
    rows, _, _ = run("chat", "prompts.jsonl", reward=f"{REWARDS}:varied", temperature=0)
    tokenizer, lm = byte_tokenizer(), AutoModelForCausalLM.from_pretrained(folder / "chat")
    for row in rows:
        text = row["prompt"] if isinstance(row["prompt"], str) else tokenizer.apply_chat_template(
            row["prompt"], tokenize=False, add_generation_prompt=True)
        ids = torch.tensor([tokenizer(text).input_ids])
        generated = lm.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=258, pad_token_id=256)[0, ids.shape[1]:]
        assert row["generation"] == tokenizer.decode(generated, skip_special_tokens=True)


def test_continued_results_are_those_of_one_go(run, tmp_path, monkeypatch):
    """A kill in the middle of a line, and a limit that is raised; a whole evaluation loads no model."""
    keys = dict(reward=f"{REWARDS}:varied", n=2, rollout_batch_size=4)
    whole, _, _ = run("chat", "prompts.jsonl", **keys)
    file = tmp_path / "out" / "prompts_eval_results.jsonl"
    text = file.read_text()
    lines = text.splitlines(keepends=True)
    for cut in ("".join(lines[:9]) + lines[9][:20], "".join(lines[:3]), lines[0][:-1], "", text[:-1], lines[0] + "\0\0\0"):
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
    names = {"gsm8k": "gsm8k", "openai/gsm8k:test": "gsm8k", "data/gsm8k-test.jsonl": "gsm8k", "a/prompts.jsonl.gz": "prompts",
             "test.jsonl": "test", "owner/some.data:train": "some.data", "eval-prompts.jsonl": "eval-prompts"}
    assert {data: name_of(data) for data in names} == names


# ---- pairs ----

def summed(lm, prompt, response):
    ids = torch.tensor([[*prompt, *response]])
    return float(lm(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1:].sum())


def test_preferences_against_the_plain_forward(run, folder):
    from data.dataset import build_dataset
    lms = [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("chat", "other")]
    examples = build_dataset(str(folder / "pairs.jsonl"), "pairs", byte_tokenizer(), 512).examples
    with torch.no_grad():
        logps = [[[summed(lm, example.prompt, response.tokens) for response in example.responses] for example in examples] for lm in lms]
    rows, summary, _ = run("chat", "pairs.jsonl")
    assert [[row["metrics"]["chosen"], row["metrics"]["rejected"]] for row in rows] == [pytest.approx(pair, rel=1e-4) for pair in logps[0]]
    assert summary["accuracy"] == sum(chosen > rejected for chosen, rejected in logps[0]) / 9 and 0 < summary["accuracy"] < 1
    assert rows[2]["chosen"] == "it is 2 it is 2 it is 2 <|im_end|>"
    rows, summary, _ = run("chat", "pairs.jsonl", "implicit", reference=folder / "other")
    margins = [(a - c) - (b - d) for (a, b), (c, d) in zip(*logps)]
    assert [row["metrics"]["margin"] for row in rows] == pytest.approx(margins, rel=1e-3, abs=1e-3)
    assert summary["accuracy"] == sum(margin > 0 for margin in margins) / 9
    rows, summary, _ = run("chat", "pairs.jsonl", "same", reference=folder / "chat")
    assert summary["accuracy"] == 0 and summary["ties"] == 9
    lms[0].model.norm.weight.data *= 1 - 1e-6                      # as another CPU might compute it
    lms[0].save_pretrained(folder / "nearly")
    byte_tokenizer().save_pretrained(folder / "nearly")
    rows, summary, _ = run("chat", "pairs.jsonl", "nearly", reference=folder / "nearly")
    assert summary["accuracy"] == 0 and summary["ties"] == 9
    assert any(row["metrics"]["margin"] > 0 for row in rows)


def test_a_reward_model_scores_pairs_and_completions_and_writes_none(run, folder):
    config = write_config(folder / "rm.yml", algorithm="rm", model=folder / "chat", data=folder / "pairs.jsonl", output=folder / "rm",
                          eval_data=folder / "pairs.jsonl", batch_size=3, lr=1e-2, max_length=256)
    train_here(config)
    rows, summary, _ = run("rm", "pairs.jsonl", "pairs")
    last = [json.loads(line) for line in (folder / "rm" / "metrics.jsonl").read_text().splitlines() if '"eval"' in line][-1]
    assert summary["accuracy"] == pytest.approx(last["accuracy"])
    rows, summary, _ = run("chat", "prompts.jsonl", "completions", reward=folder / "rm")
    assert len({row["metrics"]["reward"] for row in rows}) > 3 and summary["avg_reward_95"][0] < summary["avg_reward"]
    with pytest.raises(UserError, match="is a reward model, which writes no text; fix: "):
        run("rm", "prompts.jsonl", reward="gsm8k")


# ---- bad input ----

@pytest.mark.parametrize("model, data, keys, message", [
    ("chat", "gsm8k-test.jsonl", {}, "no reward for .*whose rows are not pairs; fix: add reward="),
    ("chat", "gsm8k-test.jsonl", {"rewards": "r1_zero"}, "unknown key 'rewards' .*fix: write reward"),
    ("chat", "gsm8k-test.jsonl", {"output_dir": "x"}, "unknown key 'output_dir' .*fix: write output"),
    ("chat", "gsm8k-test.jsonl", {"reward": "r1zero"}, "'r1zero' in reward is neither.*r1_zero"),
    ("chat", "gsm8k-test.jsonl", {"reward": "r1_zero", "temperature": "hot"}, "temperature .*fix: give a number"),
    ("chat", "gsm8k-test.jsonl", {"reward": "r1_zero", "temperature": 0, "n": 4}, "n .*temperature 0"),
    ("chat", "gsm8k-test.jsonl", {"reward": "r1_zero", "limit": 0}, "limit .* is 0; fix: give 1 or more"),
    ("chat", "gsm8k-test.jsonl", {"reward": "r1_zero", "max_length": 1000}, "knows only 512 positions; fix: lower max_length"),
    ("chat", "gsm8k-test.jsonl", {"reward": "r1_zero", "reference": "x"}, "reference .*only used with pair data"),
    ("chat", "gsm8k-test.jsonl", {"reward": "r1_zero", "output": "../x"}, "output .*fix: "),
    ("none", "gsm8k-test.jsonl", {"reward": "r1_zero"}, "model: .*fix: "),
    ("chat", "gsm8k-tests.jsonl", {"reward": "r1_zero"}, "no file .*gsm8k-tests.jsonl .*nearest"),
    ("chat", "pairs.jsonl", {"reward": "r1_zero"}, "no gold answer in .*pairs.jsonl:1"),
])
def test_refused(run, model, data, keys, message):
    with pytest.raises(UserError, match=message) as caught:
        run(model, data, **keys)
    assert "\n" not in str(caught.value) and "; fix: " in str(caught.value)


def test_only_the_rows_within_the_limit_must_have_gold_answers_that_verify(run, tmp_path):
    data = write_jsonl(tmp_path / "gold.jsonl", [{"question": "2 + 2?", "answer": answer} for answer in ("4", "none")])
    assert len(run("chat", data, "first", reward="gsm8k", limit=1)[0]) == 1
    with pytest.raises(UserError, match=r"gsm8k cannot verify the gold answers of 1 of 2 rows, in .*gold.jsonl:2 \('none'\)"):
        run("chat", data, "both", reward="gsm8k")


def test_an_output_that_is_a_file(run, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="output: .*cannot be used"):
        run("chat", "pairs.jsonl")


def test_bad_input_from_a_shell():
    done = subprocess.run([sys.executable, "evaluate.py", "data=x.jsonl"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: model is missing in the command line; fix: python evaluate.py MODEL data=... reward=...\n"


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
    for words, asked in [(["runs/m", "data=gsm8k"], ("gsm8k:test", "gsm8k_eval", "runs/eval/m-gsm8k")),
                         (["a/b", "data=openai/gsm8k:train", "output=x"], ("openai/gsm8k:train", "gsm8k_eval", "x"))]:
        with pytest.raises(Asked) as caught:
            evaluate.main([*words, "reward=r1_zero"])
        assert caught.value.args == asked
