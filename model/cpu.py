"""What is done for speed or memory on a CPU only."""
import contextlib
import ctypes
import types

import torch
import torch.nn.functional as F
from torch import nn

SLICE = 2048                           # rows of a weight, or logits of a row, that are handled together

FEW = 64                               # rows up to which weight @ x.T beats x @ weight.T on a CPU


def return_freed_memory() -> None:
    """Make glibc give freed activations back at once: kept in its heap they raise the peak of CPU
    training by a tenth."""
    with contextlib.suppress(OSError, AttributeError):                  # another C library does as it likes
        ctypes.CDLL("libc.so.6").mallopt(-3, 2 << 20)                   # M_MMAP_THRESHOLD: 2 MiB


def on_plain_cpu(lm) -> bool:
    return lm.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and lm.dtype == torch.float32


def few_rows_product(x, weight, buffer=None):
    """x @ weight.T (n, N) for few rows x (n, K) on a CPU, as a view of `buffer`: weight @ x.T, by slices
    of the weight, is up to twice as fast."""
    rows, columns = len(weight), len(x)
    if buffer is None:
        result = x.new_empty(rows, columns)
    else:
        result = buffer[:rows * columns].view(rows, columns)
    for start in range(0, len(weight), SLICE):
        torch.mm(weight[start:start + SLICE], x.T, out=result[start:start + SLICE])
    return result.T


def fast_row_count(lm, rows: int) -> int:
    """The number of rows, `rows` or a few more, that a CPU multiplies fastest: others take up to twice as
    long."""
    if not on_plain_cpu(lm):
        return rows
    multiple = 4 if rows <= 4 else 16
    return -(-rows // multiple) * multiple


def slices(logits):
    """(n, V) -> parts of its columns: on a CPU so few that they stay in its cache, else all of them."""
    return logits.split(SLICE if logits.device.type == "cpu" else logits.shape[1], 1)


def few_rows_linear(self, x):
    """The forward of a linear layer, by `few_rows_product` where it is faster."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        return F.linear(x, self.weight, self.bias)
    result = few_rows_product(rows, self.weight).contiguous()      # DeepSeek takes a complex view of it
    return (result if self.bias is None else result + self.bias).reshape(*x.shape[:-1], -1)


@contextlib.contextmanager
def cpu_linears(lm):
    """While this lasts, the LM's linear layers are fast for few rows, where it runs on a CPU in fp32."""
    if not on_plain_cpu(lm):
        yield
        return
    layers = [module for module in lm.modules() if type(module) is nn.Linear]
    for layer in layers:
        layer.forward = types.MethodType(few_rows_linear, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def row_max(logits):
    """(n, V) -> (n, 1): the maximum of each row. On a CPU element-wise maxima of halves are faster than
    `amax`."""
    while logits.device.type == "cpu" and logits.shape[1] > SLICE and logits.shape[1] % 2 == 0:
        logits = torch.maximum(*logits.chunk(2, 1))
    return logits.amax(1, keepdim=True)
