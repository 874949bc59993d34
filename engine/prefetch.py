"""Micro-batches that are made on a thread, each while the one before it is computed."""
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch


def prefetched(batches: Iterator, device: torch.device) -> Iterator:
    """The same `batches`, made one ahead of the loop where they are for a GPU."""
    if device.type == "cpu":
        return batches              # a thread would only take time from the forward
    return made_ahead(batches, functools.partial(torch.cuda.set_device, device))


def made_ahead(batches: Iterator, begin: Callable[[], None]) -> Iterator:
    """Iterate `batches` in their order, each made while the loop is at the one before it, on a thread that
    calls `begin` first. So two of them are in memory: the one of the loop and the next. An exception there is
    raised in the loop. However the loop ends, the thread ends with this generator; none may be left, since
    rewards may fork."""
    with ThreadPoolExecutor(1, initializer=begin) as thread:
        coming = thread.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = thread.submit(next, batches, None)
            yield batch
