"""`--dry-run`: everything a run would do, printed before it does anything. It reads the data and the
tokenizer, not the weights."""
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data.dataset import doubts
from data.errors import printable
from data.pack import Example, Response
from data.packing import pack
from data.store import sizes_of
from engine.checkpoint import model_path
from engine.config import describe
from engine.inputs import marked, read_inputs
from engine.plan import Plan
from model import lora
from model.load import base_of, empty_lm, is_adapter, load_config
from model.slices import LOGITS_AT_ONCE
from model.trial import check_kind

BYTES_IN_4_BIT = 0.52      # per weight, with the scales


def dry_run(run_config, kind: str, world: int = 1) -> None:
    """Print configuration, data audit, the first example, batch arithmetic and a memory forecast; UserError
    as training would."""
    common, config = run_config.common, run_config.config
    common = replace(common, model=model_path(common.model, notice))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lora.quantization(common, device, torch.bfloat16)
    section("configuration", describe(run_config))
    tokenizer, data = read_inputs(common, config, kind, notice)
    train_set = data.train_set
    for name, report in data.reports.items():
        if report:
            section(f"{name} data", audit(report))
    section("first example, trained tokens marked [[ ]]", marked(train_set[0], tokenizer))

    online = kind == "prompts"
    _, passes, updates_per_pass = config.rollout_shape()
    updates_per_rollout = passes * updates_per_pass
    if online:
        train_set = with_longest_completions(train_set, config)
    plan = Plan(common, len(train_set), updates_per_rollout)
    sizes = micro_batch_sizes(common, train_set, plan, world)
    unit = "rollout" if online else "update"
    each = f", {updates_per_rollout} updates from each" if online else ""
    section("batches", [
        f"{len(train_set)} examples / batch_size {common.batch_size} = {plan.draws_per_epoch} {unit}s per "
        f"epoch{each}, {plan.total} updates in all",
        f"{len(sizes) / plan.draws_per_epoch:.1f} micro-batches per {unit}, of {max(sizes)} tokens at most "
        f"(micro_batch_tokens {common.micro_batch_tokens})",
        f"prompts shared: {tokens_of(train_set, True)} tokens per epoch; one copy per response: "
        f"{tokens_of(train_set, False)}",
    ])
    print()
    base = base_of(common.model)
    lm = empty_lm(load_config(base), base)
    check_kind(lm, base, common, notice)
    section("memory forecast per device", forecast(common, config, lm, train_set, max(sizes), online))
    print("\nnothing was trained (--dry-run)")


def notice(text: str) -> None:
    print("  " + printable(text, keep=""))


def section(title: str, lines: list[str]) -> None:
    print("\n  ".join([f"\n{title}", *map(printable, lines)]))


# ---- data ------------------------------------------------------------------------------------------------

def audit(report: dict) -> list[str]:
    lines = [f"{report['source']}: {report['read']} rows read, {report['used']} examples used"]
    for reason, count in report["dropped"].items():
        lines.append(f"dropped {count}: {reason} (first: {report['first_dropped'][reason]})")
    lines += doubts(report)
    for name in ("prompt_length", "response_length", "total"):
        length = report[name]
        lines.append(f"{name:<16} tokens: median {length['50']}, 90 % {length['90']}, 99 % {length['99']}, "
                     f"longest {length['max']}")
    return lines


# ---- batches ---------------------------------------------------------------------------------------------

def with_longest_completions(prompts: list, config) -> list[Example]:
    """The prompts with as many completions as will be sampled, each as long as it may become."""
    completion = Response.all_trained(np.zeros(config.max_completion_length))
    per_prompt, _, _ = config.rollout_shape()
    completions = [completion] * per_prompt
    return [Example(example.prompt, completions, example.where) for example in prompts]


def tokens_of(examples: Sequence[Example], share: bool) -> int:
    return int(sizes_of(examples, share).sum())


def micro_batch_sizes(common, train_set: list, plan: Plan, world: int) -> list[int]:
    """The tokens of every micro-batch of the first epoch on the first device."""
    of_rows = sizes_of(train_set, common.share_prompt != "false")
    sizes = []
    for draw in range(1, plan.draws_per_epoch + 1):
        lengths = of_rows[plan.rows(draw)].tolist()
        for members in pack(lengths, common.micro_batch_tokens, world)[0]:
            sizes.append(sum(lengths[i] for i in members))
    return sizes


# ---- memory ----------------------------------------------------------------------------------------------

def forecast(common, config, lm, train_set: list, tokens: int, online: bool = False) -> list[str]:
    """Weights, gradients, optimizer, reference and the largest micro-batch, in GB. `lm`: the model without
    its numbers, which gets the run's adapter here."""
    settings = lm.config.get_text_config()
    trained, frozen, quantized = count_parameters(common, lm)
    every = trained + frozen
    is_bf16 = torch.cuda.is_available() and common.precision != "fp32"
    width = 2 if is_bf16 else 4      # bytes of a frozen weight that is not in 4 bits

    sizes = {}
    sizes[f"trained weights, fp32 ({millions(trained)} of {millions(every)} parameters)"] = 4 * trained
    if quantized:
        sizes["frozen weights, 4-bit"] = width * (frozen - quantized) + BYTES_IN_4_BIT * quantized
    elif frozen:
        sizes["frozen weights"] = width * frozen
    sizes["gradients, fp32"] = 4 * trained
    sizes["optimizer (AdamW: two moments, fp32)"] = 8 * trained
    if not online:
        table = 4 * sum(example.num_trained for example in train_set) if config.uses_reference() else 0
        sizes["reference (its log-probs only; no second model)"] = table
    elif needs_reference_model(common, config):
        sizes["reference (a frozen model)"] = width * every
    if config.uses_critic():
        sizes["critic (weights, gradients, optimizer)"] = 16 * trained + width * frozen
    sizes[f"one micro-batch of {tokens} tokens"] = activation_bytes(common, settings, tokens)
    at_once = LOGITS_AT_ONCE["cuda" if torch.cuda.is_available() else "cpu"]
    logits = 2 * 4 * min(at_once, tokens * settings.vocab_size)      # a slice, twice
    if frozen:
        sizes["a slice of the logits"] = logits
    else:
        head = 4 * settings.hidden_size * settings.vocab_size
        sizes["a slice of the logits and the head's gradient"] = logits + head
    sizes["total"] = sum(sizes.values())
    return [f"{name:<60} {size / 1e9:7.2f} GB" for name, size in sizes.items()]


def count_parameters(common, lm) -> tuple[int, int, int]:
    """(trained, frozen, those of the frozen that are kept in 4 bits)."""
    quantized = 0
    if common.load_in_4bit:
        quantized = sum(layer.weight.numel() for layer in lora.linear_layers(lm).values())
    if is_adapter(common.model):
        lora.attach(lm, lora.saved_settings(common.model, common))
    elif common.lora_r:
        lora.attach(lm, lora.new_settings(common, lm))
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in lm.parameters()) - trained
    return trained, frozen, quantized


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
