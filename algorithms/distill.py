"""Distillation: on-policy knowledge distillation - the student samples, and a frozen teacher gives its whole
distribution at every token of these samples.

Paper:    Agarwal et al. 2024 (GKD, On-Policy Distillation of Language Models), arXiv 2306.13649, algorithm 1;
          the divergence is eq. 1
Formula:  L = (1/N) sum over tokens t of  D( p_T(. | x, y_<t) || p_S(. | x, y_<t) ),    y from the student
          beta = 0:   D = KL(p_T || p_S), forward KL;    beta = 1:   D = KL(p_S || p_T), reverse KL
          between:    D = beta KL(p_T || m) + (1 - beta) KL(p_S || m),    m = beta p_T + (1 - beta) p_S
          KL(p || q) = sum over the vocabulary of  p (log p - log q)
Symbols:  log p_S, log p_T    student_logps, teacher_logps    of tokens of the vocabulary, at the sampling
                                                   temperature
          log m               mixture_logps
          N                   num_tokens           trained tokens of the whole update
          lambda              lmbda                share of the prompts that the student answers itself
Shapes:   (N,) trained tokens of a micro-batch, (N, slice) the same for a slice of the vocabulary: D is added
          slice by slice, so that the full (N, V) logits exist of neither model
Trains:   the policy (the student): every weight, or with lora_r an adapter. The teacher is frozen; it has the
          student's tokenizer and may have any size
Data:     {"prompt": ...}: a prompt; with lmbda below 1 also a response, in the rows of sft
Normalised by: the trained tokens of the whole update, over all micro-batches and ranks
Metrics:  loss                       token mean of D; 0 where the student is the teacher. With beta between 0
                                     and 1 it is -beta log(beta) - (1 - beta) log(1 - beta) at most
          entropy                    mean of -log p_S of the trained tokens: of own samples an estimate of the
                                     entropy, of the data's responses their negative log-likelihood
          completions/mean_length, /clipped_ratio, ...     tokens; share truncated at
                                     max_completion_length
          sampling/sampling_logp_difference/mean    sampler against training forward: rounding
Step 0:   step 0 has no micro-batches. There, and where an evaluation is due, the student answers the held-out
          prompts, and the loss is that on its answers
Differences from the paper: lambda is a share of the prompts of each batch; the paper draws whole batches.
          Where the teacher's head has more rows than the student's, the further ones, which stand for no
          token, do not count
Run:      python train.py example/tiny-distill.yml
"""
import math
from dataclasses import dataclass, field
from functools import partial

import torch

from data.errors import UserError
from data.pack import Batch
from engine.loop import Engine
from engine.options import Count, Generation, Probability

DATA = "prompts"                   # every row holds a prompt, and with lmbda below 1 a response
MODEL = "policy"                   # what is trained
PROGRESS = "loss"                  # the number shown on the progress line


@dataclass
class Config(Generation):          # temperature, max_completion_length, ...: see engine/options.py
    teacher: str = field(kw_only=True)    # model directory, run or hub name; it must have the tokenizer of
    #                                `model`; with load_in_4bit it is in 4 bits, too
    beta: Probability = 1.0        # 0 = forward KL (the student covers what the teacher does), 1 = reverse KL
    #                                (it keeps to what the teacher likes best), between: Jensen-Shannon
    lmbda: Probability = 1.0       # share of the prompts that the student answers itself; the others keep the
    #                                responses of the data
    num_iterations: Count = 1      # passes over each rollout; above 1 the samples are of an older student
    num_mini_batches: Count = 1    # updates per pass

    def frozen_models(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    def sampled_share(self) -> float:
        return self.lmbda

    def check(self, common) -> None:
        super().check(common)
        if self.lmbda < 1 and self.prompt_template:
            raise UserError("prompt_template has no place for the responses of the data, which lmbda below 1 "
                            "trains; fix: lmbda=1, or remove prompt_template")


def distill_loss(student_logps, teacher_logps, beta=1.0):
    """Log-probs of some tokens of the vocabulary, twice (N, slice) -> (N, slice): their summands of D.
    The sum over the whole vocabulary is D."""
    student, teacher = student_logps.exp(), teacher_logps.exp()
    if beta == 0:
        return teacher * (teacher_logps - student_logps)                               # forward KL
    if beta == 1:
        return student * (student_logps - teacher_logps)                               # reverse KL
    mixture_logps = torch.logaddexp(teacher_logps + math.log(beta), student_logps + math.log(1 - beta))
    of_teacher = teacher * (teacher_logps - mixture_logps)
    of_student = student * (student_logps - mixture_logps)
    return beta * of_teacher + (1 - beta) * of_student                                 # eq. 1


def train(engine: Engine, config: Config):
    policy, optimizer = engine.policy, engine.optimizer
    teacher = engine.frozen_model(config.teacher)
    summands = partial(distill_loss, beta=config.beta)

    def forward(batch: Batch):
        with torch.no_grad():
            # its distributions, as hidden states and head: their logits are made a slice at a time
            predictions = teacher(batch, config.temperature, predictions=True)
        logps, losses = policy(batch, config.temperature, against=(predictions, summands))
        return losses, logps                                       # (N,), (N,) of the trained tokens

    for rollout in engine.rollouts(config):                        # 1 sample
        for step in engine.steps(rollout):                         # at first step 0, without micro-batches
            for batch in step:                                     # 2 loss, one micro-batch
                losses, logps = forward(batch)
                (losses.sum() / step.num_tokens).backward()        # mean over the tokens of the whole update
                engine.compare_sampler(batch, logps)               # logged and checked
                step.log(losses, {"entropy": -logps})
            engine.clip_gradients()                            # 3 update; stops if loss or norm is not finite
            optimizer.step()
            optimizer.zero_grad()
            for batch in engine.eval_batches(step):                # own answers to the held-out prompts
                losses, logps = forward(batch)
                step.log(losses, {"entropy": -logps}, split="eval")
