"""DPO: Direct Preference Optimization - a classification loss on pairs that needs no reward model and no sampling.

Paper:    Rafailov et al. 2023, arXiv 2305.18290; the loss is eq. 7. Label smoothing is cDPO (Mitchell 2023).
Formula:  L = -log sigmoid( beta * [ log pi(y_w|x) / pi_ref(y_w|x)  -  log pi(y_l|x) / pi_ref(y_l|x) ] )
Symbols:  log pi(y_w|x)      policy_chosen_logps       sum over the tokens of the chosen response, stop token included
          log pi(y_l|x)      policy_rejected_logps     the same of the rejected response
          log pi_ref(...)    reference_chosen_logps, reference_rejected_logps
          beta * [log-ratio] chosen_rewards, rejected_rewards: the implicit rewards of eq. 5, up to a constant of x
Trains:   the policy, every weight. The reference is frozen; its log-probs are computed once, before the first update,
          so that no second model is in memory while training.
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages; HH-RLHF transcripts as they are
Divided:  by the pairs of the whole update, over all micro-batches and ranks.
Metrics:  loss                                log 2 = 0.6931 at step 0, where policy = reference
          rewards/chosen, rewards/rejected    implicit rewards; 0 at step 0
          rewards/margins                     chosen - rejected; 0 at step 0
          rewards/accuracies                  share of pairs with margin > 0; a tie is not a win: 0 at step 0, but for rounding
          logps/chosen, logps/rejected        summed log-probs under the policy
Differs:  AdamW with a linear schedule where the paper's code uses RMSprop; label smoothing is cDPO's, which the paper lacks.
Run:      python train.py example/tiny-dpo.yml
"""
from dataclasses import dataclass

import torch.nn.functional as F

DATA = "pairs"                     # every row holds a prompt, a chosen and a rejected response
PROGRESS = "rewards/accuracies"    # the number shown beside the loss


@dataclass
class Config:
    beta: float = 0.1              # leash to the reference: larger stays closer (0.01 to 0.5)
    label_smoothing: float = 0.0   # share of pairs assumed to be labelled the wrong way round (cDPO); 0 is plain DPO
    reference: str | None = None   # model directory or hub name; none: the start model


def dpo_loss(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
             beta=0.1, label_smoothing=0.0):
    """Four (B,) summed log-probs -> (losses (B,), metrics); nothing is reduced."""
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)              # (B,) eq. 5
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)        # (B,)
    margins = chosen_rewards - rejected_rewards                                         # (B,)
    losses = (-(1 - label_smoothing) * F.logsigmoid(margins)                            # (B,) eq. 7
              - label_smoothing * F.logsigmoid(-margins))                               # cDPO: the pair the other way round
    metrics = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
        "logps/chosen": policy_chosen_logps,
        "logps/rejected": policy_rejected_logps,
    }
    return losses, metrics


def train(engine, config):
    policy, optimizer = engine.policy, engine.optimizer
    reference = engine.reference(config.reference)

    def pair_logps(model, batch):
        """Summed log-probs of the chosen and the rejected responses, which alternate in the batch: (B,), (B,)."""
        return batch.sum(model(batch)).view(-1, 2).unbind(1)

    def forward(batch):
        return dpo_loss(*pair_logps(policy, batch), *pair_logps(reference, batch), config.beta, config.label_smoothing)

    for step in engine.steps():                                    # one optimizer update
        for batch in step:                                         # one micro-batch
            losses, metrics = forward(batch)
            (losses.sum() / step.num_examples).backward()          # mean over the pairs of the whole update
            step.log(losses, metrics)
        engine.clip_gradients()                                    # stops on a non-finite loss or norm, before the update
        optimizer.step()
        optimizer.zero_grad()
        for batch in engine.eval_batches(step):                    # empty unless an evaluation is due
            step.log(*forward(batch), split="eval")
