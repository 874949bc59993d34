"""The frozen reference: offline a table of log-probs, computed once before training; online a second
model."""
import os
import time

import torch

from data.errors import RunError
from data.pack import Example
from engine import checkpoint
from engine.ranks import from_main
from engine.reference import (
    Reference,
    lacking,
    model_key,
    packed,
    read_table,
    response_keys,
    unpacked,
    write_part,
)
from engine.signals import Stopped
from model import lora
from model.build import build_second_model, shard
from model.load import is_adapter

SEAL_SECONDS = 120      # between two parts of the reference's log-probs


def reference_table(engine, path: str | None, also: list[Example]) -> Reference:
    """The log-probs of the frozen model at `path` (None: the start model), for every example of the run
    and those in `also`. They are read from the store beside the runs; what is missing there is computed,
    before the optimizer has any state, and the model is let go: training holds no second model, and later
    epochs and later runs pay nothing for the reference."""
    examples = used_examples(engine) + engine.eval_set + list(also)
    path = resolved(engine, path)
    is_start_model = path in (None, engine.config.model)
    store = store_of(engine, path)
    wanted = set()
    for example in examples:
        wanted.update(response_keys(example))
    table = stored_table(store, wanted, engine.notice)
    if table:
        engine.notice(f"reference log-probs: {len(table)} of {len(wanted)} responses from {store}")
    missing = lacking(examples, table)
    if missing:
        model = engine.policy
        if not is_start_model or engine.first > 0:
            model = load_reference(engine, path)
        computed = frozen_logps(engine, model, missing, store)
        # another run may have stored the same meanwhile: then both use what a resumed run will find
        table = computed | stored_table(store, wanted, engine.notice)
    reference = Reference(table)
    if is_start_model and engine.first == 0:
        check_reference(engine, reference)
    return reference


def reference_model(engine, path: str | None):
    """The frozen model at `path` (None: the start model); under a fresh adapter that is the policy
    without it."""
    path = resolved(engine, path)
    is_start_model = path in (None, engine.config.model)
    has_fresh_adapter = lora.settings(engine.policy.lm) and not is_adapter(engine.config.model)
    if is_start_model and has_fresh_adapter:
        return WithoutAdapter(engine.policy)
    model = load_reference(engine, path).requires_grad_(False)
    return shard(model) if engine.world > 1 else model


def resolved(engine, path: str | None) -> str | None:
    """The directory or hub name of the reference; None for the start model. `reference: cache`, as other
    projects have it, is accepted too: caching is always on."""
    if path in (None, "cache"):
        return None
    return from_main(checkpoint.model_path, path, engine.notice)


def load_reference(engine, path: str | None):
    path = path or engine.config.model
    return build_second_model(
        path, engine.tokenizer, engine.config, engine.policy, engine.train_set, engine.notice)


def used_examples(engine) -> list[Example]:
    """The training examples of the run's updates: all, unless the run is shorter than an epoch."""
    plan = engine.plan
    rows = range(plan.num_rows)
    if plan.total < plan.draws_per_epoch:
        rows = sorted(sum(plan.all_rows(), []))
    return [engine.train_set[row] for row in rows]


def store_of(engine, path: str | None) -> str:
    """The directory with the reference's log-probs, beside the runs, by model and arithmetic."""
    policy = engine.policy
    bits = " 4-bit" if engine.config.load_in_4bit else ""
    arithmetic = f"{policy.precision} {policy.device.type} {policy.lm.dtype}{bits}"
    key = from_main(model_key, path or engine.config.model, arithmetic)
    runs = os.path.dirname(os.path.normpath(engine.run.directory))
    return os.path.join(runs, ".reference", key)


def stored_table(store: str, wanted: set, notice) -> dict:
    return unpacked(*from_main(packed, read_table, store, wanted, notice))


def frozen_logps(engine, model, examples: list[Example], store: str) -> dict:
    """The log-probs of every response's trained tokens, by `response_key`, fp32 and on the CPU. They are
    written to `store` in parts, one every SEAL_SECONDS and one at a stop, so that a pass that was stopped
    continues where it was."""
    table, unsealed, size = {}, {}, engine.config.batch_size
    since = sealed = time.perf_counter()
    for start in range(0, len(examples), size):
        block = examples[start:start + size]
        collected = engine.collect(model, block, lambda example: example.num_trained)
        for example, logps in zip(block, collected):
            lengths = [response.num_trained for response in example.responses]
            unsealed.update(zip(response_keys(example), logps.split(lengths)))
        done = start + len(block)
        is_told = done == len(examples) or start // size % 100 == 99
        engine.run.console.count("reference log-probs", done, len(examples), " rows/s", since, line=is_told)
        stop = engine.stop_requested()
        now = from_main(time.perf_counter)      # one clock decides for all ranks
        if stop or now - sealed > SEAL_SECONDS or done == len(examples):
            from_main(write_part, store, unsealed)
            table, unsealed, sealed = table | unsealed, {}, now
        if stop:
            raise Stopped(stop)
    return table


@torch.no_grad()
def check_reference(engine, reference: Reference) -> None:
    """Step-0 invariant: where the reference is the start model, policy and reference agree, per token and on
    average."""
    first_rows = [engine.train_set[row] for row in engine.plan.rows(1)]
    batch = engine.policy.collate([min(first_rows, key=Example.size)])
    difference = (engine.policy(batch) - reference(batch)).abs().max()
    if not difference <= engine.policy.tolerance:                                    # a NaN stops too
        raise RunError(f"policy and reference differ by {difference:.2g} per token before the first update, "
                       f"though both are {engine.config.model}; "
                       "fix: use a model whose forward is deterministic")


class WithoutAdapter:
    """The policy's base model, as its reference."""

    def __init__(self, policy):
        self.policy = policy

    def __call__(self, batch, temperature: float = 1.0):
        with lora.disabled(self.policy.lm):
            return self.policy(batch, temperature)
