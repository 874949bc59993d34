"""The rule of flat rows as a (T, T) mask: `attn_implementation: dense`, and the oracle of the tests."""
import torch
from transformers import AttentionInterface

from model.scores import scored_attention


def visible(segments, sliding_window=None, device=None):
    """The (T, T) boolean mask, quadratic in memory: a query sees a key of its own example, at or before its
    own place, that is in the prompt or in the same response."""
    example, response, position = [], [], []
    for number, (prompt, lengths) in enumerate(segments):
        parts = [prompt, *lengths]
        for part, length in enumerate(parts):
            start = prompt if part else 0      # part 0 is the prompt
            example += [number] * length
            response += [part] * length
            position += range(start, start + length)
    example = torch.tensor(example, device=device)
    response = torch.tensor(response, device=device)
    position = torch.tensor(position, device=device)
    same_example = example[:, None] == example
    same_response = response[:, None] == response
    in_prompt = response == 0
    mask = same_example & (same_response | in_prompt)
    mask = mask.tril()
    if sliding_window is not None:
        distance = position[:, None] - position
        mask &= distance < sliding_window
    return mask


def dense_attention(module, query, key, value, attention_mask, scaling=None, segments=None,
                    sliding_window=None, softcap=None, s_aux=None, **_):
    query = query.to(value.dtype)
    key = key.to(value.dtype)
    copies = query.shape[1] // key.shape[1]        # query heads per key
    key = key.repeat_interleave(copies, 1)
    value = value.repeat_interleave(copies, 1)
    mask = visible(segments, sliding_window, query.device)
    sinks = None if s_aux is None else s_aux[None, :, None, None]
    output = scored_attention(query, key, value, mask, scaling, softcap, sinks)
    return output.transpose(1, 2), None


AttentionInterface.register("dense", dense_attention)
