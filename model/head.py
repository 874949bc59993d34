"""What an LM does with its last hidden states: a linear head, and what some families add to it.

    logits = cap * tanh((hidden @ weight.T + bias) * scale / cap)

Most have the weight alone. Phi has a bias; Granite, Cohere and Falcon-H1 scale the logits; Gemma caps them.
"""
from typing import NamedTuple

import torch

from model.cpu import few_rows_product, on_plain_cpu


class SoftCap(NamedTuple):
    """cap * tanh(logits / cap) / temperature"""
    cap: float
    temperature: float = 1.0

    def apply_(self, logits) -> None:
        """Cap `logits` in place."""
        logits.div_(self.cap).tanh_().mul_(self.cap / self.temperature)

    def slope(self, capped):
        """The derivative d capped / d logits, from the capped logits."""
        tanh = capped * (self.temperature / self.cap)
        return (1 - tanh * tanh) / self.temperature


class Head(NamedTuple):
    """The head of an LM: weight (V, D), bias (V,) or None, a factor, and a cap or None."""
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    cap: SoftCap | None = None

    def at(self, temperature: float) -> "Head":
        """The head whose logits are this one's divided by a temperature, which stands in the scale or, where
        the logits are capped first, in the cap."""
        if self.cap is not None:
            return self._replace(cap=SoftCap(self.cap.cap, temperature))
        return self._replace(scale=self.scale / temperature)


class Predictions(NamedTuple):
    """N distributions over the vocabulary, as what their logits are made of."""
    hidden: torch.Tensor             # (N, D)
    weight: torch.Tensor             # (V, D)
    dtype: torch.dtype               # of the products of both
    bias: torch.Tensor | None        # (V,)
    cap: SoftCap | None


def predictions_of(states, head: Head, temperature: float, precision: str) -> Predictions:
    """What the hidden states (N, D) predict at a temperature, with products in "fp32" or "bf16"."""
    weight, bias, scale, cap = head.at(temperature)
    if scale != 1:
        states = states * scale
        bias = None if bias is None else bias * scale
    dtype = torch.bfloat16 if precision == "bf16" else states.dtype
    return Predictions(states, weight, dtype, bias, cap)


def head_of(lm) -> Head:
    """The head of an LM, with what its configuration says of the logits."""
    linear = lm.get_output_embeddings()
    settings = lm.config.get_text_config()
    scale = 1.0
    for key in ("logit_scale", "lm_head_multiplier"):                      # Cohere; Falcon-H1
        scale *= getattr(settings, key, None) or 1.0
    scale /= getattr(settings, "logits_scaling", None) or 1.0              # Granite, MiniCPM
    cap = getattr(settings, "final_logit_softcapping", None)               # Gemma
    cap = cap or getattr(settings, "logits_soft_cap", None)                # RecurrentGemma
    return Head(linear.weight, linear.bias, scale, SoftCap(cap) if cap else None)


class HeadLogits:
    """`HeadLogits(lm, rows)(hidden)`: (n, D) -> logits (n, V) fp32 of the LM's head, for n of at most
    `rows`. On a CPU each call overwrites the logits of the one before."""

    def __init__(self, lm, rows: int):
        self.head = head_of(lm)
        self.buffer = torch.empty(rows * len(self.head.weight)) if on_plain_cpu(lm) else None
        if lm.device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            self.head = self.head._replace(weight=self.head.weight.to(torch.bfloat16))

    def __call__(self, hidden):
        weight, bias, scale, cap = self.head
        if self.buffer is not None:
            logits = few_rows_product(hidden, weight, self.buffer)
        elif weight.is_cuda and weight.dtype == torch.bfloat16:      # not rounded, as in training
            logits = torch.mm(hidden.to(weight.dtype), weight.T, out_dtype=torch.float32)
        else:
            logits = torch.nn.functional.linear(hidden, weight).float()
        if bias is not None:
            logits += bias
        if scale != 1:
            logits *= scale
        if cap is not None:
            cap.apply_(logits)
        return logits
