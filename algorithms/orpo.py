"""ORPO: Odds Ratio Preference Optimization - fine-tuning and preference in one stage, from a base model,
without a reference.

Paper:    Hong et al. 2024, arXiv 2403.07691; the loss is eq. 6 and 7, with beta for the paper's lambda
Formula:  L = NLL(y_w|x)  -  beta * log sigmoid( log [ odds(y_w|x) / odds(y_l|x) ] )
          odds(y|x) = P / (1 - P)
Symbols:  P(y_w|x)         exp(policy_chosen_logps)      geometric mean of the tokens' probabilities, with the
                                                         stop token
          P(y_l|x)         exp(policy_rejected_logps)    the same for the rejected response
          NLL(y_w|x)       nll                           -log pi of every token of the chosen response
Shapes:   (N,) trained tokens of a micro-batch, (S,) its responses, (B,) its pairs;
          S = 2 B: each pair's chosen response, then its rejected one
Trains:   the policy: every weight, or with lora_r an adapter. No other model.
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages; HH-RLHF transcripts
Normalised by: the likelihood by the chosen tokens of the whole update, the odds-ratio term by its pairs, over
          all micro-batches and ranks
Metrics:  loss                                both terms
          nll_loss                            token mean of -log pi(y_w|x): most of the loss
          log_odds_chosen                     log of the odds ratio
          log_odds_ratio                      its log-sigmoid; -0.6931 where both responses are equally likely
          rewards/chosen, rewards/rejected    beta * mean log-probs
          rewards/margins                     chosen - rejected
          rewards/accuracies                  share of pairs with margin > beta * 1e-4 (bf16: beta * 0.05)
                                              * (1 / |y_w| + 1 / |y_l|): a smaller one is rounding, a tie
          logps/chosen, logps/rejected        mean log-probs under the policy
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: the likelihood is the response's, as in eq. 2; the authors' code (and TRL) add
          the prompt's tokens by default. 1 - P is computed as log1mexp in fp32 with P below 1 - 1e-7, so that
          a certain response gives no infinity
Run:      python train.py example/tiny-orpo.yml
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.pack import Batch
from engine.loop import Engine
from engine.options import Options, Positive

DATA = "pairs"                     # every row holds a prompt, a chosen and a rejected response
MODEL = "policy"                   # what is trained
PROGRESS = "rewards/accuracies"    # the number shown beside the loss


@dataclass
class Config(Options):
    beta: Positive = 0.1           # weight of the odds-ratio term, the paper's lambda (0.1 to 0.25)


def log_odds(logps):
    """log( P / (1 - P) ) for P = exp(logps), in fp32 and finite for every logps <= 0; the same shape."""
    logps = logps.float().clamp(max=-1e-7)
    # log(1 - exp(x)): expm1 keeps the digits near 0, log1p those far below
    near, far = torch.log(-torch.expm1(logps)), torch.log1p(-torch.exp(logps))
    return logps - torch.where(logps > -0.6931472, near, far)


def orpo_loss(policy_chosen_logps, policy_rejected_logps, beta=0.1, tie=0.0):
    """Two (B,) mean log-probs -> (losses (B,), metrics); nothing is reduced.
    `train` adds the likelihood term.
    `tie`: log-probs that differ by less are equal."""
    log_odds_chosen = log_odds(policy_chosen_logps) - log_odds(policy_rejected_logps)   # (B,) eq. 4
    log_odds_ratio = F.logsigmoid(log_odds_chosen)                                      # (B,)
    losses = -beta * log_odds_ratio                                         # (B,) eq. 7, weighted as in eq. 6
    metrics = {
        "log_odds_chosen": log_odds_chosen,
        "log_odds_ratio": log_odds_ratio,
        "rewards/chosen": beta * policy_chosen_logps,
        "rewards/rejected": beta * policy_rejected_logps,
        "rewards/margins": beta * (policy_chosen_logps - policy_rejected_logps),
        "rewards/accuracies": policy_chosen_logps - policy_rejected_logps > tie,
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
    }
    return losses, metrics


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer

    def forward(batch: Batch):
        logps = policy(batch)                                                           # (N,)
        policy_chosen_logps, policy_rejected_logps = batch.pairs(batch.mean(logps))     # (B,), (B,)
        ties = sum(batch.pairs(batch.per_token(policy.tolerance)))                      # (B,) for two means
        losses, metrics = orpo_loss(policy_chosen_logps, policy_rejected_logps, config.beta, ties)
        nll = -batch.chosen(logps)                                         # (tokens of the chosen responses,)
        return losses, nll, metrics | {"nll_loss": nll}

    for step in engine.steps():                                    # one optimizer update
        for batch in step:                                         # one micro-batch
            losses, nll, metrics = forward(batch)
            loss = losses.sum() / step.num_examples                # mean over the pairs of the whole update
            nll_loss = nll.sum() / step.num_chosen_tokens    # mean over the chosen tokens of the whole update
            (loss + nll_loss).backward()
            step.log((losses, nll), metrics)
        engine.clip_gradients()                                    # stops here if loss or norm is not finite
        optimizer.step()
        optimizer.zero_grad()
        for batch in engine.eval_batches(step):                    # empty unless an evaluation is due
            losses, nll, metrics = forward(batch)
            step.log((losses, nll), metrics, split="eval")
