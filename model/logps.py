"""Log-probs of target tokens from hidden states; the full logits never exist."""
import torch

LOGITS_AT_ONCE = {"cpu": 2 ** 22, "cuda": 2 ** 27}    # 16 MiB fits a CPU's cache, 512 MiB fills a GPU; whatever the batch


class ChunkedLogps(torch.autograd.Function):
    """log softmax(hidden @ weight.T)[target], a slice of the vocabulary at a time: the (N, V) logits never exist.

    The forward keeps each row's running maximum and sum of exponentials; the backward computes each slice's logits again and
    writes its rows of the weight gradient once. Slicing the vocabulary, not the rows, reads the large head once per pass.
    `dtype` is that of the matrix products; everything else is fp32."""

    @staticmethod
    def slices(hidden, weight, target):
        """Yield, per slice of the vocabulary: the slice, its rows of the head, its logits (N, slice), and each row's target in
        it: column (N, 1) and hit (N, 1), whether the target lies in this slice. The logits share one buffer of at most
        LOGITS_AT_ONCE numbers."""
        width = max(1, LOGITS_AT_ONCE[weight.device.type] // max(1, len(target)))
        buffer = hidden.new_empty(len(target), min(width, len(weight)))
        for start in range(0, len(weight), width):
            head = weight[start:start + width].to(hidden.dtype)
            offset = target[:, None] - start
            column = offset.clamp(0, len(head) - 1)
            logits = torch.mm(hidden, head.T, out=buffer[:, :len(head)]).float()
            yield slice(start, start + len(head)), head, logits, column, column == offset

    @staticmethod
    def forward(ctx, hidden, weight, target, dtype):
        hidden = hidden.to(dtype)                                                        # (N, D)
        maximum = torch.full((len(target), 1), -torch.inf, device=hidden.device)         # (N, 1)
        total, chosen = torch.zeros_like(maximum), torch.zeros_like(maximum)             # (N, 1)
        for _, _, logits, column, hit in ChunkedLogps.slices(hidden, weight, target):
            chosen = torch.where(hit, logits.gather(1, column), chosen)
            higher = torch.maximum(maximum, logits.amax(1, keepdim=True))
            total = total * (maximum - higher).exp() + logits.sub_(higher).exp_().sum(1, keepdim=True)
            maximum = higher
        normalizer = maximum + total.log()
        ctx.save_for_backward(hidden, weight, target, normalizer)
        return chosen[:, 0] - normalizer[:, 0]

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, target, normalizer = ctx.saved_tensors
        slope = -grad_logps[:, None]                                                     # (N, 1)
        scaled = (hidden * slope).to(hidden.dtype)         # scales (N, D) numbers here instead of (N, V) in the loop
        grad_hidden = torch.zeros(hidden.shape, device=hidden.device)
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        for vocabulary, head, logits, column, hit in ChunkedLogps.slices(hidden, weight, target):
            error = logits.sub_(normalizer).exp_()         # softmax - onehot(target) = -d logp / d logits, in place
            error = error.scatter_(1, column, error.gather(1, column) - hit.float()).to(hidden.dtype)
            grad_hidden += error @ head
            if grad_weight is None:
                continue
            if grad_weight.dtype == error.dtype:           # straight into its place
                torch.mm(error.T, scaled, out=grad_weight[vocabulary])
            else:
                grad_weight[vocabulary] = error.T @ scaled
        return grad_hidden * slope, grad_weight, None, None


class TiedEmbedding(torch.autograd.Function):
    """(weight[tokens], weight), for a weight that is embedding and head at once: the gradients of both uses are joined in place.
    Autograd alone would fill a second gradient of the vocabulary's size with zeros and add it."""

    @staticmethod
    def forward(ctx, weight, tokens, padding_idx):
        ctx.save_for_backward(tokens)
        ctx.padding_idx = padding_idx
        return weight.index_select(0, tokens), weight.view_as(weight)                    # (T, D), (V, D)

    @staticmethod
    def backward(ctx, grad_embedded, grad_head):
        tokens, = ctx.saved_tensors
        if ctx.padding_idx is not None:                    # as nn.Embedding does: this row learns nothing as an input
            grad_embedded = grad_embedded.masked_fill((tokens == ctx.padding_idx)[:, None], 0.0)
        return grad_head.index_add_(0, tokens, grad_embedded), None, None
