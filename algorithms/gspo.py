"""GSPO: Group Sequence Policy Optimization - the ratio and its clipping belong to the whole completion, as
the reward does.

Paper:    Zheng et al. 2025, arXiv 2507.18071: the objective is eq. 5, the advantage eq. 6, the ratio eq. 7
Formula:  L = mean over o_i of -min( s_i A_i, clip(s_i, 1 - eps, 1 + eps_high) A_i )
          s_i = ( pi(o_i) / pi_old(o_i) )^(1 / |o_i|),    A_i = (r_i - mean(r)) / std(r)
Symbols:  log pi(o_t)        logps            each token of a completion, at the sampling temperature
          log pi_old(o_t)    old_logps        the same under the policy that sampled it; in the first update
                                              s is exactly 1
          |o_i|              lengths
          r, A               rewards, advantages    one per completion
          eps, eps_high      epsilon, epsilon_high    s is a geometric mean over tokens: it moves a hundred
                                              times less than a token's ratio
Shapes:   (N,) sampled tokens of a micro-batch, (S,) its completions, (G,) completions of one prompt
Trains:   the policy: every weight, or with lora_r an adapter. There is no reference.
Data:     {"prompt": ..., "answer": ...}: a prompt, plus the columns that the reward reads
Normalised by: the completions of the whole update, over all micro-batches and ranks
Metrics:  loss                       0 in the first update from a rollout of the own sampler: a group's
                                     advantages sum to 0 and every ratio is 1, but the gradient is not 0. It
                                     is not a progress measure; watch `reward`
          reward, reward_std         mean over all completions; mean over the groups of their standard
                                     deviation
          frac_reward_zero_std       share of groups whose rewards are all equal: they give no gradient.
                                     Above 0.5 most sampling is wasted: the prompts are too easy or too hard
                                     (dapo replaces such groups)
          entropy                    mean of -log pi of the sampled tokens: an estimate of the entropy at
                                     the sampling temperature
          clip_ratio/low_mean, /high_mean, /region_mean    share of completions clipped below, above, either:
                                     much larger than grpo's, as in the paper; 0 in the first of the
                                     num_mini_batches updates
          completions/mean_length, /clipped_ratio, ...     tokens; share truncated at
                                     max_completion_length
          sampling/sampling_logp_difference/mean    sampler against training forward: rounding
          sampling/importance_ratio/mean, /min, /max    with rollout_engine (vLLM), which draws from a policy
                                     that is rounded otherwise: the weights of the advantages,
                                     pi_old / pi_vllm (truncate: at most 2; engine/importance.py)
Step 0:   before the first rollout the held-out prompts are sampled and scored
Differences from the paper: the standard deviation is unbiased (n - 1), plus 1e-4. With one
          update per rollout (num_mini_batches 1) it is grpo without KL
Run:      python train.py example/tiny-gspo.yml
"""
from dataclasses import dataclass

import torch

from engine.importance import importance_weighted
from engine.loop import Engine
from engine.options import Count, Positive, Sampling, TwoOrMore
from engine.rollout import alike

DATA = "prompts"                   # every row holds a prompt and what its reward needs
MODEL = "policy"                   # what is trained
PROGRESS = "reward"                # the number shown beside the loss


@dataclass
class Config(Sampling):            # reward, temperature, max_completion_length, ...: see engine/options.py
    num_generations: TwoOrMore = 8  # completions per prompt: the group
    num_iterations: Count = 1      # passes over each rollout
    num_mini_batches: Count = 4    # updates per pass
    skip_zero_std: bool = False    # do not compute groups with equal rewards: the same gradient, sooner;
    #                                loss, entropy, clip ratios and a router's loss are means over the others
    epsilon: Positive = 3e-4       # ratios of completions are clipped to [1 - epsilon, 1 + epsilon_high];
    #                                a huge value disables clipping
    epsilon_high: Positive = 4e-4  # the upper bound is 1 + epsilon_high


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
        advantages.append(centered / (std + 1e-4))                                      # eq. 6
    return advantages


def gspo_loss(logps, old_logps, advantages, lengths, epsilon=3e-4, epsilon_high=4e-4):
    """(N,), (N,), (S,), S lengths -> (losses (S,), metrics); nothing is reduced over completions."""
    log_ratios = logps - old_logps                                                      # (N,)
    if len(lengths):                                                # a micro-batch may hold no completion
        parts = log_ratios.split([int(length) for length in lengths])
        log_ratios = torch.stack([tokens.mean() for tokens in parts])                   # (S,)
    ratios = log_ratios.exp()                                                           # (S,) s, eq. 7
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon_high)
    losses = -torch.min(ratios * advantages, clipped * advantages)                      # (S,) eq. 5
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
        rollout.advantages = group_advantages(rollout.rewards)     # 3 advantage
        if config.skip_zero_std:
            rollout.skip_zero_gradients()      # advantages that are all 0: counted below, not computed
        for step in engine.steps(rollout):
            for batch in step:                                     # 4 loss, one micro-batch
                logps = policy(batch, config.temperature)          # (N,) under the current policy
                old_logps = engine.old_logps(batch, logps)         # (N,) when they were sampled
                advantages = batch.extra("advantages")             # (S,)
                advantages = importance_weighted(engine, batch, old_logps, advantages)  # if vLLM drew
                losses, metrics = gspo_loss(
                    logps, old_logps, advantages,
                    batch.lengths,
                    config.epsilon, config.epsilon_high,
                )
                (losses.sum() / step.num_responses).backward()     # mean over completions of the whole update
                step.log(losses, metrics)
            engine.clip_gradients()                            # 5 update; stops if loss or norm is not finite
            optimizer.step()
            optimizer.zero_grad()
