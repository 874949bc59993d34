"""CPO: Contrastive Preference Optimization - DPO without a reference; the likelihood of the chosen responses
keeps the policy in place instead.

Paper:    Xu et al. 2024, arXiv 2401.08417; the loss is eq. 5; cpo_alpha weighs its second term (paper: 1)
Formula:  L = -log sigmoid( beta * [ log pi(y_w|x) - log pi(y_l|x) ] )  +  cpo_alpha * NLL(y_w|x)
Symbols:  log pi(y_w|x)      policy_chosen_logps      sum over the chosen response's tokens, stop token too
          log pi(y_l|x)      policy_rejected_logps    the same for the rejected response
          NLL(y_w|x)         nll                      -log pi of every token of the chosen response
Shapes:   (N,) trained tokens of a micro-batch, (S,) its responses, (B,) its pairs;
          S = 2 B: each pair's chosen response, then its rejected one
Trains:   the policy: every weight, or with lora_r an adapter. No other model.
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages; HH-RLHF transcripts
Normalised by: the first term by the pairs of the whole update, the second by its chosen tokens, over all
          micro-batches and ranks
Metrics:  loss                                both terms
          nll_loss                            token mean of -log pi(y_w|x)
          rewards/chosen, rewards/rejected    beta * summed log-probs
          rewards/margins                     chosen - rejected
          rewards/accuracies                  share of pairs with margin > beta * 1e-4 (bf16: beta * 0.05):
                                              a smaller one is rounding, a tie. Not 0.5 at step 0: sums
                                              favour short responses
          logps/chosen, logps/rejected        summed log-probs under the policy
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: none in the loss; like the authors' code, sums in the first term and a token mean
          in the second
Run:      python train.py example/tiny-cpo.yml
"""
from dataclasses import dataclass

import torch.nn.functional as F

from data.pack import Batch
from engine.loop import Engine
from engine.options import NonNegative, Options, Positive, Smoothing

DATA = "pairs"                     # every row holds a prompt, a chosen and a rejected response
MODEL = "policy"                   # what is trained
PROGRESS = "rewards/accuracies"    # the number shown beside the loss


@dataclass
class Config(Options):
    beta: Positive = 0.1           # steepness of the preference term
    cpo_alpha: NonNegative = 1.0   # weight of the chosen responses' negative log-likelihood
    label_smoothing: Smoothing = 0.0    # share of pairs assumed to have swapped labels


def cpo_loss(policy_chosen_logps, policy_rejected_logps, beta=0.1, label_smoothing=0.0, tie=0.0):
    """Two (B,) summed log-probs -> (losses (B,), metrics); nothing is reduced.
    `train` adds the likelihood term.
    `tie`: log-probs that differ by less are equal."""
    chosen_rewards = beta * policy_chosen_logps                                         # (B,)
    rejected_rewards = beta * policy_rejected_logps                                     # (B,)
    margins = chosen_rewards - rejected_rewards                                         # (B,)
    losses = (-(1 - label_smoothing) * F.logsigmoid(margins)                          # (B,) eq. 5, first term
              - label_smoothing * F.logsigmoid(-margins))                               # the labels swapped
    metrics = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": margins > beta * tie,
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
    }
    return losses, metrics


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer

    def forward(batch: Batch):
        logps = policy(batch)                                                           # (N,)
        policy_chosen_logps, policy_rejected_logps = batch.pairs(batch.sum(logps))      # (B,), (B,)
        losses, metrics = cpo_loss(policy_chosen_logps, policy_rejected_logps, config.beta,
                                   config.label_smoothing, policy.tolerance)
        nll = -batch.chosen(logps)                                         # (tokens of the chosen responses,)
        return losses, nll, metrics | {"nll_loss": nll}

    for step in engine.steps():                                    # one optimizer update
        for batch in step:                                         # one micro-batch
            losses, nll, metrics = forward(batch)
            loss = losses.sum() / step.num_examples                # mean over the pairs of the whole update
            nll_loss = nll.sum() / step.num_chosen_tokens    # mean over the chosen tokens of the whole update
            (loss + config.cpo_alpha * nll_loss).backward()
            step.log((losses, config.cpo_alpha * nll), metrics)
        engine.clip_gradients()                                    # stops here if loss or norm is not finite
        optimizer.step()
        optimizer.zero_grad()
        for batch in engine.eval_batches(step):                    # empty unless an evaluation is due
            losses, nll, metrics = forward(batch)
            step.log((losses, config.cpo_alpha * nll), metrics, split="eval")
