"""Rollouts in which the policy answers some prompts, and the others keep the responses that they have in the
data."""
import numpy as np
import torch

from data.pack import Example
from engine.rollout import Rollout

DRAW = 3      # so that these random draws coincide with none of the completions': see rollouts.py


def mixed_rollout(engine, number: int, rows: list[int], share: float, complete) -> Rollout:
    """The `number`-th rollout, over `rows` of the data. Each is drawn by (seed, number, row), with the
    probability `share`, to be sampled by `complete(rows)` -> Examples. The numbers "sampled" say which
    responses are the policy's own."""
    sampled = []
    for row in rows:
        key = (engine.config.seed, DRAW, number, row)
        if np.random.default_rng(key).random() < share:
            sampled.append(row)
    own = dict(zip(sampled, complete(sampled)))
    examples = []
    flags = []
    for row in rows:
        example = own.get(row) or with_own_responses(engine.train_set[row])
        examples.append(example)
        flags.append(torch.full((len(example.responses),), row in own))
    rollout = Rollout(number, rows, examples)
    rollout.once("sampled", list, flags)
    return rollout


def with_own_responses(example: Example) -> Example:
    """An example of the data as `with_completions` makes them; no sampler gave its responses log-probs."""
    known = {
        "sampler_logps": torch.zeros(example.num_trained),
        "truncated": torch.zeros(len(example.responses), dtype=torch.bool),
    }
    return Example(example.prompt, example.responses, example.where, example.extras | known)
