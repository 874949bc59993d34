"""SFT: supervised fine-tuning - maximum likelihood of the responses, given their prompts.

Paper:    no single one; Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155, section 3.5 describes the stage
Formula:  L = -(1/N) sum over trained tokens t of  log pi(y_t | x, y_<t)
Symbols:  log pi(y_t | ...)   logps        one per trained token
          N                   num_tokens   trained tokens of the whole update
Shapes:   (N,) trained tokens of a micro-batch
Trains:   the policy: every weight, or with lora_r an adapter. No other model.
Data:     {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}: every
          assistant turn; {"prompt": ..., "response": ...}; {"question": ..., "answer": ...}; raw
          {"text": ...}; a pair gives its chosen response
Normalised by: the trained tokens of the whole update, over all micro-batches and ranks (a mean of means would
          weigh the tokens of short micro-batches more)
Metrics:  loss                token mean of -logps; near log(vocabulary) for random weights at step 0
Step 0:   step 0 has no micro-batches: only eval_batches evaluates the start model
Differences from the paper: -
Run:      python train.py example/tiny-sft.yml
"""
from dataclasses import dataclass
from typing import Literal

from data.pack import Batch
from engine.loop import Engine
from engine.options import Options

DATA = "responses"                 # every row holds a prompt and one response
MODEL = "policy"                   # what is trained
PROGRESS = "loss"                  # the number shown on the progress line


@dataclass
class Config(Options):
    allows_dropout = True          # no log-probs are compared
    train_on: Literal["assistant", "all"] = "assistant"    # all = every token but the first; raw `text` rows
    #                                are always trained whole


def sft_loss(logps):
    """(N,) log-probs -> (losses (N,), metrics); nothing is reduced."""
    return -logps, {}


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer

    def forward(batch: Batch):
        logps = policy(batch)                                      # (N,)
        return sft_loss(logps)

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
