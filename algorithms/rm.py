"""RM: a reward model - scores a response with one number, so that the preferred one of two scores higher.

Paper:    Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155, eq. 1 (Bradley-Terry). The margin is Llama 2's,
          arXiv 2307.09288, eq. 2; centering is arXiv 2312.09244
Formula:  L = -log sigmoid( r(x,y_w) - r(x,y_l) - m )  +  lambda * ( r(x,y_w) + r(x,y_l) )^2
Symbols:  r(x,y_w)      chosen_rewards       a linear head without bias on the response's last hidden state
          r(x,y_l)      rejected_rewards     the same for the rejected response
          m             margins              0, or the row's `margin`
          lambda        center_rewards_coefficient
Shapes:   (S,) responses of a micro-batch, (B,) its pairs;
          S = 2 B: each pair's chosen response, then its rejected one
Trains:   the trunk (every weight, or with lora_r an adapter) and the head
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages, optional "margin": 0.5;
          HH-RLHF transcripts
Normalised by: the pairs of the whole update, over all micro-batches and ranks
Metrics:  loss                                near log 2 = 0.6931 at step 0: the head starts small and random
          accuracy                            share of pairs with r(x,y_w) - r(x,y_l) > 1e-4 (bf16: 0.05):
                                              a smaller one is rounding, a tie; near 0.5 at step 0
          margin                              r(x,y_w) - r(x,y_l)
          mean_reward                         mean over all responses
          rewards/chosen, rewards/rejected    r(x,y_w), r(x,y_l)
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: every pair counts the same, where InstructGPT weighs all pairs of a prompt as one
Run:      python train.py example/tiny-rm.yml
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data.pack import Batch
from engine.loop import Engine
from engine.options import NonNegative, Options

DATA = "pairs"                     # every row holds a prompt, a chosen and a rejected response
MODEL = "reward"                   # what is trained
PROGRESS = "accuracy"              # the number shown beside the loss


@dataclass
class Config(Options):
    center_rewards_coefficient: NonNegative = 0.0    # pulls the mean of both rewards to 0 (0.01); 0 = off


def rm_loss(chosen_rewards, rejected_rewards, margins=None, center_rewards_coefficient=0.0, tie=0.0):
    """Two or three (B,) -> (losses (B,), metrics); nothing is reduced.
    `tie`: scores that differ by less are equal."""
    difference = chosen_rewards - rejected_rewards                                      # (B,)
    losses = -F.logsigmoid(difference if margins is None else difference - margins)     # (B,)
    losses = losses + center_rewards_coefficient * (chosen_rewards + rejected_rewards) ** 2
    metrics = {
        "accuracy": difference > tie,
        "margin": difference,
        "mean_reward": torch.cat([chosen_rewards, rejected_rewards]),
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
    }
    return losses, metrics


def train(engine: Engine, config: Config):
    reward_model, optimizer = engine.policy, engine.optimizer

    def forward(batch: Batch):
        chosen_rewards, rejected_rewards = batch.pairs(reward_model(batch))             # (B,), (B,)
        margins = [example.extras.get("margin", 0.0) for example in batch.examples]
        margins = torch.tensor(margins, device=reward_model.device)                     # (B,)
        return rm_loss(chosen_rewards, rejected_rewards, margins, config.center_rewards_coefficient,
                       reward_model.tolerance)

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
