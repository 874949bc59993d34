"""The memory that a run will need on each device, by arithmetic from the shapes of its model and batches."""
from typing import NamedTuple

import torch

from engine.checkpoint import model_path
from engine.ranks import check_copies
from model import lora
from model.build import embeddings, product_precision, rounded_weights, this_device
from model.compiled import FEWEST_UPDATES, decoder_layers
from model.form import VARLEN
from model.load import base_of, empty_lm, is_adapter, load_config
from model.off_the_shelf import empty_classifier
from model.reward_model import is_reward_model
from model.slices import LOGITS_AT_ONCE
from rewards.functions import is_model, parts_of

BYTES_IN_4_BIT = 0.52      # per weight, with the scales
CHECKPOINT = 12            # bytes per trained weight: itself and two moments, in fp32
# how the names of those parts begin that are there in a micro-batch only, and in an update only
OF_A_MICRO_BATCH = "bf16 copies", "one micro-batch", "a slice"
OF_AN_UPDATE = "gradients", "whole for a moment", *OF_A_MICRO_BATCH


class Counts(NamedTuple):
    """Parameters of a model."""
    trained: int
    frozen: int        # all others, among them ...
    quantized: int     # ... those that are kept in 4 bits
    linear: int        # of the linear layers, which a frozen model keeps in bf16,
    copied: int        # ... and without the head, whose slices are rounded one at a time
    layer: int         # of the largest decoder layer
    embedding: int     # of embeddings that are not the head
    rest: int          # outside of both

    @property
    def every(self) -> int:
        return self.trained + self.frozen


def forecast(common, config, lm, tokens: int, online: bool = False, world: int = 1, updates: int = 0,
             in_one: bool = False) -> list[str]:
    """A line for each part of the memory of each of `world` devices, in GB, their total, whether it fits, and
    what a checkpoint takes. `lm`: the model without its numbers, which gets the run's adapter here; `tokens`:
    of the largest micro-batch; `updates`: of the run; `in_one`: whether each of them is one micro-batch."""
    check_copies(common.replicate, world)
    shards = world // common.replicate
    counts = count_parameters(common, lm)
    device = this_device()
    is_bf16 = product_precision(common.precision, device) == "bf16"
    is_bf16_gpu = is_bf16 and device.type == "cuda"
    width = 2 if is_bf16_gpu else 4      # bytes of a frozen weight beside an adapter
    is_rounded = is_bf16 and not (counts.frozen and is_bf16_gpu)      # weights are in fp32, products in bf16
    is_compiled = will_compile(common, is_bf16_gpu, updates)
    trunks = 2 if config.uses_critic() else 1
    sizes = kept_bytes(counts, shards, width)
    if world > 1:
        sizes["whole for a moment: a layer, head and embedding"] = gathered_bytes(counts)
    # sharded layers keep none, but for those that are compiled (recast.py)
    if is_rounded and (world == 1 or is_compiled):
        sizes["bf16 copies of the linear layers, from forward to backward"] = trunks * 2 * counts.copied
    if online and needs_reference_model(common, config):
        reference = 4 * counts.every - (2 * counts.linear if is_bf16 else 0)
        if is_adapter(common.model):
            reference = width * counts.every
        sizes["reference (a frozen model)"] = reference / shards
    for key, path in config.frozen_models().items():
        sizes[f"{key} (a frozen model)"] = frozen_bytes(common, path, width, is_rounded, world)
    if config.uses_reward():
        sizes |= reward_model_bytes(common, config.reward, width, is_bf16, world)
    if config.uses_critic():
        critic = 16 * counts.trained + width * counts.frozen
        sizes["critic (weights, gradients, optimizer)"] = critic / shards
    settings = lm.config.get_text_config()
    is_measured = is_bf16 and not counts.frozen      # see `layer_bytes`
    safe = " (compiled layers keep less)" if is_compiled and not is_measured else ""
    activations = activation_bytes(common, settings, tokens, is_bf16, bool(counts.frozen), is_compiled)
    sizes[f"one micro-batch of {tokens} tokens{safe}"] = trunks * activations
    at_once = LOGITS_AT_ONCE["cuda" if torch.cuda.is_available() else "cpu"]
    logits = 2 * 4 * min(at_once, tokens * settings.vocab_size)      # a slice, twice
    if counts.frozen:
        sizes["a slice of the logits"] = logits
    else:
        head = 4 * settings.hidden_size * settings.vocab_size
        sizes["a slice of the logits and the head's gradient"] = logits + head
    total, label = sum(sizes.values()), "total"
    if in_one:      # the backward gives the micro-batch up while it makes the first gradients
        total -= min(bytes_of("gradients", sizes), bytes_of(OF_A_MICRO_BATCH, sizes))
        label = "total (gradients come as the micro-batch goes)"
    if config.engine_memory() and torch.cuda.is_available():      # it draws while no update is computed
        engine = config.engine_memory() * gpu_memory()
        kept = sum(sizes.values()) - bytes_of(OF_AN_UPDATE, sizes)
        total = max(total, kept + engine)
        sizes["vLLM, while it draws"] = engine
    sizes[label + verdict(total)] = total      # more than while it is loaded
    sizes["a checkpoint, on the disk"] = CHECKPOINT * counts.trained
    return [f"{name:<66} {size / 1e9:7.2f} GB" for name, size in sizes.items()]


def bytes_of(begins: str | tuple[str, ...], sizes: dict[str, float]) -> float:
    """The sum of those parts whose names begin like this."""
    return sum(size for name, size in sizes.items() if name.startswith(begins))


def will_compile(common, is_bf16_gpu: bool, updates: int) -> bool:
    """Whether a run of so many updates compiles its decoder layers, as far as that is known before the model
    is checked (compiled.py)."""
    if common.compile != "auto":
        return common.compile == "true"
    is_varlen = is_bf16_gpu and common.attn_implementation in ("auto", VARLEN)
    return is_varlen and not common.deterministic and updates >= FEWEST_UPDATES


def frozen_bytes(common, path: str, width: int, rounded: bool, world: int) -> float:
    """A device's share of a frozen model beside the policy, of `width` bytes per weight; `rounded`: its
    linear layers are in bf16. Like the policy's they may be in 4 bits. A head that was gathered stays
    whole."""
    base = base_of(model_path(path, lambda text: None))
    lm = empty_lm(load_config(base), base)
    size = width * size_of(lm)
    if rounded:
        size = 4 * size_of(lm) - 2 * sum(weight.numel() for weight in rounded_weights(lm))
    head = 4 * lm.get_output_embeddings().weight.numel() if world > 1 else 0
    quantized = quantized_weights(common, lm)      # they are not sharded
    shards = world // common.replicate
    return (size - width * quantized) / shards + BYTES_IN_4_BIT * quantized + head


def reward_model_bytes(common, reward: str, width: int, is_bf16: bool, world: int) -> dict[str, float]:
    """{what is shown: a device's bytes} of the models among the rewards."""
    sizes = {}
    for part in filter(is_model, parts_of(reward)):
        path = model_path(part, lambda text: None)
        if is_reward_model(path):
            size = frozen_bytes(common, path, width, is_bf16, world)
        else:
            bytes_per_weight = 2 if is_bf16 and this_device().type == "cuda" else 4
            size = bytes_per_weight * size_of(empty_classifier(path)) / (world // common.replicate)
        sizes[f"reward model {part}"] = size
    return sizes


def kept_bytes(counts: Counts, shards: int, width: int) -> dict[str, float]:
    """What a device keeps from update to update: its share of one copy of the model."""
    sizes = {}
    shown = f"{millions(counts.trained)} of {millions(counts.every)} parameters"
    sizes[f"trained weights, fp32 ({shown})"] = 4 * counts.trained / shards
    if counts.quantized:      # 4-bit weights are not sharded
        others = width * (counts.frozen - counts.quantized) / shards
        sizes["frozen weights, 4-bit"] = others + BYTES_IN_4_BIT * counts.quantized
    elif counts.frozen:
        sizes["frozen weights"] = width * counts.frozen / shards
    sizes["gradients, fp32"] = 4 * counts.trained / shards
    sizes["optimizer (AdamW: two moments, fp32)"] = 8 * counts.trained / shards
    return sizes


def gathered_bytes(counts: Counts) -> int:
    """What is whole on a device at the worst moment of a backward, in fp32: weights and gradients of the head
    and of the largest layer, and the weights of the layer that comes next; or, at the end, of the head and
    the embedding."""
    in_a_layer = 8 * (counts.rest + counts.layer) + 4 * counts.layer
    at_the_end = 8 * (counts.rest + counts.embedding)
    return max(in_a_layer, at_the_end)


def gpu_memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory


def verdict(total: float) -> str:
    """Whether so many bytes fit on this machine's GPU."""
    if not torch.cuda.is_available():
        return ""
    available = gpu_memory()
    return f" of {available / 1e9:.0f} GB: {'fits' if total < 0.95 * available else 'does not fit'}"


def count_parameters(common, lm) -> Counts:
    rounded = rounded_weights(lm)
    linear = sum(weight.numel() for weight in rounded)
    head = lm.get_output_embeddings().weight
    copied = sum(weight.numel() for weight in rounded if weight is not head)
    quantized = quantized_weights(common, lm)
    layers = list(map(size_of, decoder_layers(lm)))
    embedding = sum(map(size_of, embeddings(lm)))
    rest = size_of(lm) - sum(layers) - embedding
    if is_adapter(common.model):
        lora.attach(lm, lora.saved_settings(common.model, common))
    elif common.lora_r:
        lora.attach(lm, lora.new_settings(common, lm))
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    frozen = size_of(lm) - trained
    return Counts(trained, frozen, quantized, linear, copied, max(layers, default=0), embedding, rest)


def quantized_weights(common, lm) -> int:
    """How many weights are kept in 4 bits."""
    layers = lora.linear_layers(lm).values() if common.load_in_4bit else []
    return sum(layer.weight.numel() for layer in layers)


def size_of(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def needs_reference_model(common, config) -> bool:
    """Whether a second model computes the log-probs of every new completion; under a fresh adapter the policy
    without it does."""
    if common.lora_r and not is_adapter(common.model):
        return False
    return config.uses_reference()


def activation_bytes(
    common,
    settings,
    tokens: int,
    is_bf16: bool,
    has_adapter: bool,
    is_compiled: bool = False,
) -> int:
    """What a micro-batch keeps for the backward: of each token what its decoder layers keep, and for the
    final norm and the head four times its hidden state in fp32."""
    hidden = settings.hidden_size
    layers = settings.num_hidden_layers
    per_layer = layer_bytes(settings, is_bf16, has_adapter, is_compiled)
    per_token = layers * per_layer
    if common.gradient_checkpointing:
        # each layer's input, whose dtype is that of the weights, and all of the one that is recomputed
        is_bf16_base = is_bf16 and has_adapter and this_device().type == "cuda"
        per_token = layers * (2 if is_bf16_base else 4) * hidden + per_layer
    return tokens * (per_token + 4 * 4 * hidden)


def layer_bytes(settings, is_bf16: bool, has_adapter: bool, is_compiled: bool) -> int:
    """What a decoder layer keeps of a token, in bytes, if it is one like Qwen2's. Those of a compiled layer
    fit peaks that were measured without an adapter in bf16; else it keeps less than this says."""
    hidden = settings.hidden_size
    inner = setting(settings, "intermediate_size", 4 * hidden)
    heads = setting(settings, "num_attention_heads", 1)
    head_dim = setting(settings, "head_dim", hidden // heads)
    queries = heads * head_dim
    keys = setting(settings, "num_key_value_heads", heads) * head_dim      # or values
    width = 2 if is_bf16 else 4      # of what a matrix product reads and returns
    norms = 2 * 4 * hidden           # what both read, in fp32
    if not has_adapter:
        norms += 2 * 4 * hidden      # and the same divided by its size, for the gradient of their weights
    # what they return: in bf16 q, k, v, gate and up each round it for themselves
    returned = 5 * 2 * hidden if is_bf16 else 2 * 4 * hidden
    attention = width * (queries + 2 * keys + queries)      # q, k and v, and the output
    mlp = width * 2 * inner          # gate and up (build.gated_mlp)
    if is_compiled and is_bf16 and not has_adapter:
        # its input in fp32; what each norm returns and what attention adds, rounded
        return 4 * hidden + 3 * 2 * hidden + attention + mlp
    attention += width * queries     # joined from segments, or rounded for an adapter; varlen does neither
    return norms + returned + attention + mlp


def setting(settings, key: str, otherwise: int) -> int:
    """A number of a model's configuration: the largest where it has one per layer, as in Gemma 3n."""
    value = getattr(settings, key, None) or otherwise
    return max(value) if isinstance(value, list) else value


def millions(count: int) -> str:
    digits = 0 if count >= 1e7 else 2
    return f"{count / 1e6:.{digits}f}M"
