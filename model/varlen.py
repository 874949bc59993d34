"""Attention over flat rows with shared prompts in one call of a kernel per layer, on a GPU in bf16.

A row is split into U units: the prefix, each prompt with its first response, and each further response. The
queries of a unit are its own tokens, its keys those of the prefix, of its prompt and its own. The keys of all
units one after the other (K, kv_heads, head_dim) hold a prompt once per response: 1.6 keys per token for
HH-RLHF's pairs.
"""
import inspect
import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

from data.transfer import together_to
from model.attention import attend
from model.form import VARLEN

HAS_GQA_OPTION = "enable_gqa" in inspect.signature(varlen_attn).parameters      # torch 2.11 has none


class Units(NamedTuple):
    """The units of a flat row of T tokens, for all its layers."""
    queries: list[int]                # U lengths, whose sum is T
    keys: list[int]                   # U lengths, whose sum is K
    most_queries: int                 # the largest of each, by themselves: a layer is compiled once for all
    most_keys: int                    #     numbers, but once for each list
    query_ends: torch.Tensor          # (U + 1,) int32 on a device: where each unit's queries end, after a 0
    key_ends: torch.Tensor            # (U + 1,) the same: where each unit's keys end, after a 0
    tokens: torch.Tensor              # (K,): the token whose key each one is
    own: torch.Tensor                 # (T,): where in K each token is in its own unit
    prefixes: torch.Tensor            # (C, prefix): where in K each of C copies of the prefix is
    copied: torch.Tensor              # (P,): the tokens of prompts with further responses
    copies: torch.Tensor              # (R, P): where in K the copy of each is, for the r-th further response;
    #                                   K itself where its prompt has fewer

    def to(self, device) -> "Units":
        places = [self.own, self.prefixes, self.copied, self.copies]
        arrays = [self.query_ends, self.key_ends, self.tokens, *places]
        query_ends, key_ends, tokens, own, prefixes, copied, copies = together_to(arrays, device)
        return self._replace(
            query_ends=query_ends.int(),
            key_ends=key_ends.int(),
            tokens=tokens,
            own=own,
            prefixes=prefixes,
            copied=copied,
            copies=copies,
        )


def units_of(segments: list[tuple[int, list[int]]], prefix: int = 0) -> Units:
    """The units of a row with these `Batch.segments` and this `Batch.prefix`."""
    queries, keys = ([prefix], [prefix]) if prefix else ([], [])
    tokens, own = [(0, prefix)], [(0, prefix)]      # ranges (first, length) of tokens, and of places in K
    prefixes = []                     # per other unit: the first place of its copy of the prefix
    prompts = []                      # the ranges of prompts with further responses
    copies = []                       # ... and the first places of their copies, one per further response
    start = prefix                    # the unit's first token
    place = prefix                    # the unit's first key
    for prompt, responses in segments:
        context = (start, prompt)
        lengths = [prompt + sum(responses[:1]), *responses[1:]]
        firsts = []
        for number, length in enumerate(lengths):
            tokens.append((0, prefix))
            prefixes.append(place)
            place += prefix
            if number:                # a further response: its prompt's keys come first
                firsts.append(place)
                tokens.append(context)
                place += prompt
            tokens.append((start, length))
            own.append((place, length))
            queries.append(length)
            keys.append(prefix + prompt + length if number else prefix + length)
            start += length
            place += length
        if firsts:
            prompts.append(context)
            copies.append(firsts)
    most = max(queries), max(keys)
    if not prefix:
        prefixes = [0]
    arrays = ends(queries), ends(keys), numbers_in(tokens), numbers_in(own), rows_of(prefixes, prefix)
    return Units(queries, keys, *most, *arrays, numbers_in(prompts), copies_of(prompts, copies, place))


def with_units(batch, policy):
    """A batch with the policy's form, and what the attention of that form needs."""
    batch.form = policy.form
    if batch.form.attention == VARLEN:
        batch.units = units_of(batch.segments, batch.prefix)
    return batch


def laid_out(batch, policy):
    """The batch; where a model with another form laid it out, its examples laid out for this one. What is
    computed per token or response has the same order either way."""
    return batch if batch.form in (None, policy.form) else policy.collate(batch.examples)


def layout_of(batch) -> dict:
    """What the attention of every layer is told: segments and prefix, or units without these lists, which
    would make a compiled layer another one for each batch."""
    if batch.units is None:
        return {"segments": batch.segments, "prefix": batch.prefix}
    return {"units": batch.units}


def numbers_in(ranges: list[tuple[int, int]]) -> torch.Tensor:
    """All numbers of the ranges (first, length), one after the other."""
    firsts, lengths = np.array(ranges, dtype=int).reshape(-1, 2).T
    before = lengths.cumsum() - lengths
    return torch.from_numpy(np.repeat(firsts - before, lengths) + np.arange(lengths.sum()))


def rows_of(firsts: list[int], length: int) -> torch.Tensor:
    """(C, length): a row per range."""
    return torch.tensor(firsts)[:, None] + torch.arange(length)


def copies_of(prompts: list[tuple[int, int]], firsts: list[list[int]], filler: int) -> torch.Tensor:
    """(R, P): the place in K of each token of these prompts in each of their copies; `firsts`: per prompt,
    where each of its copies begins; `filler` where a prompt has fewer copies than another."""
    lengths = [length for _, length in prompts]
    inside = numbers_in([(0, length) for length in lengths])
    rows = []
    for row in itertools.zip_longest(*firsts, fillvalue=-1):
        first = torch.tensor(row).repeat_interleave(torch.tensor(lengths))
        rows.append(torch.where(first < 0, filler, first + inside))
    return torch.stack(rows) if rows else torch.zeros((0, 0), dtype=torch.long)


def ends(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


class UnitKeys(torch.autograd.Function):
    """(T, kv_heads, head_dim) and arrays of Units -> (K, kv_heads, head_dim): keys or values of tokens as
    those of units. The backward sums the copies of a prompt before it adds them: no token is there twice
    then, so the sum has one order. For that it takes R * P rows, a few K where groups are very uneven."""

    @staticmethod
    def forward(ctx, keys, tokens, own, prefixes, copied, copies):
        ctx.save_for_backward(own, prefixes, copied, copies)
        return keys.index_select(0, tokens)

    @staticmethod
    def backward(ctx, grad):
        own, prefixes, copied, copies = ctx.saved_tensors
        total = grad.index_select(0, own)
        if copies.numel():
            filled = torch.cat([grad, torch.zeros_like(grad[:1])])      # a 0 for copies that are not there
            # a compiled backward runs under autocast, which makes sums fp32 unless a dtype is asked for
            total.index_add_(0, copied, filled[copies].sum(0, dtype=grad.dtype))
        if prefixes.numel():
            total[:prefixes.shape[1]] += grad[prefixes].sum(0)
        return total, None, None, None, None, None


def unit_keys(keys, units: Units):
    if not torch.is_grad_enabled():      # the compiler cannot follow the class there
        return keys.index_select(0, units.tokens)
    return UnitKeys.apply(keys, units.tokens, units.own, units.prefixes, units.copied, units.copies)


def varlen_attention(module, query, key, value, attention_mask, scaling=None, units=None,
                     sliding_window=None, softcap=None, s_aux=None, **_):
    """The same as segments_attention, with the `units` of its `segments`. Raises NotImplementedError for
    scores with a cap or with sinks, which the kernel does not know."""
    if softcap or s_aux is not None:
        raise NotImplementedError("varlen attention has neither caps nor sinks of scores")
    queries = query[0].transpose(0, 1).to(value.dtype)        # (T, heads, head_dim)
    keys = key[0].transpose(0, 1).to(value.dtype)
    keys = unit_keys(keys, units)
    values = unit_keys(value[0].transpose(0, 1), units)
    attend_to = in_one_call if value.is_cuda and value.dtype != torch.float32 else one_by_one
    return attend_to(queries, keys, values, units, scaling, sliding_window)[None], None


def in_one_call(queries, keys, values, units: Units, scaling, sliding_window):
    """Attention of all units by the kernel -> (T, heads, head_dim). A unit's queries stand at the last of its
    keys' places."""
    before = -1 if sliding_window is None else sliding_window - 1      # keys that a query sees before its own
    options = {"scale": scaling, "window_size": (before, 0)}
    if HAS_GQA_OPTION:
        options["enable_gqa"] = True
    return varlen_attn(
        queries,
        keys,
        values,
        units.query_ends,
        units.key_ends,
        units.most_queries,
        units.most_keys,
        **options)


@torch.compiler.disable
def one_by_one(queries, keys, values, units: Units, scaling, sliding_window):
    """What the kernel computes, for what it does not take: a call of SDPA per unit."""
    attended = []
    parts = zip(queries.split(units.queries), keys.split(units.keys), values.split(units.keys))
    for query, key, value in parts:
        output = attend(
            query.transpose(0, 1)[None],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            scaling,
            sliding_window)
        attended.append(output[0])
    return torch.cat(attended)


AttentionInterface.register(VARLEN, varlen_attention)
