"""A computation on tensors that stay in place, recorded as a CUDA graph: one launch for all of its own.

Decoding a token takes 1,600 launches with 28 layers, which take longer than what they launch."""
import warnings
from collections.abc import Callable

import torch

WAITS = "called a synchronizing CUDA operation"      # PyTorch's warning


class Recorded:
    """`recorded(function)` calls a function that reads and writes tensors which stay where they are. Where
    that `is_wanted`, the first call is an ordinary one, the second is recorded, and all calls from then on
    replay it. As long as it waits for the GPU, or where it cannot be recorded, all calls are ordinary ones.

    The function is not kept: it may be a method of what keeps this, and the tensors of such a circle stay in
    memory until Python looks for circles."""

    def __init__(self, is_wanted: bool):
        self.can_be_recorded = is_wanted
        self.pool = torch.cuda.graph_pool_handle() if is_wanted else None
        self.graph = self.replaced = None
        self.is_ready = False

    def forget(self) -> None:
        """The tensors are others from now on."""
        # PyTorch takes a pool that no graph uses for none: the old graph stays until there is a new one
        self.replaced = self.graph or self.replaced
        self.graph = None
        self.is_ready = False

    def __call__(self, function: Callable[[], None]) -> None:
        if self.is_ready and self.graph is None:
            self.record(function)
        if self.graph is not None:
            self.graph.replay()
        elif self.can_be_recorded:
            self.is_ready = not waits(function)
        else:
            function()

    def record(self, function: Callable[[], None]) -> None:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(self.pool)
                try:
                    function()
                finally:
                    graph.capture_end()
        except RuntimeError:
            torch.cuda.synchronize()
            self.can_be_recorded = False
            return
        self.graph = graph
        self.replaced = None


def waits(function: Callable[[], None]) -> bool:
    """Call a function; whether it waits for the GPU. To record it would fail then, and a failure may leave
    PyTorch as if the recording went on."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return any(WAITS in str(warning.message) for warning in told)
