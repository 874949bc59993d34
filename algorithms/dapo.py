"""DAPO: Decoupled Clip and Dynamic Sampling Policy Optimization - GRPO with four changes that keep long
training stable.

Paper:    Yu et al. 2025, arXiv 2503.14476: the objective is eq. 8, the advantage eq. 9; clip-higher 3.1,
          dynamic sampling 3.2, token-level loss 3.3, overlong filtering and penalty 3.4 (eq. 13)
Formula:  L = 1 / (sum_i |o_i|) * sum_i sum_t -min( rho A_i, clip(rho, 1 - eps, 1 + eps_high) A_i )
          rho = pi(o_t) / pi_old(o_t),    A_i = (r_i - mean(r)) / std(r)
          over groups with both right and wrong answers
Symbols:  log pi(o_t)        logps            each token of a completion, at the sampling temperature
          log pi_old(o_t)    old_logps        the same under the policy that sampled it; in the first
                                              update of a rollout rho is exactly 1
          r, A               rewards, advantages    one per completion, the same for all of its tokens
          eps, eps_high      epsilon, epsilon_high    the upper bound is wider: unlikely tokens may
                                              rise, which keeps the entropy up
          L_max, L_cache     max_completion_length, soft_overlong_cache
Shapes:   (N,) sampled tokens of a micro-batch, (S,) its completions, (G,) completions of one prompt
Trains:   the policy: every weight, or with lora_r an adapter. There is no reference: a long chain of thought
          may leave it far behind
Data:     {"prompt": ..., "answer": ...}: a prompt, plus the columns that the reward reads
Normalised by: the tokens of the whole update, over all micro-batches and ranks: long completions weigh
          more
Metrics:  loss                       0 in the first update from a rollout only where lengths are equal: longer
                                     completions weigh more. It is not a progress measure
          reward, reward_std         mean over all completions that are trained, so that with dynamic sampling
                                     it stays near 0.5: watch the held-out reward; mean over the groups of
                                     their standard deviation
          frac_reward_zero_std       share of groups whose rewards are still all equal after
                                     max_resample_times attempts: they stay, with advantage 0
          rewards/soft_overlong/mean the mean penalty, 0 to -1; `reward` is without it
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
Differences from the paper: dynamic sampling makes a fixed number of attempts instead of sampling until the
          batch is full. It compares the rewards of a group before the penalty, which is the paper's accuracy
          of 0 or 1; the standard deviation is unbiased (n - 1), plus 1e-4
Run:      python train.py example/tiny-dapo.yml
"""
from dataclasses import dataclass

import torch

from engine.importance import importance_weighted
from engine.loop import Engine
from engine.options import Count, Positive, Sampling, TwoOrMore, Whole
from engine.rollout import alike

DATA = "prompts"                   # every row holds a prompt and what its reward needs
MODEL = "policy"                   # what is trained
PROGRESS = "reward"                # the number shown beside the loss


@dataclass
class Config(Sampling):            # reward, temperature, max_completion_length, ...: see engine/options.py
    num_generations: TwoOrMore = 8  # completions per prompt: the group
    num_iterations: Count = 1      # passes over each rollout
    num_mini_batches: Count = 1    # updates per pass
    epsilon: Positive = 0.2        # ratios are clipped to [1 - epsilon, 1 + epsilon_high]; a huge value
    #                                disables clipping
    epsilon_high: Positive = 0.28  # the upper bound is 1 + epsilon_high
    dynamic_sample: bool = True    # replace groups whose rewards are all equal by groups of other prompts
    max_resample_times: Whole = 3  # how often per rollout such groups are replaced
    soft_overlong_cache: Whole = 0    # length of the zone before max_completion_length in which a penalty
    #                                grows from 0 to -1; 0 = no penalty
    mask_truncated_completions: bool = False    # overlong filtering: completions truncated at
    #                                max_completion_length are scored but not trained


def group_advantages(rewards):
    """Per prompt (G,) rewards -> per prompt (G,) advantages, exactly 0 where the rewards are all equal. NaN
    marks a completion without a reward; it is left out of mean and std."""
    advantages = []
    for group in rewards:
        if alike(group):
            advantages.append(0 * group)
            continue
        centered = group - group.nanmean()
        std = group[~group.isnan()].std()
        advantages.append(centered / (std + 1e-4))
    return advantages


def soft_overlong(lengths, max_completion_length, cache):
    """(G,) tokens -> (G,) penalties: 0 up to max_completion_length - cache, from there down to -1 at
    max_completion_length."""
    return ((max_completion_length - cache - lengths) / cache).clamp(-1, 0)             # (G,) eq. 13


def dapo_loss(logps, old_logps, advantages, epsilon=0.2, epsilon_high=0.28):
    """Three (N,) -> (losses (N,), metrics); nothing is reduced."""
    ratios = (logps - old_logps).exp()                                                  # (N,) rho
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon_high)
    losses = -torch.min(ratios * advantages, clipped * advantages)                      # (N,) eq. 8
    low = (ratios < 1 - epsilon) & (advantages < 0)
    high = (ratios > 1 + epsilon_high) & (advantages > 0)
    metrics = {
        "entropy": -logps,
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }
    return losses, metrics


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer

    for rollout in engine.rollouts(config):                        # 1 sample
        engine.score(rollout)                                      # 2 reward
        for attempt in range(config.max_resample_times if config.dynamic_sample else 0):
            flat = [i for i, group in enumerate(rollout.rewards) if alike(group)]
            if flat:
                engine.resample(rollout, flat, attempt)     # other prompts in their place, sampled and scored
        rewards = rollout.rewards
        if config.soft_overlong_cache:
            longest = config.max_completion_length
            penalties = []
            for lengths in rollout.lengths:
                penalties.append(soft_overlong(lengths, longest, config.soft_overlong_cache))
            rewards = [group + penalty for group, penalty in zip(rewards, penalties)]
            rollout.metrics["rewards/soft_overlong/mean"] = float(torch.cat(penalties).mean())
        rollout.advantages = group_advantages(rewards)             # 3 advantage
        skip = rollout.truncated if config.mask_truncated_completions else None
        for step in engine.steps(rollout, skip):
            for batch in step:                                     # 4 loss, one micro-batch
                logps = policy(batch, config.temperature)          # (N,) under the current policy
                old_logps = engine.old_logps(batch, logps)         # (N,) when they were sampled
                advantages = batch.expand(batch.extra("advantages"))      # (S,) -> (N,)
                advantages = importance_weighted(engine, batch, old_logps, advantages)  # if vLLM drew
                losses, metrics = dapo_loss(
                    logps, old_logps, advantages,
                    config.epsilon, config.epsilon_high,
                )
                (losses.sum() / step.num_tokens).backward()        # mean over the tokens of the whole update
                step.log(losses, metrics)
            engine.clip_gradients()                            # 5 update; stops if loss or norm is not finite
            optimizer.step()
            optimizer.zero_grad()
