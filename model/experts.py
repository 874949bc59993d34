"""Mixtures of experts: the auxiliary loss that keeps their load even (arXiv 2101.03961, eq. 4-6).

For one example, over its T tokens in all layers together, with E experts of which each token uses k:

    f_e  =  tokens that use expert e / T              P_e  =  mean of softmax(router logits)_e
    aux  =  E * sum_e f_e P_e                         (k where the load is even)

Each example counts alone, with its prompt once per response, and an update adds coefficient * mean(aux) to
the loss: what TRL adds with one example per forward, and the same however micro-batches are packed.
"""
import torch

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")


class RouterLoss:
    """Adds the auxiliary loss of a policy's router to every update of `num_examples` examples."""

    def __init__(self, coefficient: float, top_k: int):
        self.coefficient = coefficient
        self.top_k = top_k
        self.num_examples = None               # of the update that is open
        self.losses = []                       # (B,) of its micro-batches

    def is_on(self) -> bool:
        return self.num_examples is not None and torch.is_grad_enabled()

    def added_to(self, hidden, router_logits, batch):
        """`hidden` (T, D), whose backward includes the gradient of the auxiliary loss."""
        losses = auxiliary_losses(router_logits, self.top_k, token_shares(batch))
        self.losses.append(losses.detach())
        return AddLoss.apply(hidden, losses.sum() * (self.coefficient / self.num_examples))

    def open(self, num_examples: int) -> None:
        self.num_examples = max(1, num_examples)      # a mini-batch of a small rollout may be empty
        self.losses = []

    def metrics(self) -> dict:
        return {"aux_loss": torch.cat(self.losses)} if self.losses else {}


def router_loss(lm, asked: float | None) -> RouterLoss | None:
    """The auxiliary loss with the coefficient that is asked for, else that of the LM's configuration; None
    where that is 0, or the LM has no router."""
    settings = lm.config.get_text_config()
    has_experts = any("expert" in name for name, _ in lm.named_parameters())
    if not has_experts or not hasattr(settings, "output_router_logits"):
        return None
    coefficient = getattr(settings, "router_aux_loss_coef", 0.0) if asked is None else asked
    for key in EXPERTS_PER_TOKEN:
        if coefficient and isinstance(getattr(settings, key, None), int):
            return RouterLoss(coefficient, getattr(settings, key))
    return None


def router_options(policy) -> dict:
    """What a policy's trunk is asked for while its router is trained."""
    router = policy.router_loss
    return {"output_router_logits": True} if router and router.is_on() else {}


def with_router_loss(policy, batch, hidden, router_logits):
    """`hidden` (T, D), whose backward includes the gradient of the auxiliary loss while the policy's router
    is trained. `router_logits`: a tensor (T, E) per layer."""
    if not router_options(policy):
        return hidden
    return policy.router_loss.added_to(hidden, router_logits, batch)


def auxiliary_losses(router_logits, top_k: int, shares) -> torch.Tensor:
    """(B,): the auxiliary loss of each example. `router_logits`: a tensor (T, E) per layer; `shares` (B, T):
    each token's share in its example, 0 for the tokens of others."""
    fractions = 0.0                            # f (B, E)
    probabilities = 0.0                        # P (B, E)
    for logits in router_logits:
        probs = logits.float().softmax(-1)
        chosen = torch.zeros_like(probs).scatter_(1, probs.topk(top_k).indices, 1.0)
        fractions = fractions + shares @ chosen / len(router_logits)
        probabilities = probabilities + shares @ probs / len(router_logits)
    return probs.shape[1] * (fractions * probabilities).sum(1)


def token_shares(batch) -> torch.Tensor:
    """(B, T): the share of each token of the flat row in its example; a prompt counts once per response."""
    shares = torch.zeros(len(batch.examples), len(batch.tokens))
    start = batch.prefix
    segments = iter(batch.segments)
    for number, example in enumerate(batch.examples):
        weights = shares[number]
        weights[:batch.prefix] = len(example.responses)
        missing = len(example.responses)
        while missing > 0:
            prompt, lengths = next(segments)
            weights[start:start + prompt] = len(lengths)
            end = start + prompt + sum(lengths)
            weights[start + prompt:end] = 1.0
            start = end
            missing -= len(lengths)
        weights /= weights.sum()
    return shares.to(batch.tokens.device)


class AddLoss(torch.autograd.Function):
    """(x, loss) -> x; the backward gives `loss` a gradient of 1, as if it had been added to what is
    minimised."""

    @staticmethod
    def forward(ctx, x, loss):
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        loss, = ctx.saved_tensors
        return grad, torch.ones_like(loss)
