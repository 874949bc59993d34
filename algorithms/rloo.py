"""RLOO: REINFORCE Leave-One-Out - a completion is one action; its baseline is the mean reward of the other
completions of its prompt.

Paper:    Ahmadian et al. 2024 (Back to Basics), arXiv 2402.14740; the baseline is Kool et al.'s, 2019
Formula:  L = mean over o_i of -min( rho A_i, clip(rho, 1 - eps, 1 + eps_high) A_i )
          rho = pi(o_i) / pi_old(o_i),    A_i = R_i - mean of R_j over j != i
          R_i = r_i - beta sum_t [ log pi_old(o_t) - log pi_ref(o_t) ]
Symbols:  log pi(o_i)        sequence_logps   sum over a completion's tokens, at the sampling temperature
          log pi_old(o_i)    old_sequence_logps    the same under the policy that sampled it; in the first
                                              pass rho is exactly 1
          log pi_old(o_t) - log pi_ref(o_t)   kl    per token, the estimator k1
          r, A               rewards, advantages    one per completion
          beta               kl_coef
          eps, eps_high      epsilon, epsilon_high
Shapes:   (N,) sampled tokens of a micro-batch, (S,) its completions, (G,) completions of one prompt;
          in kl_rewards (N,) are the tokens of these G completions
Trains:   the policy: every weight, or with lora_r an adapter. The reference is frozen, and only loaded if
          kl_coef > 0
Data:     {"prompt": ..., "answer": ...}: a prompt, plus the columns that the reward reads
Normalised by: the completions of the whole update, over all micro-batches and ranks; not by their tokens: the
          gradient grows with length
Metrics:  loss                       0 in the first update from a rollout of the own sampler: a group's
                                     advantages sum to 0 and every ratio is 1, but the gradient is not 0. It
                                     is not a progress measure; watch `reward`
          reward, reward_std         mean over all completions, without the KL; mean over the groups of their
                                     standard deviation
          frac_reward_zero_std       share of groups whose rewards are all equal: only the KL gives a gradient
                                     there. Above 0.5 most sampling is wasted: the prompts are too easy or
                                     too hard (dapo replaces such groups)
          kl                         mean over tokens of k1; 0 at step 0
          entropy                    mean of -log pi of the sampled tokens: an estimate of the entropy at
                                     the sampling temperature
          clip_ratio/low_mean, /high_mean, /region_mean    share of completions clipped below, above, either;
                                     0 in a rollout's first update. Their ratio is a product over tokens: in
                                     a second pass most are clipped
          completions/mean_length, /clipped_ratio, ...     tokens; share truncated at
                                     max_completion_length
          sampling/sampling_logp_difference/mean    sampler against training forward: rounding
          sampling/importance_ratio/mean, /min, /max    with rollout_engine (vLLM), which draws from a policy
                                     that is rounded otherwise: the weights of the advantages,
                                     pi_old / pi_vllm (truncate: at most 2; engine/importance.py)
Step 0:   before the first rollout the held-out prompts are sampled and scored
Differences from the paper: its gradient is on-policy; ratio and clipping only act with num_iterations or
          num_mini_batches above 1
Run:      python train.py example/tiny-rloo.yml
"""
from dataclasses import dataclass

import torch

from engine.importance import importance_weighted
from engine.loop import Engine
from engine.options import Count, NonNegative, Positive, Sampling, TwoOrMore
from engine.rollout import alike

DATA = "prompts"                   # every row holds a prompt and what its reward needs
MODEL = "policy"                   # what is trained
PROGRESS = "reward"                # the number shown beside the loss


@dataclass
class Config(Sampling):            # reward, temperature, max_completion_length, ...: see engine/options.py
    num_generations: TwoOrMore = 4  # completions per prompt: the group
    num_iterations: Count = 1      # passes over each rollout
    num_mini_batches: Count = 1    # updates per pass
    epsilon: Positive = 0.2        # ratios of completions are clipped to [1 - epsilon, 1 + epsilon_high];
    #                                a huge value disables clipping
    epsilon_high: Positive = 0.2   # the upper bound is 1 + epsilon_high
    kl_coef: NonNegative = 0.05    # strength of the KL in the reward: larger keeps the policy closer to the
    #                                reference; 0 = no reference
    reference: str | None = None   # model directory or hub name; null = the start model

    def uses_reference(self) -> bool:
        return self.kl_coef > 0


def kl_rewards(rewards, kl, lengths, kl_coef=0.05):
    """(G,), per token (N,), (G,) tokens -> (G,): each reward less kl_coef times the KL summed over its
    completion."""
    parts = kl.double().split([int(length) for length in lengths])
    return rewards - kl_coef * torch.stack([tokens.sum() for tokens in parts])          # R


def leave_one_out(rewards):
    """(G,) -> (G,) advantages: each reward less the mean of the others; 0 without others. NaN marks a
    completion without a reward; it counts nowhere."""
    if alike(rewards):
        return 0 * rewards
    others = (~rewards.isnan()).sum() - 1
    return rewards - (rewards.nansum() - rewards) / others


def rloo_loss(sequence_logps, old_sequence_logps, advantages, epsilon=0.2, epsilon_high=0.2):
    """Three (S,) -> (losses (S,), metrics); nothing is reduced."""
    ratios = (sequence_logps - old_sequence_logps).exp()                                # (S,) rho
    clipped = ratios.clamp(1 - epsilon, 1 + epsilon_high)
    losses = -torch.min(ratios * advantages, clipped * advantages)                      # (S,)
    low = (ratios < 1 - epsilon) & (advantages < 0)
    high = (ratios > 1 + epsilon_high) & (advantages > 0)
    metrics = {
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low | high,
    }
    return losses, metrics


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer
    reference = engine.reference(config.reference) if config.kl_coef > 0 else None

    for rollout in engine.rollouts(config):                        # 1 sample
        engine.score(rollout)                                      # 2 reward
        rewards = rollout.rewards
        if reference:
            old_logps = rollout.once("old_logps", engine.logps, policy, rollout)
            reference_logps = rollout.once("reference_logps", engine.logps, reference, rollout)
            rollout.kl = [old - other for old, other in zip(old_logps, reference_logps)]
            groups = zip(rewards, rollout.kl, rollout.lengths)
            rewards = [kl_rewards(group, kl, lengths, config.kl_coef) for group, kl, lengths in groups]
        rollout.advantages = [leave_one_out(group) for group in rewards]      # 3 advantage
        for step in engine.steps(rollout):
            for batch in step:                                     # 4 loss, one micro-batch
                logps = policy(batch, config.temperature)          # (N,) under the current policy
                old_logps = engine.old_logps(batch, logps)         # (N,) when they were sampled
                advantages = batch.extra("advantages")             # (S,)
                advantages = importance_weighted(engine, batch, old_logps, advantages)  # if vLLM drew
                losses, metrics = rloo_loss(batch.sum(logps), batch.sum(old_logps), advantages,
                                            config.epsilon, config.epsilon_high)
                (losses.sum() / step.num_responses).backward()     # mean over completions of the whole update
                step.log(losses, metrics | {"entropy": -logps})
                if reference:
                    step.log(losses, {"kl": batch.extra("kl")})
            engine.clip_gradients()                            # 5 update; stops if loss or norm is not finite
            optimizer.step()
            optimizer.zero_grad()
