"""Completions drawn from the policy.

`sample` computes each prompt, copies its keys and values for its completions and then draws one token at a
time for all rows (model/decoding.py). Rows that have ended leave the batch, and rows that wait come into it.
Each token is the inverse of a float64 distribution function (model/draw.py) at a uniform number that depends
on (seed, rollout, prompt, sample, position) only: neither the batch nor the number of ranks changes what is
drawn (except for ties within floating-point rounding).
"""
import numpy as np

from model.cache import tokens_in_memory
from model.completions import Completion, Drawn, Stops
from model.cpu import cpu_linears, fast_row_count
from model.decoding import Decoding
from model.draw import uniform_numbers
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
    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    row_prompts = []
    row_keys = []
    for prompt in by_length:
        for copy in range(copies):
            row_prompts.append(prompts[prompt])
            row_keys.append((*keys[prompt], copy))

    def ended(count):
        if report:
            report(count, len(row_keys))

    stops = Stops(tokenizer, sampling.stop_strings())
    decoder, attention = decode_in_batches, None
    if policy.form.samples_itself:
        decoder, attention = decode, "rollout"
    with generating(policy, attention) as lm, cpu_linears(lm):
        found = decoder(policy, row_prompts, row_keys, sampling, stops, ended)
    completions = [None] * len(prompts)
    for place, prompt in enumerate(by_length):
        start = place * copies
        completions[prompt] = found[start:start + copies]
    return completions


def decode(
    policy,
    prompts: list[np.ndarray],
    keys: list[tuple],
    sampling,
    stops: Stops,
    ended,
) -> list[Completion]:
    """One completion for each of `prompts` with the key of its draws; copies of a prompt are neighbours, and
    the same object. `ended(count)` is called as completions end.

    A pass of the loop draws a token or a few for all rows, or the first ones of rows that come."""
    lm = policy.lm
    limit = sampling.max_completion_length
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths, default=0)
    memory = tokens_in_memory(lm)
    most = rows_at_once(memory, longest, sampling)
    drawn = Drawn(len(prompts), limit)
    decoding = Decoding(policy, min(most, len(prompts)), sampling)
    steps = STEPS_AT_ONCE[lm.device.type]
    active = []                                                    # the n rows that are computed
    waiting = range(len(prompts))
    while len(drawn.completions) < len(prompts):
        running = [row for row in active if row not in drawn.completions]
        come = 0
        if waiting:
            so_far = [lengths[row] + drawn.lengths[row] for row in running]
            most = rows_at_once(memory, max([longest, *so_far]), sampling)
            come = rows_that_come(len(running), most, len(waiting))
        size = row_count(lm, len(running), len(active)) if come == 0 else len(running)
        if size < len(active):
            alive = running_first(active, drawn.completions)[:size]
            order = decoding.compact(alive)
            active = [active[place] for place in order]
        if come:
            new = waiting[:come]
            waiting = waiting[come:]
            active += new
            uniforms = uniform_numbers([keys[row] for row in new], limit)
            tokens, logps = decoding.add([prompts[row] for row in new], uniforms)
        else:
            new = active
            tokens, logps = decoding.advance(steps)
        if drawn.add(new, tokens, logps, stops):
            ended(len(drawn.completions))
    return [drawn.completions[row] for row in range(len(prompts))]


def decode_in_batches(
    policy,
    prompts: list[np.ndarray],
    keys: list[tuple],
    sampling,
    stops: Stops,
    ended,
) -> list[Completion]:
    """What `decode` does, with transformers' loop over the tokens and its cache, which take no new rows: all
    rows of a batch wait for its longest completion."""
    limit = sampling.max_completion_length
    longest = max(map(len, prompts), default=0)
    size = rows_at_once(tokens_in_memory(policy.lm), longest, sampling)
    found = []

    def more_ended(count):
        ended(len(found) + count)

    for start in range(0, len(prompts), size):
        end = start + size
        found += decode_plain(
            policy.lm,
            prompts[start:end],
            uniform_numbers(keys[start:end], limit),
            sampling,
            stops,
            more_ended,
            policy.form.has_exact_cache,
        )
    return found


def rows_at_once(memory: int, longest: int, sampling) -> int:
    """How many rows of up to `longest` tokens a memory for so many tokens holds, with room for a whole
    completion behind each; at least 1."""
    width = longest + sampling.max_completion_length
    return max(1, min(sampling.rollout_batch_size, memory // width))


def rows_that_come(running: int, most: int, waiting: int) -> int:
    """How many of the rows that wait join those that run: as many as there are places, once half of these are
    free. Each time what the cache holds is moved and a GPU records the step anew, so they come together. On a
    CPU tokens took longer where three quarters had to be free; where a quarter had to be, they took longer
    for completions of similar length."""
    return min(most - running, waiting) if 2 * running <= most else 0


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
