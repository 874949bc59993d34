"""APO-zero: Anchored Preference Optimization - DPO with a term for each response instead of their difference:
the chosen one becomes likelier than under the reference, the rejected one less likely.

Paper:    D'Oosterlinck et al. 2024, arXiv 2408.06266; the loss is eq. 7. SmolLM3 was aligned with it,
          at beta 0.05
Formula:  L = 1 - sigmoid( beta * log pi(y_w|x) / pi_ref(y_w|x) )
              + sigmoid( beta * log pi(y_l|x) / pi_ref(y_l|x) )
Symbols:  log pi(y_w|x)      policy_chosen_logps      sum over the chosen response's tokens, stop token too
          log pi(y_l|x)      policy_rejected_logps    the same for the rejected response
          log pi_ref(...)    reference_chosen_logps, reference_rejected_logps
          beta * log-ratio   chosen_rewards, rejected_rewards: the implicit rewards of DPO's eq. 5
Shapes:   (N,) trained tokens of a micro-batch, (S,) its responses, (B,) its pairs;
          S = 2 B: each pair's chosen response, then its rejected one
Trains:   the policy: every weight, or with lora_r an adapter. The reference is frozen; its log-probs are
          computed once, before the first update, so that no second model is in memory.
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages; HH-RLHF transcripts.
          The chosen responses should be better than the model's own: their likelihood is raised
Normalised by: the pairs of the whole update, over all micro-batches and ranks
Metrics:  loss                                1 at step 0, where policy = reference; between 0 and 2
          rewards/chosen, rewards/rejected    implicit rewards; 0 at step 0. The loss pulls the first above 0
                                              and the second below it
          rewards/margins                     chosen - rejected; 0 at step 0
          rewards/accuracies                  share of pairs with margin > beta * 1e-4 (bf16: beta * 0.05):
                                              a smaller one is rounding, a tie; 0 at step 0, except for
                                              rounding of sums above 1,000 nats and of bf16
          logps/chosen, logps/rejected        summed log-probs under the policy: the first ones usually rise
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: the loss is larger by 1, as in TRL, so that it cannot be negative; its gradient is
          the same. The paper's other loss, APO-down (eq. 8, for a model that is better than its chosen
          responses), is not here
Run:      python train.py example/tiny-apo.yml
"""
from dataclasses import dataclass

from data.pack import Batch
from engine.loop import Engine
from engine.options import Options, Positive

DATA = "pairs"                     # every row holds a prompt, a chosen and a rejected response
MODEL = "policy"                   # what is trained
PROGRESS = "rewards/accuracies"    # the number shown beside the loss


@dataclass
class Config(Options):
    beta: Positive = 0.1           # KL strength: larger keeps the policy closer to the reference (0.01-0.5)
    reference: str | None = None   # model directory or hub name; null = the start model

    def uses_reference(self) -> bool:
        return True


def apo_zero_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    beta=0.1,
    tie=0.0,
):
    """Four (B,) summed log-probs -> (losses (B,), metrics); nothing is reduced.
    `tie`: log-ratios that differ by less are equal."""
    chosen_logratios = policy_chosen_logps - reference_chosen_logps                     # (B,)
    rejected_logratios = policy_rejected_logps - reference_rejected_logps               # (B,)
    chosen_rewards = beta * chosen_logratios                                            # (B,)
    rejected_rewards = beta * rejected_logratios                                        # (B,)
    margins = chosen_rewards - rejected_rewards                                         # (B,)
    losses = (-chosen_rewards).sigmoid() + rejected_rewards.sigmoid()    # (B,) eq. 7: s(-x) = 1 - s(x)
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
        logps = batch.sum(policy(batch))                                                # (N,) -> (S,)
        reference_logps = batch.sum(reference(batch))                                   # (S,)
        policy_chosen_logps, policy_rejected_logps = batch.pairs(logps)                 # (B,), (B,)
        reference_chosen_logps, reference_rejected_logps = batch.pairs(reference_logps)
        return apo_zero_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
            config.beta,
            policy.tolerance,      # 1e-4, in bf16 0.05
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
