"""REINFORCE++: PPO's clipped loss without a critic - every token's return, in standard deviations of all
returns of the rollout.

Paper:    Hu et al. 2025, arXiv 2501.03262. baseline: true is its variant "w/ Baseline"
Formula:  L = 1 / (sum_i |o_i|) * sum_i sum_t -min( rho A_t, clip(rho, 1 - eps, 1 + eps_high) A_t )
          rho = pi(o_t) / pi_old(o_t),    A_t = (R_t - mean(R)) / std(R) over all tokens of the rollout
          R_t = r_i - beta sum over u >= t of [ log pi_old(o_u) - log pi_ref(o_u) ]
Symbols:  log pi(o_t)        logps            each token of a completion, at the sampling temperature
          log pi_old(o_t)    old_logps        the same under the policy that sampled it; in the first
                                              update of a rollout rho is exactly 1
          log pi_old(o_t) - log pi_ref(o_t)   kl    per token, the estimator k1
          r                  rewards          one per completion, at its last token; with baseline less
                                              the mean of its group
          R, A               returns, advantages    one per token
          beta               kl_coef
          eps, eps_high      epsilon, epsilon_high
Shapes:   (N,) sampled tokens of a micro-batch, (G,) completions of one prompt, (L,) tokens of one
          completion; in token_returns and whiten (N,) are the tokens of a prompt's G completions
Trains:   the policy: every weight, or with lora_r an adapter. The reference is frozen, and only loaded if
          kl_coef > 0
Data:     {"prompt": ..., "answer": ...}: a prompt, plus the columns that the reward reads
Normalised by: the tokens of the whole update, over all micro-batches and ranks. So are mean and std of the
          returns, over the whole rollout
Metrics:  loss                       0 in the first update from a rollout of the own sampler, with one
                                     mini-batch: the advantages sum to 0 over the tokens and every ratio is 1,
                                     but the gradient is not 0. It is not a progress measure; watch `reward`
          reward, reward_std         mean over all completions, without the KL; mean over the groups of their
                                     standard deviation
          frac_reward_zero_std       share of groups whose rewards are all equal: unlike in grpo they give a
                                     gradient, compared with other prompts' (with baseline they do not)
          kl                         mean over tokens of k1; 0 at step 0
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
Differences from the paper: its variant w/ Baseline has the KL (k2) in the loss; here both have it in the
          reward
Run:      python train.py example/tiny-reinforce_pp.yml
"""
from dataclasses import dataclass

import torch

from data.errors import UserError
from engine.importance import importance_weighted
from engine.loop import Engine
from engine.options import Count, NonNegative, Positive, Sampling
from engine.rollout import alike

DATA = "prompts"                   # every row holds a prompt and what its reward needs
MODEL = "policy"                   # what is trained
PROGRESS = "reward"                # the number shown beside the loss


@dataclass
class Config(Sampling):            # reward, temperature, max_completion_length, ...: see engine/options.py
    num_generations: Count = 8     # completions per prompt, which share its cost; baseline needs 2 or more
    num_iterations: Count = 1      # passes over each rollout
    num_mini_batches: Count = 1    # updates per pass
    epsilon: Positive = 0.2        # ratios are clipped to [1 - epsilon, 1 + epsilon_high]; a huge value
    #                                disables clipping
    epsilon_high: Positive = 0.2   # the upper bound is 1 + epsilon_high
    kl_coef: NonNegative = 0.01    # strength of the KL in the reward: larger keeps the policy closer to the
    #                                reference; 0 = no reference
    baseline: bool = False         # true = subtract the mean reward of the group first
    reference: str | None = None   # model directory or hub name; null = the start model

    def uses_reference(self) -> bool:
        return self.kl_coef > 0

    def check(self, common) -> None:
        super().check(common)
        if self.baseline and self.num_generations < 2:
            raise UserError("num_generations is 1, but baseline: true compares a completion with others of "
                            "its prompt; fix: give 2 or more, or remove baseline")


def center(group):
    """(G,) rewards -> (G,), less their mean. NaN marks a completion without a reward; it counts nowhere."""
    return group - group.nanmean() if not alike(group) else 0 * group


def token_returns(rewards, kl, lengths, kl_coef=0.01):
    """(G,), per token (N,), (G,) tokens -> (N,): a completion's reward less kl_coef times the KL from each
    token to its end."""
    parts = kl.double().split([int(length) for length in lengths])
    returns = []
    for reward, tokens in zip(rewards, parts):
        ahead = tokens.flip(0).cumsum(0).flip(0)                                # (L,) KL from here to the end
        returns.append(reward - kl_coef * ahead)
    return torch.cat(returns)                                                           # (N,) R


def whiten(returns):
    """Per prompt (N,) -> per prompt (N,), over all of them together with mean 0 and variance 1 (the biased
    one: PPO's is unbiased). NaN marks tokens without a reward; they count nowhere."""
    known = torch.cat(returns)
    known = known[~known.isnan()]
    if alike(known):
        return [0 * tokens for tokens in returns]
    std = known.var(correction=0).clamp(min=1e-8).sqrt()
    return [(tokens - known.mean()) / std for tokens in returns]


def reinforce_loss(logps, old_logps, advantages, epsilon=0.2, epsilon_high=0.2):
    """Three (N,) -> (losses (N,), metrics); nothing is reduced."""
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
    return losses, metrics


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer
    reference = engine.reference(config.reference) if config.kl_coef > 0 else None

    for rollout in engine.rollouts(config):                        # 1 sample
        engine.score(rollout)                                      # 2 reward
        rewards = rollout.rewards
        if config.baseline:
            rewards = [center(group) for group in rewards]
        rollout.kl = [torch.zeros_like(logps) for logps in rollout.sampler_logps]
        if reference:
            old_logps = rollout.once("old_logps", engine.logps, policy, rollout)
            reference_logps = rollout.once("reference_logps", engine.logps, reference, rollout)
            rollout.kl = [old - other for old, other in zip(old_logps, reference_logps)]
        returns = []
        for group, kl, lengths in zip(rewards, rollout.kl, rollout.lengths):
            returns.append(token_returns(group, kl, lengths, config.kl_coef))
        rollout.advantages = whiten(returns)                       # 3 advantage, one per token
        for step in engine.steps(rollout):
            for batch in step:                                     # 4 loss, one micro-batch
                logps = policy(batch, config.temperature)          # (N,) under the current policy
                old_logps = engine.old_logps(batch, logps)         # (N,) when they were sampled
                advantages = batch.extra("advantages")
                advantages = importance_weighted(engine, batch, old_logps, advantages)  # if vLLM drew
                losses, metrics = reinforce_loss(
                    logps, old_logps, advantages, config.epsilon, config.epsilon_high)
                (losses.sum() / step.num_tokens).backward()        # mean over the tokens of the whole update
                step.log(losses, metrics)
                if reference:
                    step.log(losses, {"kl": batch.extra("kl")})
            engine.clip_gradients()                            # 5 update; stops if loss or norm is not finite
            optimizer.step()
            optimizer.zero_grad()
