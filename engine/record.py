"""What is checked, logged and saved when an update is closed."""
import contextlib
import math
import time

import torch

from data.errors import RunError
from engine import checkpoint, shares
from engine.console import per_second
from engine.pace import Pace
from engine.ranks import from_all_ranks, sum_over_ranks
from engine.signals import Stopped
from engine.step import Step
from model.build import reshard

MOST = 4096      # values of a parameter that are compared before and after the first update


class Record:
    """The rows of metrics.jsonl, the progress line, and the checks of an engine's updates."""

    def __init__(self, engine, progress: str):
        self.engine, self.progress = engine, progress
        self.since = self.started = time.perf_counter()
        self.tokens_seen = 0
        self.tokens_planned = 0                      # the same as --dry-run counts them
        self.evaluating = 0.0                        # seconds of evaluations since the first update began
        self.evaluated_before = 0.0                  # the same when the open update began
        self.weights_before: list | None = None      # what the first update must move
        self.rollout_metrics: dict = {}              # they join the rows of the rollout's updates

    def begin(self) -> None:
        """Start the clock and the progress line of the updates."""
        engine = self.engine
        if engine.step is None:                      # each update sets them
            engine.optimizer.check_rates()
        self.since = time.perf_counter()
        engine.run.console.start(engine.first, engine.plan.total)

    def open_step(self, step: Step, rollout_metrics: dict) -> None:
        """An update begins."""
        self.started = time.perf_counter()
        self.evaluated_before = self.evaluating
        self.rollout_metrics = rollout_metrics
        self.weights_before = self.some_weights() if step.index == 1 else None
        router = self.engine.policy.router_loss
        if router:
            router.open(len(step.computed))

    def close_step(self, step: Step, is_left: bool) -> None:
        """Check, log, sample and save after an update that was made."""
        engine = self.engine
        config, total = engine.config, engine.plan.total
        self.check_moved()
        if engine.policy.router_loss:
            step.add(engine.policy.router_loss.metrics())
        tokens = sum(example.size(engine.policy.share_prompt) for example in step.computed)
        self.tokens_seen += tokens
        is_shared = config.share_prompt != "false"
        self.tokens_planned += sum(example.size(is_shared) for example in step.examples)
        is_logged = step.index % config.log_every == 0 or step.index in (1, total) or is_left
        shown = self.log_update(step, tokens) if is_logged else {}
        speed = per_second(self.tokens_seen, self.since + self.evaluating)
        rate = f"{speed:.0f} tokens/s"
        engine.run.console.progress(step.index, total, rate, shown, self.since, engine.first, line=is_logged)
        self.log_evaluation(step)
        every = engine.sample_every
        if every and (step.index % every == 0 or step.index == total):
            engine.saver.write_samples(step.index)
        engine.saver.check_background()
        stop = engine.stop_requested()
        is_stopped = bool(stop) and step.index < total
        if engine.is_saved(step.index) or is_stopped:
            engine.save(step.index, is_left)
        if is_stopped:
            raise Stopped(stop)

    def pace(self) -> Pace:
        """What this process has trained since the updates began."""
        updates = self.engine.last - self.engine.first
        return Pace(updates, self.tokens_planned, time.perf_counter() - self.since - self.evaluating)

    @contextlib.contextmanager
    def evaluation(self):
        """While this lasts, nothing has a gradient, and its time is not the updates'."""
        started = time.perf_counter()
        with torch.no_grad():
            yield
        elapsed = time.perf_counter() - started
        step = self.engine.step
        if step is None or step.index == 0:      # no update has begun
            self.since += elapsed
        else:
            self.evaluating += elapsed

    def log_update(self, step: Step, tokens: int) -> dict:
        """Write the row of an update into metrics.jsonl; the part of it that the console shows."""
        plan = self.engine.plan
        averages = step.averages("train") | self.rollout_metrics
        position = {"step": step.index, "split": "train", "epoch": plan.epochs_after(step.index)}
        evaluating = self.evaluating - self.evaluated_before      # in this update
        speed = round(per_second(tokens, self.started + evaluating), 1)
        rate = self.engine.optimizer.param_groups[0]["lr"]
        rest = {"grad_norm": self.engine.grad_norm, "lr": rate, "tokens_per_second": speed}
        self.engine.run.log(position | averages | rest)
        return self.shown(averages)

    def log_evaluation(self, step: Step) -> None:
        """Write the row of an evaluation, if held-out rows were logged in this step."""
        if not step.totals["eval"]:
            return
        averages = step.averages("eval")
        self.engine.run.log({"step": step.index, "split": "eval", **averages})
        shown = [f"{name} {value:.4g}" for name, value in self.shown(averages).items()]
        text = f"held-out rows at step {step.index}: {'  '.join(shown)}"
        self.engine.run.notice(text, is_progress=True)

    def shown(self, averages: dict) -> dict:
        names = dict.fromkeys(["loss", self.progress])
        return {name: averages[name] for name in names if name in averages}

    # ---- checks --------------------------------------------------------------------------------------

    def check_finite(self, step: Step) -> None:
        """RunError that names the rows, or the checkpoint right after a resume, where the loss or the
        gradient norm of an update is not finite."""
        engine, norm = self.engine, self.engine.grad_norm
        losses = torch.stack([loss for loss, _ in step.losses]).tolist()
        loss, = sum_over_ranks([sum(losses)], engine.policy.device)
        if math.isfinite(loss) and math.isfinite(norm):
            return
        what = f"loss {loss:g}, gradient norm {norm:g} in update {step.index}"
        if engine.start and step.index == engine.first + 1:           # so the checkpoint may be the fault
            raise RunError(f"{what}, the first after resuming from {engine.start}, before the weights were "
                           f"touched; fix: {checkpoint.instead_of(engine.start)}")
        bad = []
        for loss, (_, examples) in zip(losses, step.losses):
            if not math.isfinite(loss):
                bad += [example.where for example in examples]
        rows = from_all_ranks(bad) or [example.where for example in step.examples]
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        raise RunError(f"{what}, before the weights were touched; rows: {', '.join(rows[:8])}{more}; last "
                       f"checkpoint: {engine.saver.last_checkpoint()}; fix: lower lr or look at these rows")

    def check_moved(self) -> None:
        """RunError where the first update has moved no weight."""
        engine, norm = self.engine, self.engine.grad_norm
        before, self.weights_before = self.weights_before, None
        if before is None:
            return
        if norm == 0 and not engine.is_online:            # online all rewards of a rollout may be equal
            raise RunError("the gradient of the first update is exactly 0, so nothing would be trained; "
                           "likely causes: pairs whose two responses are the same once the chat template has "
                           "rendered them, or a loss that is multiplied by 0; "
                           "fix: look at the first example, which --dry-run shows")
        has_changed = False
        for old, new in zip(before, self.some_weights()):
            has_changed = has_changed or not torch.equal(old, new)
        ranks_with_changes, = sum_over_ranks([float(has_changed)], engine.policy.device)
        if norm > 0 and not ranks_with_changes:
            raise RunError(f"no weight moved in the first update (gradient norm {norm:.3g}, "
                           f"lr {engine.plan.learning_rate(1):g}); fix: raise lr")

    def some_weights(self) -> list[torch.Tensor]:
        """Copies of the first values of every trained parameter (of this rank's shards)."""
        reshard(self.engine.policy)
        found = []
        for parameter in self.engine.policy.parameters():
            if parameter.requires_grad:
                values = shares.local_part(parameter).flatten()
                found.append(values[:MOST].clone())
        return found
