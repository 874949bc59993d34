"""Tokens per second of three samplers with the same model, prompts and lengths, in one process: the own one,
vLLM, and transformers' generate.

    python benchmark/rollouts.py example/smollm2/model --rows 16 --length 64 --repeats 3

Every sampler draws `rows` completions of `length` tokens, at temperature 1, without stopping before; they
take turns, so that a busy machine is busy for all of them. The median is printed."""
import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine.options import Sampling
from model import completions, sampler, vllm
from model.build import build_policy
from model.generating import generating
from model.keys import ModelKeys


def by_generate(policy, prompts, length: int) -> None:
    inputs = torch.tensor(np.stack(prompts), device=policy.device).long()
    with generating(policy) as lm:
        lm.generate(
            inputs, attention_mask=torch.ones_like(inputs), do_sample=True, top_k=0,
            min_new_tokens=length, max_new_tokens=length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    width = given.prompt + given.length
    policy = build_policy(given.model, tokenizer, ModelKeys(max_length=width))
    rng = np.random.default_rng(0)
    vocabulary = policy.lm.config.vocab_size
    prompts = list(rng.integers(vocabulary // 2, vocabulary, (given.rows, given.prompt)).astype(np.int32))
    keys = [(0, row) for row in range(given.rows)]
    settings = Sampling(reward="", max_completion_length=given.length, rollout_batch_size=given.rows)
    completions.stop_ids = lambda tokenizer: []          # every completion has the whole length
    other = vllm.VllmSampler(policy, tokenizer, width, 0.3, 0)
    other.stop_ids = []
    ways = {
        "own": lambda: sampler.sample(policy, tokenizer, prompts, keys, 1, settings),
        "vllm": lambda: other.sample(policy, tokenizer, prompts, keys, 1, settings),
        "generate": lambda: by_generate(policy, prompts, given.length),
    }
    rates = {name: [] for name in ways}
    for repeat in range(given.repeats + 1):
        for name, draw in ways.items():
            since = time.perf_counter()
            draw()
            if repeat:                                   # the first round warms up
                seconds = time.perf_counter() - since
                rates[name].append(given.rows * given.length / seconds)
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{name:10} {median:8.0f} tokens/s   ({min(values):.0f} to {max(values):.0f})")


if __name__ == "__main__":
    main()
