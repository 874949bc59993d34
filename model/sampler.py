"""Completions drawn from the policy.

`sample` computes every prompt once (`prefill`), copies its keys and values for its completions and then draws
one token at a time for all rows (`decode`); rows that have ended leave the batch. Each token is the inverse
of a float64 distribution function (model/draw.py) at a uniform number that depends on (seed, rollout, prompt,
sample, position) only: neither the batch nor the number of ranks changes what is drawn (except for ties
within floating-point rounding).
"""
import functools
import itertools

import numpy as np
import torch

from model.cache import Cache, rows_in_memory
from model.completions import Completion, Drawn, Stops
from model.cpu import cpu_linears, fast_row_count
from model.draw import draw
from model.form import PLAIN, trunk_of
from model.generating import generating
from model.head import HeadLogits
from model.plain import decode_plain

PREFILL_TOKENS = 8192                  # prompt tokens in one forward


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
    cache, hidden = prefill(lm, prompts, room=limit)               # hidden (n, D)
    head_logits = HeadLogits(lm, rows)
    lengths = np.array([len(prompt) for prompt in prompts])
    active = list(range(rows))                                     # the n rows that are computed
    for step in range(limit):
        logits = head_logits(hidden)                               # (n, V)
        uniform = torch.from_numpy(uniforms[active, step])
        tokens, logps = draw(
            logits,
            uniform.to(lm.device),
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
        )
        if drawn.add(step, active, tokens, logps, stops):
            ended(len(drawn.completions))
        running = rows - len(drawn.completions)
        if running == 0:
            break
        size = fast_row_count(lm, running)
        if size < len(active):
            alive = running_first(active, drawn.completions)[:size]
            order = cache.compact(alive)
            active = [active[place] for place in order]
            tokens = tokens[order]
        positions = torch.from_numpy(lengths[active] + step)
        positions = positions.to(lm.device)
        states = last_hidden(lm, cache, tokens[:, None], positions[:, None])
        hidden = states[:, 0]
        cache.column += 1
    return [drawn.completions[row] for row in range(rows)]


def running_first(active: list[int], ended) -> list[int]:
    """The places in `active` of the rows that have not ended, then of those that have."""
    places = range(len(active))
    return sorted(places, key=lambda place: active[place] in ended)


def prefill(lm, prompts: list[np.ndarray], room: int):
    """A Cache of every prompt's keys and values, with `room` columns more, and the last hidden state of every
    row's prompt (rows, D). Each prompt is computed once, together with as many others as PREFILL_TOKENS
    allow."""
    groups = copies_together(prompts)
    cache = Cache(groups, room, lm.device)
    hidden = []
    while groups:
        ends = np.cumsum([len(prompt) for prompt, _ in groups])
        fitting = int((ends <= PREFILL_TOKENS).sum())
        count = max(1, fitting)
        cache.prompts = groups[:count]
        groups = groups[count:]
        ids, positions, segments = [], [], []
        for prompt, _ in cache.prompts:
            length = len(prompt)
            ids.append(prompt)
            positions.append(np.arange(length))
            segments.append((length, []))                          # a prompt without responses
        ids = torch.from_numpy(np.concatenate(ids)).long()
        positions = torch.from_numpy(np.concatenate(positions))
        ids = ids[None].to(lm.device)
        positions = positions[None].to(lm.device)
        states = last_hidden(lm, cache, ids, positions, segments)[0]
        for end, (_, rows) in zip(ends, cache.prompts):
            copies = rows.stop - rows.start
            hidden.append(states[end - 1].expand(copies, -1))
    return cache, torch.cat(hidden)


def copies_together(prompts: list[np.ndarray]) -> list[tuple[np.ndarray, slice]]:
    """Per prompt: its ids and its rows, the copies of it that are neighbours in `prompts`."""
    groups = []
    start = 0
    for _, copies in itertools.groupby(prompts, key=id):
        copies = list(copies)
        end = start + len(copies)
        groups.append((copies[0], slice(start, end)))
        start = end
    return groups


def last_hidden(lm, cache: Cache, ids, positions, segments=None):
    """(B, T) ids and positions -> hidden states (B, T, D); `cache` takes their keys and values."""
    options = {"use_cache": False, "cache": cache, "segments": segments}
    return trunk_of(lm)(input_ids=ids, position_ids=positions, **options).last_hidden_state
