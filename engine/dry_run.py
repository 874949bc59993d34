"""`--dry-run`: everything a run would do, printed before it does anything. It reads the data and the
tokenizer, not the weights."""
import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from data.dataset import doubts
from data.errors import printable
from data.pack import Example, Response
from data.packing import pack
from data.store import sizes_of
from engine.build import stored_yaml
from engine.checkpoint import model_path
from engine.config import describe
from engine.console import clock
from engine.forecast import forecast
from engine.inputs import marked, read_inputs
from engine.pace import expected_seconds
from engine.plan import Plan
from model import lora
from model.load import base_of, empty_lm, load_config
from model.trial import check_kind


def dry_run(run_config, kind: str) -> None:
    """Print configuration, data audit, the first example, batch arithmetic and a memory forecast; UserError
    as training would. The environment's WORLD_SIZE is the number of devices; under torchrun rank 0 prints."""
    if os.environ.get("RANK", "0") != "0":
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
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
    epochs = plan.total / plan.draws_per_epoch
    tokens = 0 if online else epochs * tokens_of(train_set, common.share_prompt != "false")
    known = expected_seconds(common, config, stored_yaml(common, config), plan.total, tokens)
    if known:
        seconds, like = known
        section("time", [f"about {clock(seconds)}, at the pace of {like}, without evaluations"])
    print()
    base = base_of(common.model)
    lm = empty_lm(load_config(base), base)
    check_kind(lm, base, common, notice)
    in_one = len(sizes) == plan.draws_per_epoch and (epochs <= 1 or largest_fits(common, train_set))
    lines = forecast(common, config, lm, max(sizes), online, world, plan.total, in_one)
    section(f"memory forecast for each of {world} devices" if world > 1 else "memory forecast", lines)
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


def largest_fits(common, train_set: list) -> bool:
    """Whether an update of the largest rows is one micro-batch: later epochs draw them in another order."""
    sizes = sizes_of(train_set, common.share_prompt != "false")
    largest = np.sort(sizes)[-common.batch_size:]
    return int(largest.sum()) <= common.micro_batch_tokens


def micro_batch_sizes(common, train_set: list, plan: Plan, world: int) -> list[int]:
    """The tokens of every micro-batch of the first epoch on the first device."""
    of_rows = sizes_of(train_set, common.share_prompt != "false")
    sizes = []
    for draw in range(1, plan.draws_per_epoch + 1):
        lengths = of_rows[plan.rows(draw)].tolist()
        for members in pack(lengths, common.micro_batch_tokens, world)[0]:
            sizes.append(sum(lengths[i] for i in members))
    return sizes
