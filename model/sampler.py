"""Completions drawn from the policy.

`sample` is the sampler: every prompt is computed once, its keys and values are copied for its completions, and rows that have
ended leave the batch. Each token is the inverse of a float64 distribution function at a uniform number that depends on (seed,
rollout, prompt, sample, position) only: neither the batch nor the number of ranks changes what is drawn (but for a token whose
number lies within rounding of the border between two).
"""
import contextlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from data.tokenise import stop_ids
from model.attention import segments_attention
from model.cpu import SLICE, few_rows, few_rows_product, largest, on_plain_cpu, quick
from model.generating import generating

PREFILL_TOKENS = 8192                  # of prompts in one forward

CACHE_BYTES = 2 ** 31                  # of keys and values at a time on a CPU; on a GPU half of its free memory

BLOCK = 512                            # tokens of the vocabulary in a block of the distribution function


class Completion(NamedTuple):
    """One completion: token ids (L,) int32 up to and including what stopped it, their log-probs (L,) fp32 under the policy at the
    sampling temperature (before top_p and top_k), and whether it stopped by itself."""
    tokens: np.ndarray
    logps: np.ndarray
    finished: bool


class Cache:
    """Keys and values of every layer, a row per completion. Prompts end in the same column, so that each step writes one column for
    all rows; `mask` hides the columns before a shorter prompt. `groups`: per prompt, its rows and its length."""

    def __init__(self, groups: list[tuple[list[int], int]], room: int, device):
        self.rows, self.column = sum(len(rows) for rows, _ in groups), max(length for _, length in groups)
        self.layers, self.width = {}, self.column + room
        self.prompts = []                                  # of `groups`, those that the next forward computes; none: it is one step
        start = torch.zeros(self.rows, dtype=torch.long)
        for rows, length in groups:
            start[rows] = self.column - length
        self.mask = (torch.arange(self.width) >= start[:, None])[:, None, None].to(device) if start.any() else None

    def store(self, layer: int, key, value):
        """Add the keys and values of a forward: (1, heads, T, head_dim) of whole prompts, or (B, heads, 1, head_dim) of one step;
        -> those that a step's queries see."""
        if layer not in self.layers:
            self.layers[layer] = [x.new_empty(self.rows, x.shape[1], self.width, x.shape[3]) for x in (key, value)]
            for stored in self.layers[layer] if self.mask is not None else ():
                stored[:, :, :self.column].zero_()         # the mask hides it, but 0 times NaN is NaN
        for stored, new in zip(self.layers[layer], (key, value)):
            if self.prompts:
                parts = new[0].split([length for _, length in self.prompts], dim=1)
                for (rows, length), part in zip(self.prompts, parts):
                    stored[rows, :, self.column - length:self.column] = part
            else:
                stored[:, :, self.column] = new[:, :, 0]
        return [stored[:, :, :self.column + 1] for stored in self.layers[layer]]

    def keep(self, alive: list[int], count: int) -> list[int]:
        """Keep the rows `alive` of `count`: the last of them fill the gaps. Returns the rows in their new order."""
        order = list(range(count))
        gaps = sorted(set(range(len(alive))) - set(alive))
        movers = [row for row in alive if row >= len(alive)]
        for gap, mover in zip(gaps, movers):
            order[gap] = mover
        for stored in self.layers.values():
            for i, whole in enumerate(stored):
                if gaps:
                    whole[gaps, :, :self.column] = whole[movers, :, :self.column]
                stored[i] = whole[:len(alive)]
        order = order[:len(alive)]
        if self.mask is not None:
            self.mask = self.mask[order]
        return order


def rollout_attention(module, query, key, value, attention_mask, scaling=None, cache=None, segments=None, sliding_window=None, **_):
    """Attention while sampling: of whole prompts (`segments`), or of one new token per row over all that `cache` holds."""
    key = key.to(value.dtype)                                      # as in segments_attention
    if segments is not None:
        cache.store(module.layer_idx, key, value)
        return segments_attention(module, query, key, value, None, scaling, segments, sliding_window)
    key, value = cache.store(module.layer_idx, key, value)
    start = max(0, key.shape[2] - sliding_window) if sliding_window is not None else 0
    mask = None if cache.mask is None else cache.mask[..., start:key.shape[2]]
    # the query heads of a key's head are its queries: fewer and larger products than a copy of the key for each of them
    grouped = query.to(value.dtype).view(len(query), key.shape[1], -1, query.shape[3])
    attended = F.scaled_dot_product_attention(grouped, key[:, :, start:], value[:, :, start:], mask, scale=scaling)
    return attended.reshape(len(query), 1, -1, query.shape[3]), None


AttentionInterface.register("rollout", rollout_attention)


def draw(logits, uniforms, temperature: float, top_p: float = 1.0, top_k: int = 0):
    """(n, V) fp32, which are overwritten, and (n,) float64 in [0, 1) -> tokens (n,) and their log-probs (n,) at the temperature
    (before top_p and top_k). Temperature 0 takes the likeliest token, with its log-prob at 1."""
    tokens = logits.argmax(1) if temperature == 0 else None
    pieces = logits.split(SLICE if logits.device.type == "cpu" else logits.shape[1], 1)      # on a CPU a piece stays in its cache
    maximum = largest(logits)
    for piece in pieces:                                                               # logits become weights, (n, V)
        piece.sub_(maximum)
        if temperature not in (0, 1):
            piece.div_(temperature)
        piece.exp_()
    sums = torch.cat([block_sums(piece) for piece in pieces], 1)
    normalizer = sums.sum(1).log()
    weights = logits
    if top_k or top_p < 1:
        weights = logits.clone()
        restrict(weights, top_p, top_k)
        sums = block_sums(weights)
    if tokens is None:
        tokens = invert(weights, sums, uniforms)
    return tokens, (logits.gather(1, tokens[:, None])[:, 0].double().log() - normalizer).float()


def block_sums(weights):
    """(n, V) -> (n, blocks) float64: the sums over blocks of BLOCK tokens; the last may be shorter. Sixteen at a time are added in
    fp32, the rest in float64."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK // 16, 16)).sum(3).sum(2, dtype=torch.float64)
    if whole < weights.shape[1]:
        sums = torch.cat([sums, weights[:, whole:].sum(1, keepdim=True, dtype=torch.float64)], 1)
    return sums


def invert(weights, sums, uniforms):
    """The first token whose cumulative weight exceeds uniform * total: first its block, then the token in the block."""
    cumulative = sums.cumsum(1)
    target = uniforms[:, None] * cumulative[:, -1:]
    block = (cumulative <= target).sum(1, keepdim=True)
    block = torch.minimum(block, (sums > 0).cumsum(1).argmax(1, keepdim=True))        # rounding must not pass the last that has weight
    rest = (target - (cumulative - sums).gather(1, block)).clamp(min=0)                # at a border rounding may make it negative
    tokens = block * BLOCK + torch.arange(BLOCK, device=weights.device)               # (n, BLOCK)
    inside = tokens < weights.shape[1]
    part = weights.gather(1, tokens.clamp(max=weights.shape[1] - 1)).double() * inside
    place = (part.cumsum(1) <= rest).sum(1, keepdim=True)
    place = torch.minimum(place, (part > 0).cumsum(1).argmax(1, keepdim=True))
    return (block * BLOCK + place)[:, 0]


def restrict(weights, top_p: float, top_k: int) -> None:
    """Set the weights of all but the `top_k` likeliest tokens, and then of those beyond a share of `top_p`, to 0."""
    if 0 < top_k < weights.shape[1]:
        weights.masked_fill_(weights < weights.topk(top_k, 1).values[:, -1:], 0.0)
    if top_p < 1:
        ordered, tokens = weights.sort(1, descending=True)
        before = ordered.double().cumsum(1) - ordered                                  # of the likelier tokens
        weights.masked_fill_((before >= top_p * ordered.sum(1, keepdim=True, dtype=torch.float64)).gather(1, tokens.argsort(1)), 0.0)


def sample(policy, tokenizer, prompts: list[np.ndarray], keys: list[tuple], copies: int, sampling, report=None):
    """`copies` completions of each prompt (ids): a list of lists of Completion. `keys`: per prompt, whole numbers that its draws
    depend on. `report(done, total)` is called as completions end."""
    lengths = [len(prompt) for prompt in prompts]
    rows = [(prompt, copy) for prompt in sorted(range(len(prompts)), key=lengths.__getitem__) for copy in range(copies)]
    uniforms = {row: np.random.default_rng((*keys[row[0]], row[1])).random(sampling.max_completion_length) for row in rows}
    completions, stops = {}, Stops(tokenizer, sampling.stop_strings())
    with generating(policy, "rollout") as lm, few_rows(lm) if on_plain_cpu(lm) else contextlib.nullcontext():
        size = min(sampling.rollout_batch_size, rows_in_memory(lm, max(lengths, default=0) + sampling.max_completion_length))
        for start in range(0, len(rows), size):
            part = rows[start:start + size]

            def ended(count, start=start):
                if report:
                    report(start + count, len(rows))

            found = decode(lm, [prompts[prompt] for prompt, _ in part], torch.from_numpy(np.stack([uniforms[row] for row in part])),
                           sampling, stops, ended)
            completions.update(zip(part, found))
    return [[completions[prompt, copy] for copy in range(copies)] for prompt in range(len(prompts))]


def rows_in_memory(lm, length: int) -> int:
    """How many rows of `length` tokens the memory for keys and values holds; at least 1."""
    config = lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    room = CACHE_BYTES if lm.device.type == "cpu" else torch.cuda.mem_get_info(lm.device)[0] // 2
    return max(1, room // (length * config.num_hidden_layers * 2 * heads * size * lm.dtype.itemsize))


class Stops:
    """What ends a completion: a stop token, or a string in the text so far."""

    def __init__(self, tokenizer, strings: list[str]):
        self.tokenizer, self.ids, self.strings = tokenizer, set(stop_ids(tokenizer)), strings
        self.window = max((len(string.encode()) for string in self.strings), default=0) + 4      # a token is a byte at least

    def __call__(self, tokens) -> bool:
        if int(tokens[-1]) in self.ids:
            return True
        return bool(self.strings) and any(string in self.tokenizer.decode(tokens[-self.window:]) for string in self.strings)


def decode(lm, prompts: list[np.ndarray], uniforms, sampling, stops: Stops, ended) -> list[Completion]:
    """One completion for each of `prompts`, of which neighbours may be the same object; `uniforms` (rows, tokens) float64."""
    device, head = lm.device, lm.get_output_embeddings().weight
    uniforms, count, longest = uniforms.to(device), len(prompts), sampling.max_completion_length
    groups = {}                                                    # a prompt's rows, by the prompt
    for row, prompt in enumerate(prompts):
        groups.setdefault(id(prompt), []).append(row)
    groups = [(rows, len(prompts[rows[0]])) for rows in groups.values()]
    cache = Cache(groups, longest, device)
    hidden = None                                                  # (count, D)
    while groups:                                                  # as many prompts as fit in one forward
        fitting = max(1, int((np.cumsum([length for _, length in groups]) <= PREFILL_TOKENS).sum()))
        cache.prompts, groups = groups[:fitting], groups[fitting:]
        ids = torch.from_numpy(np.concatenate([prompts[rows[0]] for rows, _ in cache.prompts])).long().to(device)
        positions = torch.cat([torch.arange(length) for _, length in cache.prompts]).to(device)
        states = lm.base_model(input_ids=ids[None], position_ids=positions[None], use_cache=False, cache=cache,
                               segments=[(length, []) for _, length in cache.prompts]).last_hidden_state[0]
        hidden = states.new_empty(count, states.shape[1]) if hidden is None else hidden
        for (rows, _), end in zip(cache.prompts, np.cumsum([length for _, length in cache.prompts])):
            hidden[rows] = states[end - 1]
    cache.prompts = []
    buffer = torch.empty(count * len(head)) if on_plain_cpu(lm) else None
    tokens, logps = np.zeros((count, longest), np.int32), np.zeros((count, longest), np.float32)
    lengths, finished = [0] * count, [False] * count
    active, running = list(range(count)), count                    # which row each row of the batch is; how many have not ended
    positions = torch.tensor([len(prompt) for prompt in prompts], device=device)
    for i in range(longest):
        logits = F.linear(hidden, head).float() if buffer is None else few_rows_product(hidden, head, buffer)
        drawn, drawn_logps = draw(logits, uniforms[:, i], sampling.temperature, sampling.top_p, sampling.top_k)
        tokens[active, i], logps[active, i] = drawn.cpu().numpy(), drawn_logps.cpu().numpy()
        for row in active:
            if not finished[row]:
                lengths[row], finished[row] = i + 1, stops(tokens[row, :i + 1])
        before, running = running, finished.count(False)
        if running < before:
            ended(count - running)
        if not running:
            break
        size = running if buffer is None else quick(running)
        if size < len(active):                                     # ended rows leave, but for those that cost no time
            first = sorted(range(len(active)), key=lambda place: finished[active[place]])
            order = cache.keep(first[:size], len(active))
            active = [active[place] for place in order]
            drawn, uniforms, positions = drawn[order], uniforms[order], positions[order]
        if i + 1 < longest:
            hidden = lm.base_model(input_ids=drawn[:, None], position_ids=positions[:, None], use_cache=False,
                                   cache=cache).last_hidden_state[:, 0]
            cache.column += 1
            positions = positions + 1
    ended(count)
    return [Completion(tokens[row, :lengths[row]], logps[row, :lengths[row]], finished[row]) for row in range(count)]
