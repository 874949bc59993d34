"""Which sampler draws completions, and how far it is from the training forward. Another engine than the own
sampler draws from a slightly different policy: importance weights take that out of the loss."""
from dataclasses import replace

import torch

from data.errors import RunError, UserError
from data.pack import Example, Response
from engine.ranks import distributed
from engine.vllm_server import VllmServer
from model.sampler import sample
from model.vllm import VllmSampler

SAMPLER = "sampling/sampling_logp_difference/mean"
RATIO = "sampling/importance_ratio"
HIGHEST = 2.0                  # importance weights are truncated here
BAND = 0.5, 5.0                # or masked outside
TOLD, STOPPED = 0.1, 1.0       # mean differences in log-prob per token
FEW, SHORT = 4, 16             # prompts, and tokens of their completions, compared before others are drawn


def sampler_of(engine, config):
    """The function that draws completions, with the signature of model.sampler.sample."""
    if not config.rollout_engine:
        return sample
    common = engine.config
    return other_engine(engine.policy, engine.tokenizer, config, common.max_length, common.seed,
                        engine.run.directory).sample


def other_engine(policy, tokenizer, config, max_length: int, seed: int, output: str):
    """The engine that `config.rollout_engine` names, a VllmSampler or a VllmServer. `max_length`: tokens of
    the longest prompt and its completion; `output`: the directory of the run. UserError where it cannot be
    had, or not for this policy."""
    if hasattr(policy.lm, "peft_config"):
        raise UserError(f"rollout_engine is {config.rollout_engine}, which gets whole weights, and the model "
                        "is an adapter; fix: give a merged model, or remove rollout_engine")
    if config.rollout_engine != "vllm":
        return VllmServer(config.rollout_engine, policy, tokenizer, output, max_length)
    _, world = distributed()
    sharing = config.vllm_tensor_parallel
    if world % sharing:
        raise UserError(f"vllm_tensor_parallel is {sharing}, which does not divide the number of processes, "
                        f"{world}; fix: start {sharing} under torchrun, or give 1")
    return VllmSampler(policy, tokenizer, max_length, config.vllm_memory, seed, sharing)


def importance_weighted(engine, batch, old_logps: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """Advantages per token (N,), or per completion (S,), times the importance weights: the ratio of the
    policy's probability to that of the engine which sampled, truncated or masked. A loss that is proportional
    to its advantages is weighted by that, too. The same tensor where the own sampler drew.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training". TRL
    1.16 leaves out whole completions whose ratio is above 3, unless it is told otherwise."""
    config = engine.online.config
    if not config.rollout_engine or config.importance_sampling == "off":
        return advantages
    log_ratios = old_logps - batch.extra("sampler_logps")
    if len(advantages) != len(log_ratios):
        log_ratios = batch.sum(log_ratios)                       # (S,)
    weights = importance_weights(log_ratios.exp(), config.importance_sampling)
    log_weights(engine.step, weights)
    return advantages * weights


def importance_weights(ratios: torch.Tensor, how: str) -> torch.Tensor:
    """The ratios, at most HIGHEST; or with "mask" 0 in the place of those outside BAND."""
    if how == "truncate":
        return ratios.clamp(max=HIGHEST)
    lowest, highest = BAND
    is_outside = (ratios < lowest) | (ratios > highest)
    return ratios.masked_fill(is_outside, 0.0)


def log_weights(step, weights: torch.Tensor) -> None:
    """Log their mean and extremes over the update. All ranks, which have the same number of micro-batches,
    call this for each, where one may have no weights."""
    step.add({f"{RATIO}/mean": weights})
    extremes = torch.full((2,), -torch.inf, dtype=torch.float64, device=weights.device)      # -min, max
    if len(weights):
        extremes = torch.stack([-weights.min(), weights.max()]).double()
    totals = step.totals["train"]
    for i, (name, sign) in enumerate((("min", -1), ("max", 1))):
        if (f"{RATIO}/{name}", 0) in totals:
            before, _ = totals[f"{RATIO}/{name}", 0]
            extremes[i] = torch.maximum(extremes[i], sign * before)
    if step.engine.world > 1:
        torch.distributed.all_reduce(extremes, torch.distributed.ReduceOp.MAX)
    totals[f"{RATIO}/min", 0] = [-extremes[0], 1]
    totals[f"{RATIO}/max", 0] = [extremes[1], 1]


def check_sampler(engine, step) -> None:
    """The check below for the rollout of an update, where its difference was logged."""
    totals = step.totals["train"]
    if (SAMPLER, 0) in totals:
        check_difference(engine, *totals[SAMPLER, 0])


def check_difference(engine, total: torch.Tensor, count: int) -> None:
    """RunError where the training forward gives the rollout's tokens other log-probs than the sampler, on
    average: this rank's sum of differences and its count of tokens. Another engine rounds otherwise: a large
    difference is told, and one that cannot be rounding stops."""
    difference = engine.mean(total, count)
    place = f"rollout {engine.online.rollout.number + 1}"
    if engine.online.config.rollout_engine:
        fix = "precision: fp32, or remove rollout_engine"
        judge(difference, place, RunError, engine.notice, fix)
    elif not difference <= engine.policy.rounding:
        raise RunError(f"the training forward and the sampler differ by {difference:.2g} in log-prob per "
                       f"token of {place}; fix: use a model with ordinary attention layers, or precision: "
                       "fp32")


def judge(difference: float, place: str, kind: type[UserError], notice, fix: str) -> None:
    """An error of this `kind` where another engine computes another model, and a notice with a `fix` where it
    is far: by their mean difference in log-prob per token of the `place`."""
    fault = f"the training forward and vLLM differ by {difference:.2g} in log-prob per token of {place}"
    if not difference <= STOPPED:
        raise kind(f"{fault}: it computes another model; fix: remove rollout_engine")
    if difference > TOLD:
        notice(f"{fault}; fix: {fix}")


@torch.no_grad()
def check_engine(engine, policy, tokenizer, prompts: list, seed: int, sampling, notice) -> None:
    """The check above where nothing is trained, on a few short completions of `prompts` (token ids), which
    are drawn for that at temperature 1. UserError where the `engine`, which has the policy's weights,
    computes another model."""
    prompts = sorted(prompts, key=len)[:FEW]
    keys = [(seed, i) for i in range(len(prompts))]
    longest = min(SHORT, sampling.max_completion_length)
    sampling = replace(sampling, temperature=1.0, max_completion_length=longest)
    drawn = engine.draw(policy, tokenizer, prompts, keys, 1, sampling)
    total = count = 0
    for prompt, (completion,) in zip(prompts, drawn):
        response = Response.all_trained(completion.tokens)
        logps = policy(policy.collate([Example(prompt, [response], "", {})]), 1.0)
        differences = logps - torch.from_numpy(completion.logps).to(logps)
        total += float(differences.abs().sum())
        count += len(differences)
    judge(total / count, f"{len(prompts)} short completions", UserError, notice, "remove rollout_engine")
