"""One weight as embedding and as head."""
import torch


class TiedEmbedding(torch.autograd.Function):
    """(weight[tokens], weight), for a weight that is embedding and head at once: the gradients of both uses
    are added in place. Autograd alone would fill a second gradient of the vocabulary's size with zeros and
    add it."""

    @staticmethod
    def forward(ctx, weight, tokens, padding_idx):
        ctx.save_for_backward(tokens)
        ctx.padding_idx = padding_idx
        return weight.index_select(0, tokens), weight.view_as(weight)            # (T, D), (V, D)

    @staticmethod
    def backward(ctx, grad_embedded, grad_head):
        tokens, = ctx.saved_tensors
        if ctx.padding_idx is not None:        # as in nn.Embedding: as an input, this row has no gradient
            padding = tokens == ctx.padding_idx
            grad_embedded = grad_embedded.masked_fill(padding[:, None], 0.0)
        return grad_head.index_add_(0, tokens, grad_embedded), None, None
