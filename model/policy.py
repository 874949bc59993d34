"""The policy: a Hugging Face causal LM that returns log-probs of the trained tokens, never all logits."""
import torch
from torch import nn

from data.pack import Batch, collate
from model import lora
from model.entropy import ChunkedEntropy
from model.logps import ChunkedLogps
from model.tied import TiedEmbedding


class Policy(nn.Module):
    """A causal LM as the algorithms see it. For a batch of T tokens, N of which are trained:

    `policy(batch)` -> (N,) fp32: log pi(token | all before it) of each trained token, response by response.

    `policy(batch, temperature)` -> (N,): the same with logits / temperature, for tokens sampled at it.

    `policy(batch, entropy=True)` -> (N,), (N,): the log-probs, and the entropy over the whole vocabulary at
    each trained token's position, in nats. Both have gradients.

    A forward has three parts, in this order:
    1. `hidden`: the LM without its head reads the flat row (attention.py) -> hidden states (T, D).
    2. `states`: the hidden states that predict trained tokens (N, D), and the weight of the head (V, D).
    3. `logps`: the head, a slice of the vocabulary at a time (logps.py) -> (N,).

    `precision` is that of the matrix products: weights stay as loaded (fp32 when trained) and run under bf16
    autocast. Under `torchrun` this module, not the LM inside, is the FSDP root: its forward gathers
    embedding, norm and head."""

    def __init__(self, lm, precision: str = "fp32", share_prompt: bool = True):
        super().__init__()
        self.lm = lm
        self.precision = precision
        self.share_prompt = share_prompt
        self.dropouts = lora.dropouts(lm)

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
        """The hidden states (N, D) that predict the trained tokens, and the weight of the head (V, D)."""
        embedding = self.lm.get_input_embeddings()
        head = self.lm.get_output_embeddings().weight
        inputs = {"input_ids": batch.tokens[None]}
        tied = embedding.weight is head
        if tied and type(embedding) is nn.Embedding:       # Gemma 3 has a subclass, which scales its output
            embedded, head = TiedEmbedding.apply(head, batch.tokens, embedding.padding_idx)
            inputs = {"inputs_embeds": embedded[None]}
        # not `hidden[source]`: its backward is not deterministic
        return self.hidden(batch, **inputs).index_select(0, batch.source), head

    def logps(self, states, head, target, temperature: float, entropy: bool):
        if temperature != 1:
            states = states / temperature
        dtype = torch.bfloat16 if self.precision == "bf16" else states.dtype
        chunked = ChunkedEntropy if entropy else ChunkedLogps
        return chunked.apply(states, head, target, dtype)

    def hidden(self, batch: Batch, **inputs):
        """The last hidden states (T, D). `inputs`: the batch's tokens in one of transformers' two forms."""
        for dropout in self.dropouts:          # LoRA's acts in training only
            dropout.train(torch.is_grad_enabled())
        with self.autocast():
            output = self.lm.base_model(**inputs, position_ids=batch.positions[None], use_cache=False,
                                        segments=batch.segments)
        return output.last_hidden_state[0]
