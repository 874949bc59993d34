"""Sums over the whole vocabulary that compare the predictions of two models, in slices of the vocabulary like
`ChunkedLogps`: the full logits of neither model exist. The formula that is summed is given."""
import torch

from model.head import Predictions
from model.slices import logit_slices, target_logits

PARTS = 16      # of a slice of ChunkedLogps: the formula has tensors of its own beside both models' logits


def compared(own: Predictions, other: Predictions, summands, target):
    """-> log-probs (N,) of `target` (N,) under `own`, without a gradient, and (N,): the sums over the
    vocabulary of `summands(own_logps, other_logps)`, with their gradient to states and head of `own` alone.

    `summands` takes the log-probs of both models for some tokens of the vocabulary, twice (N, slice), and
    returns as many numbers, each a function of the two log-probs at its place. Where the head of `other` has
    more rows, those beyond the V of `own` do not count in its distribution: they stand for no token."""
    rows = len(own.weight)
    bias = None if other.bias is None else other.bias[:rows]
    hidden = other.hidden.to(other.dtype)
    other = other._replace(hidden=hidden, weight=other.weight[:rows], bias=bias)
    return ChunkedSum.apply(own.hidden, own.weight, own.bias, own.cap, own.dtype, other, summands, target)


class ChunkedSum(torch.autograd.Function):
    """`compared`, by autograd of `summands` on each slice. For one row, with p = softmax(logits) and the
    slopes g_j = d summand_j / d log p_j:

        d sum / d logit_j  =  g_j - p_j sum_k g_k

    The forward makes three passes over the slices of the own head, the backward one."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, cap, dtype, other, summands, target):
        own = Predictions(hidden.to(dtype), weight, dtype, bias, cap)
        chosen, log_z = target_logits(slices_of(own, target), target)
        _, other_log_z = target_logits(slices_of(other, target), target)
        total = torch.zeros_like(log_z)                                  # (N, 1)
        slope_total = torch.zeros_like(log_z)
        for logits, other_logits, *_ in both_slices(own, other, target):
            logps = logits.sub_(log_z)
            values, slopes = with_slopes(summands, logps, other_logits.sub_(other_log_z))
            total += values.sum(1, keepdim=True)
            slope_total += slopes.sum(1, keepdim=True)
        ctx.save_for_backward(own.hidden, weight, bias, target, log_z, other_log_z, slope_total)
        ctx.cap, ctx.other, ctx.summands = cap, other, summands
        logps = (chosen - log_z)[:, 0]
        ctx.mark_non_differentiable(logps)
        return logps, total[:, 0]

    @staticmethod
    def backward(ctx, _, grad_sums):
        hidden, weight, bias, target, log_z, other_log_z, slope_total = ctx.saved_tensors
        own = Predictions(hidden, weight, hidden.dtype, bias, ctx.cap)
        factor = grad_sums[:, None]                                      # (N, 1)
        grad_hidden = torch.zeros_like(hidden).float()
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.empty_like(bias)
        for logits, other_logits, rows, head in both_slices(own, ctx.other, target):
            cap_slope = None if ctx.cap is None else ctx.cap.slope(logits)
            logps = logits.sub_(log_z)
            _, slopes = with_slopes(ctx.summands, logps, other_logits.sub_(other_log_z))
            error = slopes - logps.exp_().mul_(slope_total)
            error *= factor
            if cap_slope is not None:
                error *= cap_slope
            if grad_bias is not None:
                grad_bias[rows] = error.sum(0)
            error = error.to(hidden.dtype)
            grad_hidden += error @ head
            if grad_weight is not None:
                grad_weight[rows] = error.T @ hidden
        return grad_hidden, grad_weight, grad_bias, *[None] * 5


def slices_of(model: Predictions, target, parts: int = 1):
    return logit_slices(model.hidden, model.weight, target, model.bias, model.cap, parts)


def both_slices(own: Predictions, other: Predictions, target):
    """Yield the logits of both models for a slice of the vocabulary (N, slice), and its rows and own head as
    in `logit_slices`."""
    slices = zip(slices_of(own, target, PARTS), slices_of(other, target, PARTS), strict=True)
    for (logits, _, _, rows, head), (other_logits, *_) in slices:
        yield logits, other_logits, rows, head


def with_slopes(summands, own_logps, other_logps):
    """The summands of a slice (N, slice), and their derivatives by the own log-probs."""
    leaf = own_logps.detach().requires_grad_()
    with torch.enable_grad():
        values = summands(leaf, other_logps)
        slopes, = torch.autograd.grad(values.sum(), leaf)
    return values.detach(), slopes
