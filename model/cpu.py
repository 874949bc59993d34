"""What is done for speed or memory on a CPU only."""
import contextlib
import ctypes
import types

import torch
import torch.nn.functional as F
from torch import nn

SLICE = 2048       # rows of a weight, or logits of a row, that are handled together

FEW = 64           # rows up to which weight @ x.T is faster than x @ weight.T


def return_freed_memory() -> None:
    """Make glibc return freed activations at once: in its heap they raise the peak of training by a tenth."""
    with contextlib.suppress(OSError, AttributeError):         # other C libraries have no such option
        ctypes.CDLL("libc.so.6").mallopt(-3, 2 << 20)          # M_MMAP_THRESHOLD: 2 MiB


def on_plain_cpu(lm) -> bool:
    """Whether the LM runs in fp32 on a CPU, for which the functions below are made."""
    return lm.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and lm.dtype == torch.float32


def few_rows_product(x, weight, buffer=None):
    """x @ weight.T (n, N) for few rows x (n, K), as a view of `buffer`. It is computed as weight @ x.T in
    slices of the weight, which is up to twice as fast."""
    if buffer is None:
        result = x.new_empty(len(weight), len(x))
    else:
        result = buffer[:len(weight) * len(x)].view(len(weight), len(x))
    for start in range(0, len(weight), SLICE):
        rows = slice(start, start + SLICE)
        torch.mm(weight[rows], x.T, out=result[rows])
    return result.T


def quick(rows: int) -> int:
    """`rows`, rounded up to a number that a CPU multiplies fast: others take up to twice as long."""
    multiple = 4 if rows <= 4 else 16
    return -(-rows // multiple) * multiple


def few_rows_linear(self, x):
    """The forward of a linear layer, by `few_rows_product` where that is faster."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        return F.linear(x, self.weight, self.bias)
    result = few_rows_product(rows, self.weight)
    if self.bias is not None:
        result = result + self.bias
    return result.reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def few_rows(lm):
    """Run the linear layers of an LM by `few_rows_linear`."""
    layers = [module for module in lm.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.forward = types.MethodType(few_rows_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def largest(logits):
    """(n, V) -> (n, 1): the maximum of each row. On a CPU maxima of halves are faster than `amax`."""
    while logits.device.type == "cpu" and logits.shape[1] > SLICE and logits.shape[1] % 2 == 0:
        left, right = logits.chunk(2, 1)
        logits = torch.maximum(left, right)
    return logits.amax(1, keepdim=True)
