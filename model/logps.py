"""Log-probs of target tokens from hidden states; the full logits (N, V) never exist."""
import torch

from model.slices import kernel, logit_slices, slice_error, target_logits


def plain_logps(hidden, weight, target):
    """What ChunkedLogps computes, with the full logits: hidden (N, D), weight (V, D), target (N,) -> (N,)"""
    logits = hidden @ weight.T
    logps = logits.log_softmax(1)
    return logps.gather(1, target[:, None])[:, 0]


class ChunkedLogps(torch.autograd.Function):
    """`plain_logps` in slices of the vocabulary: each slice of the rows would read the whole head. `dtype` is
    that of the matrix products and of what enters them; everything else is fp32. `bias` and `cap` as in
    `logit_slices`; `compiled`: whether a slice's element-wise work is compiled.

    The forward keeps log Z of each row. The backward computes each slice's logits again, and writes the
    gradient of each row of the head once. With p = softmax(logits) of one row of hidden states:

        d logp / d logit_j   =  1[j = target] - p_j
        d logp / d hidden    =  sum_j (1[j = target] - p_j) weight_j
        d logp / d weight_j  =  (1[j = target] - p_j) hidden
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, dtype, bias=None, cap=None, compiled=False):
        hidden = hidden.to(dtype)
        chosen, log_z = target_logits(logit_slices(hidden, weight, target, bias, cap), target, compiled)
        ctx.save_for_backward(hidden, weight, target, log_z, bias)
        ctx.cap = cap
        ctx.error_of = kernel(slice_error, compiled)
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
            error = ctx.error_of(logits, log_z, column, hit, ctx.cap, hidden.dtype)
            if grad_bias is not None:
                grad_bias[rows] = (error * factor).sum(0)
            grad_hidden += error @ head
            if grad_weight is None:
                continue
            if grad_weight.dtype == error.dtype:          # no copy of a slice of the gradient
                torch.mm(error.T, scaled, out=grad_weight[rows])
            else:
                grad_weight[rows] = error.T @ scaled
        return grad_hidden * factor, grad_weight, None, None, grad_bias, None, None
