"""A policy from a model's directory: loaded, checked, with its adapter, and sharded over ranks."""
import os
import types
from collections import Counter

import numpy as np
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from data.errors import UserError
from data.store import Examples
from data.tokenise import end_ids
from model import lora
from model.check import check_policy
from model.compiled import compile_layers, decoder_layers
from model.cpu import return_freed_memory
from model.generating import within
from model.keys import ModelKeys
from model.load import base_of, empty_lm, is_adapter, load_config, load_lm, stored_dtype
from model.policy import Policy
from model.recast import recast


def build_policy(
    path: str,
    tokenizer,
    keys=None,
    frozen: bool = False,
    trains_adapter: bool = False,
    is_trained: bool = True,
    needs_head: bool = True,
) -> Policy:
    """Load the model at `path` (a directory or a hub name) as a Policy on this process's device, in eval
    mode: dropout is 0. Where it is an adapter, its base model is loaded with it; else, if `keys.lora_r` asks
    for LoRA, it gets a fresh adapter, which a `frozen` model does not need.

    `keys`: a ModelKeys (None: its defaults), or a run's configuration. `trains_adapter`: whether the run's
    start model is an adapter. Only adapters are trained then, as with `keys.lora_r`, and on a GPU all other
    weights may be in bf16. `is_trained`: whether anything is. Without `needs_head` the model may be a
    sequence classifier, whose trunk it is then."""
    keys = keys or ModelKeys()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")      # torch asks for pages of 2 MiB: fewer page faults
    device = this_device()
    precision = product_precision(keys.precision, device)
    dtype = torch.float32
    if (trains_adapter or keys.lora_r > 0) and precision == "bf16" and device.type == "cuda":
        dtype = torch.bfloat16
    quantized = lora.quantization(keys, device, dtype)
    will_be_sharded = num_ranks() > 1 and not quantized
    if will_be_sharded:
        lm = load_mapped(base_of(path), dtype, needs_head)
    else:
        lm = load_lm(base_of(path), dtype, needs_head, **quantized)
    lm.eval()
    if precision == "bf16" and not is_trained:
        for weight in rounded_weights(lm):      # once, not in every forward
            if will_be_sharded:
                weight.kept_as = torch.bfloat16
            else:
                weight.data = weight.data.to(torch.bfloat16)
    if not (quantized or will_be_sharded):             # else it goes there a layer at a time
        lm.to(device)
    if device.type == "cpu" and lm.num_parameters() > 2 ** 26:      # small ones keep it: a third faster
        return_freed_memory()
    check_sizes(lm, path, tokenizer, keys.max_length)
    if is_adapter(path):
        lora.attach_saved(lm, path, keys, check=not frozen)
    elif keys.lora_r and not frozen:
        lora.attach(lm, lora.new_settings(keys, lm), keys.seed)
    patch_gated_mlps(lm)
    if keys.gradient_checkpointing:
        checkpoint_layers(lm, path)
    return Policy(lm, precision)


def num_ranks() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def load_mapped(path: str, dtype: torch.dtype, needs_head: bool = True):
    """The LM at `path` for one of several ranks, on the CPU. Where it is to be in fp32 it has the dtype of
    its files: these are mapped, so that all ranks of a machine share their pages and none holds a copy.
    `shard` makes of every weight what its `kept_as` says."""
    stored = stored_dtype(path) if dtype == torch.float32 else None
    if stored not in (None, dtype) and not has_same_buffers(path, stored):
        stored = None
    lm = load_lm(path, stored or dtype, needs_head)
    for weight in lm.parameters():
        weight.kept_as = dtype if stored else weight.dtype
    return lm


def has_same_buffers(path: str, dtype: torch.dtype) -> bool:
    """Whether the buffers of the LM at `path` have the same dtypes in fp32 and where its weights are in
    `dtype`. Some are rounded with them, such as the scale of Gemma's embedding."""
    config = load_config(path)
    found = []
    for choice in (torch.float32, dtype):
        buffers = empty_lm(config, path, choice).named_buffers()
        found.append({name: buffer.dtype for name, buffer in buffers})
    return found[0] == found[1]


def rounded_weights(lm) -> list[nn.Parameter]:
    """What a forward in bf16 rounds before it multiplies: the weights and biases of linear layers, but for
    the head's bias and a head that is the embedding, too."""
    embedding, head = lm.get_input_embeddings().weight, lm.get_output_embeddings()
    found = []
    for module in lm.modules():
        if type(module) is not nn.Linear or module.weight is embedding:
            continue
        found += [module.weight] if module is head else module.parameters()
    return found


def build_second_model(path: str, tokenizer, config, first: Policy, examples, notice, wrap=None) -> Policy:
    """A frozen model of the run beside its policy `first` (a reference, a teacher, or with `wrap`, which
    makes it of a Policy, a reward model): without a fresh adapter, in the dtype that `config` gives the run's
    models, and sharded where the policy is. The start model has the form of the policy, which starts from it;
    others are checked on some of `examples`."""
    second = build_policy(
        path, tokenizer, config, frozen=True, trains_adapter=is_adapter(config.model), is_trained=False)
    if wrap:
        second = wrap(second)
    second.requires_grad_(False)
    if num_ranks() > 1:
        shard(second, config.replicate)
    if path == config.model:
        second.use(first.form)
    else:
        check_policy(second, examples, config, notice)
    if first.is_compiled and second.form == first.form:
        compile_layers(second)
    keep_no_copies(second)
    return second


def build_critic_trunk(path: str, tokenizer, config, first: Policy, examples, notice) -> Policy:
    """The model that a critic starts from, which is trained: with the form of the policy `first` where it has
    the same layers, else checked on some of `examples`, whole on the device."""
    trunk = build_policy(
        path, tokenizer, config, frozen=True, trains_adapter=is_adapter(config.model), needs_head=False)
    if path == config.model or has_layers_of(first.lm, trunk.lm):
        trunk.use(first.form)
    else:
        place = trunk.device
        trunk.lm.to(this_device())
        check_policy(trunk, examples, config, notice)
        trunk.lm.to(place)
    if first.is_compiled and trunk.form == first.form:
        compile_layers(trunk)
    return trunk


def has_layers_of(lm, other) -> bool:
    """Whether two LMs have the same configuration, but for the dtype and the names of their files."""
    def settings(model):
        kept = model.config.to_dict()
        for key in ("dtype", "torch_dtype", "_name_or_path", "transformers_version", "use_cache"):
            kept.pop(key, None)
        return kept

    return settings(lm) == settings(other)


def this_device() -> torch.device:
    """This process's GPU, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def product_precision(wanted: str, device: torch.device) -> str:
    """The precision of matrix products: "fp32" or "bf16". auto is bf16 on a GPU that has it."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if wanted == "auto":
        return "bf16" if has_bf16 else "fp32"
    if wanted == "bf16" and device.type == "cuda" and not has_bf16:
        raise UserError("precision: this GPU has no bf16; fix: precision=fp32")
    return wanted


def check_sizes(lm, path: str, tokenizer, max_length: int | None) -> None:
    """UserError where the tokenizer has more tokens than the embedding, or an example may be longer than the
    model's context. Special tokens that no text holds unless it spells them out may have no row, such as
    <image_soft_token> in Gemma 3 1B; `check_ids` looks for them in the data."""
    rows = lm.get_input_embeddings().num_embeddings
    if len(tokenizer) - len(unused_beyond(rows, tokenizer)) > rows:
        raise UserError(f"model: the tokenizer has {len(tokenizer)} tokens but the embedding only {rows} "
                        "rows; fix: use the tokenizer this model was saved with")
    context = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if context and max_length is not None and max_length > context:
        raise UserError(f"max_length is {max_length}, but the model {path} knows only {context} positions; "
                        "fix: lower max_length")


def unused_beyond(rows: int, tokenizer) -> list[int]:
    """The ids from `rows` on of the tokenizer's special tokens that neither begin nor end nor pad a text."""
    if len(tokenizer) <= rows:
        return []
    used = {tokenizer.bos_token_id, tokenizer.pad_token_id, *end_ids(tokenizer)}
    found = []
    for token, entry in tokenizer.added_tokens_decoder.items():
        if token >= rows and entry.special and token not in used:
            found.append(token)
    return found


def check_ids(examples, rows: int, tokenizer) -> None:
    """UserError where one of `examples` holds a special token for which an embedding of so many `rows` has
    none."""
    beyond = unused_beyond(rows, tokenizer)
    if not beyond or isinstance(examples, Examples) and examples.largest_id() < rows:
        return
    for example in examples:
        parts = [example.prompt]
        for response in example.responses:
            parts.append(response.tokens)
        largest = int(np.concatenate(parts).max())
        if largest in beyond:
            token = tokenizer.decode(largest)
            raise UserError(f"model: {example.where} spells out {token}, a token for which the model has no "
                            "embedding; fix: remove it from the row")


def checkpoint_layers(lm, path: str) -> None:
    """Recompute the layers of an LM in the backward; UserError where it cannot."""
    try:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"gradient_checkpointing: {path} is a {lm.config.model_type}, whose layers cannot be "
                        "recomputed; fix: gradient_checkpointing=false") from error
    for module in lm.modules():
        # transformers checkpoints in train mode only; everything else stays in eval, without dropout
        module.training = getattr(module, "gradient_checkpointing", False)
        if not module.training:
            continue
        for name, value in list(vars(module).items()):     # OPT's layers read these rates themselves
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def patch_gated_mlps(lm) -> None:
    """Give the gated MLPs of an LM the forward below, those whose own forward computes the same (not so in
    BitNet, Gemma 3n or Falcon-H1)."""
    for module in lm.modules():
        names = {name for name, _ in module.named_children()}
        if {"gate_proj", "up_proj", "down_proj"} <= names and hasattr(module, "act_fn") and is_gated(module):
            module.forward = types.MethodType(gated_mlp, module)


@torch.no_grad()
def is_gated(module) -> bool:
    """Whether a module computes `gated_mlp`, tried on four random rows."""
    generator = torch.Generator().manual_seed(0)
    try:
        weight = module.gate_proj.weight
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        rows = torch.randn(4, module.gate_proj.in_features, generator=generator).to(weight.device, dtype)
        return torch.allclose(gated_mlp(module, rows), module(rows), rtol=1e-3, atol=1e-5)
    except (RuntimeError, TypeError, AttributeError):
        return False


def gated_mlp(self, x):
    """The forward of a gated MLP, down(act(gate(x)) * up(x)), that keeps two of the four wide activations:
    the other two cost no matrix product to compute again. A third of a layer's activations less."""
    def down(gate, up):
        return self.down_proj(self.act_fn(gate) * up)

    gate = self.gate_proj(x)
    up = self.up_proj(x)
    if not torch.is_grad_enabled():
        return down(gate, up)
    has_dropout = bool(lora.dropouts(self.down_proj))
    return checkpoint(down, gate, up, use_reentrant=False, preserve_rng_state=has_dropout)


def reshard(policy: Policy) -> None:
    """Give up what a forward without a backward has gathered: until then the parameters of the root are other
    objects than those that the optimizer knows."""
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def embeddings(module) -> list:
    """The embeddings in a module, outside of its decoder layers, whose weight is not the head's, too."""
    uses = Counter(id(weight) for _, weight in module.named_parameters(remove_duplicate=False))
    inside = set()
    for layer in decoder_layers(module):
        inside.update(layer.modules())
    found = []
    for part in module.modules():
        if type(part) is nn.Embedding and part not in inside and uses[id(part.weight)] == 1:
            found.append(part)
    return found


def shard(policy: Policy, copies: int = 1) -> None:
    """Shard a policy over all ranks, and let it say so; see `shard_over_ranks`."""
    shard_over_ranks(policy, copies)
    for module in policy.modules():
        if isinstance(module, Policy):
            module.is_sharded = True
    policy.within = types.MethodType(within, policy)
    register_fsdp_forward_method(policy, "within")


def shard_over_ranks(model: nn.Module, copies: int = 1) -> None:
    """FSDP2 over all ranks: a group per decoder layer and embedding, and one for the rest. Each goes to the
    device, and what is not of this rank is given up, before the next one follows. Gradients are summed, not
    averaged, over ranks: the algorithms divide by counts of the whole step. With several `copies` each lies
    on neighbouring ranks, such as those of a machine."""
    world = torch.distributed.get_world_size()
    shape, names = (copies, world // copies), ("replicate", "shard")
    if copies == 1:
        shape, names = shape[1:], names[1:]
    device = this_device()
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for module in (*decoder_layers(model), *embeddings(model), model):
        for weight in module.parameters():
            if hasattr(weight, "kept_as"):
                weight.data = weight.data.to(device).to(weight.kept_as)
        # 4-bit weights are integers, which cannot be sharded like this: every rank keeps them whole
        whole = {parameter for parameter in model.parameters() if not parameter.is_floating_point()}
        fully_shard(module, mesh=mesh, ignored_params=whole)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)       # without it gloo fails: it has no PREMUL_SUM


def keep_no_copies(policy: Policy) -> None:
    """Where a policy is sharded, let its layers cast their weights to bf16 once more in the backward, unless
    they are compiled: the compiler keeps the copies anyway."""
    if policy.is_sharded and policy.precision == "bf16" and not policy.is_compiled:
        for layer in decoder_layers(policy):
            recast(layer)
