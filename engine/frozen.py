"""The frozen reference: offline a table of log-probs, computed once before training; online a second
model."""
import gc
import itertools
import time

from data.pack import Example
from data.store import Examples, response_keys
from engine import checkpoint
from engine.ranks import from_main
from engine.reference import (
    Reference,
    Table,
    check_reference,
    lacking,
    read_table,
    store_of,
    whole_parts,
    write_part,
)
from engine.signals import Stopped
from model import lora
from model.build import build_second_model
from model.load import is_adapter
from model.policy import Policy

SEAL_SECONDS = 120      # at least between two parts of the reference's log-probs,
SEAL_SHARE = 0.1        # ... and this share of the time until then: every part is three open files


def reference_table(engine, path: str | None, also: list[Example]) -> Reference:
    """The log-probs of the frozen model at `path` (None: the start model), for every example of the run
    and those in `also`. They are read from the store beside the runs; what is missing there is computed,
    before the optimizer has any state, and the model is let go: training holds no second model, and later
    epochs and later runs pay nothing for the reference."""
    groups = [used_examples(engine), engine.eval_set]
    if also:
        groups.append(Examples.of(also))
    path = resolved(engine, path)
    is_start_model = path in (None, engine.config.model)
    store = store_of(engine, path)
    table = stored_table(store, engine.notice)
    missing, there, wanted = lacking(groups, table)
    if there:
        engine.notice(f"reference log-probs: {there} of {wanted} responses from {store}")
    if any(missing):
        model = engine.policy
        if not is_start_model or engine.first > 0:
            model = load_reference(engine, path)
        compute_logps(engine, model, missing, store)
        del model
        gc.collect()                      # a sharded model refers to itself
        # another run may have stored the same meanwhile: then both use what a resumed run will find
        table = stored_table(store, engine.notice)
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
    return load_reference(engine, path)


def frozen_model(engine, path: str | None) -> Policy:
    """The model at `path` (None: the start model), without gradients, sharded where the policy is."""
    return load_reference(engine, resolved(engine, path))


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


def used_examples(engine) -> Examples:
    """The training examples of the run's updates: all, unless the run is shorter than an epoch."""
    plan = engine.plan
    if plan.total >= plan.draws_per_epoch:
        return engine.train_set
    return engine.train_set.take(sorted(itertools.chain(*plan.all_rows())))


def stored_table(store: str, notice) -> Table:
    return read_table(from_main(whole_parts, store, notice))


def compute_logps(engine, model, groups: list[Examples], store: str) -> None:
    """Write the log-probs of every response's trained tokens to `store`, in parts, one every SEAL_SECONDS and
    one at a stop, so that a pass that was stopped continues where it was."""
    keys, logps, size = [], [], engine.config.batch_size
    total, done = sum(map(len, groups)), 0
    since = sealed = time.perf_counter()
    for number, block in enumerate(blocks_of(groups, size), 1):
        collected = engine.collect(model, block, lambda example: example.num_trained)
        for example, values in zip(block, collected):
            lengths = [response.num_trained for response in example.responses]
            keys += response_keys(example)
            logps += values.split(lengths)
        done += len(block)
        is_told = done == total or number % 100 == 0
        engine.run.console.count("reference log-probs", done, total, " rows/s", since, line=is_told)
        stop = engine.stop_requested()
        now = from_main(time.perf_counter)      # one clock decides for all ranks
        interval = max(SEAL_SECONDS, SEAL_SHARE * (now - since))
        if stop or now - sealed > interval or done == total:
            from_main(write_part, store, keys, logps)
            keys, logps, sealed = [], [], now
        if stop:
            raise Stopped(stop)


def blocks_of(groups: list[Examples], size: int):
    """The examples of all groups, `size` at a time."""
    for group in groups:
        for start in range(0, len(group), size):
            yield group[start:start + size]


class WithoutAdapter:
    """The policy's base model, as its reference."""

    def __init__(self, policy):
        self.policy = policy

    def __call__(self, batch, temperature: float = 1.0):
        with lora.disabled(self.policy.lm):
            return self.policy(batch, temperature)
