"""Dr. GRPO: GRPO Done Right - without the two divisions that favour long wrong answers and prompts that are
too easy or too hard.

Paper:    Liu et al. 2025 (Understanding R1-Zero-Like Training), arXiv 2503.20783, section 3.2
Formula:  L = 1/G sum over o_i of 1/M sum_t [ -min( rho A_i, clip(rho, 1 - eps, 1 + eps_high) A_i )
          + beta k3 ]
          rho = pi(o_t) / pi_old(o_t),    A_i = r_i - mean(r)
          k3 = pi_ref / pi - log(pi_ref / pi) - 1
Symbols:  log pi(o_t)        logps            each token of a completion, at the sampling temperature
          log pi_old(o_t)    old_logps        the same under the policy that sampled it; in the first
                                              update of a rollout rho is exactly 1
          log pi_ref(o_t)    reference_logps
          r, A               rewards, advantages    one per completion, the same for all of its tokens
          eps, eps_high      epsilon, epsilon_high
          M                  max_completion_length    a constant: dividing by |o_i| would penalise a long
                                              wrong answer less than a short one
Shapes:   (N,) sampled tokens of a micro-batch, (S,) its completions, (G,) completions of one prompt
Trains:   the policy: every weight, or with lora_r an adapter. The reference is frozen, and only loaded if
          beta > 0
Data:     {"prompt": ..., "answer": ...}: a prompt, plus the columns that the reward reads
Normalised by: the completions of the whole update times max_completion_length, over all micro-batches and
          ranks
Metrics:  loss                       0 in the first update from a rollout only where lengths are equal: longer
                                     completions weigh more. It is not a progress measure; watch `reward`
          reward, reward_std         mean over all completions; mean over the groups of their standard
                                     deviation
          frac_reward_zero_std       share of groups whose rewards are all equal: they give no gradient.
                                     Above 0.5 most sampling is wasted: the prompts are too easy or too hard
                                     (dapo replaces such groups)
          kl                         mean over tokens of k3, with beta > 0; 0 at step 0
          entropy                    mean of -log pi of the sampled tokens: an estimate of the entropy at
                                     the sampling temperature
          clip_ratio/low_mean, /high_mean, /region_mean    share of tokens clipped below, above, either; 0
                                     in a rollout's first update
          completions/mean_length, /clipped_ratio, ...     tokens; share truncated at
                                     max_completion_length
          sampling/sampling_logp_difference/mean    sampler against training forward: rounding
          sampling/importance_ratio/mean, /min, /max    with rollout_engine (vLLM), which draws from a policy
                                     that is rounded otherwise: the weights of the advantages,
                                     pi_old / pi_vllm (truncate: at most 2; engine/importance.py)
Step 0:   before the first rollout the held-out prompts are sampled and scored
Differences from the paper: none with beta 0. The gradient shrinks as max_completion_length grows: with
          max_grad_norm and AdamW that matters little
Run:      python train.py example/tiny-dr_grpo.yml
"""
from dataclasses import dataclass

import torch

from data.errors import UserError
from engine.importance import importance_weighted
from engine.loop import Engine
from engine.options import Count, NonNegative, Positive, Sampling, TwoOrMore
from engine.rollout import alike

DATA = "prompts"                   # every row holds a prompt and what its reward needs
MODEL = "policy"                   # what is trained
PROGRESS = "reward"                # the number shown beside the loss


@dataclass
class Config(Sampling):            # reward, temperature, max_completion_length, ...: see engine/options.py
    num_generations: TwoOrMore = 8  # completions per prompt: the group
    num_iterations: Count = 1      # passes over each rollout
    num_mini_batches: Count = 1    # updates per pass
    skip_zero_std: bool = False    # do not compute groups with equal rewards: the same gradient, sooner;
    #                                loss, entropy, clip ratios and a router's loss are means over the others
    epsilon: Positive = 0.2        # ratios are clipped to [1 - epsilon, 1 + epsilon_high]; a huge value
    #                                disables clipping
    epsilon_high: Positive = 0.2   # the upper bound is 1 + epsilon_high
    beta: NonNegative = 0.0        # KL strength: larger keeps the policy closer to the reference; 0 = none
    reference: str | None = None   # model directory or hub name; null = the start model

    def uses_reference(self) -> bool:
        return self.beta > 0

    def check(self, common) -> None:
        super().check(common)
        if self.skip_zero_std and self.beta > 0:
            raise UserError("skip_zero_std: the KL term gives every group a gradient; fix: beta=0")


def group_advantages(rewards):
    """Per prompt (G,) rewards -> per prompt (G,) advantages, exactly 0 where the rewards are all equal. NaN
    marks a completion without a reward; it is left out of the mean."""
    advantages = []
    for group in rewards:
        if alike(group):
            advantages.append(0 * group)
            continue
        centered = group - group.nanmean()
        advantages.append(centered)
    return advantages


def dr_grpo_loss(logps, old_logps, advantages, reference_logps=None, epsilon=0.2, epsilon_high=0.2, beta=0.0):
    """Three or four (N,) -> (losses (N,), metrics); nothing is reduced."""
    ratios = (logps - old_logps).exp()                                                  # (N,) rho
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon_high)
    losses = -torch.min(ratios * advantages, clipped * advantages)                      # (N,)
    low = (ratios < 1 - epsilon) & (advantages < 0)
    high = (ratios > 1 + epsilon_high) & (advantages > 0)
    metrics = {
        "entropy": -logps,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }
    if reference_logps is not None:
        log_ratios = reference_logps - logps
        kl = log_ratios.exp() - log_ratios - 1                                          # (N,) eq. 4
        losses = losses + beta * kl
        metrics["kl"] = kl
    return losses, metrics


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer
    reference = engine.reference(config.reference) if config.beta > 0 else None

    for rollout in engine.rollouts(config):                        # 1 sample
        engine.score(rollout)                                      # 2 reward
        rollout.advantages = group_advantages(rollout.rewards)     # 3 advantage
        if reference:
            rollout.once("reference_logps", engine.logps, reference, rollout)      # for batch.extra below
        if config.skip_zero_std:
            rollout.skip_zero_gradients()      # advantages that are all 0: counted below, not computed
        for step in engine.steps(rollout):
            for batch in step:                                     # 4 loss, one micro-batch
                logps = policy(batch, config.temperature)          # (N,) under the current policy
                old_logps = engine.old_logps(batch, logps)         # (N,) when they were sampled
                advantages = batch.expand(batch.extra("advantages"))      # (S,) -> (N,)
                advantages = importance_weighted(engine, batch, old_logps, advantages)  # if vLLM drew
                reference_logps = batch.extra("reference_logps") if reference else None
                losses, metrics = dr_grpo_loss(
                    logps, old_logps, advantages,
                    reference_logps,
                    config.epsilon, config.epsilon_high,
                    config.beta,
                )
                losses = batch.sum(losses) / config.max_completion_length  # (S,) by a constant, not by length
                (losses.sum() / step.num_responses).backward()     # mean over completions of the whole update
                step.log(losses, metrics)
            engine.clip_gradients()                            # 5 update; stops if loss or norm is not finite
            optimizer.step()
            optimizer.zero_grad()
