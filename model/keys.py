"""The keys of a configuration that say how a model is loaded."""
from dataclasses import dataclass


@dataclass
class ModelKeys:
    """How `build_policy` loads a model, with the defaults; a run's configuration has the same keys and can
    stand here."""
    precision: str = "auto"                # auto, fp32 or bf16
    attn_implementation: str = "auto"      # auto, segments, varlen, dense or plain
    share_prompt: str = "auto"             # auto, true or false
    gradient_checkpointing: bool = False
    load_in_4bit: bool = False
    lora_r: int = 0                        # 0: no new adapter
    lora_alpha: float | None = None        # None: 2 * lora_r
    lora_dropout: float = 0.0
    lora_targets: str = "all-linear"       # or names such as q_proj,v_proj
    max_length: int | None = None          # the longest example, in tokens; None: it is not known
    seed: int = 0                          # for the weights of a new adapter
