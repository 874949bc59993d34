"""`--dry-run`: everything a run would do, printed before it does anything. Reads the data and the tokenizer,
not the weights."""
import math
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from data.dataset import doubts, load_datasets
from data.errors import printable
from data.pack import Example, Response
from data.plan import order, pack
from engine.checkpoint import model_path
from engine.config import describe
from model import lora
from model.load import base_of, check_path, is_adapter, load_config, load_tokenizer_for, unloadable
from model.logps import LOGITS_AT_ONCE
from rewards.functions import check_rewards


def dry_run(run_config, kind: str, world: int = 1) -> None:
    """Print configuration, data audit, the first example, batch arithmetic and a memory forecast; UserError
    as training would."""
    common, config = run_config.common, run_config.config
    common = replace(common, model=model_path(common.model, notice))
    lora.quantization(common, torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.bfloat16)
    section("configuration", describe(run_config))
    tokenizer = load_tokenizer_for(common, common.model, notice)
    check_path(getattr(config, "reference", None) or common.model, "reference")
    train_set, eval_set, reports = load_datasets(common, config, kind, tokenizer, notice)
    if kind == "prompts":
        check_rewards(config, train_set + eval_set)
    for name, report in reports.items():
        if report:
            section(f"{name} data", audit(report))
    section("first example, trained tokens marked [[ ]]", marked(train_set[0], tokenizer))

    per_draw = 1                                         # updates made from batch_size rows
    if kind == "prompts":                                # with completions as long as they may become
        completions = [Response.all_trained(np.zeros(config.max_completion_length))] * getattr(config, "num_generations", 1)
        train_set = [Example(example.prompt, completions, example.where) for example in train_set]
        per_draw = math.prod(getattr(config, key, 1) for key in ("num_iterations", "num_ppo_epochs", "num_mini_batches"))
    plan = order(len(train_set), common.batch_size, common.seed, 0, common.shuffle)
    share = common.share_prompt != "false"
    micro_batches = [pack([train_set[i].size(share) for i in members], common.micro_batch_tokens, world)[0] for members in plan]
    total = common.max_steps or math.ceil(common.epochs * len(plan) * per_draw)
    sizes = [sum(train_set[members[i]].size(share) for i in part) for members, parts in zip(plan, micro_batches) for part in parts]
    unit, each = ("rollout", f", {per_draw} updates from each") if kind == "prompts" else ("update", "")
    section("batches", [
        f"{len(train_set)} examples / batch_size {common.batch_size} = {len(plan)} {unit}s per epoch{each}, {total} updates in all",
        f"{len(sizes) / len(plan):.1f} micro-batches per {unit}, of {max(sizes)} tokens at most "
        f"(micro_batch_tokens {common.micro_batch_tokens})",
        f"prompts shared: {sum(e.size() for e in train_set)} tokens per epoch; one copy per response: "
        f"{sum(e.size(False) for e in train_set)}"])
    section("memory forecast per device", forecast(common, config, train_set, max(sizes), kind == "prompts"))
    print("\nnothing was trained (--dry-run)")


def notice(text: str) -> None:
    print("  " + printable(text, keep=""))


def section(title: str, lines: list[str]) -> None:
    shown = [printable(line) for line in lines]
    print(f"\n{title}\n  " + "\n  ".join(shown))


def audit(report: dict) -> list[str]:
    lines = [f"{report['source']}: {report['read']} rows read, {report['used']} examples used"]
    lines += [f"dropped {count}: {reason} (first: {report['first_dropped'][reason]})" for reason, count in report["dropped"].items()]
    lines += doubts(report)
    for name in ("prompt_length", "response_length", "total"):
        lengths = report[name]
        lines.append(f"{name:<16} tokens: median {lengths['50']}, 90 % {lengths['90']}, 99 % {lengths['99']}, longest {lengths['max']}")
    return lines


def marked(example, tokenizer, most: int | None = None) -> list[str]:
    """Prompt and responses as text, runs of trained tokens between [[ and ]]; of a text longer than `most`
    characters the middle is left out."""
    texts = [("prompt", tokenizer.decode(example.prompt))]
    for response in example.responses:
        text, start = "", 0
        for i in range(1, len(response.tokens) + 1):
            if i == len(response.tokens) or response.trained[i] != response.trained[start]:
                piece = tokenizer.decode(response.tokens[start:i])
                text += f"[[{piece}]]" if response.trained[start] else piece
                start = i
        texts.append(("response", text))
    lines = []
    for name, text in texts:
        if most and len(text) > most:
            text = f"{text[:most // 2]} … {text[-most // 2:]}"
        lines.append(f"{name:<9} {text!r}")
    return lines


def forecast(common, config, train_set: list, tokens: int, online: bool = False) -> list[str]:
    """Weights, gradients, optimizer, reference and the largest micro-batch, in GB, from the model's
    configuration alone."""
    adapter, base = is_adapter(common.model), base_of(common.model)
    settings = load_config(base)
    try:
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(settings)
    except Exception as error:  # noqa: BLE001  somebody else's file: anything may be raised
        raise unloadable(base, error) from error
    matrices = sum(layer.weight.numel() for layer in lora.linear_layers(lm).values()) if common.load_in_4bit else 0
    if adapter or common.lora_r:
        lora.attach(lm, lora.saved_settings(common.model, common) if adapter else lora.new_settings(common, lm))
    trained = sum(parameter.numel() for parameter in lm.parameters() if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in lm.parameters()) - trained
    width = 2 if torch.cuda.is_available() and common.precision != "fp32" else 4      # bytes of a frozen weight that is not in 4 bits
    hidden, vocabulary = settings.hidden_size, settings.vocab_size
    inner = getattr(settings, "intermediate_size", 4 * hidden)
    # per token and layer, kept for the backward: two norms (input and output, fp32), q k v and rotated q k,
    # attention output, and
    # the MLP's gate and up
    per_layer = 4 * (10 * hidden + 2 * inner) if not common.gradient_checkpointing else 4 * hidden
    activations = tokens * (settings.num_hidden_layers * per_layer + 4 * 4 * hidden)
    at_once = LOGITS_AT_ONCE["cuda" if torch.cuda.is_available() else "cpu"]
    logits = 2 * 4 * min(at_once, tokens * vocabulary) + (0 if frozen else 4 * hidden * vocabulary)      # a slice twice
    table = 4 * sum(example.num_trained for example in train_set) if hasattr(config, "reference") else 0
    # online a second model must answer for every new completion; under a fresh adapter it is the policy
    # without that
    reference = (getattr(config, "beta", 0) or getattr(config, "kl_coef", 0)) and (adapter or not common.lora_r)
    critic = getattr(config, "share_value_trunk", True) is False
    rows = {
        f"trained weights, fp32 ({millions(trained)} of {millions(trained + frozen)} parameters)": 4 * trained,
        **({f"frozen weights{', 4-bit' if matrices else ''}": width * (frozen - matrices) + 0.52 * matrices} if frozen else {}),
        "gradients, fp32": 4 * trained,
        "optimizer (AdamW: two moments, fp32)": 8 * trained,
        **({"reference (a frozen model)": width * (trained + frozen)} if reference and online else
           {} if online else {"reference (its log-probs only; no second model)": table}),
        **({"critic (weights, gradients, optimizer)": 16 * trained + width * frozen} if critic else {}),
        f"one micro-batch of {tokens} tokens": activations,
        "a slice of the logits" + ("" if frozen else " and the head's gradient"): logits,
    }
    rows["together"] = sum(rows.values())
    return [f"{name:<60} {size / 1e9:7.2f} GB" for name, size in rows.items()]


def millions(count: int) -> str:
    return f"{count / 1e6:.{0 if count >= 1e7 else 2}f}M"
