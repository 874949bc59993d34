"""RPO: DPO plus the likelihood of the chosen responses, which keeps their log-probs from falling.

Paper:    Pang et al. 2024 (Iterative Reasoning Preference Optimization), arXiv 2404.19733, eq. 1; the first
          term is DPO's, Rafailov et al. 2023, arXiv 2305.18290, eq. 7
Formula:  L = -log sigmoid( beta * [ log pi(y_w|x) / pi_ref(y_w|x)  -  log pi(y_l|x) / pi_ref(y_l|x) ] )
              + alpha * NLL(y_w|x)
Symbols:  log pi(y_w|x)      policy_chosen_logps      sum over the chosen response's tokens, stop token too
          log pi(y_l|x)      policy_rejected_logps    the same for the rejected response
          log pi_ref(...)    reference_chosen_logps, reference_rejected_logps
          beta * log-ratio   chosen_rewards, rejected_rewards: the implicit rewards of DPO's eq. 5
          NLL(y_w|x)         nll                      -log pi of every token of the chosen response
          alpha              rpo_alpha
Shapes:   (N,) trained tokens of a micro-batch, (S,) its responses, (B,) its pairs;
          S = 2 B: each pair's chosen response, then its rejected one
Trains:   the policy: every weight, or with lora_r an adapter. The reference is frozen; its log-probs are
          computed once, before the first update, so that no second model is in memory.
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages; HH-RLHF transcripts
Normalised by: the first term by the pairs of the whole update, the second by its chosen tokens, over all
          micro-batches and ranks
Metrics:  loss                                log 2 + rpo_alpha * nll_loss at step 0, where policy = reference
          nll_loss                            token mean of -log pi(y_w|x)
          rewards/chosen, rewards/rejected    implicit rewards; 0 at step 0
          rewards/margins                     chosen - rejected; 0 at step 0
          rewards/accuracies                  share of pairs with margin > beta * 1e-4 (bf16: beta * 0.05):
                                              a smaller one is rounding, a tie; 0 at step 0, except for
                                              rounding of sums above 1,000 nats and of bf16
          logps/chosen, logps/rejected        summed log-probs under the policy
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: the likelihood is a mean over the chosen tokens of the update, where the paper
          takes a mean over each response's tokens; label smoothing (cDPO). The paper samples the pairs from
          the model and repeats the training from its result; here the pairs are given
Run:      python train.py example/tiny-rpo.yml
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
    beta: Positive = 0.1           # KL strength: larger keeps the policy closer to the reference (0.01-0.5)
    label_smoothing: Smoothing = 0.0    # share of pairs assumed to have swapped labels (cDPO)
    rpo_alpha: NonNegative = 1.0   # weight of the chosen responses' negative log-likelihood
    reference: str | None = None   # model directory or hub name; null = the start model

    def uses_reference(self) -> bool:
        return True


def rpo_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    beta=0.1,
    label_smoothing=0.0,
    tie=0.0,
):
    """Four (B,) summed log-probs -> (losses (B,), metrics); nothing is reduced.
    `train` adds the likelihood term.
    `tie`: log-ratios that differ by less are equal."""
    chosen_logratios = policy_chosen_logps - reference_chosen_logps                     # (B,)
    rejected_logratios = policy_rejected_logps - reference_rejected_logps               # (B,)
    chosen_rewards = beta * chosen_logratios                                            # (B,) eq. 5
    rejected_rewards = beta * rejected_logratios                                        # (B,)
    margins = chosen_rewards - rejected_rewards                                         # (B,)
    losses = (-(1 - label_smoothing) * F.logsigmoid(margins)                            # (B,) eq. 7
              - label_smoothing * F.logsigmoid(-margins))                           # cDPO: the labels swapped
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
    reference = engine.reference(config.reference)

    def forward(batch: Batch):
        token_logps = policy(batch)                                                     # (N,)
        logps = batch.sum(token_logps)                                                  # (S,)
        reference_logps = batch.sum(reference(batch))                                   # (S,)
        policy_chosen_logps, policy_rejected_logps = batch.pairs(logps)                 # (B,), (B,)
        reference_chosen_logps, reference_rejected_logps = batch.pairs(reference_logps)
        losses, metrics = rpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
            config.beta,
            config.label_smoothing,
            policy.tolerance,      # 1e-4, in bf16 0.05
        )
        nll = -batch.chosen(token_logps)                                   # (tokens of the chosen responses,)
        return losses, nll, metrics | {"nll_loss": nll}

    for step in engine.steps():                                    # one optimizer update
        for batch in step:                                         # one micro-batch
            losses, nll, metrics = forward(batch)
            loss = losses.sum() / step.num_examples                # mean over the pairs of the whole update
            nll_loss = nll.sum() / step.num_chosen_tokens    # mean over the chosen tokens of the whole update
            (loss + config.rpo_alpha * nll_loss).backward()
            step.log((losses, config.rpo_alpha * nll), metrics)
        engine.clip_gradients()                                    # stops here if loss or norm is not finite
        optimizer.step()
        optimizer.zero_grad()
        for batch in engine.eval_batches(step):                    # empty unless an evaluation is due
            losses, nll, metrics = forward(batch)
            step.log((losses, config.rpo_alpha * nll), metrics, split="eval")
