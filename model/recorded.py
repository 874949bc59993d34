"""A computation on tensors that stay in place, recorded as a CUDA graph: one launch for all of its own.

Decoding a token takes 1,600 launches with 28 layers, which take longer than what they launch."""
from collections.abc import Callable

import torch


class Recorded:
    """`function()` reads and writes tensors that stay where they are. Where that `is_wanted`, its first call
    is an ordinary one, the second is recorded, and all calls from then on replay it. Where it cannot be
    recorded, because it waits for the GPU, all calls are ordinary ones."""

    def __init__(self, function: Callable[[], None], is_wanted: bool):
        self.function = function
        self.can_be_recorded = is_wanted
        self.pool = torch.cuda.graph_pool_handle() if is_wanted else None
        self.forget()

    def forget(self) -> None:
        """The tensors are others from now on."""
        self.graph = None
        self.was_called = False

    def __call__(self) -> None:
        if self.can_be_recorded and self.was_called and self.graph is None:
            self.record()
        if self.graph is None:
            self.function()
        else:
            self.graph.replay()
        self.was_called = True

    def record(self) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(self.pool)
                try:
                    self.function()
                finally:
                    graph.capture_end()
        except RuntimeError:
            torch.cuda.synchronize()
            self.can_be_recorded = False
            return
        self.graph = graph
