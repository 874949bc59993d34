"""The engine of online algorithms: rollouts, their rewards, and the updates made from each of them.

An algorithm iterates `engine.rollouts(...)` and for each rollout calls `engine.score(rollout)`, sets `rollout["advantages"]` and
iterates `engine.steps(rollout)`; it may call `engine.frozen(path)`, `engine.logps(model, rollout)`, `engine.old_logps(batch, logps)`.
A checkpoint in the middle of a rollout holds it: a resumed run goes on with the same completions.
"""
import json
import math
import os
import time

import numpy as np
import torch
from safetensors.torch import load_file

from data.errors import RunError, UserError
from data.pack import Example, Response
from engine import checkpoint
from engine.console import per_second
from engine.loop import Engine, Stopped
from engine.options import stop_strings
from engine.ranks import PATIENCE, from_main
from engine.rollout import Rollout, alike, with_completions
from engine.score import reward_model_path, score_rollout
from model import lora
from model.build import build_policy, shard
from model.load import is_adapter
from model.reward_model import build_reward_model
from model.sampler import sample
from rewards.functions import load_reward, score_all

EVALUATION, TRAINING, REPLACEMENT = range(3)      # so that the random draws of these never coincide
# so many updates in a row without a signal are told of, so many rollouts with nothing to train end the run
MANY = 10
FIX = "look at the reward, or raise max_completion_length"


class OnlineEngine(Engine):
    """`config.batch_size` prompts per rollout; an update is one mini-batch of it, and `max_steps` counts updates."""
    may_teach_nothing = True       # where all completions of every prompt earn the same

    def rollouts(self, config, num_generations: int = 1, epochs: int = 1, mini_batches: int = 1, samples: int = 0):
        """Iterate the rollouts of the run: completions of the next `batch_size` prompts, `num_generations` of each. Each is used for
        `epochs` passes over its prompts in `mini_batches` parts. `samples`: how often samples.jsonl gets some of them in the run, where
        sample_every does not say. Before, between and after them the held-out prompts are sampled and scored when that is due."""
        self.sampling, self.num_generations, self.mini_batches = config, num_generations, mini_batches
        self.rewards = load_reward(config.reward, config.reward_weights)
        self.reward_models = {reward.name: self.load_reward_model(reward) for reward in self.rewards if reward.path}
        self.plan_updates(epochs * mini_batches)
        self.check_total()
        if samples and not self.config.sample_every:
            self.sample_every = self.per_draw * math.ceil(self.total / self.per_draw / samples)
        self.tell_sampling()
        self.updates_without_signal, self.rollouts_without_training, self.told_of_signal = 0, 0, False
        self.since = time.perf_counter()
        self.run.console.start(self.first, self.total)
        for number in range(self.first // self.per_draw, math.ceil(self.total / self.per_draw)):
            start = number * self.per_draw                                       # updates made before this rollout
            if self.first <= start:
                self.evaluate(start)
            yield self.restore(number) if self.first > start else self.sample_rollout(number)
        self.evaluate(self.total)
        if not self.optimizer.state:
            raise RunError(f"nothing was trained in {self.total} updates: no rollout had a completion to "
                           f"train; fix: {FIX}")
        self.run.erase()
        self.save_final()

    def tell_sampling(self) -> None:
        """A line each of how completions are drawn and ended, where that is not by the plain rule."""
        sampling = self.sampling
        if sampling.top_p < 1 or sampling.top_k:
            self.notice(f"top_p {sampling.top_p:g}, top_k {sampling.top_k}: completions are drawn from the "
                        "likeliest tokens, log-probs, ratios and KL are those of the full distribution")
        if strings := stop_strings(sampling.stop):
            self.notice(f"a completion ends at {' or '.join(map(repr, strings))}, and at a stop token")
        patience = PATIENCE.total_seconds() / 3      # a reward that fails is called again, to find out where
        if self.world > 1 and sampling.reward_timeout > patience:
            raise UserError(f"reward_timeout is {sampling.reward_timeout:g}, longer than the other processes "
                            f"wait for the first; fix: give {patience:g} or less")

    def steps(self, rollout: Rollout, skip: list | None = None):
        """Iterate the updates made from a rollout. Completions without a reward, and those that `skip` marks (per prompt a bool (G,)),
        are not trained. Where a rollout is used more than once, the log-probs before its first update are stored."""
        self.rollout, kept = rollout, self.kept(rollout, skip)
        first = rollout.number * self.per_draw + 1
        due = [index for index in range(first, first + self.per_draw) if self.first < index <= self.total]
        if not any(kept):
            return self.pass_over(rollout, due)
        self.rollouts_without_training = 0
        self.watch_signal(rollout, len(due))
        if "old_logps" not in rollout and self.per_draw > 1:
            rollout["old_logps"] = self.logps(self.policy, rollout)
        examples = [example.part(which) for example, which in zip(rollout.examples, kept) if which]
        for index in due:
            epoch, part = divmod(index - first, self.mini_batches)
            order = np.random.default_rng((self.config.seed, rollout.number, epoch)).permutation(len(examples))
            mine = np.array_split(order, self.mini_batches)[part] if self.mini_batches > 1 else np.arange(len(examples))
            self.differences = []
            yield from self.update(index, self.divided([examples[i] for i in mine]), rollout.metrics)

    def kept(self, rollout: Rollout, skip: list | None) -> list[list[int]]:
        """Per prompt, which of its responses have a reward and are not skipped."""
        kept = []
        for i, rewards in enumerate(rollout["rewards"]):
            out = rewards.isnan() | (skip[i] if skip else False)
            kept.append((~out).nonzero()[:, 0].tolist())
        return kept

    def pass_over(self, rollout: Rollout, due: list[int]) -> None:
        """The updates `due` of a rollout with nothing to train: they count, are logged and saved, but no
        weight moves, by AdamW's momentum neither. RunError after MANY such rollouts in a row."""
        self.rollouts_without_training += 1
        rewards = torch.cat(rollout["rewards"])
        without = int(rewards.isnan().sum())
        masked = len(rewards) - without
        counts = {"without a reward": without, "cut at max_completion_length, and masked": masked}
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        fault = f"nothing to train in rollout {rollout.number + 1} ({reasons})"
        if self.rollouts_without_training == MANY:
            raise RunError(f"{fault}; so it was in {MANY} rollouts in a row; fix: {FIX}")
        self.notice(f"{fault}; it is passed over")
        for index in due:
            for _ in self.update(index, [], rollout.metrics):
                self.grad_norm = 0.0

    def watch_signal(self, rollout: Rollout, updates: int) -> None:
        """Warn once where MANY updates in a row had nothing to learn from: rewards alike in every group (in
        the rollout, where a prompt has but one completion), or no advantage."""
        groups = rollout["rewards"]
        compared = groups if self.num_generations > 1 else [torch.cat(groups)]
        advantages = torch.cat(rollout["advantages"]) if "advantages" in rollout else torch.ones(1)
        is_flat = all(map(alike, compared)) or not advantages.nan_to_num().any()
        self.updates_without_signal = self.updates_without_signal + updates if is_flat else 0
        before = self.updates_without_signal - updates
        if before < MANY <= self.updates_without_signal and not self.told_of_signal:
            self.told_of_signal = True
            cut = rollout.metrics.get("completions/clipped_ratio", 0.0)
            reward = rollout.metrics.get("reward", math.nan)
            unit = "prompt" if self.num_generations > 1 else "rollout"
            known = f"mean reward {reward:.4g}, {cut:.0%} cut at max_completion_length"
            self.notice(f"warning: in {self.updates_without_signal} updates all completions of a {unit} "
                        f"earned the same ({known}): the reward teaches little or nothing; try: read some of "
                        "them (sample_every: 1), easier prompts, a larger num_generations, temperature or "
                        "max_completion_length, a reward with partial credit")

    def divided(self, examples: list[Example]) -> list[Example]:
        """The same responses in examples of at most `micro_batch_tokens`: advantages are known, so a group need not stay together."""
        parts = []
        for example in examples:
            which, size = [], 0
            for i, response in enumerate(example.responses):
                cost = len(response.tokens) + (0 if self.policy.share_prompt and which else len(example.prompt))
                if which and size + cost > self.config.micro_batch_tokens:
                    parts.append(example.part(which))
                    which, size, cost = [], 0, len(response.tokens) + len(example.prompt)
                which, size = [*which, i], size + cost
            parts.append(example.part(which))
        return parts

    # ---- 1 sample ---------------------------------------------------------------------------------------------------

    def sample_rollout(self, number: int) -> Rollout:
        """Completions for the prompts of the `number`-th draw (0-based)."""
        rows = self.indices(number + 1)
        return Rollout(number, self.complete(rows, self.train_set, (TRAINING, number), self.num_generations, f"rollout {number + 1}"))

    def complete(self, rows: list[int], prompts: list[Example], key: tuple, copies: int, label: str) -> list[Example]:
        """The examples `prompts[i] for i in rows` with `copies` sampled responses each. Each rank samples its share of the prompts;
        then all have all."""
        since, mine = time.perf_counter(), rows[self.rank::self.world]

        def report(done, total):
            self.run.console.count(f"{label}: completions", done, total, "/s", since)

        found = sample(self.policy, self.tokenizer, [prompts[i].prompt for i in mine], [(self.config.seed, *key, i) for i in mine],
                       copies, self.sampling, report)
        if self.world > 1:
            parts = [None] * self.world
            torch.distributed.all_gather_object(parts, found)
            found = [parts[position % self.world][position // self.world] for position in range(len(rows))]
        return [with_completions(prompts[i], completions) for i, completions in zip(rows, found)]

    def resample(self, rollout: Rollout, which: list[int], attempt: int) -> None:
        """Replace the prompts `which` of the rollout by others, drawn by (seed, rollout, attempt), with new and scored completions."""
        rng = np.random.default_rng((self.config.seed, REPLACEMENT, rollout.number, attempt))
        rows = rng.choice(len(self.train_set), size=len(which), replace=len(which) > len(self.train_set)).tolist()
        fresh = Rollout(rollout.number, self.complete(rows, self.train_set, (REPLACEMENT, rollout.number, attempt), self.num_generations,
                                                      f"rollout {rollout.number + 1}, attempt {attempt + 1}"))
        self.judge(fresh)
        for i, example in zip(which, fresh.examples):
            rollout.examples[i] = example
        rollout.metrics = self.reward_metrics(rollout)

    # ---- 2 reward ---------------------------------------------------------------------------------------------------

    def score(self, rollout: Rollout) -> None:
        """Set rollout["rewards"] (G,) per prompt: the weighted sum of all rewards; NaN where none of them judges a completion."""
        if not rollout.restored:
            self.judge(rollout)
        rollout.metrics = self.reward_metrics(rollout)

    def judge(self, rollout: Rollout) -> None:
        def by_functions(*arguments):
            return from_main(score_all, *arguments, self.sampling.reward_timeout)

        def by_model(reward):
            model = self.reward_models[reward.name]
            return self.collect(model, rollout.examples, lambda example: len(example.responses))

        failure = None
        try:
            with self.run.console.cleared():      # a reward may print
                score_rollout(rollout, self.rewards, self.tokenizer, by_functions, by_model)
        except RunError as error:
            failure = error
        # a signal often reaches the processes that a reward started, so its values may be wrong: drop them
        if stop := self.stop_requested():
            done = self.step.index if self.step else self.first
            if done > self.first and not self.is_saved(done):
                self.save(done)
            raise Stopped(stop)
        if failure:
            raise failure

    def load_reward_model(self, reward):
        """The run of `rm` that a reward names, as a frozen RewardModel; it must have been trained with the policy's tokenizer."""
        path = reward_model_path(reward.path, self.tokenizer, self.notice)
        trunk = build_policy(self.config, self.tokenizer, path, frozen=True)
        return build_reward_model(trunk, path, self.config.seed, self.notice).requires_grad_(False)

    def reward_metrics(self, rollout: Rollout) -> dict:
        """What TRL logs of a rollout, under its names; completions without a reward are left out and counted."""
        groups = [rewards[~rewards.isnan()] for rewards in rollout["rewards"]]
        lengths, truncated, rewards = torch.cat(rollout.lengths), torch.cat(rollout["truncated"]), torch.cat(groups)
        ended = lengths[~truncated]
        metrics = {"reward": rewards.mean()}
        if any(len(example.responses) > 1 for example in rollout.examples):
            metrics |= {"reward_std": torch.stack([self.spread(group) for group in groups]).mean(),
                        "frac_reward_zero_std": sum(map(alike, groups)) / len(groups)}
        for reward in self.rewards if len(self.rewards) > 1 else ():
            values = torch.cat(rollout[f"rewards/{reward.name}"])
            metrics[f"rewards/{reward.name}/mean"] = values.nanmean()
        metrics |= {
            "completions/mean_length": lengths.mean(), "completions/min_length": lengths.min(), "completions/max_length": lengths.max(),
            "completions/clipped_ratio": truncated.float().mean(), "completions/mean_terminated_length": ended.mean(),
            **({"completions/without_reward": float(len(lengths) - len(rewards))} if len(rewards) < len(lengths) else {})}
        return {name: float(value) for name, value in metrics.items() if not math.isnan(value)}      # means over none are left out

    def episodes(self, rollout: Rollout) -> dict:
        """How far the run is, under TRL's names: completions so far, and per second of this process."""
        def completions(rollouts):
            epochs, rest = divmod(rollouts, self.draws_per_epoch)
            return (epochs * len(self.train_set) + rest * self.config.batch_size) * self.num_generations

        done = completions(rollout.number + 1)
        before = completions(self.first // self.per_draw)
        return {"episode": done, "eps": per_second(done - before, self.since)}

    @staticmethod
    def spread(rewards):
        return torch.zeros((), dtype=torch.float64) if alike(rewards) else rewards.std()

    # ---- 4 loss -----------------------------------------------------------------------------------------------------

    def frozen(self, path: str | None = None):
        """The reference, frozen: the model at `path`, else the start model; under a fresh adapter that is the policy without it."""
        path = path and from_main(checkpoint.model_path, path, self.notice)
        if path in (None, self.config.model) and lora.settings(self.policy.lm) and not is_adapter(self.config.model):
            return WithoutAdapter(self.policy)
        model = build_policy(self.config, self.tokenizer, path or self.config.model, frozen=True).requires_grad_(False)
        return shard(model) if self.world > 1 else model

    def logps(self, model, rollout: Rollout) -> list:
        """Per prompt: the log-probs of its completions' tokens under `model`, at the sampling temperature."""
        return self.collect(lambda batch: model(batch, self.sampling.temperature), rollout.examples, lambda example: example.num_trained)

    def logps_and_values(self, rollout: Rollout) -> list[tuple]:
        """Of all prompts the log-probs, and the values, of their completions' tokens under a policy with a critic, in one forward."""
        def pairs(batch):
            return torch.stack(self.policy(batch, self.sampling.temperature, values=True), 1).flatten()

        found = self.collect(pairs, rollout.examples, lambda example: 2 * example.num_trained)
        # contiguous, as after a resume: a sum over every other number is rounded in another order
        return list(zip(*(numbers.view(-1, 2).T.contiguous() for numbers in found)))

    def old_logps(self, batch, logps):
        """(N,) log-probs of the batch's tokens under the policy that sampled them: the stored ones, else (in the only update made from
        the rollout) `logps` itself, without its gradient. In the first update of a rollout they must be the sampler's."""
        old_logps = batch.extra("old_logps") if self.per_draw > 1 else logps.detach()
        if (self.step.index - 1) % self.per_draw == 0:
            difference = (old_logps - batch.extra("sampler_logps")).abs()
            self.differences.append(difference.sum(dtype=torch.float64))
            self.step.add({"sampling/sampling_logp_difference/mean": difference})
        return old_logps

    def clip_gradients(self) -> None:
        super().clip_gradients()
        if self.differences:
            difference = self.mean(sum(self.differences), self.step.num_tokens / self.world)
            if not difference <= self.policy.tolerance:
                raise RunError(f"the training forward and the sampler differ by {difference:.2g} in log-prob per token of rollout "
                               f"{self.rollout.number + 1}; fix: use a model with ordinary attention layers, or precision: fp32")

    # ---- evaluation, samples, checkpoints -----------------------------------------------------------------------------

    def save(self, index: int) -> None:
        """Before the first trained rollout there is nothing to save: a new start makes the same."""
        if self.optimizer.state:
            super().save(index)

    def evaluate(self, index: int) -> None:
        """If an evaluation is due after update `index`, the end of a rollout: one completion of every held-out prompt, always with the
        same random numbers, and its rewards. What a run did before it was interrupted is not done again."""
        due = index in (0, self.total) or index // self.eval_every > (index - self.per_draw) // self.eval_every
        if not self.eval_set or not due or index in from_main(self.evaluated):
            return
        rollout = Rollout(index, self.complete(range(len(self.eval_set)), self.eval_set, (EVALUATION,), 1, "held-out prompts"))
        self.judge(rollout)
        metrics = self.reward_metrics(rollout)
        self.run.append("metrics.jsonl", {"step": index, "split": "eval", **metrics})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items() if name[:6] == "reward")
        self.run.notice(f"held-out prompts at step {index}: {shown}")

    def evaluated(self) -> set:
        rows = map(json.loads, self.run.rows("metrics.jsonl"))
        return {row["step"] for row in rows if row.get("split") == "eval"}

    def write_samples(self, index: int, count: int = 4) -> None:
        """The first completion of the rollout's first prompts, with its reward."""
        for example in self.rollout.examples[:count]:
            self.run.append("samples.jsonl", {
                "step": index, "prompt": self.tokenizer.decode(example.prompt),
                "completion": self.tokenizer.decode(example.responses[0].tokens), "reward": float(example.extras["rewards"][0])})

    def stored(self, index: int) -> dict:
        """The rollout, if more updates will be made from it: tokens, and all numbers known of responses and tokens."""
        if index % self.per_draw == 0:
            return {}
        examples = self.rollout.examples
        rows = {id(example.extras["columns"]): i for i, example in enumerate(self.train_set)}
        tensors = {
            "rows": torch.tensor([rows[id(example.extras["columns"])] for example in examples]),
            "groups": torch.tensor([len(example.responses) for example in examples]),
            "lengths": torch.tensor([len(response.tokens) for example in examples for response in example.responses]),
            "tokens": torch.from_numpy(np.concatenate([response.tokens for example in examples for response in example.responses]))}
        names = [name for name, value in examples[0].extras.items() if torch.is_tensor(value)]
        return tensors | {f"extras/{name}": torch.cat(self.rollout[name]) for name in names}

    def restore(self, number: int) -> Rollout:
        """The rollout that the checkpoint holds."""
        tensors = load_file(os.path.join(self.start, checkpoint.ROLLOUT))
        responses = [Response.all_trained(tokens.numpy()) for tokens in tensors["tokens"].split(tensors["lengths"].tolist())]
        examples, done = [], 0
        for row, size in zip(tensors["rows"].tolist(), tensors["groups"].tolist()):
            prompt = self.train_set[row]
            examples.append(Example(prompt.prompt, responses[done:done + size], prompt.where, dict(prompt.extras)))
            done += size
        rollout = Rollout(number, examples, restored=True)
        for name, values in tensors.items():
            if name.startswith("extras/"):
                per_response = len(values) == len(responses)
                rollout[name[7:]] = values.split([len(e.responses) if per_response else e.num_trained for e in examples])
        return rollout


class WithoutAdapter:
    """The policy's base model, as its reference."""

    def __init__(self, policy):
        self.policy = policy

    def __call__(self, batch, temperature: float = 1.0):
        with lora.disabled(self.policy.lm):
            return self.policy(batch, temperature)
