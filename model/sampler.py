"""Completions drawn from the policy.

`sample` computes every prompt once (`prefill`), copies its keys and values for its completions and then draws
one token at a time for all rows (`decode`); rows that have ended leave the batch. Each token is the inverse
of a float64 distribution function (model/draw.py) at a uniform number that depends on (seed, rollout, prompt,
sample, position) only: neither the batch nor the number of ranks changes what is drawn (except for ties
within floating-point rounding).
"""
import itertools
from typing import NamedTuple

import numpy as np
import torch

from data.tokenise import stop_ids
from model.cache import Cache
from model.cpu import HeadLogits, cpu_linears, fast_row_count
from model.draw import draw

PREFILL_TOKENS = 8192                  # prompt tokens in one forward
CACHE_BYTES = 2 ** 31                  # keys and values at a time on a CPU; on a GPU half of its free memory


class Completion(NamedTuple):
    """One completion: token ids (L,) int32 up to and including what stopped it, their log-probs (L,) fp32
    under the policy at the sampling temperature (before top_p and top_k), and whether it stopped by
    itself."""
    tokens: np.ndarray
    logps: np.ndarray
    finished: bool


class Stops:
    """What ends a completion: a stop token, or a string in the text so far."""

    def __init__(self, tokenizer, strings: list[str]):
        self.tokenizer, self.strings = tokenizer, strings
        self.ids = set(stop_ids(tokenizer))
        longest = max((len(string.encode()) for string in strings), default=0)
        self.window = longest + 4                      # a token is a byte at least

    def __call__(self, tokens) -> bool:
        if int(tokens[-1]) in self.ids:
            return True
        if not self.strings:
            return False
        text = self.tokenizer.decode(tokens[-self.window:])
        return any(string in text for string in self.strings)


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

    with policy.generating("rollout") as lm, cpu_linears(lm):
        longest = max(lengths, default=0) + limit
        size = min(sampling.rollout_batch_size, rows_in_memory(lm, longest))
        for start in range(0, len(rows), size):
            part = rows[start:start + size]
            batch = [prompts[prompt] for prompt, _ in part]
            uniforms = []
            for prompt, copy in part:
                generator = np.random.default_rng((*keys[prompt], copy))
                uniforms.append(generator.random(limit))
            found += decode(lm, batch, np.stack(uniforms), sampling, stops, ended)
    groups = [found[i:i + copies] for i in range(0, len(found), copies)]
    places = np.argsort(by_length)
    return [groups[place] for place in places]


def rows_in_memory(lm, length: int) -> int:
    """How many rows of `length` tokens the memory for keys and values holds; at least 1."""
    config = lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = config.num_hidden_layers * 2 * heads * head_dim * lm.dtype.itemsize
    room = CACHE_BYTES if lm.device.type == "cpu" else torch.cuda.mem_get_info(lm.device)[0] // 2
    return max(1, room // (length * per_token))


def decode(lm, prompts: list[np.ndarray], uniforms, sampling, stops: Stops, ended) -> list[Completion]:
    """One completion for each of `prompts`; copies of a prompt are neighbours, and the same object.
    `uniforms` (rows, tokens) float64. `ended(count)` is called as completions end."""
    rows = len(prompts)
    drawn = Drawn(rows, sampling.max_completion_length)
    cache, hidden = prefill(lm, prompts, sampling.max_completion_length)       # hidden (n, D)
    head_logits = HeadLogits(lm, rows)
    lengths = np.array([len(prompt) for prompt in prompts])
    active = list(range(rows))                                     # the n rows that are computed
    for step in range(sampling.max_completion_length):
        uniform = torch.from_numpy(uniforms[active, step]).to(lm.device)
        logits = head_logits(hidden)
        tokens, logps = draw(logits, uniform, sampling.temperature, sampling.top_p, sampling.top_k)
        if drawn.add(step, active, tokens, logps, stops):
            ended(len(drawn.completions))
        running = rows - len(drawn.completions)
        if running == 0:
            break
        size = fast_row_count(lm, running)
        if size < len(active):
            places = sorted(range(len(active)), key=lambda place: active[place] in drawn.completions)
            order = cache.compact(places[:size], len(active))      # running rows come first
            active = [active[place] for place in order]
            tokens = tokens[order]
        positions = torch.from_numpy(lengths[active] + step).to(lm.device)
        states = last_hidden(lm, cache, tokens[:, None], positions[:, None])
        hidden = states[:, 0]
        cache.column += 1
    return [drawn.completions[row] for row in range(rows)]


class Drawn:
    """What was drawn so far: tokens and log-probs (rows, limit), and by row the completions that have
    ended."""

    def __init__(self, rows: int, limit: int):
        self.tokens = np.zeros((rows, limit), np.int32)
        self.logps = np.zeros((rows, limit), np.float32)
        self.completions = {}

    def add(self, step: int, active: list[int], tokens, logps, stops: Stops) -> bool:
        """Note the tokens that a step drew for the rows `active`; whether any of them has ended now."""
        self.tokens[active, step] = tokens.cpu().numpy()
        self.logps[active, step] = logps.cpu().numpy()
        before = len(self.completions)
        for row in active:
            if row in self.completions:
                continue
            tokens = self.tokens[row, :step + 1]
            logps = self.logps[row, :step + 1]
            stopped = stops(tokens)
            if stopped or step + 1 == self.tokens.shape[1]:
                self.completions[row] = Completion(tokens, logps, stopped)
        return len(self.completions) > before


def prefill(lm, prompts: list[np.ndarray], room: int):
    """A Cache of every prompt's keys and values, with `room` columns more, and the last hidden state of every
    row's prompt (rows, D). Each prompt is computed once, together with as many others as PREFILL_TOKENS
    allow."""
    groups = copies_together(prompts)
    cache = Cache(groups, room, lm.device)
    hidden = []
    while groups:
        ends = np.cumsum([len(prompt) for prompt, _ in groups])
        count = max(1, int((ends <= PREFILL_TOKENS).sum()))
        cache.prompts, groups = groups[:count], groups[count:]
        ids = np.concatenate([prompt for prompt, _ in cache.prompts])
        lengths = [len(prompt) for prompt, _ in cache.prompts]
        positions = np.concatenate([np.arange(length) for length in lengths])
        ids = torch.from_numpy(ids).long().to(lm.device)
        positions = torch.from_numpy(positions).to(lm.device)
        segments = [(length, []) for length in lengths]            # prompts without responses
        states = last_hidden(lm, cache, ids[None], positions[None], segments)[0]
        for end, (_, rows) in zip(ends, cache.prompts):
            hidden.append(states[end - 1].expand(rows.stop - rows.start, -1))
    return cache, torch.cat(hidden)


def copies_together(prompts: list[np.ndarray]) -> list[tuple[np.ndarray, slice]]:
    """Per prompt: its ids and its rows, the copies of it that are neighbours in `prompts`."""
    groups, start = [], 0
    for _, copies in itertools.groupby(prompts, key=id):
        copies = list(copies)
        groups.append((copies[0], slice(start, start + len(copies))))
        start += len(copies)
    return groups


def last_hidden(lm, cache: Cache, ids, positions, segments=None):
    """(B, T) ids and positions -> hidden states (B, T, D); `cache` takes their keys and values."""
    options = {"use_cache": False, "cache": cache, "segments": segments}
    return lm.base_model(input_ids=ids, position_ids=positions, **options).last_hidden_state
