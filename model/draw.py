"""From logits to tokens: the inverse of the distribution function, in float64, at given uniform numbers."""
import numpy as np
import torch

from model.cpu import row_max, slices

BLOCK = 512                            # tokens of the vocabulary in a block of the distribution function


def draw(
    logits,
    uniforms,
    temperature: float,
    top_p: float = 1.0,
    top_k: int = 0,
):
    """(n, V) fp32, which are overwritten, and (n,) float64 in [0, 1) -> tokens (n,) and their log-probs (n,)
    at the temperature (before top_p and top_k). Temperature 0 takes the likeliest token, with its log-prob at
    1."""
    if temperature == 0:
        likeliest = logits.argmax(1)
    weights, sums = softmax_weights(logits, temperature or 1.0)
    normalizer = sums.sum(1).log()
    if temperature == 0:
        tokens = likeliest
    elif top_k or top_p < 1:
        allowed = restrict(weights.clone(), top_p, top_k)
        tokens = inverse_cdf(allowed, block_sums(allowed), uniforms)
    else:
        tokens = inverse_cdf(weights, sums, uniforms)
    chosen = weights.gather(1, tokens[:, None])
    logps = chosen[:, 0].double().log() - normalizer
    return tokens, logps.float()


def uniform_numbers(keys: list[tuple], count: int) -> np.ndarray:
    """(keys, count) float64 in [0, 1), the same for the same key: whole numbers."""
    generators = map(np.random.default_rng, keys)
    return np.stack([generator.random(count) for generator in generators])


def softmax_weights(logits, temperature: float):
    """(n, V) -> weights (n, V), exp((logit - maximum) / temperature) in the place of the logits, and their
    sums over blocks (n, blocks) float64."""
    maximum = row_max(logits)
    sums = []
    for piece in slices(logits):
        piece.sub_(maximum)
        if temperature != 1:
            piece.div_(temperature)
        piece.exp_()
        sums.append(block_sums(piece))
    return logits, torch.cat(sums, 1)


def block_sums(weights):
    """(n, V) -> (n, blocks) float64: the sums over blocks of BLOCK tokens; the last block may be shorter.
    Sixteen weights at a time are added in fp32, the rest in float64."""
    size = weights.shape[1]
    whole = size - size % BLOCK
    sixteens = weights[:, :whole].unflatten(1, (-1, BLOCK // 16, 16))
    sums = sixteens.sum(3).sum(2, dtype=torch.float64)
    if whole < size:
        rest = weights[:, whole:].sum(1, keepdim=True, dtype=torch.float64)
        sums = torch.cat([sums, rest], 1)
    return sums


def inverse_cdf(weights, sums, uniforms):
    """The first token whose cumulative weight exceeds uniform * total: first its block, then the token in the
    block."""
    cumulative = sums.cumsum(1)
    total = cumulative[:, -1:]
    target = uniforms[:, None] * total
    block = first_above(cumulative, target, sums)                  # (n, 1)
    before = (cumulative - sums).gather(1, block)
    rest = target - before
    rest = rest.clamp(min=0)                                       # at a border rounding may make it negative
    first = block * BLOCK
    tokens = first + torch.arange(BLOCK, device=weights.device)    # (n, BLOCK)
    last = weights.shape[1] - 1
    inside = weights.gather(1, tokens.clamp(max=last)).double()
    inside = inside * (tokens <= last)
    place = first_above(inside.cumsum(1), rest, inside)
    return (first + place)[:, 0]


def first_above(cumulative, target, weights):
    """(n, 1): the first place where `cumulative` exceeds `target`. Rounding never passes the last place with
    weight."""
    below = cumulative <= target
    place = below.sum(1, keepdim=True)
    has_weight = weights > 0
    last = has_weight.cumsum(1).argmax(1, keepdim=True)
    return torch.minimum(place, last)


def restrict(weights, top_p: float, top_k: int):
    """The weights with 0 for all but the `top_k` likeliest tokens, and then for those beyond a share of
    `top_p`."""
    if 0 < top_k < weights.shape[1]:
        lowest = weights.topk(top_k, 1).values[:, -1:]
        weights.masked_fill_(weights < lowest, 0.0)
    if top_p < 1:
        ordered, tokens = weights.sort(1, descending=True)
        before = ordered.double().cumsum(1) - ordered            # the weight of the likelier tokens
        total = ordered.sum(1, keepdim=True, dtype=torch.float64)
        beyond = before >= top_p * total
        beyond = beyond.gather(1, tokens.argsort(1))             # in the order of the vocabulary
        weights.masked_fill_(beyond, 0.0)
    return weights
