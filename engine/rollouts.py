"""Online training: completions, their rewards, and the updates made from them.

An algorithm iterates `engine.rollouts(config)`; for each rollout it calls `engine.score(rollout)`, sets
`rollout.advantages` and iterates `engine.steps(rollout)`. A checkpoint in the middle of a rollout holds it: a
resumed run goes on with the same completions.
"""
import json
import math
import os
import time
from collections.abc import Iterator

import numpy as np
import torch
from safetensors.torch import load_file

from data.errors import RunError, UserError
from data.pack import Example, Response
from engine import checkpoint
from engine.console import per_second
from engine.plan import Plan
from engine.ranks import PATIENCE, from_main
from engine.rollout import PerPrompt, Rollout, alike, with_completions
from engine.score import reward_model_path, score_rollout
from engine.signals import Stopped
from engine.step import Step
from model.build import build_policy
from model.reward_model import build_reward_model
from model.sampler import sample
from rewards.functions import load_reward, score_all

EVALUATION, TRAINING, REPLACEMENT = range(3)      # so that the random draws of these never coincide
MANY = 10      # updates in a row without a signal, which are told; rollouts with nothing to train, which end a run
FIX = "look at the reward, or raise max_completion_length"
SAMPLER = "sampling/sampling_logp_difference/mean"
SAMPLES = 4                                       # completions in samples.jsonl at a time


class Rollouts:
    """The rollouts of a run. `config.batch_size` prompts are drawn per rollout; an update is one mini-batch of
    it, and `max_steps` counts updates. `num_samplings`: how often samples.jsonl gets completions in the run,
    where sample_every does not say."""

    def __init__(self, engine, config, num_samplings: int):
        self.engine, self.config = engine, config
        self.group_size, passes, self.mini_batches = config.rollout_shape()
        self.rewards = load_reward(config.reward, config.reward_weights)
        self.reward_models = {}
        for reward in self.rewards:
            if reward.path:
                self.reward_models[reward.name] = self.load_reward_model(reward.path)
        engine.plan = Plan(engine.config, len(engine.train_set), passes * self.mini_batches)
        self.plan, self.updates_per_rollout = engine.plan, passes * self.mini_batches
        if num_samplings and not engine.sample_every:
            num_rollouts = self.plan.total / self.updates_per_rollout
            engine.sample_every = self.updates_per_rollout * math.ceil(num_rollouts / num_samplings)
        self.rollout: Rollout | None = None
        self.updates_without_signal, self.rollouts_without_training = 0, 0
        self.is_told_of_signal = False
        self.tell_sampling()

    def load_reward_model(self, run: str):
        """The run of `rm` that a reward names, frozen; it must have the policy's tokenizer."""
        engine = self.engine
        path = reward_model_path(run, engine.tokenizer, engine.notice)
        trunk = build_policy(engine.config, engine.tokenizer, path, frozen=True)
        return build_reward_model(trunk, path, engine.config.seed, engine.notice).requires_grad_(False)

    def tell_sampling(self) -> None:
        """A line each on how completions are drawn and ended, where that is not by the plain rule."""
        config, engine = self.config, self.engine
        if config.top_p < 1 or config.top_k:
            engine.notice(f"top_p {config.top_p:g}, top_k {config.top_k}: completions are drawn from the "
                          "likeliest tokens, log-probs, ratios and KL are those of the full distribution")
        strings = [repr(string) for string in config.stop_strings()]
        if strings:
            engine.notice(f"a completion ends at {' or '.join(strings)}, and at a stop token")
        patience = PATIENCE.total_seconds() / 3      # a reward that fails is called again, to find out where
        if engine.world > 1 and config.reward_timeout > patience:
            raise UserError(f"reward_timeout is {config.reward_timeout:g}, longer than the other processes "
                            f"wait for the first; fix: give {patience:g} or less")

    def iterate(self) -> Iterator[Rollout]:
        """The rollouts of the run. Before, between and after them the held-out prompts are sampled and scored
        when that is due."""
        engine, size = self.engine, self.updates_per_rollout
        engine.begin()
        begun, within = divmod(engine.first, size)
        trainer = checkpoint.load_trainer(engine.start) if engine.start else {}
        if trainer.get("rollout_is_left"):           # no more updates are made from it
            begun, within = begun + 1, 0
        for number in range(begun, math.ceil(self.plan.total / size)):
            engine.close(is_left=True)               # the algorithm may have left the rollout before
            if within and number == begun:
                yield self.restore(number)
                continue
            self.evaluate(number * size)
            yield self.sample_rollout(number)
        engine.close(is_left=True)
        self.evaluate(self.plan.total)
        if not engine.optimizer.state:
            raise RunError(f"nothing was trained in {self.plan.total} updates: no rollout had a completion to "
                           f"train; fix: {FIX}")

    # ---- 1 sample ------------------------------------------------------------------------------------------

    def sample_rollout(self, number: int) -> Rollout:
        """Completions for the prompts of the `number`-th draw (from 0)."""
        rows = self.plan.rows(number + 1)
        key, label = (TRAINING, number), f"rollout {number + 1}"
        return Rollout(number, rows, self.complete(rows, self.engine.train_set, key, self.group_size, label))

    def complete(self, rows: list[int], prompts: list[Example], key: tuple, copies: int, label: str) -> list[Example]:
        """The examples `prompts[row] for row in rows` with `copies` sampled responses each. Each rank samples its
        share of the prompts; then all have all."""
        engine = self.engine
        since, mine = time.perf_counter(), rows[engine.rank::engine.world]

        def report(done, total):
            engine.run.console.count(f"{label}: completions", done, total, "/s", since)

        ids = [prompts[row].prompt for row in mine]
        keys = [(engine.config.seed, *key, row) for row in mine]
        found = sample(engine.policy, engine.tokenizer, ids, keys, copies, self.config, report)
        if engine.world > 1:
            parts = [None] * engine.world
            torch.distributed.all_gather_object(parts, found)
            found = [parts[place % engine.world][place // engine.world] for place in range(len(rows))]
        return [with_completions(prompts[row], completions) for row, completions in zip(rows, found)]

    def resample(self, rollout: Rollout, which: list[int], attempt: int) -> None:
        """Replace the prompts `which` of the rollout by others, drawn by (seed, rollout, attempt), with new and
        scored completions."""
        if attempt < rollout.attempts:
            return                                   # it was done before the checkpoint of this rollout
        prompts = self.engine.train_set
        rng = np.random.default_rng((self.engine.config.seed, REPLACEMENT, rollout.number, attempt))
        rows = rng.choice(len(prompts), size=len(which), replace=len(which) > len(prompts)).tolist()
        key = (REPLACEMENT, rollout.number, attempt)
        label = f"rollout {rollout.number + 1}, attempt {attempt + 1}"
        fresh = Rollout(rollout.number, rows, self.complete(rows, prompts, key, self.group_size, label))
        self.score(fresh)
        for place, row, example in zip(which, rows, fresh.examples):
            rollout.rows[place], rollout.examples[place] = row, example
        rollout.attempts = attempt + 1
        rollout.metrics = self.reward_metrics(rollout)

    # ---- 2 reward ------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout) -> None:
        """Set rollout.rewards, (G,) per prompt: the weighted sum of all rewards, NaN where none of them scored a
        completion. The scores are kept as they are: after a resume a penalty that an algorithm adds to
        rollout.rewards is added once, not twice."""
        named = [f"rewards/{reward.name}" for reward in self.rewards]
        rollout.once(("scored", *named), self.scores, rollout, named)
        rollout.rewards = rollout["scored"]
        rollout.metrics = self.reward_metrics(rollout)

    def scores(self, rollout: Rollout, named: list[str]) -> list[PerPrompt]:
        """The weighted sum of all rewards, and each of them."""
        engine, timeout = self.engine, self.config.reward_timeout

        def by_functions(*arguments):
            return from_main(score_all, *arguments, timeout)

        def by_model(reward):
            model = self.reward_models[reward.name]
            return engine.collect(model, rollout.examples, lambda example: len(example.responses))

        failure = None
        try:
            with engine.run.console.cleared():      # a reward may print
                score_rollout(rollout, self.rewards, engine.tokenizer, by_functions, by_model)
        except RunError as error:
            failure = error
        # a signal often reaches the processes that a reward started, so its values may be wrong: drop them
        stop = engine.stop_requested()
        if stop:
            if engine.last > engine.first and not engine.is_saved(engine.last):
                engine.save(engine.last)
            raise Stopped(stop)
        if failure:
            raise failure
        return [rollout.rewards, *map(rollout.__getitem__, named)]

    def reward_metrics(self, rollout: Rollout) -> dict:
        """What TRL logs of a rollout, under its names; completions without a reward are left out and counted."""
        groups = [rewards[~rewards.isnan()] for rewards in rollout.rewards]
        lengths, truncated = torch.cat(rollout.lengths), torch.cat(rollout.truncated)
        rewards = torch.cat(groups)
        metrics = {"reward": rewards.mean()}
        if any(len(example.responses) > 1 for example in rollout.examples):
            metrics["reward_std"] = torch.stack([spread(group) for group in groups]).mean()
            metrics["frac_reward_zero_std"] = sum(alike(group) for group in groups) / len(groups)
        if len(self.rewards) > 1:
            for reward in self.rewards:
                values = torch.cat(rollout[f"rewards/{reward.name}"])
                metrics[f"rewards/{reward.name}/mean"] = values.nanmean()
        metrics |= {
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": truncated.float().mean(),
            "completions/mean_terminated_length": lengths[~truncated].mean()}
        if len(rewards) < len(lengths):
            metrics["completions/without_reward"] = float(len(lengths) - len(rewards))
        # a mean over none is left out
        return {name: float(value) for name, value in metrics.items() if not math.isnan(value)}

    def episodes(self, rollout: Rollout) -> dict:
        """How far the run is, under TRL's names: completions so far, and per second of this process."""
        def completions(rollouts):
            epochs, rest = divmod(rollouts, self.plan.draws_per_epoch)
            prompts = epochs * self.plan.num_rows + rest * self.engine.config.batch_size
            return prompts * self.group_size

        done = completions(rollout.number + 1)
        before = completions(self.engine.first // self.updates_per_rollout)
        return {"episode": done, "eps": per_second(done - before, self.engine.since)}

    # ---- 4 loss: the updates made from a rollout ---------------------------------------------------------------

    def steps(self, rollout: Rollout, skip: PerPrompt | None) -> Iterator[Step]:
        """Iterate the updates made from a rollout, without completions that have no reward or that `skip` marks.
        Where a rollout is used more than once, the log-probs before its first update are stored."""
        engine = self.engine
        self.rollout, kept = rollout, self.kept(rollout, skip)
        first = rollout.number * self.updates_per_rollout + 1
        updates = range(max(first, engine.first + 1), min(first + self.updates_per_rollout - 1, self.plan.total) + 1)
        if not any(kept):
            return self.pass_over(rollout, updates)
        self.rollouts_without_training = 0
        self.watch_signal(rollout, len(updates))
        if self.updates_per_rollout > 1:
            rollout.once("old_logps", self.logps, engine.policy, rollout)
        examples = [example.part(which) for example, which in zip(rollout.examples, kept) if which]
        for update in updates:
            mine = self.mini_batch(rollout.number, update - first, len(examples))
            yield engine.open(update, self.divided([examples[i] for i in mine]), rollout.metrics)
        engine.close()

    def mini_batch(self, number: int, update: int, count: int) -> np.ndarray:
        """Which of the `count` prompts of rollout `number` its `update`-th update (from 0) trains."""
        if self.mini_batches == 1:
            return np.arange(count)
        epoch, part = divmod(update, self.mini_batches)
        order = np.random.default_rng((self.engine.config.seed, number, epoch)).permutation(count)
        return np.array_split(order, self.mini_batches)[part]

    def kept(self, rollout: Rollout, skip: PerPrompt | None) -> list[list[int]]:
        """Per prompt, which of its responses have a reward and are not skipped."""
        kept = []
        for i, rewards in enumerate(rollout.rewards):
            out = rewards.isnan() | (skip[i] if skip else False)
            kept.append((~out).nonzero()[:, 0].tolist())
        return kept

    def divided(self, examples: list[Example]) -> list[Example]:
        """The same responses in examples of at most `micro_batch_tokens`: advantages are known, so a group need
        not stay together."""
        limit, is_shared = self.engine.config.micro_batch_tokens, self.engine.policy.share_prompt
        parts = []
        for example in examples:
            which, size = [], 0
            for i, response in enumerate(example.responses):
                prompt = 0 if is_shared and which else len(example.prompt)
                if which and size + prompt + len(response.tokens) > limit:
                    parts.append(example.part(which))
                    which, size, prompt = [], 0, len(example.prompt)
                which.append(i)
                size += prompt + len(response.tokens)
            parts.append(example.part(which))
        return parts

    def logps(self, model, rollout: Rollout) -> PerPrompt:
        """Per prompt: the log-probs of its completions' tokens under `model`, at the sampling temperature."""
        temperature = self.config.temperature
        return self.engine.collect(lambda batch: model(batch, temperature), rollout.examples, num_trained)

    def logps_and_values(self, rollout: Rollout) -> tuple[PerPrompt, PerPrompt]:
        """Per prompt the log-probs, and the values, of its completions' tokens under a policy with a critic, in
        one forward."""
        policy, temperature = self.engine.policy, self.config.temperature

        def pairs(batch):
            return torch.stack(policy(batch, temperature, values=True), 1).flatten()

        found = self.engine.collect(pairs, rollout.examples, lambda example: 2 * example.num_trained)
        logps, values = [], []
        for numbers in found:
            # contiguous, as after a resume: a sum over every other number is rounded in another order
            both = numbers.view(-1, 2).T.contiguous()
            logps.append(both[0])
            values.append(both[1])
        return logps, values

    def old_logps(self, batch, logps: torch.Tensor) -> torch.Tensor:
        """(N,) log-probs of the batch's tokens under the policy that sampled them: the stored ones, else (in the
        only update made from the rollout) `logps` itself, without its gradient. In the first update of a rollout
        they must be the sampler's: the difference is logged, and `clip_gradients` checks it."""
        old_logps = batch.extra("old_logps") if self.updates_per_rollout > 1 else logps.detach()
        step = self.engine.step
        if (step.index - 1) % self.updates_per_rollout == 0:
            step.add({SAMPLER: (old_logps - batch.extra("sampler_logps")).abs()})
        return old_logps

    def check_sampler(self, step: Step) -> None:
        """RunError where the training forward gives the sampled tokens other log-probs than the sampler did."""
        if SAMPLER not in step.totals["train"]:
            return
        engine = self.engine
        total, _ = step.totals["train"][SAMPLER][0]
        difference = engine.mean(total, step.num_tokens / engine.world)
        if not difference <= engine.policy.tolerance:
            raise RunError(f"the training forward and the sampler differ by {difference:.2g} in log-prob per token "
                           f"of rollout {self.rollout.number + 1}; fix: use a model with ordinary attention "
                           "layers, or precision: fp32")

    # ---- rollouts that train nothing ------------------------------------------------------------------------------

    def pass_over(self, rollout: Rollout, updates: range) -> None:
        """The `updates` of a rollout with nothing to train: they count, are logged and saved, but no weight
        moves, not even by AdamW's momentum. RunError after MANY such rollouts in a row."""
        self.rollouts_without_training += 1
        rewards = torch.cat(rollout.rewards)
        without = int(rewards.isnan().sum())
        counts = {"without a reward": without, "cut at max_completion_length, and masked": len(rewards) - without}
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        fault = f"nothing to train in rollout {rollout.number + 1} ({reasons})"
        if self.rollouts_without_training == MANY:
            raise RunError(f"{fault}; so it was in {MANY} rollouts in a row; fix: {FIX}")
        self.engine.notice(f"{fault}; it is passed over")
        for update in updates:
            step = self.engine.open(update, [], rollout.metrics)
            step.is_made, self.engine.grad_norm = True, 0.0
        self.engine.close()

    def watch_signal(self, rollout: Rollout, updates: int) -> None:
        """Warn once where MANY updates in a row had no signal: rewards alike in every group (in the rollout,
        where a prompt has but one completion), or no advantage."""
        groups = rollout.rewards if self.group_size > 1 else [torch.cat(rollout.rewards)]
        is_flat = all(map(alike, groups))
        if rollout.knows("advantages"):
            is_flat = is_flat or not torch.cat(rollout.advantages).nan_to_num().any()
        before = self.updates_without_signal
        self.updates_without_signal = before + updates if is_flat else 0
        if self.is_told_of_signal or not before < MANY <= self.updates_without_signal:
            return
        self.is_told_of_signal = True
        cut = rollout.metrics.get("completions/clipped_ratio", 0.0)
        reward = rollout.metrics.get("reward", math.nan)
        unit = "prompt" if self.group_size > 1 else "rollout"
        self.engine.notice(
            f"warning: in {self.updates_without_signal} updates all completions of a {unit} got the same reward "
            f"(mean reward {reward:.4g}, {cut:.0%} cut at max_completion_length): there is little or no gradient; "
            "try: read some of them (sample_every: 1), easier prompts, a larger num_generations, temperature or "
            "max_completion_length, a reward with partial credit")

    # ---- evaluation, samples, checkpoints -------------------------------------------------------------------------

    def evaluate(self, update: int) -> None:
        """If an evaluation is due after `update`, the end of a rollout: one completion of every held-out prompt,
        always with the same random numbers, and its rewards. What a run did before it was interrupted is not
        done again."""
        engine, every = self.engine, self.plan.eval_every
        before = update - self.updates_per_rollout
        is_due = update in (0, self.plan.total) or update // every > before // every
        if not engine.eval_set or not is_due or update in from_main(self.evaluated):
            return
        rows = range(len(engine.eval_set))
        examples = self.complete(rows, engine.eval_set, (EVALUATION,), 1, "held-out prompts")
        rollout = Rollout(update, rows, examples)
        self.score(rollout)
        engine.run.append("metrics.jsonl", {"step": update, "split": "eval", **rollout.metrics})
        rewards = [f"{name} {value:.4g}" for name, value in rollout.metrics.items() if name.startswith("reward")]
        engine.notice(f"held-out prompts at step {update}: {'  '.join(rewards)}")

    def evaluated(self) -> set[int]:
        """The updates after which this run was evaluated already."""
        rows = [json.loads(line) for line in self.engine.run.rows("metrics.jsonl")]
        return {row["step"] for row in rows if row.get("split") == "eval"}

    def write_samples(self, update: int) -> None:
        """The first completion of the rollout's first prompts, with its reward."""
        decode = self.engine.tokenizer.decode
        for example in self.rollout.examples[:SAMPLES]:
            reward = float(example.extras["rewards"][0])
            row = {"step": update, "prompt": decode(example.prompt), "completion": decode(example.responses[0].tokens)}
            self.engine.run.append("samples.jsonl", row | {"reward": reward})

    def position(self, update: int, is_left: bool) -> dict:
        """What trainer.json says beside the step: whether the algorithm left the rollout before its last
        update."""
        return {"rollout_is_left": True} if is_left and update % self.updates_per_rollout else {}

    def stored(self, update: int, is_left: bool) -> dict:
        """The rollout, if more updates will be made from it: tokens, and the numbers that were computed once."""
        if update % self.updates_per_rollout == 0 or is_left:
            return {}
        rollout = self.rollout
        responses = []
        for example in rollout.examples:
            responses += example.responses
        tensors = {
            "rows": torch.tensor(rollout.rows),
            "attempts": torch.tensor(rollout.attempts),
            "groups": torch.tensor([len(example.responses) for example in rollout.examples]),
            "lengths": torch.tensor([len(response.tokens) for response in responses]),
            "tokens": torch.from_numpy(np.concatenate([response.tokens for response in responses]))}
        for name in rollout.kept:
            tensors[f"extras/{name}"] = torch.cat(rollout[name])
        return tensors

    def restore(self, number: int) -> Rollout:
        """The rollout that the checkpoint holds."""
        tensors = load_file(os.path.join(self.engine.start, checkpoint.ROLLOUT))
        responses = []
        for tokens in tensors["tokens"].split(tensors["lengths"].tolist()):
            responses.append(Response.all_trained(tokens.numpy()))
        rows, examples, done = tensors["rows"].tolist(), [], 0
        for row, size in zip(rows, tensors["groups"].tolist()):
            prompt = self.engine.train_set[row]
            group = responses[done:done + size]
            examples.append(Example(prompt.prompt, group, prompt.where, dict(prompt.extras)))
            done += size
        rollout = Rollout(number, rows, examples)
        rollout.attempts = int(tensors["attempts"])
        for name, values in tensors.items():
            if name.startswith("extras/"):
                is_per_response = len(values) == len(responses)
                sizes = [len(example.responses) if is_per_response else num_trained(example) for example in examples]
                rollout.once(name.removeprefix("extras/"), values.split, sizes)
        return rollout


def spread(rewards: torch.Tensor) -> torch.Tensor:
    """The standard deviation of a group (G,) -> (); exactly 0 where all are equal."""
    return torch.zeros((), dtype=torch.float64) if alike(rewards) else rewards.std()


def num_trained(example: Example) -> int:
    return example.num_trained
