"""The policy: a Hugging Face causal LM that returns log-probs of the trained tokens, never all logits."""
import torch
from torch import nn

from data.pack import Batch, collate
from model import dense, lora  # noqa: F401  a form of attention is registered
from model.divergence import compared
from model.entropy import ChunkedEntropy
from model.experts import router_options, with_router_loss
from model.form import PLAIN, Form, set_form, trunk_of
from model.head import Head, predictions_of
from model.logps import ChunkedLogps
from model.plain import plain_hidden
from model.tied import inputs_and_head
from model.varlen import laid_out, layout_of, with_units


class Policy(nn.Module):
    """A causal LM as the algorithms see it. For a batch of T tokens, N of which are trained:

    `policy(batch)` -> (N,) fp32: log pi(token | all before it) of each trained token, response by response.

    `policy(batch, temperature)` -> (N,): the same with logits / temperature, for tokens sampled at it.

    `policy(batch, entropy=True)` -> (N,), (N,): the log-probs, and the entropy over the whole vocabulary at
    each trained token's position, in nats. Both have gradients.

    `policy(batch, temperature, predictions=True)` -> Predictions: the distributions over the vocabulary that
    the trained tokens come from, as hidden states and head (divergence.py).

    `policy(batch, temperature, against=(predictions, summands))` -> (N,), (N,): the log-probs, without their
    gradient, and the sums over the vocabulary of summands(own log-probs, those of another model).

    A forward has three parts, in this order:
    1. `hidden`: the LM without its head reads the flat row (attention.py), or where its layers cannot, a row
       per response (plain.py) -> hidden states (T, D).
    2. `states`: the hidden states that predict trained tokens (N, D), and the head (head.py).
    3. `logps`: the head, a slice of the vocabulary at a time (logps.py) -> (N,).

    `precision` is that of the matrix products: weights stay as loaded (fp32 when trained) and run under bf16
    autocast. Under `torchrun` this module, not the LM inside, is the FSDP root: its forward gathers
    embedding, norm and head."""

    def __init__(self, lm, precision: str = "fp32", form: Form = Form()):  # noqa: B008  it is immutable
        super().__init__()
        self.lm = lm
        self.precision = precision
        self.dropouts = lora.dropouts(lm)
        self.is_sharded = self.is_compiled = False
        self.router_loss = None                # a RouterLoss while a mixture of experts is trained
        self.use(form)

    def use(self, form: Form) -> None:
        """Compute hidden states in this form, or in plain rows where the LM's attention cannot be
        exchanged."""
        self.form = set_form(self.lm, form)

    @property
    def trunk(self):
        return trunk_of(self.lm)

    @property
    def share_prompt(self) -> bool:
        return self.form.share_prompt

    @property
    def device(self):
        return self.lm.device

    @property
    def tolerance(self) -> float:
        """Log-probs of responses that differ by less count as equal: such a pair is a tie."""
        return 1e-4 if self.precision == "fp32" else 5e-2

    @property
    def rounding(self) -> float:
        """How far apart two computations of the same log-probs may be on average: in bf16 single tokens of a
        small model differ by 0.25, all of them by 0.03."""
        return 1e-4 if self.precision == "fp32" else 0.1

    def collate(self, examples) -> Batch:
        return with_units(collate(examples, self.share_prompt), self).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, batch: Batch, temperature: float = 1.0, entropy: bool = False,
                predictions: bool = False, against: tuple | None = None):
        states, head = self.states(laid_out(batch, self))
        if predictions or against:
            own = predictions_of(states, head, temperature, self.precision)
            return compared(own, *against, batch.target) if against else own
        return self.logps(states, head, batch.target, temperature, entropy)

    def states(self, batch: Batch):
        """The hidden states (N, D) that predict the trained tokens, and the head."""
        inputs, head = inputs_and_head(self, batch.tokens)
        # not `hidden[source]`: its backward is not deterministic
        return self.hidden(batch, **inputs).index_select(0, batch.source), head

    def logps(self, states, head: Head, target, temperature: float, entropy: bool):
        states, weight, dtype, bias, cap = predictions_of(states, head, temperature, self.precision)
        if entropy:
            return ChunkedEntropy.apply(states, weight, target, dtype, bias, cap)
        return ChunkedLogps.apply(states, weight, target, dtype, bias, cap, self.is_compiled)

    def hidden(self, batch: Batch, **inputs):
        """The last hidden states (T, D). `inputs`: the batch's tokens in one of transformers' two forms."""
        for dropout in self.dropouts:          # LoRA's acts in training only
            dropout.train(torch.is_grad_enabled())
        with self.autocast():
            if self.form.attention == PLAIN:
                return plain_hidden(self, batch)
            output = self.trunk(**inputs, position_ids=batch.positions[None], use_cache=False,
                                **layout_of(batch), **router_options(self))
        return with_router_loss(self, batch, output.last_hidden_state[0], output.get("router_logits"))
