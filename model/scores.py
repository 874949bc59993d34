"""What some families do to attention scores: a cap (Gemma 2), or a sink beside the keys (gpt-oss)."""
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

SINK_DIMS = 8      # added to the head dimension; CUDA's kernels want a multiple of 8


def scored_attention(query, key, value, mask=None, scaling=None, softcap=None, sinks=None):
    """Attention whose scores (..., L, K) are in memory: query (..., L, head_dim), key and value
    (..., K, head_dim), mask (..., L, K) of booleans. A score s becomes softcap * tanh(s / softcap). `sinks`,
    which broadcast to (..., L, 1), are scores of one more key, whose value is 0."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    scores = (query @ key.transpose(-1, -2)).float() * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sinks = sinks.float().expand(*scores.shape[:-1], 1)
        scores = torch.cat([sinks, scores], -1)
    weights = scores.softmax(-1).to(value.dtype)
    if sinks is not None:
        weights = weights[..., 1:]
    return weights @ value


def window_mask(queries: int, keys: int, sliding_window: int, device):
    """(L, K): which of K keys each of L queries sees, which stand at the last places: the last
    `sliding_window` up to its own."""
    before = keys - queries                        # keys before the first query
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return mask.tril(before).triu(before - sliding_window + 1)


def special_attention(query, key, value, scaling, sliding_window, softcap, sinks):
    """attention.attend for scores with a cap, or with sinks."""
    queries = query.shape[2]
    keys = key.shape[2]
    if softcap:
        mask = window_mask(queries, keys, sliding_window or keys, query.device)
        grouped = query.unflatten(1, (key.shape[1], -1))           # (1, kv_heads, heads per key, L, head_dim)
        if sinks is not None:
            sinks = sinks.view(1, key.shape[1], -1, 1, 1)
        output = scored_attention(grouped, key[:, :, None], value[:, :, None], mask, scaling, softcap, sinks)
        return output.flatten(1, 2).transpose(1, 2)
    head_dim = value.shape[3]
    query, key, value = with_sink(query, key, value, sinks, scaling)
    if sliding_window is None:
        mask = causal_lower_right(queries, keys + 1)               # the sink is the first key
    else:
        mask = window_mask(queries, keys, sliding_window, query.device)
        mask = F.pad(mask, (1, 0), value=True)                     # every query sees the sink
    output = F.scaled_dot_product_attention(query, key, value, mask, scale=scaling, enable_gqa=True)
    return output[..., :head_dim].transpose(1, 2)


def with_sink(query, key, value, sinks, scaling):
    """Query, key and value with which ordinary attention has a sink per query head: `sinks` (heads,) are
    scores of a first key, whose value is 0. One more dimension carries them, so that they need no mask:

        query'  =  (query, sink / scaling)        key'  =  (key, 0)        key' of the sink  =  (0, 1)
    """
    _, heads, length, head_dim = query.shape
    if scaling is None:
        scaling = head_dim ** -0.5
    column = (sinks / scaling).to(query.dtype)
    column = column[None, :, None, None].expand(1, heads, length, 1)
    query = F.pad(torch.cat([query, column], 3), (0, SINK_DIMS - 1))
    key = F.pad(key, (0, SINK_DIMS, 1, 0))                         # a row of zeros in front
    sink = torch.zeros_like(key[:, :, :1])
    sink[..., head_dim] = 1
    key = torch.cat([sink, key[:, :, 1:]], 2)
    value = F.pad(value, (0, SINK_DIMS, 1, 0))
    return query, key, value
