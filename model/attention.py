"""Attention over flat rows with shared prompts, as functions that transformers' models call."""
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface


def segments_attention(module, query, key, value, attention_mask, scaling=None, segments=None, sliding_window=None, **_):
    """Attention over a flat row: SDPA per prompt-with-its-first-response (causal) and per further response (its queries over
    the prompt's keys and its own). Memory is linear in the row's length.

    query (1, heads, T, head_dim); key, value (1, kv_heads, T, head_dim); segments as in `Batch.segments`.
    Returns (1, T, heads, head_dim), as transformers' attention functions do."""
    query, key = query.to(value.dtype), key.to(value.dtype)      # under bf16 autocast the rotary embedding leaves them in fp32
    units = [length for prompt, responses in segments for length in (prompt + sum(responses[:1]), *responses[1:])]
    # `split` once instead of slicing per unit: the backward of every slice would fill a zero gradient of the whole row
    queries, keys, values = (iter(x.split(units, dim=2)) for x in (query, key, value))
    attended = []

    def attend(q, k, v):
        length, context = q.shape[2], k.shape[2] - q.shape[2]
        if sliding_window is not None and k.shape[2] > sliding_window:
            mask = torch.ones(length, k.shape[2], dtype=torch.bool, device=q.device).tril(context).triu(context - sliding_window + 1)
        else:
            mask = causal_lower_right(length, k.shape[2]) if context else None
        attended.append(F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True))

    for prompt, responses in segments:
        key_unit, value_unit = next(keys), next(values)
        attend(next(queries), key_unit, value_unit)
        for _ in responses[1:]:
            attend(next(queries), torch.cat([key_unit[:, :, :prompt], next(keys)], 2),
                   torch.cat([value_unit[:, :, :prompt], next(values)], 2))
    return torch.cat([unit.transpose(1, 2) for unit in attended], 1), None


def visible(segments, sliding_window=None, device=None):
    """The (T, T) boolean mask of the same rule (may see: causal, and key in the prompt or the same response, and same example).
    Quadratic in memory: it is what `attn_implementation: dense` runs and what the tests hold `segments_attention` against."""
    example, response, position, offset = [], [], [], 0
    for number, (prompt, responses) in enumerate(segments):
        example += [number] * (prompt + sum(responses))
        response += [-1] * prompt + [offset + i for i, length in enumerate(responses) for _ in range(length)]
        position += [*range(prompt), *(prompt + i for length in responses for i in range(length))]
        offset += len(responses)
    example, response, position = (torch.tensor(x, device=device) for x in (example, response, position))
    same_example, same_response = example[:, None] == example, response[:, None] == response
    mask = (same_example & (same_response | (response == -1))).tril()
    return mask if sliding_window is None else mask & (position[:, None] - position < sliding_window)


def dense_attention(module, query, key, value, attention_mask, scaling=None, segments=None, sliding_window=None, **_):
    query, key = query.to(value.dtype), key.to(value.dtype)
    mask = visible(segments, sliding_window, query.device)
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True).transpose(1, 2), None


AttentionInterface.register("segments", segments_attention)
AttentionInterface.register("dense", dense_attention)
