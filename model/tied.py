"""One weight as embedding and as head."""
import torch
import torch.nn.functional as F
from torch import nn

from model.form import PLAIN
from model.head import head_of


def inputs_and_head(policy, tokens):
    """(the tokens (T,) of a flat row as input_ids or inputs_embeds, the head of the policy's LM). Where the
    head is the embedding and is trained, its gradients are added in place."""
    embedding = policy.lm.get_input_embeddings()
    head = head_of(policy.lm)
    is_tied = embedding.weight is head.weight
    # Gemma 3 has a subclass of nn.Embedding, which scales its output; plain rows embed more than once
    is_plain = policy.form.attention == PLAIN
    if not is_tied or not head.weight.requires_grad or type(embedding) is not nn.Embedding or is_plain:
        return {"input_ids": tokens[None]}, head
    embedded, weight = TiedEmbedding.apply(head.weight, tokens, embedding.padding_idx)
    return {"inputs_embeds": embedded}, head._replace(weight=weight)


class TiedEmbedding(torch.autograd.Function):
    """(weight[tokens][None], weight), for a weight that is embedding and head at once: the gradients of both
    uses are added in place. Autograd alone would fill a second gradient of the vocabulary's size with zeros
    and add it."""

    @staticmethod
    def forward(ctx, weight, tokens, padding_idx):
        ctx.save_for_backward(tokens)
        ctx.padding_idx = padding_idx
        # not a view of (T, D): a compiled layer would be another one for it
        return F.embedding(tokens[None], weight), weight.view_as(weight)         # (1, T, D), (V, D)

    @staticmethod
    def backward(ctx, grad_embedded, grad_head):
        tokens, = ctx.saved_tensors
        if ctx.padding_idx is not None:        # as in nn.Embedding: as an input, this row has no gradient
            padding = tokens == ctx.padding_idx
            grad_embedded = grad_embedded.masked_fill(padding[:, None], 0.0)
        return grad_head.index_add_(0, tokens, grad_embedded[0]), None, None
