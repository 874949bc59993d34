"""The forms in which hidden states are computed, and what they need to know about an LM."""
from typing import NamedTuple

VARLEN = "varlen"       # a form of attention: flat rows, one call of a kernel per layer
PLAIN = "plain"         # a form of attention: rows of their own, through the model's own attention
PADDING = 1.25          # how many times their own tokens plain rows may take together, with what pads them


class Form(NamedTuple):
    """How hidden states are computed; `check_policy` chooses what is exact for an LM."""
    attention: str = "segments"            # or varlen, dense, plain
    share_prompt: bool = True              # whether a prompt is laid out once for all its responses
    padding: float = PADDING               # how far plain rows may be padded
    has_exact_cache: bool = True           # whether transformers' loop samples with the LM's own cache
    takes_our_cache: bool = True           # whether our loop samples where rows are flat, not transformers'

    @property
    def samples_itself(self) -> bool:
        """Whether model/decoding.py draws completions; else transformers' loop does, a batch at a time."""
        return self.attention != PLAIN and self.takes_our_cache


def set_form(lm, form: Form) -> Form:
    """Let an LM compute attention in this form. Where its attention cannot be exchanged, the form that is
    returned has plain rows."""
    if not lm._can_set_attn_implementation():
        return form._replace(attention=PLAIN)
    own = ordinary_attention(lm)
    lm.set_attn_implementation(own if form.attention == PLAIN else form.attention)
    return form


def ordinary_attention(lm) -> str:
    """The name of transformers' own attention that an LM uses."""
    return "sdpa" if lm._supports_sdpa else "eager"        # eager: Gemma 2


def trunk_of(lm):
    """The LM without its head."""
    inner = lm.base_model
    if inner is lm:                                        # Llama 4, or the trunk itself
        inner = getattr(lm, "language_model", lm)
    return inner.model if hasattr(inner, "lm_head") else inner
