"""The policy: a Hugging Face causal LM that returns log-probs of the trained tokens and never builds the full logits.

`policy(batch) -> (N,)` composes `attention` (a flat, prompt-shared row without a (T, T) mask) and `logps` (the LM head in chunks).
"""
import contextlib

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from data.pack import Batch, collate
from model import lora
from model.logps import ChunkedLogps, TiedEmbedding


class Policy(nn.Module):
    """A causal LM as the algorithms see it: `policy(batch)` -> (N,) fp32 log-probs of the batch's trained tokens, in order; where
    they were sampled at a temperature, `policy(batch, temperature)`.

    `precision` is that of the matrix products: weights stay as loaded (fp32 when trained) and run under bf16 autocast.
    Under `torchrun` this module, not the LM inside, is the FSDP root: its forward gathers embedding, norm and head."""

    def __init__(self, lm, precision: str = "fp32", share_prompt: bool = True):
        super().__init__()
        self.lm, self.precision, self.share_prompt, self.dropouts = lm, precision, share_prompt, lora.dropouts(lm)

    @property
    def device(self):
        return self.lm.device

    def collate(self, examples) -> Batch:
        return collate(examples, self.share_prompt).to(self.device)

    @property
    def tolerance(self) -> float:
        """How far two computations of the same log-probs may be apart, per token or on average."""
        return 1e-4 if self.precision == "fp32" else 5e-2

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def forward(self, batch: Batch, temperature: float = 1.0):
        return self.logps(*self.states(batch), batch.target, temperature)

    def states(self, batch: Batch):
        """The last hidden states (N, D) that predict the trained tokens, and the weight (V, D) of the head above them."""
        embedding, head = self.lm.get_input_embeddings(), self.lm.get_output_embeddings().weight
        inputs = {"input_ids": batch.tokens[None]}
        if embedding.weight is head and type(embedding) is nn.Embedding:      # Gemma 3's scales what it looks up
            embedded, head = TiedEmbedding.apply(head, batch.tokens, embedding.padding_idx)
            inputs = {"inputs_embeds": embedded[None]}
        # `hidden[source]` has a non-deterministic backward
        return self.hidden(batch, **inputs).index_select(0, batch.source), head

    def logps(self, states, head, target, temperature: float):
        dtype = torch.bfloat16 if self.precision == "bf16" else states.dtype
        return ChunkedLogps.apply(states if temperature == 1 else states / temperature, head, target, dtype)

    def hidden(self, batch: Batch, **inputs):
        """The last hidden states (T, D) of a batch, whose tokens `inputs` gives in one of transformers' two forms."""
        for dropout in self.dropouts:              # acts in training only; everything without a gradient sees the plain model
            dropout.train(torch.is_grad_enabled())
        with self.autocast():
            return self.lm.base_model(**inputs, position_ids=batch.positions[None], use_cache=False,
                                      segments=batch.segments).last_hidden_state[0]

    @contextlib.contextmanager
    def generating(self, attention: str | None = None):
        """The LM itself, in the state that generation needs: ordinary attention with a KV cache (or the registered `attention`), no
        gradients, every sharded weight gathered."""
        sharded = [module for module in self.modules() if isinstance(module, FSDPModule)]
        if sharded:      # a forward through this root on every rank gathers everything; after it each rank runs the LM as often as it likes
            self.set_reshard_after_forward(False)
            with torch.no_grad():
                self(self.collate([]))
        implementation = self.lm.config._attn_implementation
        self.lm.set_attn_implementation(attention or ("sdpa" if self.lm._supports_sdpa else "eager"))       # eager: Gemma 2
        training = [module for module in self.lm.modules() if module.training]       # dropout of LoRA, and checkpointed layers,
        for module in training:                                                       # which ignore the cache
            module.training = False
        try:
            with torch.no_grad(), self.autocast():
                yield self.lm
        finally:
            self.lm.set_attn_implementation(implementation)
            for module in training:
                module.training = True
            for module in sharded:
                module.reshard()
                module.set_reshard_after_forward(True, recurse=False)
