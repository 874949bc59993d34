"""PPO: Proximal Policy Optimization - a critic predicts the return; tokens with a positive advantage become
more likely.

Paper:    Schulman et al. 2017, arXiv 1707.06347, eq. 7; for language models Ouyang et al. 2022 (InstructGPT),
          arXiv 2203.02155, section 3.5; the advantage is Schulman et al. 2016 (GAE), arXiv 1506.02438, eq.
          16; value clipping, whitening and where the critic starts are as in Huang et al. 2024 (The N+
          Implementation Details of RLHF with PPO), arXiv 2403.17031
Formula:  r_t = -beta k_t + [t = T] score,    d = log pi_old - log pi_ref
          k1 = d,    k2 = d^2 / 2,    k3 = exp(-d) - 1 + d
          delta_t = r_t + gamma V_old_t+1 - V_old_t,    A_t = delta_t + gamma lam A_t+1
          R_t = A_t + V_old_t,    after T: A = V = 0
          L = mean_t( -min( rho A', clip(rho, 1 - eps, 1 + eps) A' ) )
              + vf_coef mean_t( 1/2 max( (V - R)^2, (V_clip - R)^2 ) )
          rho = pi / pi_old,    A' = (A - mean A) / std A,    V_clip = V_old + clip(V - V_old, -eps_v, eps_v)
Symbols:  log pi(o_t), V_t      logps, values             each token of a completion, at the sampling
                                                          temperature; the state before that token
          log pi_old, V_old     old_logps, old_values     the same before the first update from the rollout
          log pi_ref            reference_logps
          score, r, A, R        scores, rewards, advantages, returns
          beta, eps, eps_v      kl_coef, cliprange, cliprange_value
Shapes:   (N,) sampled tokens of a micro-batch, (L,) tokens of one completion; a prompt has one completion
Trains:   the policy and a critic: a trunk of its own under a linear head (with lora_r an adapter in both
          trunks). The critic starts as the reward model where the reward is one, else as the start model
          under a head of 0. final/ is the policy alone. With the reward and the frozen reference these are
          the four models of PPO
Data:     {"prompt": ..., "answer": ...}: a prompt, plus the columns that the reward reads
Normalised by: the tokens of the whole update, both terms, over all micro-batches and ranks; an update is
          one mini-batch
Metrics:  objective/scores, /rlhf_reward    mean score; mean of score and KL penalty together, which is
                                            maximised
          objective/kl, /non_score_reward   means over completions of the sum of k1, 0 at step 0; of the sum
                                            of -beta k
          objective/entropy                 mean over completions of the sum of -log pi: an estimate
          policy/approxkl_avg               mean of (log rho)^2 / 2; 0 in a rollout's first update
          policy/clipfrac_avg, val/clipfrac_avg    shares of tokens clipped; 0 in a rollout's first update
          val/ratio, val/ratio_var          mean of rho, 1 in a rollout's first update; mean of (rho - 1)^2
          policy/entropy_avg                mean of -log pi of the sampled tokens
          loss/policy_avg, loss/value_avg   the two terms. In a rollout's first update, with one mini-batch
                                            and the own sampler, the first is 0 (A' has mean 0), its
                                            gradient is not
          val/explained_variance            1 - var(R - V_old) / var(R): 1 is a perfect critic; 0 at step 0
                                            under a head of 0
          val/mean                          mean of V_old
          val/num_eos_tokens                completions of the rollout that were not truncated
          episode, eps                      completions so far; per second
          reward, completions/..., sampling/...    mean reward; lengths in tokens; sampler against training
                                            forward: rounding
          sampling/importance_ratio/mean, /min, /max    with rollout_engine (vLLM), which draws from a policy
                                            that is rounded otherwise: the weights of the advantages,
                                            pi_old / pi_vllm (truncate: at most 2; engine/importance.py)
Step 0:   before the first rollout the held-out prompts are sampled and scored
Differences from the paper: (compared with TRL's last PPO) the score stands on the last token, not one after
          it; sampling ends at the stop token; pi_old comes from the training forward; every mini-batch is an
          optimizer step; whitening and means go over all micro-batches and ranks and include no padding
Run:      python train.py example/tiny-ppo.yml
"""
from dataclasses import dataclass
from typing import Literal

import torch

from engine.importance import importance_weighted
from engine.loop import Engine
from engine.options import Count, Fraction, NonNegative, Positive, Probability, Sampling, Whole
from engine.rollout import alike

DATA = "prompts"                   # every row holds a prompt and what its reward needs
MODEL = "actor_critic"             # what is trained
PROGRESS = "reward"                # the number shown beside the loss


@dataclass
class Config(Sampling):            # reward, temperature, max_completion_length, ...: see engine/options.py
    num_ppo_epochs: Count = 4      # passes over each rollout
    num_mini_batches: Count = 1    # updates per pass
    kl_coef: NonNegative = 0.05    # strength of the KL in the reward: larger keeps the policy closer to the
    #                                reference
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"    # how that KL is estimated, per token
    cliprange: Positive = 0.2      # ratios are clipped to [1 - cliprange, 1 + cliprange]; a huge value
    #                                disables clipping
    cliprange_value: Positive = 0.2    # values are clipped to at most this far from the old ones
    vf_coef: NonNegative = 0.1     # weight of the value loss
    gamma: Fraction = 1.0          # discount per token
    lam: Probability = 0.95        # GAE: 1 = the whole return less the value, 0 = one step and the next value
    whiten_rewards: bool = False   # divide the tokens' rewards by their standard deviation, keep their mean
    missing_eos_penalty: float | None = None    # subtracted from the score of a completion truncated at
    #                                max_completion_length
    share_value_trunk: bool = False    # true = the value head uses the policy's trunk, which saves a model
    num_sample_generations: Whole = 10    # how often per run completions are written to samples.jsonl, unless
    #                                sample_every is set
    reference: str | None = None   # model directory or hub name; null = the start model

    def uses_reference(self) -> bool:
        return True

    def uses_critic(self) -> bool:
        return not self.share_value_trunk

    def rollout_shape(self) -> tuple[int, int, int]:
        return 1, self.num_ppo_epochs, self.num_mini_batches


def token_rewards(score, log_ratios, kl_coef=0.05, kl_estimator="k1"):
    """For one completion: score (1,), log pi_old - log pi_ref (L,) -> rewards (L,); all NaN where the score
    is."""
    if kl_estimator == "k1":
        kl = log_ratios
    elif kl_estimator == "k2":
        kl = log_ratios ** 2 / 2
    else:
        kl = (-log_ratios).exp() - 1 + log_ratios
    rewards = -kl_coef * kl + 0 * score
    rewards[-1] += score[0]
    return rewards


def gae(rewards, values, gamma=1.0, lam=0.95):
    """For one completion: rewards (L,), values (L,) -> (advantages (L,), returns (L,))."""
    advantages = []
    advantage = next_value = 0.0
    for reward, value in zip(reversed(rewards.tolist()), reversed(values.tolist())):
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * advantage                # eq. 16 of GAE, from the end
        next_value = value
        advantages.append(advantage)
    advantages = torch.tensor(advantages[::-1], dtype=torch.float64)
    return advantages, advantages + values


def whiten(parts, shift_mean=True):
    """A list of (L,) -> the same, over all entries together with variance 1 (the unbiased one: REINFORCE++'s
    is biased), and with mean 0 or the mean they have. NaN, for completions without a reward, counts
    nowhere."""
    known = torch.cat(parts)
    known = known[~known.isnan()]
    if alike(known):
        return [0 * part for part in parts] if shift_mean else parts
    mean = known.mean()
    variance = known.var() if len(known) > 1 else torch.tensor(0.0)
    target = 0.0 if shift_mean else mean
    return [(part - mean) * torch.rsqrt(variance + 1e-8) + target for part in parts]


def ppo_policy_loss(logps, old_logps, advantages, cliprange=0.2):
    """Three (N,) -> (losses (N,), metrics); nothing is reduced."""
    log_ratios = logps - old_logps
    ratios = log_ratios.exp()                                                           # (N,) rho
    plain = ratios * advantages
    clipped = ratios.clamp(1 - cliprange, 1 + cliprange) * advantages
    losses = -torch.min(plain, clipped)                                                 # (N,) eq. 7
    metrics = {
        "loss/policy_avg": losses,
        "policy/approxkl_avg": log_ratios ** 2 / 2,
        "policy/clipfrac_avg": clipped < plain,
        "policy/entropy_avg": -logps,
        "val/ratio": ratios,
        "val/ratio_var": (ratios - 1) ** 2,
    }
    return losses, metrics


def ppo_value_loss(values, old_values, returns, cliprange_value=0.2):
    """Three (N,) -> (losses (N,), metrics); nothing is reduced."""
    # not old_values + (values - old_values).clamp(...): so a value within the range is itself to the bit
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    errors = (values - returns) ** 2
    clipped_errors = (clipped - returns) ** 2
    losses = torch.max(errors, clipped_errors) / 2                                      # (N,)
    return losses, {"loss/value_avg": losses, "val/clipfrac_avg": clipped_errors > errors}


def rollout_metrics(rollout, rewards, advantages) -> dict:
    """The metrics of a rollout before its first update; `rewards` and `advantages` are not whitened."""
    def sums(parts):
        return torch.stack([part.sum() for part in parts])

    scores = torch.cat(rollout.scores)
    rlhf_rewards = sums(rewards)
    old_logps = sums(rollout.old_logps)
    returns = torch.cat(rollout.returns)
    advantages = torch.cat(advantages)
    metrics = {
        "objective/scores": scores.nanmean(),
        "objective/rlhf_reward": rlhf_rewards.nanmean(),
        "objective/non_score_reward": (rlhf_rewards - scores).nanmean(),
        "objective/kl": (old_logps - sums(rollout.reference_logps)).mean(),
        "objective/entropy": -old_logps.mean(),
        "val/mean": torch.cat(rollout.old_values).mean(),
        "val/num_eos_tokens": (~torch.cat(rollout.truncated)).sum(),
    }
    known = ~returns.isnan()                                     # a completion without a reward has no return
    if known.sum() > 1 and returns[known].var() > 0:
        metrics["val/explained_variance"] = 1 - advantages[known].var() / returns[known].var()
    return {name: float(value) for name, value in metrics.items() if not value.isnan()}      # means over none


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer            # the weights of the policy and its critic
    reference = engine.reference(config.reference)
    penalty = config.missing_eos_penalty or 0.0

    for rollout in engine.rollouts(config, config.num_sample_generations):                   # 1 sample
        engine.score(rollout)                                                                # 2 reward
        rollout.once(("old_logps", "old_values"), engine.logps_and_values, rollout)
        rollout.once("reference_logps", engine.logps, reference, rollout)
        scores, rewards = [], []
        completions = zip(rollout.rewards, rollout.truncated, rollout.old_logps, rollout.reference_logps)
        for reward, truncated, old_logps, reference_logps in completions:
            score = reward - penalty * truncated                                             # (1,)
            scores.append(score)
            log_ratios = old_logps - reference_logps                                         # (L,)
            rewards.append(token_rewards(score, log_ratios, config.kl_coef, config.kl_estimator))
        scaled = whiten(rewards, shift_mean=False) if config.whiten_rewards else rewards
        advantages, returns = [], []
        for token_reward, old_values in zip(scaled, rollout.old_values):                     # 3 advantage
            advantage, value_target = gae(token_reward, old_values, config.gamma, config.lam)
            advantages.append(advantage)
            returns.append(value_target)
        rollout.scores = scores
        rollout.returns = returns
        rollout.advantages = whiten(advantages)
        rollout.metrics |= rollout_metrics(rollout, rewards, advantages) | engine.episodes(rollout)
        for step in engine.steps(rollout):
            for batch in step:                                     # 4 loss, one micro-batch
                logps, values = policy(batch, config.temperature, values=True)               # (N,), (N,)
                old_logps = engine.old_logps(batch, logps)         # (N,) when they were sampled
                advantages = batch.extra("advantages")
                advantages = importance_weighted(engine, batch, old_logps, advantages)  # if vLLM drew
                policy_losses, metrics = ppo_policy_loss(
                    logps, old_logps, advantages, config.cliprange)
                value_losses, value_metrics = ppo_value_loss(
                    values, batch.extra("old_values"), batch.extra("returns"), config.cliprange_value)
                losses = policy_losses + config.vf_coef * value_losses
                (losses.sum() / step.num_tokens).backward()        # mean over the tokens of the whole update
                step.log(losses, metrics | value_metrics)
            engine.clip_gradients()                            # 5 update; stops if loss or norm is not finite
            optimizer.step()
            optimizer.zero_grad()
