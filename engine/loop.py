"""The engine an algorithm drives: it iterates updates and micro-batches and does everything between two of them.

An algorithm calls `engine.steps()`, iterates each `Step`, and may touch `engine.policy`, `engine.optimizer`,
`engine.reference(path)`, `engine.clip_gradients()`, `engine.eval_batches(step)` and `engine.mean(sum, count)`; where its loss
needs more of an update than its micro-batches, also `train_set`, `eval_set`, `updates()`, `batches(examples)` and `notice(text)`.
"""
import contextlib
import math
import os
import shutil
import signal
import time

import torch
from torch.distributed.tensor import DTensor

from data.errors import RunError, UserError
from data.pack import Example
from data.plan import order, pack
from data.tokenise import stop_ids
from engine import checkpoint
from engine.console import per_second
from engine.logs import Run
from engine.options import Sampling
from engine.ranks import distributed, from_all_ranks, from_main, sum_over_ranks
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
from engine.step import Step
from model.build import build_policy, reshard
from model.load import base_of, generation_settings, is_finite
from model.reward_model import RewardModel
from model.sampler import sample
from rewards.guard import handle, interrupt, leave

SEAL_SECONDS = 120      # between two parts of the reference's log-probs


class Engine:
    """Policy, optimizer, data and run of one training; `start` is the checkpoint to continue from, or None."""
    may_teach_nothing = False      # whether the rows of an update may have no gradient and the run goes on

    def __init__(self, config, policy, tokenizer, train_set: list, eval_set: list, run: Run, progress: str, start: str | None = None):
        self.config, self.policy, self.tokenizer, self.run, self.progress = config, policy, tokenizer, run, progress
        self.train_set, self.eval_set = train_set, eval_set
        self.rank, self.world = distributed()
        self.start, self.first = start, checkpoint.load_trainer(start)["step"] if start else 0
        self.draws_per_epoch = math.ceil(len(train_set) / config.batch_size)      # how often batch_size rows are drawn in an epoch
        self.plan_updates(1)
        decayed, plain = [], []
        for parameter in filter(lambda parameter: parameter.requires_grad, policy.parameters()):
            (decayed if parameter.ndim > 1 else plain).append(parameter)      # norms and biases are not decayed
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        # fused: one pass over the weights and no temporaries of their size
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        if start:
            checkpoint.load_optimizer(start, policy, self.optimizer)
        self.step, self.grad_norm, self.signal = None, None, None
        self.since, self.tokens_seen = time.perf_counter(), 0
        self.plan, self.planned_epoch = None, None            # the rows of every update of one epoch
        self.catch_signals()

    # ---- plan -------------------------------------------------------------------------------------------------------

    def plan_updates(self, per_draw: int) -> None:
        """How many updates the run has, where each draw of `batch_size` rows is used for `per_draw` of them."""
        config = self.config
        self.per_draw, self.total = per_draw, config.max_steps or math.ceil(config.epochs * self.draws_per_epoch * per_draw)
        self.eval_every, self.sample_every = config.eval_every or max(1, self.total // 10), config.sample_every

    def check_total(self) -> None:
        if self.first > self.total:
            raise UserError(f"max_steps: the run is at step {self.first} already, after the {self.total} asked for; fix: raise max_steps")

    def deal(self, examples: list) -> list[list]:
        """This rank's micro-batches of these examples; every rank gets the same number of them."""
        share = self.policy.share_prompt
        mine = pack([example.size(share) for example in examples], self.config.micro_batch_tokens, self.world)[self.rank]
        return [[examples[i] for i in members] for members in mine]

    def indices(self, index: int) -> list[int]:
        """The rows of draw `index` (1-based): a function of the seed and nothing else."""
        epoch, position = divmod(index - 1, self.draws_per_epoch)
        if epoch != self.planned_epoch:
            config = self.config
            self.plan = order(len(self.train_set), config.batch_size, config.seed, epoch, config.shuffle)
            self.planned_epoch = epoch
        return self.plan[position]

    def learning_rate(self, index: int) -> float:
        """lr * min(1, k / warmup) for update k, then the schedule; never 0."""
        config = self.config
        warmup = round(config.warmup * self.total) if config.warmup < 1 else round(config.warmup)
        if index <= warmup:
            return config.lr * index / warmup
        progress = (index - 1 - warmup) / max(1, self.total - warmup)
        decay = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return config.lr * decay[config.schedule]

    # ---- what algorithms call ---------------------------------------------------------------------------------------

    def steps(self):
        """Iterate the updates of the run, from the one after the checkpoint; after the last one the final model is written."""
        self.check_total()
        self.since = time.perf_counter()
        self.run.console.start(self.first, self.total)
        if self.first == 0 and self.eval_set:
            self.step = Step(self, 0, [])
            yield self.step
            self.record_evaluation(self.step)
        for index in range(self.first + 1, self.total + 1):
            yield from self.update(index, [self.train_set[i] for i in self.indices(index)])
        self.run.erase()
        self.save_final()

    def update(self, index: int, examples: list, more: dict | None = None):
        """Yield the Step of one update, and do what lies between two of them: learning rate, logging (with `more` metrics), samples,
        checkpoints, signals."""
        started, shown = time.perf_counter(), {}
        self.step = Step(self, index, examples)
        lr = self.learning_rate(index)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        before = self.some_weights() if index == 1 else None
        yield self.step
        if before and self.grad_norm == 0 and not self.may_teach_nothing:
            raise RunError("the gradient of the first update is exactly 0, so nothing would be trained; "
                           "likely causes: pairs whose two responses are the same once the chat template has "
                           "rendered them, or a loss that is multiplied by 0; "
                           "fix: look at the first example, which --dry-run shows")
        if before and self.grad_norm > 0 and not self.moved(before):
            raise RunError(f"no weight moved in the first update (gradient norm {self.grad_norm:.3g}, lr {lr:g}); fix: raise lr")
        tokens = sum(example.size(self.policy.share_prompt) for example in examples)
        self.tokens_seen += tokens
        logged = index % self.config.log_every == 0 or index in (1, self.total)
        if logged:
            averages = self.step.averages("train") | (more or {})
            self.run.append("metrics.jsonl", {
                "step": index, "split": "train", "epoch": round(index / self.draws_per_epoch / self.per_draw, 4), **averages,
                "grad_norm": self.grad_norm, "lr": lr,
                "tokens_per_second": round(per_second(tokens, started), 1)})
            shown = {name: averages[name] for name in dict.fromkeys(["loss", self.progress]) if name in averages}
        rate = f"{per_second(self.tokens_seen, self.since):.0f} tokens/s"
        self.run.console.progress(index, self.total, rate, shown, self.since, self.first, line=logged)
        self.record_evaluation(self.step)
        if self.sample_every and (index % self.sample_every == 0 or index == self.total):
            self.write_samples(index)
        stop = self.stop_requested()
        if self.is_saved(index) or (stop and index < self.total):
            self.save(index)
        if stop and index < self.total:
            raise Stopped(stop)

    def updates(self) -> list[list]:
        """The examples of every update of the run, in order."""
        return [[self.train_set[i] for i in self.indices(index)] for index in range(1, self.total + 1)]

    def reference(self, path: str | None = None, also: list = ()) -> Reference:
        """The frozen model at `path` (None: the start model) as a table of its log-probs, for every example of this run and
        for those in `also`. They never change, so they are computed once, before the optimizer has any state, and the model
        is let go: training holds no second model, and later epochs, and later runs, pay nothing for the reference."""
        used = range(len(self.train_set))
        if self.total < self.draws_per_epoch:                 # less than an epoch: only the rows of these updates are needed
            used = sorted(i for index in range(1, self.total + 1) for i in self.indices(index))
        examples = [self.train_set[i] for i in used] + self.eval_set + list(also)
        path = None if path == "cache" else path              # TRL's and the papers' codes ask for what always happens here
        path = path and from_main(checkpoint.model_path, path, self.notice)
        is_start_model = path is None or path == self.config.model
        policy, bits = self.policy, " 4-bit" if self.config.load_in_4bit else ""
        arithmetic = f"{policy.precision} {policy.device.type} {policy.lm.dtype}{bits}"
        store = os.path.join(os.path.dirname(os.path.normpath(self.run.directory)), ".reference",
                             from_main(model_key, path or self.config.model, arithmetic))
        wanted = {key for example in examples for key in response_keys(example)}
        table = unpacked(*from_main(packed, read_table, store, wanted, self.notice))
        if table:
            self.notice(f"reference log-probs: {len(table)} of {len(wanted)} responses from {store}")
        if missing := lacking(examples, table):
            if not is_start_model or self.first > 0:
                policy = build_policy(self.config, self.tokenizer, path or self.config.model, frozen=True)
            computed = self.frozen_logps(policy, missing, store)
            # another run may have stored the same meanwhile: then both use what a resumed run will find
            table = computed | unpacked(*from_main(packed, read_table, store, wanted, self.notice))
        reference = Reference(table)
        if is_start_model and self.first == 0:
            self.check_reference(reference)
        return reference

    def clip_gradients(self) -> None:
        """Scale the gradients to `max_grad_norm` at most; stop the run, before the update, if the loss or their norm is not finite."""
        if not self.step.losses:
            return                                                             # step 0: nothing was trained
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm or math.inf)
        self.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        losses = [float(loss) for loss, _ in self.step.losses]
        loss, = sum_over_ranks([sum(losses)], self.policy.device)
        if not (math.isfinite(loss) and math.isfinite(self.grad_norm)):
            what = f"loss {loss:g}, gradient norm {self.grad_norm:g} in update {self.step.index}"
            if self.start and self.step.index == self.first + 1:      # so the checkpoint may be the fault
                raise RunError(f"{what}, the first after resuming from {self.start}, before the weights were "
                               f"touched; fix: {checkpoint.instead_of(self.start)}")
            bad = []
            for loss, (_, examples) in zip(losses, self.step.losses):
                if not math.isfinite(loss):
                    bad += [example.where for example in examples]
            rows = from_all_ranks(bad)
            rows = rows or [example.where for example in self.step.examples]
            shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
            last = checkpoint.checkpoints(self.run.directory)
            raise RunError(f"{what}, before the weights were touched; rows: {shown}; last checkpoint: "
                           f"{last[-1] if last else 'none'}; fix: lower lr or look at these rows")

    def batches(self, examples: list, label: str | None = None):
        """Micro-batches of any examples, which the ranks share; `label` names their bar on a terminal."""
        since = time.perf_counter()
        for start in range(0, len(examples), self.config.batch_size):
            block = examples[start:start + self.config.batch_size]
            for members in self.deal(block):
                yield self.policy.collate(members)
            if label:
                self.run.console.count(label, start + len(block), len(examples), " rows/s", since)

    def eval_batches(self, step: Step, examples: list | None = None):
        """The micro-batches of the held-out rows (or of `examples`, which stand for them) if an evaluation is due at this step,
        without gradients; else nothing."""
        if self.eval_set and (step.index % self.eval_every == 0 or step.index == self.total):
            with torch.no_grad():                  # holds for the caller's loop body too, which runs while this is suspended
                yield from self.batches(self.eval_set if examples is None else examples, "held-out rows")

    def mean(self, total: float, count: float) -> float:
        """total / count, each summed over all ranks first."""
        total, count = sum_over_ranks([float(total), float(count)], self.policy.device)
        return total / max(1.0, count)

    def notice(self, text: str) -> None:
        """Tell the user once, on the console and in events.log."""
        self.run.notice(text)

    # ---- the reference's log-probs ----------------------------------------------------------------------------------

    @torch.no_grad()
    def collect(self, function, examples: list, size) -> list:
        """`function(batch)`, a number for each of the batch's responses or tokens, for all `examples`: per example a tensor of
        `size(example)` numbers on the CPU. Each rank computes its share."""
        ends = torch.tensor([0, *map(size, examples)]).cumsum(0).tolist()
        offsets = dict(zip(map(id, examples), ends))
        numbers = torch.zeros(ends[-1], device=self.policy.device)
        for start in range(0, len(examples), self.config.batch_size):
            for members in self.deal(examples[start:start + self.config.batch_size]):
                values = function(self.policy.collate(members))
                for example, part in zip(members, values.split([size(example) for example in members])):
                    numbers[offsets[id(example)]:offsets[id(example)] + len(part)] = part
        if self.world > 1:
            torch.distributed.all_reduce(numbers)
        return list(numbers.cpu().split([size(example) for example in examples])) if examples else []

    def frozen_logps(self, model, examples: list, store: str) -> dict:
        """The log-probs of every response's trained tokens, by `response_key`, fp32 and on the CPU. They are
        written to `store` in parts, one every SEAL_SECONDS and one at a stop, so that a pass that was stopped
        continues where it was."""
        table, unsealed, size = {}, {}, self.config.batch_size
        since = sealed = time.perf_counter()
        for start in range(0, len(examples), size):
            block = examples[start:start + size]
            collected = self.collect(model, block, lambda example: example.num_trained)
            for example, logps in zip(block, collected):
                lengths = [int(response.trained.sum()) for response in example.responses]
                unsealed.update(zip(response_keys(example), logps.split(lengths)))
            done = start + len(block)
            line = done == len(examples) or start // size % 100 == 99
            self.run.console.count("reference log-probs", done, len(examples), " rows/s", since, line=line)
            stop = self.stop_requested()
            # one clock decides for all ranks
            age = from_main(lambda: time.perf_counter() - sealed)      # noqa: B023
            if stop or age > SEAL_SECONDS or done == len(examples):
                from_main(write_part, store, unsealed)
                table, unsealed, sealed = table | unsealed, {}, time.perf_counter()
            if stop:
                raise Stopped(stop)
        return table

    @torch.no_grad()
    def check_reference(self, reference: Reference) -> None:
        """Step-0 invariant: where the reference is the start model, policy and reference agree, per token and on average."""
        batch = self.policy.collate([min(map(self.train_set.__getitem__, self.indices(1)), key=Example.size)])
        difference = (self.policy(batch) - reference(batch)).abs().max()
        if not difference <= self.policy.tolerance:                                    # a NaN stops too
            raise RunError(f"policy and reference differ by {difference:.2g} per token before the first update, though both are "
                           f"{self.config.model}; fix: use a model whose forward is deterministic")

    # ---- between two updates ----------------------------------------------------------------------------------------

    def synchronize_gradients(self, last: bool) -> None:
        """Sharded gradients are reduced over ranks once per update, with the last micro-batch."""
        if self.world > 1:
            self.policy.set_requires_gradient_sync(last)

    def some_weights(self) -> list:
        """Copies of the first values of every trained parameter (of this rank's shards)."""
        reshard(self.policy)
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.policy.parameters() if p.requires_grad)
        return [parameter.detach().flatten()[:4096].clone() for parameter in local]

    def moved(self, before: list) -> bool:
        changed = any(not torch.equal(old, new) for old, new in zip(before, self.some_weights()))
        return sum_over_ranks([float(changed)], self.policy.device)[0] > 0

    def record_evaluation(self, step: Step) -> None:
        if not step.totals["eval"]:
            return
        averages = step.averages("eval")
        self.run.append("metrics.jsonl", {"step": step.index, "split": "eval", **averages})
        shown = "  ".join(f"{name} {averages[name]:.4g}" for name in dict.fromkeys(["loss", self.progress]) if name in averages)
        self.run.notice(f"held-out rows at step {step.index}: {shown}")

    def write_samples(self, index: int, count: int = 4, length: int = 128) -> None:
        """One completion at temperature 1 for each of the first held-out (else training) prompts, keyed by (seed, step).
        All ranks generate the same, so that sharded forwards stay in step."""
        examples, sampling = (self.eval_set or self.train_set)[:count], Sampling(reward="", max_completion_length=length)
        keys = [(self.config.seed, index, number) for number in range(len(examples))]
        found = sample(self.policy, self.tokenizer, [example.prompt for example in examples], keys, 1, sampling)
        for example, (completion,) in zip(examples, found):
            self.run.append("samples.jsonl", {"step": index, "prompt": self.tokenizer.decode(example.prompt),
                                              "completion": self.tokenizer.decode(completion.tokens)})

    def try_saving(self) -> None:
        """Before the first update: write everything but the weights once, so that no run can end with
        nothing. All that is saved gets the template's stop tokens."""
        self.policy.lm.generation_config.eos_token_id = stop_ids(self.tokenizer)
        from_main(self.write_trial)

    def write_trial(self) -> None:
        lm, merge = self.policy.lm, self.config.merge
        _, changed = generation_settings(base_of(self.start or self.config.model))
        if changed:
            self.notice(changed)
        if isinstance(self.policy, RewardModel) and (reason := checkpoint.why_no_classifier(lm, merge)):
            self.notice(f"classifier/ will not be written: {reason}")
        outline = checkpoint.outline(self.policy)

        def write(temporary):
            checkpoint.write_checkpoint(temporary, lm, self.tokenizer, outline, {}, {"step": 0}, {})

        checkpoint.write_sealed(self.run.path("checkpoint"), write, trial=True)
        final = self.write_final(outline, trial=True)
        moments = 2 * checkpoint.num_bytes(checkpoint.trained(self.policy))
        self.check_disk(checkpoint.num_bytes(outline) + moments, final)

    def check_disk(self, one: int, final: int) -> None:
        """Warn if the disk has no room for checkpoints of `one` bytes each and `final` bytes at the end."""
        every, directory = self.config.save_every, self.run.directory
        planned = self.total // every if every else 0
        at_once = max(1, min(planned, self.config.keep + 1))       # the oldest goes when the newest is there
        missing = max(1, at_once - len(checkpoint.checkpoints(directory)))
        free = shutil.disk_usage(directory).free
        if free < missing * one + final:
            free, one, final = (f"{size / 1e9:.3g} GB" for size in (free, one, final))
            self.notice(f"warning: the disk of {directory} has {free} left, but {missing} checkpoints of "
                        f"{one} and {final} at the end do not fit; fix: free disk space, or lower keep")

    def check_weights(self, index: int) -> None:
        """Stop the run, on all ranks, before anything is written, if a trained weight, a moment of it or the
        policy's answer to a row is not finite: a loss would show it one update later."""
        reshard(self.policy)
        tensors = {}
        for name, parameter in checkpoint.trained(self.policy).items():
            tensors[name] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{key} of {name}"] = value
        faults = [float(not is_finite(checkpoint.local_part(tensor))) for tensor in tensors.values()]
        counts = sum_over_ranks(faults, self.policy.device)
        bad = [name for name, count in zip(tensors, counts) if count]
        if not bad and self.step and self.step.examples:
            example = min(self.step.examples, key=Example.size)
            with torch.no_grad():
                said = self.policy(self.policy.collate([example]))
            reshard(self.policy)
            if not said.isfinite().all():
                bad = [f"the policy's answer to {example.where}"]
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            last = checkpoint.checkpoints(self.run.directory)
            raise RunError(f"not finite after update {index}: {bad[0]}{more}; it was not saved; "
                           f"last checkpoint: {last[-1] if last else 'none'}; fix: lower lr")

    def is_saved(self, index: int) -> bool:
        """Whether every run has a checkpoint after update `index`, stopped or not."""
        every = self.config.save_every
        return every is not None and index % every == 0

    def save(self, index: int) -> None:
        from_main(self.run.check_there)
        self.check_weights(index)
        directory = self.run.path("checkpoints", f"step-{index:06d}")
        checkpoint.save_checkpoint(directory, self.policy, self.tokenizer, self.optimizer, {"step": index}, self.stored(index))
        if self.rank == 0:
            self.run.replace(saved=directory)
            checkpoint.clean(self.run.directory, keep=self.config.keep)

    def stored(self, index: int) -> dict:
        """Tensors that a checkpoint after update `index` must hold beside weights and optimizer."""
        return {}

    def save_final(self) -> None:
        """`final/`, loadable by name; of a reward model also `classifier/`, for AutoModelForSequenceClassification."""
        from_main(self.run.check_there)
        self.check_weights(self.total)
        weights = checkpoint.model_state(self.policy)
        try:
            from_main(self.write_final, weights)
        except UserError:
            if self.config.merge:
                self.save(self.total)             # the merge may have failed: at least the adapter is kept
            raise

    def write_final(self, weights: dict, trial: bool = False) -> int:
        """Write, or try, what a run ends with, on rank 0; the number of bytes of its weights."""
        lm = self.policy.lm
        if self.config.merge:
            lm, weights = checkpoint.merged(lm, weights)
        if self.config.save_dtype == "bf16":
            weights = checkpoint.in_dtype(weights, torch.bfloat16)

        def write(name, save):
            def fill(temporary):
                save(lm, self.tokenizer, weights, temporary)
            aside = None if trial else checkpoint.set_aside(self.run.path(name))
            if aside:
                self.notice(f"what was changed in {self.run.path(name)} is kept in {aside}")
            checkpoint.write_sealed(self.run.path(name), fill, trial)

        copies = 1
        if isinstance(self.policy, RewardModel) and not checkpoint.why_no_classifier(lm):
            write("classifier", checkpoint.save_classifier)
            copies = 2
        if self.config.merge or not trial:              # else a trial has written the same as a checkpoint
            write("final", checkpoint.save_model)       # last: it marks the run as finished
        if not trial:
            self.run.replace()
            self.run.finish()
        return copies * checkpoint.num_bytes(weights)

    # ---- signals ----------------------------------------------------------------------------------------------------

    def catch_signals(self) -> None:
        """The first SIGTERM or SIGINT asks for a stop after this update (or this part of the reference pass,
        or before a rollout's first update); the second one exits at once. Under torchrun the second one may
        be the first again: a scheduler signals every process, and torchrun, which got it too, passes it on.
        SIGTERM ends processes that a reward forks, as usual. They ignore a Ctrl-C, which reaches them too:
        the run handles it."""
        self.signalled, same_request = 0.0, 5.0 if "LOCAL_RANK" in os.environ else 0.0      # seconds

        def handler(number, frame):
            if not self.signal:
                self.signal, self.signalled = number, time.monotonic()
                interrupt()
            elif time.monotonic() - self.signalled >= same_request:
                with contextlib.suppress(RuntimeError):      # the signal came during a write to the terminal
                    self.run.erase()
                leave(128 + number)
        handle(signal.SIGTERM, handler)
        handle(signal.SIGINT, handler, in_child=lambda number, frame: None)

    def stop_requested(self) -> int | None:
        """The signal, if any rank got one: all ranks leave together."""
        total, = sum_over_ranks([float(self.signal or 0)], self.policy.device)
        return (self.signal or signal.SIGTERM) if total else None


class Stopped(Exception):
    """A signal ended the run after an update, with a checkpoint; `train.py` exits with 128 + its number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
