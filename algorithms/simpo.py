"""SimPO: Simple Preference Optimization - the length-averaged likelihood is the reward, and a margin takes
the reference's place.

Paper:    Meng et al. 2024, arXiv 2405.14734; the loss is eq. 6. cpo_alpha > 0 is CPO-SimPO
Formula:  L = -log sigmoid( beta / |y_w| * log pi(y_w|x)  -  beta / |y_l| * log pi(y_l|x)  -  gamma )
Symbols:  log pi(y_w|x) / |y_w|    policy_chosen_logps      mean over the chosen response's tokens, with the
                                                            stop token
          log pi(y_l|x) / |y_l|    policy_rejected_logps    the same for the rejected response
          gamma                    simpo_gamma              the margin by which the chosen response has to win
Shapes:   (N,) trained tokens of a micro-batch, (S,) its responses, (B,) its pairs;
          S = 2 B: each pair's chosen response, then its rejected one
Trains:   the policy: every weight, or with lora_r an adapter. No other model.
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages; HH-RLHF transcripts
Normalised by: the pairs of the whole update, over all micro-batches and ranks; with cpo_alpha, the likelihood
          of the chosen responses by their tokens in the whole update
Metrics:  loss                                1.3133 where both means are equal, with beta 2 and simpo_gamma 1
          nll_loss                            token mean of -log pi(y_w|x)
          rewards/chosen, rewards/rejected    beta * mean log-probs
          rewards/margins                     chosen - rejected, without simpo_gamma
          rewards/accuracies                  share of pairs with margin > beta * 1e-4 (bf16: beta * 0.05)
                                              * (1 / |y_w| + 1 / |y_l|): a smaller one is rounding, a tie
          logps/chosen, logps/rejected        mean log-probs under the policy
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: label smoothing and cpo_alpha are later additions; both are off. The paper tunes
          gamma as a share of beta (0.3 to 0.6)
Run:      python train.py example/tiny-simpo.yml
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
    beta: Positive = 2.0           # scale of the mean log-probs (2 to 10)
    simpo_gamma: NonNegative = 1.0    # target margin between the rewards: 0.3 to 0.6 times beta
    cpo_alpha: NonNegative = 0.0   # weight of the chosen responses' negative log-likelihood; 0 = plain SimPO
    label_smoothing: Smoothing = 0.0    # share of pairs assumed to have swapped labels


def simpo_loss(policy_chosen_logps, policy_rejected_logps,
               beta=2.0, simpo_gamma=1.0, label_smoothing=0.0, tie=0.0):
    """Two (B,) mean log-probs -> (losses (B,), metrics); nothing is reduced.
    `train` adds the likelihood term.
    `tie`: log-probs that differ by less are equal."""
    chosen_rewards = beta * policy_chosen_logps                                         # (B,) eq. 4
    rejected_rewards = beta * policy_rejected_logps                                     # (B,)
    margins = chosen_rewards - rejected_rewards                                         # (B,)
    losses = (-(1 - label_smoothing) * F.logsigmoid(margins - simpo_gamma)              # (B,) eq. 6
              - label_smoothing * F.logsigmoid(simpo_gamma - margins))                  # the labels swapped
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
        policy_chosen_logps, policy_rejected_logps = batch.pairs(batch.mean(logps))     # (B,), (B,)
        ties = sum(batch.pairs(batch.per_token(policy.tolerance)))                      # (B,) for two means
        losses, metrics = simpo_loss(policy_chosen_logps, policy_rejected_logps, config.beta,
                                     config.simpo_gamma, config.label_smoothing, ties)
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
