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
    return FORMAT.fullmatch(response.strip()) is not None and response.count("<think>") == response.count("<answer>") == 1


def is_right(response, answer):
    """In format, and the integer inside <answer> is `answer` (a string of digits)."""
    found = ANSWER.findall(response)
    return is_in_format(response) and bool(found) and int(found[-1]) == int(answer)


def generate(model, tokenizer, prompts, sample, seed=0):
    """One response per prompt (a list of messages), as text without special tokens."""
    tokeniser = Tokeniser(tokenizer)
    ids = [np.array(tokeniser.prompt_ids(prompt), np.int32) for prompt in prompts]
    sampling = Sampling(reward="", max_completion_length=120, temperature=1.0 if sample else 0.0, rollout_batch_size=100)
    found = sampler.sample(Policy(model), tokenizer, ids, [(seed, i) for i in range(len(ids))], 1, sampling)
    return [tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion, in found]


def measure(model, tokenizer, rows, seed=0):
    """Shares of `rows` ({"prompt": messages, "answer": digits}): {"sampled": {"accuracy", "format"}, "greedy": {…}}."""
    model.eval()
    result = {}
    for name in ("sampled", "greedy"):
        responses = generate(model, tokenizer, [row["prompt"] for row in rows], name == "sampled", seed)
        result[name] = {
            "accuracy": sum(is_right(response, row["answer"]) for response, row in zip(responses, rows)) / len(rows),
            "format": sum(is_in_format(response) for response in responses) / len(rows)}
    return result


def read_rows(count, path=HERE / "eval-prompts.jsonl"):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:count]]


def main():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    for name, shares in measure(model, tokenizer, read_rows(args.rows), args.seed).items():
        print(f"{name:7}  accuracy {shares['accuracy']:.3f}  format {shares['format']:.3f}")


if __name__ == "__main__":
    main()
