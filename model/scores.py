"""What some families do to attention scores: a cap (Gemma 2), or a sink beside the keys (gpt-oss)."""
import torch
import torch.nn.functional as F

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


def capped_attention(query, key, value, mask, scaling, softcap):
    """`scored_attention` in the shapes of attention.attend -> (1, L, heads, head_dim)"""
    grouped = query.unflatten(1, (key.shape[1], -1))               # (1, kv_heads, heads per key, L, head_dim)
    output = scored_attention(grouped, key[:, :, None], value[:, :, None], mask, scaling, softcap)
    return output.flatten(1, 2).transpose(1, 2)


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
