"""Logits in slices of the vocabulary, and what log-probs need of each slice."""
import functools

import torch

LOGITS_AT_ONCE = {
    "cpu": 2 ** 22,         # 16 MiB fits a CPU's cache
    "cuda": 2 ** 27,        # 512 MiB keeps a GPU busy
}
ALIGNED = 128               # numbers; a GPU's fast products need rows that begin at multiples of 16 bytes


def logit_slices(hidden, weight, target, bias=None, cap=None, parts=1):
    """Yield the logits, a slice of the vocabulary at a time, in one buffer of at most LOGITS_AT_ONCE / parts
    numbers. `bias` (V,) fp32 and `cap` as in head.Head.

    logits   (N, slice) fp32; the caller may overwrite them
    column   (N, 1): the target's place in this slice, or any place where the target is in another slice
    hit      (N, 1): whether the target is in this slice
    rows     the slice's rows of the head, as a Python slice
    head     these rows (slice, D), in the precision of `hidden`"""
    width = slice_width(len(target), hidden.device.type, parts)
    # a GPU adds bf16 products in fp32: logits that are not rounded cost nothing there
    is_unrounded = hidden.is_cuda and hidden.dtype == torch.bfloat16
    dtype = torch.float32 if is_unrounded else hidden.dtype
    options = {"out_dtype": dtype} if is_unrounded else {}
    buffer = hidden.new_empty(len(target), min(width, len(weight)), dtype=dtype)
    for start in range(0, len(weight), width):
        rows = slice(start, start + width)
        head = weight[rows].to(hidden.dtype)
        offset = target[:, None] - start
        column = offset % len(head)
        out = buffer[:, :len(head)]
        logits = torch.mm(hidden, head.T, out=out, **options).float()
        if bias is not None:
            logits += bias[rows]
        if cap is not None:
            cap.apply_(logits)
        yield logits, column, column == offset, rows, head


def slice_width(rows: int, device: str, parts: int = 1) -> int:
    """How many tokens of the vocabulary a slice has."""
    width = LOGITS_AT_ONCE[device] // parts // max(1, rows)
    if device == "cuda" and width > ALIGNED:
        width -= width % ALIGNED
    return max(1, width)


def target_logits(slices, target, compiled: bool = False):
    """The targets' logits (N, 1), and log Z (N, 1): the log of each row's sum of exp(logits)."""
    add = kernel(add_slice, compiled)
    total = torch.zeros_like(target[:, None]).float()        # sum of exp(logits - maximum)
    chosen = torch.zeros_like(total)
    maximum = total - torch.inf
    for logits, column, hit, *_ in slices:
        chosen, maximum, total = add(logits, column, hit, chosen, maximum, total)
    return chosen, maximum + total.log()


def add_slice(logits, column, hit, chosen, maximum, total):
    """`chosen`, `maximum` and `total` (N, 1) with one slice more. The largest logit so far is subtracted
    before `exp`, and the sum so far is rescaled where a slice has a larger one. May overwrite the logits."""
    chosen = chosen + hit * logits.gather(1, column)
    higher = torch.maximum(maximum, logits.amax(1, keepdim=True))
    if torch.compiler.is_compiling():      # one kernel, which need not write the logits back
        exponentials = (logits - higher).exp()
    else:
        exponentials = logits.sub_(higher).exp_()
    total = total * (maximum - higher).exp() + exponentials.sum(1, keepdim=True)
    return chosen, higher, total


def slice_error(logits, log_z, column, hit, cap, dtype):
    """p - 1[j = target] of a slice (N, slice), times the slope of a cap, in `dtype`. May overwrite the
    logits."""
    slope = None if cap is None else cap.slope(logits)
    if torch.compiler.is_compiling():      # one kernel again
        places = torch.arange(logits.shape[1], device=logits.device)
        error = (logits - log_z).exp() - (hit & (places == column)).float()
    else:
        error = logits.sub_(log_z).exp_()
        error.scatter_add_(1, column, -hit.float())
    if slope is not None:
        error *= slope
    return error.to(dtype)


@functools.cache
def kernel(function, compiled):
    """`function`, as one kernel where a run compiles its layers. torch.compile imports the compiler, which
    takes a second, so it is called only where a kernel is needed."""
    return torch.compile(function, dynamic=True) if compiled else function
