"""Which examples an update takes, how they are dealt to ranks and micro-batches, and what these share."""
import math
import os

import numpy as np

MIN_PREFIX = 16     # tokens; what a shorter prefix saves, the copies of its keys and values cost


def order(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """(count,) the example indices of one epoch: a pure function, so the data position is the step number."""
    if not shuffle:
        return np.arange(count)
    draw = np.random.default_rng((seed, epoch))
    return draw.permutation(count)


def pack(sizes: list[int], micro_batch_tokens: int, world: int = 1) -> list[list[list[int]]]:
    """Deal one update's examples (given by their sizes in tokens) to ranks and micro-batches.

    Returns, per rank, the same number of lists of positions in `sizes` (some may be empty): the fewest with
    which `fill` keeps within `micro_batch_tokens`. An example larger than that is alone in its
    micro-batch."""
    needed = sum(min(size, micro_batch_tokens) for size in sizes)
    rounds = math.ceil(needed / (micro_batch_tokens * world))
    rounds = max(1, rounds)
    bins = fill(sizes, rounds * world, micro_batch_tokens)
    while bins is None:
        rounds += 1
        bins = fill(sizes, rounds * world, micro_batch_tokens)
    return [bins[rank::world] for rank in range(world)]


def fill(sizes: list[int], count: int, capacity: int) -> list[list[int]] | None:
    """`count` bins of positions in `sizes`: the largest size first, each into the emptiest bin. None if a bin
    with several would exceed `capacity`."""
    bins = [[] for _ in range(count)]
    loads = [0] * count
    largest_first = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    for i in largest_first:
        emptiest = loads.index(min(loads))
        if bins[emptiest] and loads[emptiest] + sizes[i] > capacity:
            return None
        bins[emptiest].append(i)
        loads[emptiest] += sizes[i]
    for members in bins:
        members.sort()
    return bins


def common_prefix(prompts: list[np.ndarray]) -> int:
    """How many tokens several prompts begin with, which are then computed once; 0 for a few. Each prompt
    keeps its last token, which predicts."""
    if len(prompts) < 2:
        return 0
    beginnings = [prompt[:-1].tolist() for prompt in prompts]
    length = len(os.path.commonprefix(beginnings))
    return length if length >= MIN_PREFIX else 0
