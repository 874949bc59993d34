"""How often is a model right and in format on the held-out problems?

    python example/tiny/measure.py MODEL [--rows 500] [--seed 0]

Prints accuracy (right and in format) and the format rate, once sampled at temperature 1 and once greedy.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data.tokenise import Tokeniser  # noqa: E402
from engine.options import Sampling  # noqa: E402
from model import sampler  # noqa: E402
from model.policy import Policy  # noqa: E402

FORMAT = re.compile(r"<think>.*</think> <answer>.*</answer>", re.DOTALL)
ANSWER = re.compile(r"<answer>\s*(-?\d+)\s*</answer>")


def is_in_format(response):
    """The whole response is one `<think>…</think> <answer>…</answer>`."""
    thoughts = response.count("<think>")
    answers = response.count("<answer>")
    return bool(FORMAT.fullmatch(response.strip())) and thoughts == answers == 1


def is_right(response, answer):
    """In format, and the integer inside <answer> is `answer` (a string of digits)."""
    found = ANSWER.findall(response)
    return is_in_format(response) and bool(found) and int(found[-1]) == int(answer)


def generate(model, tokenizer, prompts, sample, seed=0):
    """One response per prompt (a list of messages), as text without special tokens."""
    tokeniser = Tokeniser(tokenizer)
    ids = []
    keys = []
    for i, prompt in enumerate(prompts):
        ids.append(np.array(tokeniser.prompt_ids(prompt), np.int32))
        keys.append((seed, i))
    temperature = 1.0 if sample else 0.0
    sampling = Sampling(reward="", max_completion_length=120, temperature=temperature, rollout_batch_size=100)
    responses = []
    for completion, in sampler.sample(Policy(model), tokenizer, ids, keys, 1, sampling):
        responses.append(tokenizer.decode(completion.tokens, skip_special_tokens=True))
    return responses


def measure(model, tokenizer, rows, seed=0):
    """Shares of `rows` ({"prompt": messages, "answer": digits}):
    {"sampled": {"accuracy", "format"}, "greedy": {…}}."""
    model.eval()
    prompts = [row["prompt"] for row in rows]
    answers = [row["answer"] for row in rows]
    shares = {}
    for name in ("sampled", "greedy"):
        responses = generate(model, tokenizer, prompts, name == "sampled", seed)
        right = sum(map(is_right, responses, answers))
        in_format = sum(map(is_in_format, responses))
        shares[name] = {"accuracy": right / len(rows), "format": in_format / len(rows)}
    return shares


def read_rows(count, path=HERE / "eval-prompts.jsonl"):
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(map(json.loads, lines[:count]))


def main():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    measured = measure(model, tokenizer, read_rows(args.rows), args.seed)
    for name, shares in measured.items():
        print(f"{name:7}  accuracy {shares['accuracy']:.3f}  format {shares['format']:.3f}")


if __name__ == "__main__":
    main()
