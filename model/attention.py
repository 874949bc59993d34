"""Attention over flat rows with shared prompts, as a function that transformers' models call."""
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface


def segments_attention(module, query, key, value, attention_mask, scaling=None, segments=None,
                       sliding_window=None, **_):
    """Attention over a flat row, one call of SDPA per prompt with its first response, and one per further
    response: its queries over the keys of the prompt and its own. Memory is linear in the row's length.

    query (1, heads, T, head_dim); key, value (1, kv_heads, T, head_dim); segments as in `Batch.segments`.
    Returns (1, T, heads, head_dim), as transformers' attention functions do."""
    query, key = query.to(value.dtype), key.to(value.dtype)    # rotary embeddings return fp32 under autocast
    units = []                                                 # lengths of the parts with a call each
    for prompt, responses in segments:
        units.append(prompt + sum(responses[:1]))
        units.extend(responses[1:])
    # one split, not a slice per unit: each slice's backward would fill a gradient of the whole row with zeros
    queries = query.split(units, dim=2)
    keys = key.split(units, dim=2)
    values = value.split(units, dim=2)
    attended = []
    first = 0                                                  # the unit of a prompt with its first response
    for prompt, responses in segments:
        attended.append(attend(queries[first], keys[first], values[first], scaling, sliding_window))
        for unit in range(first + 1, first + len(responses)):
            unit_keys = torch.cat([keys[first][:, :, :prompt], keys[unit]], 2)
            unit_values = torch.cat([values[first][:, :, :prompt], values[unit]], 2)
            attended.append(attend(queries[unit], unit_keys, unit_values, scaling, sliding_window))
        first += max(1, len(responses))
    return torch.cat(attended, 1), None


def attend(query, key, value, scaling, sliding_window):
    """Causal attention of L queries, the last of the K keys' positions -> (1, L, heads, head_dim)"""
    queries, keys = query.shape[2], key.shape[2]
    before = keys - queries                                    # keys that every query sees
    mask = None
    if sliding_window is not None and keys > sliding_window:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = ones.tril(before).triu(before - sliding_window + 1)
    elif before:
        mask = causal_lower_right(queries, keys)
    output = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling,
                                            enable_gqa=True)
    return output.transpose(1, 2)


AttentionInterface.register("segments", segments_attention)
