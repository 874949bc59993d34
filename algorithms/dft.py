"""DFT: Dynamic Fine-Tuning - SFT with every token weighted by its own probability, so that unlikely tokens
pull less.

Paper:    Wu et al. 2025, arXiv 2508.05629; the loss is eq. 8 and 9
Formula:  L = -(1/N) sum over trained tokens t of  sg[ pi(y_t | x, y_<t) ] * log pi(y_t | x, y_<t)
          sg: without its gradient
Symbols:  log pi(y_t | ...)   logps        one per trained token
          N                   num_tokens   trained tokens of the whole update
Shapes:   (N,) trained tokens of a micro-batch
Trains:   the policy: every weight, or with lora_r an adapter. No other model.
Data:     {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}: every
          assistant turn; {"prompt": ..., "response": ...}; {"question": ..., "answer": ...}; raw
          {"text": ...}; a pair gives its chosen response
Normalised by: the trained tokens of the whole update, over all micro-batches and ranks; not by the sum of the
          weights
Metrics:  loss                token mean of -p log p; it is small for unlikely and for certain tokens alike
                              (0.3679 at most), so that it does not show progress
          nll_loss            token mean of -logps, SFT's loss
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: -
Run:      python train.py example/tiny-dft.yml
"""
from dataclasses import dataclass
from typing import Literal

from data.pack import Batch
from engine.loop import Engine
from engine.options import Options

DATA = "responses"                 # every row holds a prompt and one response
MODEL = "policy"                   # what is trained
PROGRESS = "nll_loss"              # the number shown beside the loss


@dataclass
class Config(Options):
    allows_dropout = True          # no log-probs are compared
    train_on: Literal["assistant", "all"] = "assistant"    # all = every token but the first; raw `text` rows
    #                                are always trained whole


def dft_loss(logps):
    """(N,) log-probs -> (losses (N,), metrics); nothing is reduced."""
    losses = -logps.exp().detach() * logps                         # (N,) eq. 9
    return losses, {"nll_loss": -logps}


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer

    def forward(batch: Batch):
        logps = policy(batch)                                      # (N,)
        return dft_loss(logps)

    for step in engine.steps():                                    # one optimizer update
        for batch in step:                                         # one micro-batch
            losses, metrics = forward(batch)
            (losses.sum() / step.num_tokens).backward()     # mean over the trained tokens of the whole update
            step.log(losses, metrics)
        engine.clip_gradients()                                    # stops here if loss or norm is not finite
        optimizer.step()
        optimizer.zero_grad()
        for batch in engine.eval_batches(step):                    # empty unless an evaluation is due
            losses, metrics = forward(batch)
            step.log(losses, metrics, split="eval")
