"""Completions drawn from the policy.

`sample` computes every prompt once, copies its keys and values for its completions and then draws one token
at a time for all rows (model/decoding.py); rows that have ended leave the batch. Each token is the inverse
of a float64 distribution function (model/draw.py) at a uniform number that depends on (seed, rollout, prompt,
sample, position) only: neither the batch nor the number of ranks changes what is drawn (except for ties
within floating-point rounding).
"""
import functools
import itertools

import numpy as np

from model.cache import rows_in_memory
from model.completions import Completion, Drawn, Stops
from model.cpu import cpu_linears, fast_row_count
from model.decoding import Decoding
from model.form import PLAIN
from model.generating import generating
from model.plain import decode_plain

STEPS_AT_ONCE = {"cpu": 1, "cuda": 8}  # before the host looks at what was drawn: it would wait for the GPU


def sample(
    policy,
    tokenizer,
    prompts: list[np.ndarray],
    keys: list[tuple],
    copies: int,
    sampling,
    report=None,
) -> list[list[Completion]]:
    """`copies` completions of each prompt (ids): a list of lists of Completion.

    `keys`: per prompt, whole numbers that its draws depend on. `sampling`: any object with temperature,
    top_p, top_k, max_completion_length, rollout_batch_size and stop_strings(). `report(done, total)` is
    called as completions end."""
    limit = sampling.max_completion_length
    lengths = [len(prompt) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lengths.__getitem__)
    rows = list(itertools.product(by_length, range(copies)))       # (prompt, copy)
    stops = Stops(tokenizer, sampling.stop_strings())
    found = []

    def ended(count):
        if report:
            report(len(found) + count, len(rows))

    decoder = decode
    if policy.form.attention == PLAIN:
        decoder = functools.partial(decode_plain, use_cache=policy.form.has_exact_cache)
    with generating(policy, "rollout") as lm, cpu_linears(lm):
        longest = max(lengths, default=0) + limit
        size = min(sampling.rollout_batch_size, rows_in_memory(lm, longest))
        for start in range(0, len(rows), size):
            batch = []
            uniforms = []
            for prompt, copy in rows[start:start + size]:
                batch.append(prompts[prompt])
                generator = np.random.default_rng((*keys[prompt], copy))
                uniforms.append(generator.random(limit))
            uniforms = np.stack(uniforms)
            found += decoder(lm, batch, uniforms, sampling, stops, ended)
    completions = [None] * len(prompts)
    for place, prompt in enumerate(by_length):
        start = place * copies
        completions[prompt] = found[start:start + copies]
    return completions


def decode(
    lm,
    prompts: list[np.ndarray],
    uniforms: np.ndarray,
    sampling,
    stops: Stops,
    ended,
) -> list[Completion]:
    """One completion for each of `prompts`; copies of a prompt are neighbours, and the same object.
    `uniforms` (rows, tokens) float64. `ended(count)` is called as completions end."""
    rows = len(prompts)
    limit = sampling.max_completion_length
    drawn = Drawn(rows, limit)
    decoding = Decoding(lm, prompts, uniforms, sampling)
    steps = STEPS_AT_ONCE[lm.device.type]
    active = list(range(rows))                                     # the n rows that are computed
    length = 0                                                     # of the completions that are noted
    while True:
        tokens, logps = decoding.drawn(length)
        if drawn.add(length, active, tokens, logps, stops):
            ended(len(drawn.completions))
        length += tokens.shape[1]
        running = rows - len(drawn.completions)
        if running == 0:
            break
        size = row_count(lm, running, len(active))
        if size < len(active):
            alive = running_first(active, drawn.completions)[:size]
            order = decoding.compact(alive)
            active = [active[place] for place in order]
        decoding.advance(min(steps, limit - length))
    return [drawn.completions[row] for row in range(rows)]


def row_count(lm, running: int, computed: int) -> int:
    """With how many rows to go on where `running` of `computed` rows have not ended. A GPU is as fast with
    twice as many, and records the step anew where it has fewer."""
    if lm.device.type == "cuda":
        return computed if 2 * running > computed else running
    return fast_row_count(lm, running)


def running_first(active: list[int], ended) -> list[int]:
    """The places in `active` of the rows that have not ended, then of those that have."""
    places = range(len(active))
    return sorted(places, key=lambda place: active[place] in ended)
