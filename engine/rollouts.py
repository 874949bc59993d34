"""Online training: completions, their rewards, and the updates made from them.

An algorithm iterates `engine.rollouts(config)`; for each rollout it calls `engine.score(rollout)`, sets
`rollout.advantages` and iterates `engine.steps(rollout)`. One without a reward iterates the steps at once. A
checkpoint in the middle of a rollout holds it: a resumed run goes on with the same completions.
"""
import math
import time
from collections.abc import Iterator

import numpy as np
import torch

from data.errors import RunError
from data.pack import Example
from engine import rollout_state
from engine.first_pass import in_first_pass, parts_of
from engine.importance import SAMPLER, sampler_of
from engine.mixture import mixed_rollout
from engine.plan import Plan
from engine.reward_models import load_reward_model, scores_of
from engine.rollout import PerPrompt, Rollout, with_completions
from engine.rollout_record import RolloutRecord
from engine.score import by_all_ranks, score_rollout
from engine.signals import Stopped
from engine.step import Step
from model.build import reshard
from model.policy import Policy
from rewards.functions import load_reward

EVALUATION, TRAINING, REPLACEMENT = range(3)      # so that the random draws of these never coincide
MANY = 10      # rollouts in a row with nothing to train, after which a run ends
FIX = "look at the reward, or raise max_completion_length"


class Rollouts:
    """The rollouts of a run. `config.batch_size` prompts are drawn per rollout; an update is one
    mini-batch of it, and `max_steps` counts updates. `num_samplings`: how often samples.jsonl gets
    completions in the run, where sample_every does not say."""

    def __init__(self, engine, config, num_samplings: int):
        self.engine, self.config = engine, config
        self.group_size, passes, self.mini_batches = config.rollout_shape()
        self.updates_per_rollout = passes * self.mini_batches
        self.share = config.sampled_share()
        self.rewards = []
        if config.uses_reward():
            self.rewards = load_reward(config.reward, config.reward_weights)
        # a loss without a reward has no ratio to the policy that sampled
        self.uses_old_logps = self.updates_per_rollout > 1 and bool(self.rewards)
        self.reward_models = {}
        for reward in self.rewards:
            if reward.path:
                self.reward_models[reward.name] = load_reward_model(engine, reward.path)
        engine.plan = Plan(engine.config, len(engine.train_set), self.updates_per_rollout)
        if num_samplings and not engine.sample_every:
            num_rollouts = engine.plan.total / self.updates_per_rollout
            engine.sample_every = self.updates_per_rollout * math.ceil(num_rollouts / num_samplings)
        self.sample = sampler_of(engine, config)
        self.rollout: Rollout | None = None
        self.rollouts_without_training = 0
        self.record = RolloutRecord(self)
        self.record.tell_sampling()

    def iterate(self) -> Iterator[Rollout]:
        """The rollouts of the run. Before, between and after them the held-out prompts are sampled and scored
        when that is due; without a reward the algorithm evaluates in its steps, see `eval_batches`."""
        engine, size = self.engine, self.updates_per_rollout
        engine.begin()
        begun, within = divmod(engine.first, size)
        if rollout_state.was_left(engine.start):     # no more updates are made from it
            begun, within = begun + 1, 0
        for number in range(begun, math.ceil(engine.plan.total / size)):
            engine.close_step(is_left=True)               # the algorithm may have left the rollout before
            if within and number == begun:
                yield self.record.measured(rollout_state.restored(engine.start, number, engine.train_set))
                continue
            self.record.evaluate(number * size)
            yield self.record.measured(self.sample_rollout(number))
        engine.close_step(is_left=True)
        self.record.evaluate(engine.plan.total)
        if not engine.optimizer.state:
            raise RunError(f"nothing was trained in {engine.plan.total} updates: no rollout had a completion "
                           f"to train; fix: {FIX}")

    # ---- 1 sample ------------------------------------------------------------------------------------

    def sample_rollout(self, number: int) -> Rollout:
        """Completions for the prompts of the `number`-th draw (from 0)."""
        rows, key = self.engine.plan.rows(number + 1), (TRAINING, number)
        label = f"rollout {number + 1}"

        def complete(rows):
            return self.complete(rows, self.engine.train_set, key, self.group_size, label)

        if self.share < 1:
            return mixed_rollout(self.engine, number, rows, self.share, complete)
        return Rollout(number, rows, complete(rows))

    def sample_held_out(self, update: int) -> Rollout:
        """One completion of every held-out prompt, with the same random numbers every time."""
        prompts = self.engine.eval_set
        rows = list(range(len(prompts)))
        examples = self.complete(rows, prompts, (EVALUATION,), 1, "held-out prompts")
        return Rollout(update, rows, examples)

    def complete(self, rows: list[int], prompts: list[Example], key: tuple, copies: int,
                 label: str) -> list[Example]:
        """The examples `prompts[row] for row in rows` with `copies` sampled responses each. Each rank samples
        its share of the prompts; then all have all."""
        engine = self.engine
        since = time.perf_counter()
        mine = rows[engine.rank::engine.world]

        def report(done, total):
            engine.run.console.count(f"{label}: completions", done, total, "/s", since)

        ids = [prompts[row].prompt for row in mine]
        keys = [(engine.config.seed, *key, row) for row in mine]
        found = self.sample(engine.policy, engine.tokenizer, ids, keys, copies, self.config, report)
        if engine.world > 1:
            parts = [None] * engine.world
            torch.distributed.all_gather_object(parts, found)
            found = [None] * len(rows)
            for rank, part in enumerate(parts):
                found[rank::engine.world] = part
        return [with_completions(prompts[row], completions) for row, completions in zip(rows, found)]

    def resample(self, rollout: Rollout, which: list[int], attempt: int) -> None:
        """Replace the prompts `which` of the rollout by others, drawn by (seed, rollout, attempt), with new
        and scored completions."""
        if attempt < rollout.attempts:
            return                                   # it was done before the checkpoint of this rollout
        prompts = self.engine.train_set
        rng = np.random.default_rng((self.engine.config.seed, REPLACEMENT, rollout.number, attempt))
        is_repeated = len(which) > len(prompts)
        rows = rng.choice(len(prompts), len(which), replace=is_repeated).tolist()
        key = (REPLACEMENT, rollout.number, attempt)
        label = f"rollout {rollout.number + 1}, attempt {attempt + 1}"
        examples = self.complete(rows, prompts, key, self.group_size, label)
        fresh = Rollout(rollout.number, rows, examples)
        self.score(fresh)
        for place, row, example in zip(which, rows, fresh.examples):
            rollout.rows[place] = row
            rollout.examples[place] = example
        rollout.attempts = attempt + 1
        rollout.metrics = self.record.reward_metrics(rollout)

    # ---- 2 reward ------------------------------------------------------------------------------------

    def score(self, rollout: Rollout) -> None:
        """Set rollout.rewards, (G,) per prompt: the weighted sum of all rewards, NaN where none of them
        scored a completion. A checkpoint holds these sums, so that a penalty which an algorithm adds to
        rollout.rewards is added once, not once more after a resume."""
        if not self.rewards:
            raise RunError("engine.score was called in a run without a reward; fix: remove the line, or "
                           "write class Config(Sampling), which has the key reward")
        named = [f"rewards/{reward.name}" for reward in self.rewards]
        rollout.once(("scored", *named), self.scores, rollout, named)
        rollout.rewards = [group.clone() for group in rollout["scored"]]      # to be changed in place
        rollout.metrics = self.record.reward_metrics(rollout)

    def scores(self, rollout: Rollout, named: list[str]) -> list[PerPrompt]:
        """The weighted sum of all rewards, and each of them."""
        engine = self.engine

        sizes = [len(example.responses) for example in rollout.examples]
        by_functions = by_all_ranks(sizes, self.config.reward_timeout)

        def by_model(reward):
            return scores_of(engine, self.reward_models[reward.name], rollout.examples)

        failure = None
        try:
            with engine.run.console.cleared():      # a reward may print
                score_rollout(rollout, self.rewards, engine.tokenizer, by_functions, by_model)
        except RunError as error:
            failure = error
        # a signal often reaches the processes that a reward started, so its values may be wrong: drop them
        if stop := engine.stop_requested():
            if engine.last > engine.first and not engine.is_saved(engine.last):
                engine.save(engine.last)
            raise Stopped(stop)
        if failure:
            raise failure
        return [rollout[name] for name in ("rewards", *named)]

    # ---- 4 loss: the updates made from a rollout -----------------------------------------------------

    def steps(self, rollout: Rollout, skip: PerPrompt | None) -> Iterator[Step]:
        """Iterate the updates made from a rollout, without completions that have no reward or that `skip`
        marks. Where a rollout is used more than once, the log-probs before its first update are stored."""
        engine = self.engine
        self.rollout = rollout
        kept = self.kept(rollout, skip)
        first = rollout.number * self.updates_per_rollout + 1
        end = min(first + self.updates_per_rollout, engine.plan.total + 1)
        updates = range(max(first, engine.first + 1), end)
        if not any(kept):
            return self.pass_over(rollout, updates)
        self.rollouts_without_training = 0
        if self.rewards:
            self.record.watch_signal(rollout, len(updates))
        elif engine.eval_set and updates.start == 1:
            yield engine.open_step(0, [])
        if self.uses_old_logps:
            rollout.once("old_logps", self.logps, engine.policy, rollout, kept)
        examples = parts_of(rollout, kept)
        for update in updates:
            mine = self.mini_batch(rollout.number, update - first, examples)
            yield engine.open_step(update, mine, rollout.metrics)
        engine.close_step()

    def mini_batch(self, number: int, update: int, examples: list[Example]) -> list[Example]:
        """Those of the `examples` of rollout `number` that its `update`-th update (from 0) trains."""
        if self.mini_batches == 1:
            return self.divided(examples)
        epoch, part = divmod(update, self.mini_batches)
        order = np.random.default_rng((self.engine.config.seed, number, epoch)).permutation(len(examples))
        rows = np.array_split(order, self.mini_batches)[part]
        return self.divided([examples[row] for row in rows])

    def kept(self, rollout: Rollout, skip: PerPrompt | None) -> list[list[int]]:
        """Per prompt, which of its responses have a reward and are not skipped."""
        kept = []
        for i, truncated in enumerate(rollout.truncated):
            is_kept = ~rollout.rewards[i].isnan() if self.rewards else torch.ones_like(truncated)
            if skip:
                is_kept &= ~skip[i]
            kept.append(is_kept.nonzero()[:, 0].tolist())
        return kept

    def divided(self, examples: list[Example]) -> list[Example]:
        """The same responses in examples of at most `micro_batch_tokens`: advantages are known, so a group
        need not stay together."""
        engine = self.engine
        limit = engine.config.micro_batch_tokens
        parts = []
        for example in examples:
            which, size = [], 0
            for i, response in enumerate(example.responses):
                prompt = 0 if engine.policy.share_prompt and which else len(example.prompt)
                if which and size + prompt + len(response.tokens) > limit:
                    parts.append(example.part(which))
                    which, size, prompt = [], 0, len(example.prompt)
                which.append(i)
                size += prompt + len(response.tokens)
            parts.append(example.part(which))
        return parts

    def logps(self, model, rollout: Rollout, kept: list[list[int]] | None = None) -> PerPrompt:
        """Per prompt: the log-probs of its completions' tokens under `model`, at the sampling temperature, in
        the micro-batches that train."""
        found = in_first_pass(self, rollout, lambda batch: model(batch, self.config.temperature), kept)
        if isinstance(model, Policy):
            reshard(model)      # what this forward has gathered would hide a change of the model's weights
        return found

    def old_logps(self, batch, logps: torch.Tensor) -> torch.Tensor:
        """(N,) log-probs of the batch's tokens under the policy that sampled them: the stored ones, else (in
        the only update made from the rollout) `logps` itself, without its gradient. In the first update of a
        rollout they must be the sampler's: the difference is logged, and `clip_gradients` checks it."""
        old_logps = batch.extra("old_logps") if self.uses_old_logps else logps.detach()
        self.compare_sampler(batch, old_logps)
        return old_logps

    def compare_sampler(self, batch, logps: torch.Tensor) -> None:
        """Log how far the sampler's log-probs are from `logps` (N,), those of the training forward, if this
        is the first update of a rollout; `clip_gradients` checks it."""
        step = self.engine.step
        if (step.index - 1) % self.updates_per_rollout != 0:
            return
        differences = (logps - batch.extra("sampler_logps")).abs()
        if self.share < 1:
            differences = differences[batch.expand(batch.extra("sampled")).bool()]
        step.add({SAMPLER: differences})

    # ---- rollouts that train nothing -----------------------------------------------------------------

    def pass_over(self, rollout: Rollout, updates: range) -> None:
        """The `updates` of a rollout with nothing to train: they count, are logged and saved, but no weight
        moves, not even by AdamW's momentum. RunError after MANY such rollouts in a row."""
        self.rollouts_without_training += 1
        fault = self.record.nothing_to_train(rollout)
        if self.rollouts_without_training == MANY:
            raise RunError(f"{fault}; so it was in {MANY} rollouts in a row; fix: {FIX}")
        self.engine.notice(f"{fault}; it is passed over")
        for update in updates:
            step = self.engine.open_step(update, [], rollout.metrics)
            step.is_made, self.engine.grad_norm = True, 0.0
        self.engine.close_step()

    # ---- checkpoints ---------------------------------------------------------------------------------

    def state(self, update: int, is_left: bool) -> tuple[dict, dict]:
        """(what trainer.json says beside the step, the tensors of the rollout): nothing after its last
        update. Once the algorithm has left it, no more updates are made from it."""
        if update % self.updates_per_rollout == 0:
            return {}, {}
        if is_left:
            return {rollout_state.LEFT: True}, {}
        return {}, rollout_state.stored(self.rollout)
