"""KTO: Kahneman-Tversky Optimization - learns from single responses marked good or bad; no pairs are needed.

Paper:    Ethayarajh et al. 2024, arXiv 2402.01306; the loss is eq. 7 and 8, z0 section 4.1
Formula:  L = w_D * ( 1 - sigmoid( beta * (r - z0) ) ) for a desirable response
          L = w_U * ( 1 - sigmoid( beta * (z0 - r) ) ) for an undesirable one
          r = log pi(y|x) / pi_ref(y|x),    z0 = max(0, mean of log pi(y'|x) / pi_ref(y'|x))
Symbols:  log pi(y|x)        policy_logps        sum over the response's tokens, with the stop token
          log pi_ref(y|x)    reference_logps
          z0                 kl                  the point from which gains and losses count, without a
                                                 gradient. y' is the response to another prompt of the update
          w_D, w_U           desirable_weight, undesirable_weight
Shapes:   (N,) trained tokens of a micro-batch, (B,) its examples, each with one response
Trains:   the policy: every weight, or with lora_r an adapter. The reference is frozen; its log-probs are
          computed once, before the first update, so that no second model is in memory.
Data:     {"prompt": ..., "response": ..., "label": true}; a pair gives two rows, the chosen one true and the
          rejected one false
Normalised by: the examples of the whole update, over all micro-batches and ranks; kl is a mean over the same
Metrics:  loss                                0.5 at step 0 with both weights 1, where policy = reference
          kl                                  z0; 0 at step 0
          rewards/chosen, rewards/rejected    beta * r of the desirable and the undesirable responses; 0 at
                                              step 0
          rewards/margins                     their difference; 0 at step 0
          logps/chosen, logps/rejected        summed log-probs under the policy of the desirable and the
                                              undesirable responses
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: y' never comes from the same prompt (the paper's code takes a neighbour's, which
          in unpacked pairs often is the same): y' is the response of the nearest earlier row of the update
          that has another prompt (the last row comes before the first). An update whose rows all have one
          prompt takes y' from all training rows
Run:      python train.py example/tiny-kto.yml
"""
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from data.errors import UserError
from data.pack import Batch, Example
from data.store import Together, response_keys
from engine.loop import Engine
from engine.options import Options, Positive

DATA = "labelled"                  # every row holds a prompt, one response and whether it is desirable
MODEL = "policy"                   # what is trained
PROGRESS = "rewards/margins"       # the number shown beside the loss


@dataclass
class Config(Options):
    beta: Positive = 0.1           # KL strength: larger keeps the policy closer to the reference
    desirable_weight: Positive = 1.0    # with n_D desirable and n_U undesirable rows, the paper recommends
    #                                desirable_weight * n_D / (undesirable_weight * n_U) from 1 to 4/3
    undesirable_weight: Positive = 1.0    # weight of the undesirable rows; see desirable_weight
    reference: str | None = None   # model directory or hub name; null = the start model

    def uses_reference(self) -> bool:
        return True


def kto_loss(policy_logps, reference_logps, labels, kl,
             beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """(B,), (B,) summed log-probs, (B,) bool, () -> (losses (B,), metrics); nothing is reduced."""
    logratios = policy_logps - reference_logps                                          # (B,) r of eq. 7
    gains = torch.where(labels, logratios - kl, kl - logratios)                         # (B,)
    weights = torch.where(labels, desirable_weight, undesirable_weight)                 # (B,) lambda_y
    losses = weights * (1 - torch.sigmoid(beta * gains))                                # (B,) eq. 8
    rewards = beta * logratios
    metrics = {
        "kl": kl.expand(len(labels)),
        "rewards/chosen": rewards[labels],
        "rewards/rejected": rewards[~labels],
        "rewards/margins": (rewards[labels], -rewards[~labels]),       # the sum of two means
        "logps/chosen": policy_logps[labels],
        "logps/rejected": policy_logps[~labels],
    }
    return losses, metrics


def lenders(examples: Iterable[Example]) -> list[int | None]:
    """For every example the place of the nearest one before it that has another prompt and is no other turn
    of the same conversation; before the first comes the last. None where there is none."""
    prompts, rows = [], []
    for example in examples:
        prompts.append(example.prompt.tobytes())
        rows.append(example.where)
    found = []
    for i in range(len(rows)):
        lender = None
        for k in range(1, len(rows)):
            if prompts[i - k] != prompts[i] and rows[i - k] != rows[i]:
                lender = (i - k) % len(rows)
                break
        found.append(lender)
        if lender is None:                 # nearly always all have the same prompt
            return found
    return found


def key_of(example: Example) -> tuple:
    return example.where, *response_keys(example)


def lenders_of_data(engine: Engine) -> Callable[[Example], Example]:
    """example -> its lender among all training rows; held-out rows come after these."""
    train_set, eval_set = engine.train_set, engine.eval_set
    found = lenders(train_set)
    if None in found:
        alone = train_set[len(found) - 1].where
        raise UserError(f"kto: no training row has another prompt than {alone}, and z0 "
                        "needs a response to another prompt; fix: add rows with other prompts")
    everything = Together(train_set, eval_set)
    found += lenders(everything)[len(train_set):]
    places = {}
    for example, place in zip(everything, found):
        places[key_of(example)] = place
    return lambda example: everything[places[key_of(example)]]


def mismatched(examples: Sequence[Example], max_length: int, of_data: Callable) -> list[Example]:
    """Every prompt of an update (or of the held-out rows) with its lender's response: the lender among these
    examples, and where all of them have one prompt, as in an update of a single row, the one among the data.
    Where the two together exceed max_length, the prompt loses its beginning: both were checked
    against max_length with other partners."""
    places = lenders(examples)
    if None in places:
        others = [of_data(example) for example in examples]
    else:
        others = [examples[place] for place in places]
    made = []
    for example, other in zip(examples, others):
        response = other.responses[0]
        room = max_length - len(response.tokens)
        made.append(Example(example.prompt[-room:], [response], example.where))
    return made


def advise_weights(train_set: Sequence[Example], config: Config) -> str:
    """The counts of both labels and the weights that the paper's section 4.2 recommends for them."""
    desirable = sum(example.extras["label"] for example in train_set)
    undesirable = len(train_set) - desirable
    least = config.undesirable_weight * undesirable / desirable
    is_inside = least <= config.desirable_weight <= 4 / 3 * least
    counts = f"{desirable} desirable and {undesirable} undesirable rows"
    best = f"desirable_weight is best between {least:.3g} and {4 / 3 * least:.3g}"
    return (f"{'' if is_inside else 'warning: '}{counts}: with undesirable_weight "
            f"{config.undesirable_weight:g}, {best}, and it is {config.desirable_weight:g}")


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer
    max_length = engine.config.max_length
    engine.notice(advise_weights(engine.train_set, config))
    of_data = lenders_of_data(engine)
    held_out = mismatched(engine.eval_set, max_length, of_data)
    borrowed = []
    for rows in engine.plan.all_rows():
        borrowed += mismatched([engine.train_set[row] for row in rows], max_length, of_data)
    reference = engine.reference(config.reference, held_out + borrowed)

    @torch.no_grad()
    def estimate_kl(batches: Iterable[Batch]):
        """z0 of a whole update, from the micro-batches of its mismatched examples."""
        total, count = 0.0, 0
        for batch in batches:
            total += float((policy(batch) - reference(batch)).sum())
            count += len(batch.examples)
        mean = engine.mean(total, count)
        return torch.tensor(max(0.0, mean), device=policy.device)  # the mean first, then the clamp

    def forward(batch: Batch, kl):
        labels = [example.extras["label"] for example in batch.examples]
        labels = torch.tensor(labels, dtype=torch.bool, device=policy.device)           # (B,)
        policy_logps = batch.sum(policy(batch))                                         # (B,)
        reference_logps = batch.sum(reference(batch))                                   # (B,)
        return kto_loss(policy_logps, reference_logps, labels, kl,
                        config.beta, config.desirable_weight, config.undesirable_weight)

    for step in engine.steps():                                    # one optimizer update
        others = mismatched(step.examples, max_length, of_data)
        kl = estimate_kl(engine.batches(others))                   # first pass, without gradients
        for batch in step:                                         # one micro-batch
            losses, metrics = forward(batch, kl)
            (losses.sum() / step.num_examples).backward()         # mean over the examples of the whole update
            step.log(losses, metrics)
        engine.clip_gradients()                                    # stops here if loss or norm is not finite
        optimizer.step()
        optimizer.zero_grad()
        kl = estimate_kl(engine.eval_batches(step, held_out))
        for batch in engine.eval_batches(step):                    # empty unless an evaluation is due
            losses, metrics = forward(batch, kl)
            step.log(losses, metrics, split="eval")
