"""What is told, logged and evaluated of rollouts."""
import json
import math

import torch

from data.errors import RunError, UserError
from data.pack import Example
from engine.console import per_second
from engine.ranks import PATIENCE, from_main
from engine.rollout import PerPrompt, Rollout, alike

MANY = 10      # updates in a row without a signal, after which a warning is given


class RolloutRecord:
    """The rewards, metrics, held-out evaluations and warnings of a run's rollouts."""

    def __init__(self, rollouts):
        self.rollouts, self.engine, self.config = rollouts, rollouts.engine, rollouts.config
        self.updates_without_signal, self.is_told_of_signal = 0, False

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
        if engine.world > 1 and config.uses_reward() and config.reward_timeout > patience:
            raise UserError(f"reward_timeout is {config.reward_timeout:g}, longer than the other processes "
                            f"wait for the first; fix: give {patience:g} or less")

    # ---- rewards -------------------------------------------------------------------------------------

    def each_reward(self, rollout: Rollout) -> tuple[list[PerPrompt], list[float]]:
        """Of a scored rollout every reward by itself, (G,) per prompt with NaN where it scored nothing, and
        its weight in their sum."""
        if not rollout.knows("scored"):
            raise RunError("the rewards of the rollout are not known yet; fix: add the line "
                           "engine.score(rollout) before engine.each_reward(rollout)")
        rewards = []
        for reward in self.rollouts.rewards:
            rewards.append([group.clone() for group in rollout[f"rewards/{reward.name}"]])
        weights = [reward.weight for reward in self.rollouts.rewards]
        return rewards, weights

    # ---- metrics -------------------------------------------------------------------------------------

    def reward_metrics(self, rollout: Rollout) -> dict:
        """What TRL logs of a rollout, under its names; completions without a reward are left out and
        counted. `std` is the mean over the groups of their standard deviations, where TRL 1.16 takes that of
        all completions."""
        rewards = torch.cat(known(rollout.rewards))
        is_grouped = any(len(example.responses) > 1 for example in rollout.examples)
        metrics = {"reward": rewards.mean()}
        if is_grouped:
            metrics["reward_std"], metrics["frac_reward_zero_std"] = spreads(rollout.rewards)
        if len(self.rollouts.rewards) > 1:
            for reward in self.rollouts.rewards:
                name = f"rewards/{reward.name}"
                metrics[f"{name}/mean"] = torch.cat(rollout[name]).nanmean()
                if is_grouped:
                    metrics[f"{name}/std"], metrics[f"{name}/frac_zero_std"] = spreads(rollout[name])
        metrics |= self.completion_metrics(rollout)
        count = sum(map(len, rollout.rewards))
        if len(rewards) < count:
            metrics["completions/without_reward"] = count - len(rewards)
        return numbers(metrics)

    def completion_metrics(self, rollout: Rollout) -> dict:
        """Those that need no reward."""
        lengths, truncated = torch.cat(rollout.lengths), torch.cat(rollout.truncated)
        return numbers({
            "completions/mean_length": lengths.mean(),
            "completions/min_length": lengths.min(),
            "completions/max_length": lengths.max(),
            "completions/clipped_ratio": truncated.float().mean(),
            "completions/mean_terminated_length": lengths[~truncated].mean(),
        })

    def measured(self, rollout: Rollout) -> Rollout:
        """A rollout with the metrics that it has without a reward."""
        rollout.metrics = self.completion_metrics(rollout)
        return rollout

    def nothing_to_train(self, rollout: Rollout) -> str:
        """Why no completion of a rollout is trained."""
        count = len(torch.cat(rollout.truncated))
        without = int(torch.cat(rollout.rewards).isnan().sum()) if self.rollouts.rewards else 0
        counts = {"without a reward": without,
                  "cut at max_completion_length, and masked": count - without}
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
        return f"nothing to train in rollout {rollout.number + 1} ({reasons})"

    def episodes(self, rollout: Rollout) -> dict:
        """How far the run is, under TRL's names: completions so far, and per second of this process."""
        done = self.completions(rollout.number + 1)
        before = self.completions(self.engine.first // self.rollouts.updates_per_rollout)
        return {"episode": done, "eps": per_second(done - before, self.engine.record.since)}

    def completions(self, num_rollouts: int) -> int:
        plan = self.engine.plan
        epochs, rest = divmod(num_rollouts, plan.draws_per_epoch)
        prompts = epochs * plan.num_rows + rest * self.engine.config.batch_size
        return prompts * self.rollouts.group_size

    def watch_signal(self, rollout: Rollout, updates: int) -> None:
        """Warn once where MANY updates in a row had no signal: rewards alike in every group (in the rollout,
        where a prompt has but one completion), or no advantage."""
        is_grouped = self.rollouts.group_size > 1
        groups = rollout.rewards if is_grouped else [torch.cat(rollout.rewards)]
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
        unit = "prompt" if is_grouped else "rollout"
        self.engine.notice(
            f"warning: in {self.updates_without_signal} updates all completions of a {unit} got the same "
            f"reward (mean reward {reward:.4g}, {cut:.0%} cut at max_completion_length): there is little or "
            "no gradient; try: read some of them (sample_every: 1), easier prompts, a larger "
            "num_generations, temperature or max_completion_length, a reward with partial credit")

    # ---- evaluation ----------------------------------------------------------------------------------

    def evaluate(self, update: int) -> None:
        """If an evaluation is due after `update`, the end of a rollout: one completion of every held-out
        prompt, always with the same random numbers, and its rewards. What a run did before it was interrupted
        is not done again."""
        engine, every = self.engine, self.engine.plan.eval_every
        before = update - self.rollouts.updates_per_rollout
        is_due = update in (0, engine.plan.total) or update // every > before // every
        is_scored = engine.eval_set and self.rollouts.rewards
        if not is_scored or not is_due or update in from_main(self.evaluated):
            return
        with engine.record.evaluation():
            rollout = self.rollouts.sample_held_out(update)
            self.rollouts.score(rollout)
        engine.run.log({"step": update, "split": "eval", **rollout.metrics})
        rewards = []
        for name, value in rollout.metrics.items():
            if name.startswith("reward"):
                rewards.append(f"{name} {value:.4g}")
        engine.run.notice(f"held-out prompts at step {update}: {'  '.join(rewards)}", is_progress=True)

    def held_out(self, step) -> list[Example]:
        """The held-out prompts, each with a completion of the policy as it is; the evaluation of `step` gets
        their metrics."""
        with self.engine.record.evaluation():
            rollout = self.rollouts.sample_held_out(step.index)
        step.add(self.completion_metrics(rollout), "eval")
        return rollout.examples

    def evaluated(self) -> set[int]:
        """The updates after which this run was evaluated already."""
        found = set()
        for line in self.engine.run.rows("metrics.jsonl"):
            row = json.loads(line)
            if row.get("split") == "eval":
                found.add(row["step"])
        return found


def known(groups: PerPrompt) -> PerPrompt:
    """(G,) per prompt -> the same without NaN."""
    return [group[~group.isnan()] for group in groups]


def spreads(groups: PerPrompt) -> tuple[float, float]:
    """(G,) per prompt -> the mean of the groups' standard deviations, and the share of groups whose numbers
    are all equal. NaN is left out; a deviation is exactly 0 where all are equal."""
    deviations = []
    for group in known(groups):
        deviations.append(0.0 if alike(group) else float(group.std()))
    return sum(deviations) / len(groups), sum(map(alike, groups)) / len(groups)


def numbers(metrics: dict) -> dict[str, float]:
    """The metrics as floats; a mean over none is left out."""
    return {name: float(value) for name, value in metrics.items() if not math.isnan(value)}
