"""The engine an algorithm drives. One update, in the order in which it happens:

    engine.steps()            opens update k: its rows, its learning rate
      for batch in step       a micro-batch: examples in one flat row               data/pack.py
        policy(batch)         log-probs of the trained tokens                       model/policy.py
        loss.backward()       the algorithm's own formula                           algorithms/
        step.log              what is averaged over the update                      engine/step.py
      clip_gradients          checks loss and gradients, scales them
      optimizer.step          moves the weights                                     engine/optimizer.py
      optimizer.zero_grad
      eval_batches            held-out rows, where an evaluation is due
    engine closes update k    its row in metrics.jsonl, samples, checkpoint, signals

An update is closed when the algorithm asks for the next one, or by `engine.finish()` in train.py. So nothing
is lost where an algorithm leaves its loop early: `break` keeps every update that was made, its row and the
model.
"""
import math
import time
from collections.abc import Callable, Iterator

import torch
from torch.distributed.tensor import DTensor

from data.errors import RunError, UserError
from data.pack import Batch, Example
from data.packing import pack
from data.store import Examples
from engine import checkpoint, critic, frozen, restore
from engine.contract import check_before_clipping, check_new
from engine.importance import check_sampler
from engine.logs import Run
from engine.optimizer import Optimizer
from engine.plan import Plan
from engine.ranks import distributed, sum_over_ranks
from engine.record import Record
from engine.rollout import Rollout
from engine.rollouts import Rollouts
from engine.saver import Saver
from engine.signals import Signals
from engine.step import Step
from model.policy import Policy


class Engine:
    """Policy, optimizer, data and run of one training.

    `kind`: the algorithm's DATA; `progress`: the metric shown beside the loss; `start`: the checkpoint to
    continue from, or None."""

    def __init__(self, config, policy: Policy, tokenizer, train_set: Examples, eval_set: Examples,
                 run: Run, kind: str, progress: str, start: str | None = None):
        self.config, self.policy, self.tokenizer = config, policy, tokenizer
        self.train_set, self.eval_set = train_set, eval_set
        self.run, self.start = run, start
        self.is_online = kind == "prompts"
        self.rank, self.world = distributed()
        self.first = checkpoint.load_trainer(start)["step"]      # the last update made before
        self.plan = Plan(config, len(train_set))
        self.sample_every = config.sample_every
        self.step: Step | None = None                # the last step that was opened
        self.is_open = False                         # whether its bookkeeping is still to be done
        self.last = self.first                       # the last update that was made
        self.grad_norm = math.nan                    # before clipping
        self.remembered: dict[str, dict] = {}        # what `remember` was given
        self.online: Rollouts | None = None
        self.optimizer = Optimizer(self)
        if start:
            restore.load_optimizer(start, policy, self.optimizer)
        self.record = Record(self, progress)
        self.saver = Saver(self)
        self.signals = Signals(run)

    # ---- what algorithms call ------------------------------------------------------------------------

    def steps(self, rollout: Rollout | None = None, skip: list | None = None) -> Iterator[Step]:
        """Iterate the updates of the run, from the one after the checkpoint; or with a `rollout` those that
        are made from it, without the completions that `skip` marks (a bool (G,) per prompt)."""
        if rollout is not None:
            yield from self.online.steps(rollout, skip)
            return
        self.begin()
        if self.first == 0 and self.eval_set:
            yield self.open_step(0, [])
        for update in range(self.first + 1, self.plan.total + 1):
            examples = [self.train_set[row] for row in self.plan.rows(update)]
            yield self.open_step(update, examples)
        self.close_step()

    def clip_gradients(self) -> None:
        """Scale the gradients to a norm of `max_grad_norm` at most. Stop the run, before the weights move, if
        the loss or the norm is not finite."""
        step = self.step
        if step.index == 0:
            return                                   # nothing is trained there
        check_before_clipping(self)
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit)
        self.grad_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        self.record.check_finite(step)
        if self.online:
            check_sampler(self, step)
        step.is_clipped = True

    def eval_batches(self, step: Step, examples: list[Example] | None = None) -> Iterator[Batch]:
        """The micro-batches of the held-out rows, or of `examples` in their place, without gradients; nothing
        where no evaluation is due at this step. Online the rows are prompts, and each gets a completion."""
        due = step.index % self.plan.eval_every == 0 or step.index == self.plan.total
        if not self.eval_set or not due:
            return
        if examples is None:
            examples = self.online.record.held_out(step) if self.online else self.eval_set
        with self.record.evaluation():     # it holds for the caller's loop too, which runs while this waits
            for batch in self.batches(examples, "held-out rows"):
                step.start_micro_batch("eval")
                yield batch

    def reference(self, path: str | None = None, also: list[Example] = ()) -> Callable[[Batch], torch.Tensor]:
        """The frozen reference at `path` (None: the start model); `reference(batch)` -> (N,) log-probs.

        Offline it is a table, computed before the first update for every row of this run and those in `also`,
        so that no second model is in memory. Online completions are new, so that it stays a model; then it
        also takes a temperature: `reference(batch, temperature)`."""
        if self.is_online:
            return frozen.reference_model(self, path)
        return frozen.reference_table(self, path, also)

    def frozen_model(self, path: str) -> Policy:
        """The model at `path`, a directory or a hub name, frozen. It may have any size and family, and is
        asked as the policy is: `model(batch)`."""
        return frozen.frozen_model(self, path)

    def remember(self, name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Keep `tensors` in every checkpoint, for what an algorithm carries from update to update (an
        averaged reference, a KL controller). After a resume they hold the saved values again. Change them in
        place."""
        if self.start:
            restore.recall(self.start, {f"{name}/{key}": tensor for key, tensor in tensors.items()})
        self.remembered[name] = tensors
        return tensors

    def batches(self, examples: list[Example], label: str | None = None, block: int = 0) -> Iterator[Batch]:
        """Micro-batches of any examples, which the ranks share; `label` names their bar on a terminal. Each
        `block` of examples, as many as an update has unless it is given, is dealt by itself."""
        since, size = time.perf_counter(), block or self.config.batch_size
        for start in range(0, len(examples), size):
            part = examples[start:start + size]
            for members in self.deal(part):
                yield self.policy.collate(members)
            if label:
                self.run.console.count(label, start + len(part), len(examples), " rows/s", since)

    def mean(self, total: float, count: float) -> float:
        """total / count, each summed over all ranks first."""
        total, count = sum_over_ranks([float(total), float(count)], self.policy.device)
        return total / max(1.0, count)

    def notice(self, text: str) -> None:
        """Tell the user once, on the console and in events.log."""
        self.run.notice(text)

    # ---- what online algorithms call besides; see engine/rollouts.py ---------------------------------

    def rollouts(self, config, num_samplings: int = 10) -> Iterator[Rollout]:
        self.online = Rollouts(self, config, num_samplings)
        return self.online.iterate()

    def score(self, rollout: Rollout) -> None:
        self.online.score(rollout)

    def each_reward(self, rollout: Rollout) -> tuple:
        return self.online.record.each_reward(rollout)

    def resample(self, rollout: Rollout, which: list[int], attempt: int) -> None:
        self.online.resample(rollout, which, attempt)

    def logps(self, model, rollout: Rollout) -> list[torch.Tensor]:
        return self.online.logps(model, rollout)

    def logps_and_values(self, rollout: Rollout) -> tuple[list, list]:
        return critic.logps_and_values(self, rollout)

    def episodes(self, rollout: Rollout) -> dict:
        return self.online.record.episodes(rollout)

    def old_logps(self, batch: Batch, logps: torch.Tensor) -> torch.Tensor:
        return self.online.old_logps(batch, logps)

    def compare_sampler(self, batch: Batch, logps: torch.Tensor) -> None:
        self.online.compare_sampler(batch, logps)

    # ---- the bookkeeping of an update ----------------------------------------------------------------

    def begin(self) -> None:
        """Start the clock and the progress line of the updates."""
        if self.first > self.plan.total:
            raise UserError(f"max_steps: the run is at step {self.first} already, after the "
                            f"{self.plan.total} asked for; fix: raise max_steps")
        self.record.begin()

    def open_step(self, update: int, examples: list[Example], metrics: dict | None = None) -> Step:
        """Close the update before, and begin this one; `metrics` join its row."""
        self.close_step()
        self.step, self.is_open = Step(self, update, examples), True
        check_new(self.step, self.last)
        self.record.open_step(self.step, metrics or {})
        if update:
            self.optimizer.set_learning_rate(self.plan.learning_rate(update))
        return self.step

    def close_step(self, is_left: bool = False) -> None:
        """Do the bookkeeping of the update that is open, if there is one. `is_left`: the algorithm has left
        its loop; an update that it had not made is no update then."""
        if not self.is_open:
            return
        self.is_open, step = False, self.step
        if step.index == 0:
            self.record.log_evaluation(step)
        elif step.is_made:
            self.last = step.index
            self.record.close_step(step, is_left)
        elif not is_left:
            raise RunError(f"update {step.index} made no change; fix: add the line optimizer.step() after "
                           "engine.clip_gradients()")

    def finish(self) -> None:
        """Close the last update and write the final model. train.py calls it when the algorithm returns."""
        self.close_step(is_left=True)
        if not self.optimizer.state:
            raise RunError("nothing was trained, so there is no model to write; fix: iterate engine.steps() "
                           "until an update is made")
        if self.last < self.plan.total:
            self.notice(f"the algorithm ended the run after update {self.last} of {self.plan.total}")
        self.run.erase()
        self.saver.save_final()

    # ---- examples to ranks and micro-batches ---------------------------------------------------------

    def deal(self, examples: list[Example]) -> list[list[Example]]:
        """This rank's micro-batches of these examples; every rank gets the same number of them."""
        sizes = [example.size(self.policy.share_prompt) for example in examples]
        mine = pack(sizes, self.config.micro_batch_tokens, self.world)[self.rank]
        micro_batches = []
        for members in mine:
            micro_batches.append([examples[i] for i in members])
        return micro_batches

    @torch.no_grad()
    def collect(self, function, examples: list[Example], size, block: int = 0) -> list[torch.Tensor]:
        """`function(batch)`, a number for each of the batch's responses or tokens, for all `examples`: per
        example a tensor of `size(example)` numbers on the CPU. Each rank computes its share. `block`: see
        `batches`."""
        sizes = [size(example) for example in examples]
        numbers = torch.zeros(sum(sizes), device=self.policy.device)
        parts = numbers.split(sizes) if sizes else ()
        part_of = {id(example): part for example, part in zip(examples, parts)}
        for batch in self.batches(examples, block=block):
            values = function(batch).split([size(example) for example in batch.examples])
            for example, part in zip(batch.examples, values):
                part_of[id(example)].copy_(part)
        if self.world > 1:
            torch.distributed.all_reduce(numbers)
        return list(numbers.cpu().split(sizes)) if sizes else []

    # ---- checkpoints, samples, signals ---------------------------------------------------------------

    def is_saved(self, update: int) -> bool:
        """Whether every run has a checkpoint after this update, stopped or not."""
        every = self.config.save_every
        return every is not None and update % every == 0

    def save(self, update: int, is_left: bool = False) -> None:
        self.saver.save(update, is_left)

    def stop_requested(self) -> int | None:
        """The signal that asks this run to stop, if any rank got one: all ranks leave together."""
        return self.signals.requested(self.policy.device)
