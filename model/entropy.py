"""The entropy of the next token beside its log-prob, in slices of the vocabulary like `ChunkedLogps`."""
import torch

from model.logps import logit_slices, target_logits


class ChunkedEntropy(torch.autograd.Function):
    """(hidden (N, D), weight (V, D), target (N,), dtype) -> log-probs (N,) and entropies (N,) in nats,
    fp32. The log-probs are those of ChunkedLogps. This makes one more pass over the slices and has two of
    them in memory.

    For one row, with p = softmax(logits):

        H                =  -sum_j p_j log p_j
        d H / d logit_j  =  -p_j (log p_j + H)
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, dtype):
        hidden = hidden.to(dtype)
        chosen, log_z = target_logits(hidden, weight, target)
        entropy = torch.zeros_like(log_z)                                # (N, 1)
        for logits, *_ in logit_slices(hidden, weight, target):
            logps = logits.sub_(log_z)
            summands = logps.exp().mul_(logps)                           # p log p
            entropy -= summands.sum(1, keepdim=True)
        ctx.save_for_backward(hidden, weight, target, log_z, entropy)
        return (chosen - log_z)[:, 0], entropy[:, 0]

    @staticmethod
    def backward(ctx, grad_logps, grad_entropies):
        hidden, weight, target, log_z, entropy = ctx.saved_tensors
        grad_logps = grad_logps[:, None]                                 # (N, 1)
        grad_entropies = grad_entropies[:, None]                         # (N, 1)
        grad_hidden = torch.zeros_like(hidden).float()
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
        for logits, column, hit, rows, head in logit_slices(hidden, weight, target):
            logps = logits.sub_(log_z)
            negative = logps.exp().neg_()                                # -p
            slope = logps.add_(entropy).mul_(grad_entropies)
            slope.add_(grad_logps)                                       # both gradients have the factor -p
            error = negative.mul_(slope)
            error.scatter_add_(1, column, grad_logps * hit)
            error = error.to(hidden.dtype)
            grad_hidden += error @ head
            if grad_weight is not None:
                grad_weight[rows] = error.T @ hidden
        return grad_hidden, grad_weight, None, None
