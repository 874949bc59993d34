"""What `table.py` runs in processes of their own: the measurement of one model, and the choice among samples.
"""
import json
import random
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
from benchmark import shared  # noqa: E402
from data.dataset import build_dataset  # noqa: E402
from data.pack import Example, Response  # noqa: E402
from engine.evaluation import load_frozen, response_scores  # noqa: E402
from engine.results import load_examples, score_part, with_lengths  # noqa: E402
from engine.rollout import Rollout, with_completions  # noqa: E402
from model.load import base_of, load_config, load_tokenizer  # noqa: E402
from model.sampler import sample  # noqa: E402
from rewards.functions import load_reward  # noqa: E402
from sample import sft_row, usable  # noqa: E402

TEXT = ROOT / "benchmark" / "ordinary_text.txt"
LENIENT = "gsm8k"      # the last number is right
STRICT = "strict"      # the name of a recipe's own measure


def measure(job: dict) -> dict:
    """The numbers of one model; the columns are explained in `table.py`."""
    tokenizer = load_tokenizer(job["model"])
    texts = text_examples(tokenizer)
    policy = load_frozen(job["model"], tokenizer, texts, shared.say, job["start"])
    start = None
    if job["model"] != job["start"]:
        start = load_frozen(job["start"], tokenizer, texts, shared.say, job["model"])
    numbers = {"text loss": text_loss(policy, texts)}
    answers = None
    if job["sampling"]:
        answers, strict = sampled_answers(policy, tokenizer, job, 1.0)
        greedy, _ = sampled_answers(policy, tokenizer, job, 0.0)
        numbers |= shares(answers, strict)
        for name, share in shares(greedy, strict).items():
            if name != "tokens":
                numbers[f"greedy {name}"] = share
    if start and job["pairs"]:
        config = load_config(base_of(job["start"])).get_text_config()
        max_length = getattr(config, "max_position_embeddings", None) or 2 ** 30
        numbers["pairs"] = share_of_gains(policy, start, tokenizer, job, max_length)
    if start and answers:
        # at temperature 1 the sampler's log-probs are the policy's
        of_policy = total(answers.sampler_logps)
        of_start = total(response_scores(start, answers.examples))
        numbers["KL"] = (of_policy - of_start) / len(answers.examples)
    return numbers


def total(tensors: list) -> float:
    """The sum of all numbers in a list of tensors."""
    found = 0.0
    for tensor in tensors:
        found += float(tensor.double().sum())
    return found


def text_loss(policy, texts: list) -> float:
    """Nats per token."""
    count = 0
    for example in texts:
        count += example.num_trained
    return -total(response_scores(policy, texts)) / count


def text_examples(tokenizer) -> list:
    """The paragraphs of the ordinary text, each predicted from its first token on."""
    examples = []
    for paragraph in TEXT.read_text(encoding="utf-8").split("\n\n"):
        text = " ".join(paragraph.split())
        ids = tokenizer(text, add_special_tokens=False).input_ids
        prompt = np.array(ids[:1], np.int32)
        examples.append(Example(prompt, [Response.all_trained(ids[1:])], TEXT.name))
    return examples


def sampled_answers(policy, tokenizer, job: dict, temperature: float):
    """(A rollout with an answer to each held-out problem, scored by the recipe's rewards and by gsm8k; the
    name of the strict one among them)."""
    keys = {"prompt_template": None, "stop": None} | job["sampling"]
    settings = evaluate.Config(
        model=job["model"], limit=job["limit"], seed=job["seed"], temperature=temperature, **keys)
    settings = with_lengths(settings, job["model"])
    examples, _ = load_examples(settings, "prompts", job["model"], tokenizer, shared.say)
    prompts = []
    draws = []
    for number, example in enumerate(examples):
        prompts.append(example.prompt)
        draws.append((job["seed"], number))
    completions = sample(policy, tokenizer, prompts, draws, 1, settings)
    rollout = Rollout(0, range(len(examples)), list(map(with_completions, examples, completions)))
    rewards = load_reward(settings.reward)
    names = [reward.name for reward in rewards]
    if LENIENT not in names:
        rewards += load_reward(LENIENT)
    score_part(rollout, rewards, {}, tokenizer, settings.reward_timeout)
    return rollout, f"rewards/{STRICT if STRICT in names else names[0]}"


def shares(answers, strict: str) -> dict:
    """Strict and lenient accuracy and the mean length of a rollout's answers; `strict`: the name of what
    decides the first."""
    count = len(answers.examples)
    found = {"strict": 0.0, "lenient": 0.0, "tokens": 0.0}
    for right, number, truncated, length in zip(
            answers[strict], answers[f"rewards/{LENIENT}"], answers.truncated, answers.lengths):
        found["strict"] += float(right >= 1 and not truncated) / count
        found["lenient"] += float(number == 1) / count
        found["tokens"] += float(length) / count
    return found


def share_of_gains(policy, start, tokenizer, job: dict, max_length: int) -> float:
    """The share of pairs whose chosen answer gained more log-prob than the rejected one. The start model's
    log-probs are the same for every row of the table, and kept in the file `of_start`."""
    pairs = build_dataset(job["pairs"], "pairs", tokenizer, max_length).examples
    kept = Path(job["of_start"])
    if not kept.exists():
        shared.store(kept, [scores.tolist() for scores in response_scores(start, pairs)])
    before = json.loads(kept.read_text())
    right = 0
    for mine, of_start in zip(response_scores(policy, pairs), before, strict=True):
        chosen, rejected = (mine - torch.tensor(of_start, dtype=mine.dtype)).tolist()
        right += chosen > rejected
    return right / len(pairs)


def select(job: dict) -> None:
    """Write best.jsonl and random.jsonl beside the samples of sample.py."""
    folder = Path(job["folder"])
    groups = defaultdict(list)
    for row in shared.read_jsonl(str(folder / "samples_results.jsonl")):
        groups[row["id"]].append(row)
    rng = random.Random(job["seed"])
    chosen = []
    for group in groups.values():
        candidates = usable(group, defaultdict(int))
        if candidates:
            chosen.append(sft_row(rng.choice(candidates)))
    best = shared.read_jsonl(str(folder / "sft.jsonl"))
    assert len(best) == len(chosen), "both hold a row for every problem with an answer"
    shared.write_rows(str(folder / "best.jsonl"), best)
    shared.write_rows(str(folder / "random.jsonl"), chosen)


if __name__ == "__main__":
    role, words = sys.argv[1:]
    job = json.loads(words)
    print(json.dumps(measure(job) if role == "measure" else select(job)))
