"""A policy from a model's directory: loaded, checked, with its adapter, and sharded over ranks."""
import os
import types

import torch
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.utils.checkpoint import checkpoint

from data.errors import UserError
from model import attention, dense, lora  # noqa: F401  the forms of attention are registered
from model.cpu import return_freed_memory
from model.load import base_of, is_adapter, load_lm
from model.policy import Policy


def gated_mlp(self, x):
    """The forward of a gated MLP, down(act(gate(x)) * up(x)), that keeps two of the four wide activations: the other two cost no
    matrix product to compute again. A third of a layer's activations less."""
    def down(gate, up):
        return self.down_proj(self.act_fn(gate) * up)

    gate, up = self.gate_proj(x), self.up_proj(x)
    if not torch.is_grad_enabled():
        return down(gate, up)
    return checkpoint(down, gate, up, use_reentrant=False, preserve_rng_state=bool(lora.dropouts(self.down_proj)))


def build_policy(config, tokenizer, path: str | None = None, frozen: bool = False) -> Policy:
    """Load `config.model` (or `path`, a checkpoint of it) as a Policy on this process's device, in eval mode: dropout is 0. Where
    it is an adapter, its base model with it; else, if LoRA is asked for, with a fresh one, which a `frozen` model does not need."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if config.precision == "bf16" and device.type == "cuda" and not bf16:
        raise UserError("precision: this GPU has no bf16; fix: precision=fp32")
    precision = config.precision if config.precision != "auto" else "bf16" if bf16 else "fp32"
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # torch asks Linux for pages of 2 MiB: fewer page faults
    path, train_adapter = path or config.model, config.lora_r > 0 or is_adapter(config.model)
    dtype = torch.bfloat16 if train_adapter and precision == "bf16" and device.type == "cuda" else torch.float32
    quantized = lora.quantization(config, device, dtype)
    lm = load_lm(base_of(path), dtype, config.attn_implementation, **quantized).eval()
    lm = lm if quantized else lm.to(device)
    if device.type == "cpu" and lm.num_parameters() > 2 ** 26:          # a small model has memory to spare, and is a third faster so
        return_freed_memory()
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:
        raise UserError(f"model: the tokenizer has {len(tokenizer)} tokens but the embedding only "
                        f"{lm.get_input_embeddings().num_embeddings} rows; fix: use the tokenizer this model was saved with")
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if context and config.max_length > context:
        raise UserError(f"max_length is {config.max_length}, but the model {config.model} knows only {context} positions; "
                        "fix: lower max_length")
    if is_adapter(path):
        lora.attach_saved(lm, path, config, check=not frozen)
    elif config.lora_r and not frozen:
        lora.attach(lm, lora.new_settings(config, lm), config.seed)
    for module in lm.modules():
        if {"gate_proj", "up_proj", "down_proj"} <= dict(module.named_children()).keys() and hasattr(module, "act_fn"):
            module.forward = types.MethodType(gated_mlp, module)
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        for module in lm.modules():      # transformers checkpoints in train mode only; everything else stays in eval, without dropout
            module.training = getattr(module, "gradient_checkpointing", False)
    return Policy(lm, precision, share_prompt=config.share_prompt != "false")


def reshard(policy: Policy) -> None:
    """Give up what a forward without a backward has gathered: until then the parameters of the root are other
    objects than those that the optimizer knows."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def shard(policy: Policy):
    """FSDP2 over all ranks: one group per decoder layer and one for the rest. Gradients are summed, not averaged, over ranks:
    the algorithms divide by counts of the whole step."""
    names = {name for module in policy.modules() for name in getattr(module, "_no_split_modules", None) or ()}      # of a critic's too
    layers = [module for module in policy.modules() if type(module).__name__ in names]
    for module in (*layers, policy):
        # 4-bit weights are integers, which cannot be split like this: every rank keeps them whole
        fully_shard(module, ignored_params={p for p in policy.parameters() if not p.is_floating_point()})
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)       # without it gloo fails: it has no PREMUL_SUM
    return policy
