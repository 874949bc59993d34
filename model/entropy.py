"""The entropy of the next token beside its log-prob, in slices of the vocabulary like `ChunkedLogps`."""
import torch

from model.slices import logit_slices, target_logits


class ChunkedEntropy(torch.autograd.Function):
    """(hidden (N, D), weight (V, D), target (N,), dtype, bias, cap) -> log-probs (N,) and entropies (N,) in
    nats, fp32. The log-probs are those of ChunkedLogps. This makes one more pass over the slices and has two
    of them in memory.

    For one row, with p = softmax(logits):

        H                =  -sum_j p_j log p_j
        d H / d logit_j  =  -p_j (log p_j + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, dtype, bias=None, cap=None):
        hidden = hidden.to(dtype)
        chosen, log_z = target_logits(logit_slices(hidden, weight, target, bias, cap), target)
        entropy = torch.zeros_like(log_z)                                # (N, 1)
        for logits, *_ in logit_slices(hidden, weight, target, bias, cap):
            logps = logits.sub_(log_z)
            summands = logps.exp().mul_(logps)                           # p log p
            entropy -= summands.sum(1, keepdim=True)
        ctx.save_for_backward(hidden, weight, target, log_z, entropy, bias)
        ctx.cap = cap
        return (chosen - log_z)[:, 0], entropy[:, 0]

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies):
        hidden, weight, target, log_z, entropy, bias = ctx.saved_tensors
        grad_logps = grad_logps[:, None]                                 # (N, 1)
        grad_entropies = grad_entropies[:, None]                         # (N, 1)
        grad_hidden = torch.zeros_like(hidden).float()
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.empty_like(bias)
        for logits, column, hit, rows, head in logit_slices(hidden, weight, target, bias, ctx.cap):
            cap_slope = None if ctx.cap is None else ctx.cap.slope(logits)
            logps = logits.sub_(log_z)
            negative = logps.exp().neg_()                                # -p
            slope = logps.add_(entropy).mul_(grad_entropies)
            slope.add_(grad_logps)                                       # both gradients have the factor -p
            error = negative.mul_(slope)
            error.scatter_add_(1, column, grad_logps * hit)
            if cap_slope is not None:
                error *= cap_slope
            if grad_bias is not None:
                grad_bias[rows] = error.sum(0)
            error = error.to(hidden.dtype)
            grad_hidden += error @ head
            if grad_weight is not None:
                grad_weight[rows] = error.T @ hidden
        return grad_hidden, grad_weight, None, None, grad_bias, None
