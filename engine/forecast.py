"""The memory that a run will need on each device, by arithmetic from the shapes of its model and batches."""
from typing import NamedTuple

import torch

from engine.checkpoint import model_path
from engine.ranks import check_copies
from model import lora
from model.build import embeddings, product_precision, rounded_weights, this_device
from model.compiled import decoder_layers
from model.load import base_of, empty_lm, is_adapter, load_config
from model.off_the_shelf import empty_classifier
from model.reward_model import is_reward_model
from model.slices import LOGITS_AT_ONCE
from rewards.functions import is_model, parts_of

BYTES_IN_4_BIT = 0.52      # per weight, with the scales
CHECKPOINT = 12            # bytes per trained weight: itself and two moments, in fp32
# how the names of those parts begin that are there in an update only
OF_AN_UPDATE = "gradients", "whole for a moment", "bf16 copies", "one micro-batch", "a slice"


class Counts(NamedTuple):
    """Parameters of a model."""
    trained: int
    frozen: int        # all others, among them ...
    quantized: int     # ... those that are kept in 4 bits
    linear: int        # of the linear layers, which a frozen model keeps in bf16
    layer: int         # of the largest decoder layer
    embedding: int     # of embeddings that are not the head
    rest: int          # outside of both

    @property
    def every(self) -> int:
        return self.trained + self.frozen


def forecast(common, config, lm, tokens: int, online: bool = False, world: int = 1) -> list[str]:
    """A line for each part of the memory of each of `world` devices, in GB, their total, whether it fits, and
    what a checkpoint takes. `lm`: the model without its numbers, which gets the run's adapter here; `tokens`:
    of the largest micro-batch."""
    check_copies(common.replicate, world)
    shards = world // common.replicate
    counts = count_parameters(common, lm)
    device = this_device()
    is_bf16 = product_precision(common.precision, device) == "bf16"
    width = 2 if is_bf16 and device.type == "cuda" else 4      # bytes of a frozen weight beside an adapter
    sizes = kept_bytes(counts, shards, width)
    if world > 1:
        sizes["whole for a moment: a layer, head and embedding"] = gathered_bytes(counts)
    if is_bf16 and not counts.frozen and (world == 1 or common.compile != "false"):
        sizes["bf16 copies of the linear layers, from forward to backward"] = 2 * counts.linear
    if online and needs_reference_model(common, config):
        reference = 4 * counts.every - (2 * counts.linear if is_bf16 else 0)
        if is_adapter(common.model):
            reference = width * counts.every
        sizes["reference (a frozen model)"] = reference / shards
    for key, path in config.frozen_models().items():
        rounded = is_bf16 and not (counts.frozen and width == 2)
        sizes[f"{key} (a frozen model)"] = frozen_bytes(common, path, width, rounded, world)
    if config.uses_reward():
        sizes |= reward_model_bytes(common, config.reward, width, is_bf16, world)
    if config.uses_critic():
        critic = 16 * counts.trained + width * counts.frozen
        sizes["critic (weights, gradients, optimizer)"] = critic / shards
    settings = lm.config.get_text_config()
    sizes[f"one micro-batch of {tokens} tokens"] = activation_bytes(common, settings, tokens)
    at_once = LOGITS_AT_ONCE["cuda" if torch.cuda.is_available() else "cpu"]
    logits = 2 * 4 * min(at_once, tokens * settings.vocab_size)      # a slice, twice
    if counts.frozen:
        sizes["a slice of the logits"] = logits
    else:
        head = 4 * settings.hidden_size * settings.vocab_size
        sizes["a slice of the logits and the head's gradient"] = logits + head
    total = sum(sizes.values())
    if config.engine_memory() and torch.cuda.is_available():      # it draws while no update is computed
        engine = config.engine_memory() * gpu_memory()
        kept = [size for name, size in sizes.items() if not name.startswith(OF_AN_UPDATE)]
        total = max(total, sum(kept) + engine)
        sizes["vLLM, while it draws"] = engine
    sizes["total" + verdict(total)] = total      # more than while it is loaded
    sizes["a checkpoint, on the disk"] = CHECKPOINT * counts.trained
    return [f"{name:<66} {size / 1e9:7.2f} GB" for name, size in sizes.items()]


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
    linear = sum(weight.numel() for weight in rounded_weights(lm))
    quantized = quantized_weights(common, lm)
    layers = list(map(size_of, decoder_layers(lm)))
    embedding = sum(map(size_of, embeddings(lm)))
    rest = size_of(lm) - sum(layers) - embedding
    if is_adapter(common.model):
        lora.attach(lm, lora.saved_settings(common.model, common))
    elif common.lora_r:
        lora.attach(lm, lora.new_settings(common, lm))
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    return Counts(trained, size_of(lm) - trained, quantized, linear, max(layers, default=0), embedding, rest)


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


def activation_bytes(common, settings, tokens: int) -> int:
    """What a micro-batch keeps for the backward, in fp32. Per token and layer: two norms (input and output),
    q k v and rotated q k, attention output, and the MLP's gate and up."""
    hidden = settings.hidden_size
    inner = getattr(settings, "intermediate_size", None) or 4 * hidden
    if isinstance(inner, list):                    # Gemma 3n has one per layer
        inner = max(inner)
    per_layer = 4 * hidden if common.gradient_checkpointing else 4 * (10 * hidden + 2 * inner)
    return tokens * (settings.num_hidden_layers * per_layer + 4 * 4 * hidden)


def millions(count: int) -> str:
    digits = 0 if count >= 1e7 else 2
    return f"{count / 1e6:.{digits}f}M"
