"""DPO: Direct Preference Optimization - a classification loss on pairs, without reward model or sampling.

Paper:    Rafailov et al. 2023, arXiv 2305.18290; the loss is eq. 7. Label smoothing is cDPO (Mitchell 2023);
          average_log_prob is the length-normalised DPO of Tulu 3, arXiv 2411.15124, section 5
Formula:  L = -log sigmoid( beta * [ log pi(y_w|x) / pi_ref(y_w|x)  -  log pi(y_l|x) / pi_ref(y_l|x) ] )
Symbols:  log pi(y_w|x)      policy_chosen_logps      sum over the chosen response's tokens, stop token too;
                                                      with average_log_prob their mean
          log pi(y_l|x)      policy_rejected_logps    the same for the rejected response
          log pi_ref(...)    reference_chosen_logps, reference_rejected_logps
          beta * log-ratio   chosen_rewards, rejected_rewards: the implicit rewards of eq. 5, up to a
                             constant that depends on x only
Shapes:   (N,) trained tokens of a micro-batch, (S,) its responses, (B,) its pairs;
          S = 2 B: each pair's chosen response, then its rejected one
Trains:   the policy: every weight, or with lora_r an adapter. The reference is frozen; its log-probs are
          computed once, before the first update, so that no second model is in memory.
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages; HH-RLHF transcripts
Normalised by: the pairs of the whole update, over all micro-batches and ranks
Metrics:  loss                                log 2 = 0.6931 at step 0, where policy = reference
          rewards/chosen, rewards/rejected    implicit rewards; 0 at step 0
          rewards/margins                     chosen - rejected; 0 at step 0
          rewards/accuracies                  share of pairs with margin > beta * 1e-4 (bf16: beta * 0.05):
                                              a smaller one is rounding, a tie; 0 at step 0, except for
                                              rounding of sums above 1,000 nats and of bf16. With means
                                              times (1 / |y_w| + 1 / |y_l|), as in ipo
          logps/chosen, logps/rejected        summed log-probs under the policy, with average_log_prob mean
                                              ones. Both usually fall: the loss only widens their distance
                                              (rpo keeps the chosen ones up)
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: AdamW with a linear schedule, where its code uses RMSprop; label smoothing (cDPO);
          average_log_prob
Run:      python train.py example/tiny-dpo.yml
"""
from dataclasses import dataclass

import torch.nn.functional as F

from data.pack import Batch
from engine.loop import Engine
from engine.options import Options, Positive, Smoothing

DATA = "pairs"                     # every row holds a prompt, a chosen and a rejected response
MODEL = "policy"                   # what is trained
PROGRESS = "rewards/accuracies"    # the number shown beside the loss


@dataclass
class Config(Options):
    beta: Positive = 0.1           # KL strength: larger keeps the policy closer to the reference (0.01-0.5)
    label_smoothing: Smoothing = 0.0    # share of pairs assumed to have swapped labels (cDPO); 0 = plain DPO
    average_log_prob: bool = False  # true = means over tokens, so that length does not count (Tulu 3, OLMo,
    #                                 with beta 5); false = sums, as in the paper
    reference: str | None = None   # model directory or hub name; null = the start model
    reference_free: bool = False   # true = no reference: its log-probs count as 0

    def uses_reference(self) -> bool:
        return not self.reference_free


def dpo_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    beta=0.1,
    label_smoothing=0.0,
    tie=0.0,
):
    """Four (B,) summed (or mean) log-probs -> (losses (B,), metrics); nothing is reduced.
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
    reference = None
    if not config.reference_free:
        reference = engine.reference(config.reference)

    def forward(batch: Batch):
        per_response = batch.mean if config.average_log_prob else batch.sum             # (N,) -> (S,)
        logps = per_response(policy(batch))                                             # (S,)
        reference_logps = per_response(reference(batch)) if reference else 0 * logps.detach()
        policy_chosen_logps, policy_rejected_logps = batch.pairs(logps)                 # (B,), (B,)
        reference_chosen_logps, reference_rejected_logps = batch.pairs(reference_logps)
        ties = sum(batch.pairs(batch.per_token(policy.tolerance)))                      # (B,) for two means
        return dpo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
            config.beta,
            config.label_smoothing,
            ties if config.average_log_prob else policy.tolerance,      # 1e-4, in bf16 0.05
        )

    for step in engine.steps():                                    # one optimizer update
        for batch in step:                                         # one micro-batch
            losses, metrics = forward(batch)
            (losses.sum() / step.num_examples).backward()          # mean over the pairs of the whole update
            step.log(losses, metrics)
        engine.clip_gradients()                                    # stops here if loss or norm is not finite
        optimizer.step()
        optimizer.zero_grad()
        for batch in engine.eval_batches(step):                    # empty unless an evaluation is due
            losses, metrics = forward(batch)
            step.log(losses, metrics, split="eval")
