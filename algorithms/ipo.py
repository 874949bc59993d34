"""IPO: Identity Preference Optimization - DPO with a squared distance to a finite target margin, so that
deterministic labels cannot push the margin to infinity.

Paper:    Azar et al. 2023, arXiv 2310.12036; the loss is eq. 17, with beta for the paper's tau
Formula:  L = ( log pi(y_w|x) / pi_ref(y_w|x)  -  log pi(y_l|x) / pi_ref(y_l|x)  -  1 / (2 beta) )^2
Symbols:  log pi(y_w|x)      policy_chosen_logps      mean over the chosen response's tokens, stop token too
          log pi(y_l|x)      policy_rejected_logps    the same for the rejected response
          log pi_ref(...)    reference_chosen_logps, reference_rejected_logps
Shapes:   (N,) trained tokens of a micro-batch, (S,) its responses, (B,) its pairs;
          S = 2 B: each pair's chosen response, then its rejected one
Trains:   the policy: every weight, or with lora_r an adapter. The reference is frozen; its log-probs are
          computed once, before the first update, so that no second model is in memory.
Data:     {"prompt": ..., "chosen": ..., "rejected": ...}, strings or messages; HH-RLHF transcripts
Normalised by: the pairs of the whole update, over all micro-batches and ranks
Metrics:  loss                                1 / (2 beta)^2 at step 0, where policy = reference: 25 with 0.1
          rewards/chosen, rewards/rejected    beta * log-ratio, with means as in the loss; 0 at step 0
          rewards/margins                     chosen - rejected; 0 at step 0; the loss pulls it to 0.5
          rewards/accuracies                  share of pairs with margin > beta * 1e-4 (bf16: beta * 0.05)
                                              * (1 / |y_w| + 1 / |y_l|), for sums without this factor; a
                                              smaller one is rounding, a tie; 0 at step 0, except for
                                              rounding of sums above 1,000 nats and of bf16
          logps/chosen, logps/rejected        mean log-probs under the policy
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: it sums over tokens (average_log_prob: false); its authors advise means, so
          that the margin does not depend on length. With means 1 / (2 beta) is in nats per token: beta 0.1
          asks for 5 of them, so that 0.1 to 1 is the useful range
Run:      python train.py example/tiny-ipo.yml
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
    beta: Positive = 0.1           # the target margin is 1 / (2 beta): larger keeps the policy closer to the
    #                                reference
    average_log_prob: bool = True  # true = means over tokens; false = sums, as in the paper
    reference: str | None = None   # model directory or hub name; null = the start model

    def uses_reference(self) -> bool:
        return True


def ipo_loss(
    policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
    beta=0.1,
    tie=0.0,
):
    """Four (B,) mean (or summed) log-probs -> (losses (B,), metrics); nothing is reduced.
    `tie`: log-ratios that differ by less are equal."""
    chosen_logratios = policy_chosen_logps - reference_chosen_logps                     # (B,)
    rejected_logratios = policy_rejected_logps - reference_rejected_logps               # (B,)
    chosen_rewards = beta * chosen_logratios                                            # (B,)
    rejected_rewards = beta * rejected_logratios                                        # (B,)
    margins = beta * (chosen_logratios - rejected_logratios)                            # (B,)
    losses = (chosen_logratios - rejected_logratios - 1 / (2 * beta)) ** 2              # (B,) eq. 17
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
        per_response = batch.mean if config.average_log_prob else batch.sum             # (N,) -> (S,)
        logps = per_response(policy(batch))                                             # (S,)
        reference_logps = per_response(reference(batch))                                # (S,)
        policy_chosen_logps, policy_rejected_logps = batch.pairs(logps)                 # (B,), (B,)
        reference_chosen_logps, reference_rejected_logps = batch.pairs(reference_logps)
        ties = sum(batch.pairs(batch.per_token(policy.tolerance)))                      # (B,) for two means
        return ipo_loss(
            policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps,
            config.beta,
            ties if config.average_log_prob else policy.tolerance,
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
