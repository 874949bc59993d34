"""The rule of flat rows as a (T, T) mask: `attn_implementation: dense`, and the oracle of the tests."""
import torch
from transformers import AttentionInterface

from model.scores import scored_attention


def visible(segments, prefix=0, sliding_window=None, device=None):
    """The (T, T) boolean mask, quadratic in memory: a query sees a key at or before its own place that is in
    the prefix, in its prompt or in the same response."""
    example = [-1] * prefix
    response = [0] * prefix
    position = list(range(prefix))
    for number, (prompt, lengths) in enumerate(segments):
        parts = [prompt, *lengths]
        for part, length in enumerate(parts):
            start = prefix + prompt if part else prefix      # part 0 is the prompt
            example += [number] * length
            response += [part] * length
            position += range(start, start + length)
    example = torch.tensor(example, device=device)
    response = torch.tensor(response, device=device)
    position = torch.tensor(position, device=device)
    same_example = example[:, None] == example
    same_response = response[:, None] == response
    in_prompt = response == 0
    in_prefix = example == -1
    mask = in_prefix | same_example & (same_response | in_prompt)
    mask = mask.tril()
    if sliding_window is not None:
        distance = position[:, None] - position
        mask &= distance < sliding_window
    return mask


def dense_attention(module, query, key, value, attention_mask, scaling=None, segments=None, prefix=0,
                    sliding_window=None, softcap=None, s_aux=None, **_):
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    copies = query.shape[1] // key.shape[1]        # query heads per key
    key = key.repeat_interleave(copies, 1)
    value = value.repeat_interleave(copies, 1)
    mask = visible(segments, prefix, sliding_window, query.device)
    sinks = None if s_aux is None else s_aux[None, :, None, None]
    output = scored_attention(query, key, value, mask, scaling, softcap, sinks)
    return output.transpose(1, 2), None


AttentionInterface.register("dense", dense_attention)
