"""The policy: a Hugging Face causal LM that returns log-probs of the trained tokens, never all logits."""
from typing import NamedTuple

import torch
from torch import nn

from data.pack import Batch, collate
from model import attention, dense, lora  # noqa: F401  the forms of attention are registered
from model.entropy import ChunkedEntropy
from model.head import Head, head_of
from model.logps import ChunkedLogps
from model.plain import PADDING, plain_hidden
from model.tied import TiedEmbedding

PLAIN = "plain"        # a form of attention: rows of their own, through the model's own attention


class Form(NamedTuple):
    """How hidden states are computed; `check_policy` chooses what is exact for an LM."""
    attention: str = "segments"            # or dense, or plain
    share_prompt: bool = True              # whether a prompt is laid out once for all its responses
    padding: float = PADDING               # how far plain rows may be padded
    has_exact_cache: bool = True           # whether plain rows are sampled with the LM's own cache


def ordinary_attention(lm) -> str:
    """The name of transformers' own attention that an LM uses."""
    return "sdpa" if lm._supports_sdpa else "eager"        # eager: Gemma 2


def trunk_of(lm):
    """The LM without its head."""
    inner = lm.base_model
    if inner is lm:                                        # Llama 4, or the trunk itself
        inner = getattr(lm, "language_model", lm)
    return inner.model if hasattr(inner, "lm_head") else inner


class Policy(nn.Module):
    """A causal LM as the algorithms see it. For a batch of T tokens, N of which are trained:

    `policy(batch)` -> (N,) fp32: log pi(token | all before it) of each trained token, response by response.

    `policy(batch, temperature)` -> (N,): the same with logits / temperature, for tokens sampled at it.

    `policy(batch, entropy=True)` -> (N,), (N,): the log-probs, and the entropy over the whole vocabulary at
    each trained token's position, in nats. Both have gradients.

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
        self.is_sharded = False
        self.router_loss = None                # a RouterLoss while a mixture of experts is trained
        self.use(form)

    def use(self, form: Form) -> None:
        """Compute hidden states in this form. An LM whose attention cannot be exchanged has plain rows."""
        if self.lm._can_set_attn_implementation():
            own = ordinary_attention(self.lm)
            self.lm.set_attn_implementation(own if form.attention == PLAIN else form.attention)
        else:
            form = form._replace(attention=PLAIN)
        self.form = form

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
        """How far apart two computations of the same log-probs may be, per token or on average."""
        return 1e-4 if self.precision == "fp32" else 5e-2

    def collate(self, examples) -> Batch:
        return collate(examples, self.share_prompt).to(self.device)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, batch: Batch, temperature: float = 1.0, entropy: bool = False):
        states, head = self.states(batch)
        return self.logps(states, head, batch.target, temperature, entropy)

    def states(self, batch: Batch):
        """The hidden states (N, D) that predict the trained tokens, and the head."""
        embedding = self.lm.get_input_embeddings()
        head = head_of(self.lm)
        inputs = {"input_ids": batch.tokens[None]}
        tied = embedding.weight is head.weight
        # Gemma 3 has a subclass of nn.Embedding, which scales its output
        if tied and type(embedding) is nn.Embedding and self.form.attention != PLAIN:
            embedded, weight = TiedEmbedding.apply(head.weight, batch.tokens, embedding.padding_idx)
            head = head._replace(weight=weight)
            inputs = {"inputs_embeds": embedded[None]}
        # not `hidden[source]`: its backward is not deterministic
        return self.hidden(batch, **inputs).index_select(0, batch.source), head

    def logps(self, states, head: Head, target, temperature: float, entropy: bool):
        weight, bias, scale, cap = head.at(temperature)
        if scale != 1:
            states = states * scale
            bias = None if bias is None else bias * scale
        dtype = torch.bfloat16 if self.precision == "bf16" else states.dtype
        chunked = ChunkedEntropy if entropy else ChunkedLogps
        return chunked.apply(states, weight, target, dtype, bias, cap)

    def hidden(self, batch: Batch, **inputs):
        """The last hidden states (T, D). `inputs`: the batch's tokens in one of transformers' two forms."""
        for dropout in self.dropouts:          # LoRA's acts in training only
            dropout.train(torch.is_grad_enabled())
        router = self.router_loss if self.router_loss and self.router_loss.is_on() else None
        options = {"output_router_logits": True} if router else {}
        with self.autocast():
            if self.form.attention == PLAIN:
                padding = self.form.padding
                hidden, router_logits = plain_hidden(self.trunk, batch, padding, self.is_sharded, **options)
            else:
                output = self.trunk(**inputs, position_ids=batch.positions[None], use_cache=False,
                                    segments=batch.segments, **options)
                hidden, router_logits = output.last_hidden_state[0], output.get("router_logits")
        return router.added_to(hidden, router_logits, batch) if router else hidden
