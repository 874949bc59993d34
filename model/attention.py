"""Attention over flat rows with shared prompts, as a function that transformers' models call."""
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from model.scores import special_attention, window_mask


def segments_attention(module, query, key, value, attention_mask, scaling=None, segments=None, prefix=0,
                       sliding_window=None, softcap=None, s_aux=None, **_):
    """Attention over a flat row, one call of SDPA per prompt with its first response, and one per further
    response: its queries over the keys of the prompt and its own, all behind those of the prefix. Memory is
    linear in the row's length.

    query (1, heads, T, head_dim); key, value (1, kv_heads, T, head_dim); segments and prefix as in `Batch`;
    softcap: a cap on the scores (Gemma 2); s_aux (heads,): sinks (gpt-oss), both as in scores.py. Returns
    (1, T, heads, head_dim), as transformers' attention functions do."""
    options = (scaling, sliding_window, softcap, s_aux)
    query = query.to(value.dtype)          # under autocast, rotary embeddings return fp32
    key = key.to(value.dtype)
    units = [prefix]                       # lengths of the parts of the row with a call each
    for prompt, responses in segments:
        units += [prompt + sum(responses[:1]), *responses[1:]]
    # one split, not a slice per unit: each slice's backward would fill a gradient of the whole row with zeros
    queries = query.split(units, dim=2)
    keys = key.split(units, dim=2)
    values = value.split(units, dim=2)
    attended = []
    if prefix:
        attended.append(attend(queries[0], keys[0], values[0], *options))
    first = 1                              # the unit of a prompt with its first response
    for prompt, responses in segments:
        unit = queries[first], keys[first], values[first]
        if prefix:                         # its queries again: a causal square is faster than a mask
            unit = [torch.cat([whole[0], whole[first]], 2) for whole in (queries, keys, values)]
        output = attend(*unit, *options)
        attended.append(output[:, prefix:])
        _, prompt_keys, prompt_values = unit
        end = prefix + prompt
        for other in range(first + 1, first + len(responses)):
            unit_keys = torch.cat([prompt_keys[:, :, :end], keys[other]], 2)
            unit_values = torch.cat([prompt_values[:, :, :end], values[other]], 2)
            output = attend(queries[other], unit_keys, unit_values, *options)
            attended.append(output)
        first += max(1, len(responses))
    return torch.cat(attended, 1), None


def attend(query, key, value, scaling, sliding_window, softcap=None, sinks=None):
    """Causal attention of L queries that stand at the last of K keys' places -> (1, L, heads, head_dim)"""
    if softcap or sinks is not None:
        return special_attention(query, key, value, scaling, sliding_window, softcap, sinks)
    queries = query.shape[2]
    keys = key.shape[2]
    mask = None
    if sliding_window is not None and keys > sliding_window:
        mask = window_mask(queries, keys, sliding_window, query.device)
    elif keys > queries:
        mask = causal_lower_right(queries, keys)
    output = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2)


AttentionInterface.register("segments", segments_attention)
