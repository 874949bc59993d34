"""CISPO: Clipped IS-weight Policy Optimization - the ratio is a bounded weight of each token's log-prob, so
that no token loses its gradient.

Paper:    MiniMax 2025 (MiniMax-M1), arXiv 2506.13585, eq. 4 and 5. The single bound is ScaleRL's,
          arXiv 2510.13786
Formula:  L = 1 / (sum_i |o_i|) * sum_i sum_t -sg( min(rho, eps_high) ) A_i log pi(o_t)
          rho = pi(o_t) / pi_old(o_t),    A_i = (r_i - mean(r)) / std(r),    sg: without its gradient
Symbols:  log pi(o_t)        logps            each token of a completion, at the sampling temperature
          log pi_old(o_t)    old_logps        the same under the policy that sampled it; in the first
                                              update of a rollout rho is exactly 1
          r, A               rewards, advantages    one per completion, the same for all of its tokens
          eps_high           epsilon_high     the bound itself, not its distance from 1
Shapes:   (N,) sampled tokens of a micro-batch, (S,) its completions, (G,) completions of one prompt
Trains:   the policy: every weight, or with lora_r an adapter. There is no reference.
Data:     {"prompt": ..., "answer": ...}: a prompt, plus the columns that the reward reads
Normalised by: the tokens of the whole update, over all micro-batches and ranks
Metrics:  loss                       the weighted log-probs: not a progress measure; watch `reward`
          reward, reward_std         mean over all completions; mean over the groups of their standard
                                     deviation
          frac_reward_zero_std       share of groups whose rewards are all equal: they give no gradient.
                                     Above 0.5 most sampling is wasted: the prompts are too easy or too hard
                                     (dapo replaces such groups)
          entropy                    mean of -log pi of the sampled tokens: an estimate of the entropy at
                                     the sampling temperature
          cispo_clip_ratio           share of tokens with a positive advantage and a ratio above epsilon_high;
                                     0 in a rollout's first update
          completions/mean_length, /clipped_ratio, ...     tokens; share truncated at
                                     max_completion_length
          sampling/sampling_logp_difference/mean    sampler against training forward: rounding
          sampling/importance_ratio/mean, /min, /max    with rollout_engine (vLLM), which draws from a policy
                                     that is rounded otherwise: the weights of the advantages,
                                     pi_old / pi_vllm (truncate: at most 2; engine/importance.py)
Step 0:   before the first rollout the held-out prompts are sampled and scored
Differences from the paper: it leaves its lower bound open, so there is none; the standard
          deviation is unbiased (n - 1), plus 1e-4
Run:      python train.py example/tiny-cispo.yml
"""
from dataclasses import dataclass
from typing import Annotated

from engine.importance import importance_weighted
from engine.loop import Engine
from engine.options import Count, Range, Sampling, TwoOrMore
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
    epsilon_high: Annotated[float, Range("1 or more: it bounds the ratio itself", lambda x: x >= 1)] = 5.0
    #                                the largest weight of a token (4 to 8): ratios are at most epsilon_high,
    #                                not 1 + epsilon_high as elsewhere


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


def cispo_loss(logps, old_logps, advantages, epsilon_high=5.0):
    """Three (N,) -> (losses (N,), metrics); nothing is reduced."""
    ratios = (logps - old_logps).exp().detach()                                         # (N,) rho
    losses = -ratios.clamp(max=epsilon_high) * advantages * logps                       # (N,) eq. 4 and 5
    is_clipped = (ratios > epsilon_high) & (advantages > 0)
    return losses, {"entropy": -logps, "cispo_clip_ratio": is_clipped}


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
                advantages = batch.expand(batch.extra("advantages"))      # (S,) -> (N,)
                advantages = importance_weighted(engine, batch, old_logps, advantages)  # if vLLM drew
                losses, metrics = cispo_loss(logps, old_logps, advantages, config.epsilon_high)
                (losses.sum() / step.num_tokens).backward()        # mean over the tokens of the whole update
                step.log(losses, metrics)
            engine.clip_gradients()                            # 5 update; stops if loss or norm is not finite
            optimizer.step()
            optimizer.zero_grad()
