"""Log-probs of target tokens from hidden states; the full logits (N, V) never exist."""
import torch

LOGITS_AT_ONCE = {
    "cpu": 2 ** 22,         # 16 MiB fits a CPU's cache
    "cuda": 2 ** 27,        # 512 MiB keeps a GPU busy
}


def plain_logps(hidden, weight, target):
    """What ChunkedLogps computes, with the full logits: hidden (N, D), weight (V, D), target (N,) -> (N,)"""
    logits = hidden @ weight.T
    logps = logits.log_softmax(1)
    return logps.gather(1, target[:, None])[:, 0]


def logit_slices(hidden, weight, target, bias=None, cap=None):
    """Yield the logits, a slice of the vocabulary at a time, in one buffer of at most LOGITS_AT_ONCE numbers.
    `bias` (V,) fp32 and `cap` as in head.Head.

    logits   (N, slice) fp32; the caller may overwrite them
    column   (N, 1): the target's place in this slice, or any place where the target is in another slice
    hit      (N, 1): whether the target is in this slice
    rows     the slice's rows of the head, as a Python slice
    head     these rows (slice, D), in the precision of `hidden`"""
    at_once = LOGITS_AT_ONCE[hidden.device.type]
    width = max(1, at_once // max(1, len(target)))
    buffer = hidden.new_empty(len(target), min(width, len(weight)))
    for start in range(0, len(weight), width):
        rows = slice(start, start + width)
        head = weight[rows].to(hidden.dtype)
        offset = target[:, None] - start
        column = offset % len(head)
        out = buffer[:, :len(head)]
        logits = torch.mm(hidden, head.T, out=out).float()
        if bias is not None:
            logits += bias[rows]
        if cap is not None:
            cap.apply_(logits)
        yield logits, column, column == offset, rows, head


def target_logits(slices, target):
    """The targets' logits (N, 1), and log Z (N, 1): the log of each row's sum of exp(logits). The largest
    logit so far is subtracted before `exp`, and the sum so far is rescaled where a slice has a larger
    one."""
    total = torch.zeros_like(target[:, None]).float()        # sum of exp(logits - maximum)
    chosen = torch.zeros_like(total)
    maximum = total - torch.inf
    for logits, column, hit, *_ in slices:
        chosen += hit * logits.gather(1, column)
        higher = torch.maximum(maximum, logits.amax(1, keepdim=True))
        logits.sub_(higher).exp_()
        total *= (maximum - higher).exp()
        total += logits.sum(1, keepdim=True)
        maximum = higher
    return chosen, maximum + total.log()


class ChunkedLogps(torch.autograd.Function):
    """`plain_logps` in slices of the vocabulary: each slice of the rows would read the whole head. `dtype` is
    that of the matrix products; everything else is fp32. `bias` and `cap` as in `logit_slices`.

    The forward keeps log Z of each row. The backward computes each slice's logits again, and writes the
    gradient of each row of the head once. With p = softmax(logits) of one row of hidden states:

        d logp / d logit_j   =  1[j = target] - p_j
        d logp / d hidden    =  sum_j (1[j = target] - p_j) weight_j
        d logp / d weight_j  =  (1[j = target] - p_j) hidden
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, dtype, bias=None, cap=None):
        hidden = hidden.to(dtype)
        chosen, log_z = target_logits(logit_slices(hidden, weight, target, bias, cap), target)
        ctx.save_for_backward(hidden, weight, target, log_z, bias)
        ctx.cap = cap
        return (chosen - log_z)[:, 0]

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, target, log_z, bias = ctx.saved_tensors
        factor = -grad_logps[:, None]                     # the minus makes the error below p - 1[j = target]
        scaled = (hidden * factor).to(hidden.dtype)       # N x D products here instead of N x V in the loop
        grad_hidden = torch.zeros_like(hidden).float()
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.empty_like(bias)
        for logits, column, hit, rows, head in logit_slices(hidden, weight, target, bias, ctx.cap):
            slope = None if ctx.cap is None else ctx.cap.slope(logits)
            error = logits.sub_(log_z).exp_()
            error.scatter_add_(1, column, -hit.float())
            if slope is not None:
                error *= slope
            if grad_bias is not None:
                grad_bias[rows] = (error * factor).sum(0)
            error = error.to(hidden.dtype)
            grad_hidden += error @ head
            if grad_weight is None:
                continue
            if grad_weight.dtype == error.dtype:          # no copy of a slice of the gradient
                torch.mm(error.T, scaled, out=grad_weight[rows])
            else:
                grad_weight[rows] = error.T @ scaled
        return grad_hidden * factor, grad_weight, None, None, grad_bias, None
