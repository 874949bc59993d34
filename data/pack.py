"""Token examples -> flat, padding-free, prompt-shared micro-batches.

One example is laid out once, however many responses it has:

    tokens     p p p p | c c c | r r r r        the prompt is computed once, not K times
    positions  0 1 2 3 | 4 5 6 | 4 5 6 7        every response restarts after its prompt
    may see    causal, and (key in the prompt, or key in the same response), and same example

A micro-batch is such examples one after the other in one row, behind the prefix that all their prompts begin
with (a system prompt), which is laid out and computed once. The token before `r` is the last `c`, so shifting
by one would be wrong: `source` and `target` say which hidden state predicts which token, for the trained
tokens only.

Four counts of a micro-batch name the shapes everywhere:
T  laid-out tokens        N  trained tokens        S  responses        B  examples

    >>> example = Example(np.array([5, 6]), [Response.all_trained([7, 8]), Response.all_trained([9])], "doc")
    >>> batch = collate([example])
    >>> batch.tokens.tolist(), batch.positions.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2])
    >>> batch.source.tolist(), batch.target.tolist(), batch.lengths      # 6 predicts 7 and 9
    ([1, 2, 1], [7, 8, 9], [2, 1])
"""
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from data.errors import RunError
from data.packing import common_prefix
from data.transfer import together_to


@dataclass
class Response:
    """One response's token ids, and which of them are trained: not all in conversations of several turns."""
    tokens: np.ndarray      # (L,) int32
    trained: np.ndarray     # (L,) bool

    @classmethod
    def all_trained(cls, tokens):
        return cls(np.asarray(tokens, np.int32), np.ones(len(tokens), bool))

    @property
    def num_trained(self) -> int:
        return int(self.trained.sum())


@dataclass
class Example:
    """A prompt and its K responses: K=1 for sft, K=2 for a pair (chosen, rejected), K=G for a group."""
    prompt: np.ndarray                              # (P,) int32, P >= 1
    responses: list[Response]
    where: str                                      # "file:line", for errors that name the row
    extras: dict = field(default_factory=dict)      # tensors: a number per response, or per trained token
    has_gradient: bool = True                       # False: an update counts it, but does not compute it

    @property
    def num_trained(self) -> int:
        return sum(response.num_trained for response in self.responses)

    def groups(self, share_prompt: bool) -> list[list[Response]]:
        """The responses that follow each copy of the prompt."""
        if share_prompt or not self.responses:
            return [self.responses]
        return [[response] for response in self.responses]

    def size(self, share_prompt: bool = True) -> int:
        """Laid-out tokens."""
        responses = sum(len(response.tokens) for response in self.responses)
        return len(self.prompt) * len(self.groups(share_prompt)) + responses

    def part(self, which: list[int]) -> "Example":
        """This example with only the responses `which`, and their numbers of the tensors in `extras`."""
        responses = [self.responses[i] for i in which]
        extras = dict(self.extras)
        for name, value in self.extras.items():
            if torch.is_tensor(value):
                numbers = self.per_response(name, value)
                extras[name] = torch.cat([numbers[i] for i in which])
        return replace(self, responses=responses, extras=extras)

    def sizes_in(self, value: torch.Tensor) -> list[int] | None:
        """How many of the numbers in `value` belong to each response: one, or one per trained token. None
        where it has another shape."""
        lengths = [response.num_trained for response in self.responses]
        if value.shape == (len(lengths),):
            return [1] * len(lengths)
        return lengths if value.shape == (sum(lengths),) else None

    def per_response(self, name: str, value: torch.Tensor):
        """A tensor of `extras` as K tensors. Raises RunError for one of a wrong length."""
        sizes = self.sizes_in(value)
        if sizes is None:
            raise RunError(f"{name} of {self.where} has {value.numel()} numbers, neither "
                           f"{len(self.responses)} (one per response) nor {self.num_trained} (one per "
                           "trained token); fix: store one of these two")
        return value.split(sizes)


@dataclass
class Batch:
    """One micro-batch of B examples: S responses, N trained tokens and T laid-out tokens."""
    tokens: torch.Tensor                    # (T,) ids
    positions: torch.Tensor                 # (T,) position of each token in its own prompt + response
    source: torch.Tensor                    # (N,) index into the T hidden states of the one that predicts ...
    target: torch.Tensor                    # (N,) ... this token id
    last: torch.Tensor                      # (S,) index of each response's last token
    lengths: list[int]                      # S trained-token counts, whose sum is N ...
    counts: torch.Tensor                    # (S,) ... and the same beside the other tensors
    segments: list[tuple[int, list[int]]]   # per laid-out prompt: its length, and those of its responses ...
    prefix: int                             # ... behind so many tokens, which all prompts begin with
    examples: list[Example]
    units: tuple | None = None              # what one call of attention per layer needs, see model/varlen.py
    form: tuple | None = None               # what a policy laid it out for, see model/form.py

    def sum(self, x):
        """(N,) per trained token -> (S,) per response"""
        # not `index_add_`, which is not deterministic; unsafe: a check of the counts would wait for the GPU
        sums = torch.segment_reduce(x.double(), "sum", lengths=self.counts, unsafe=True)
        return sums.to(x.dtype)

    def mean(self, x):
        """(N,) -> (S,): the mean over each response's trained tokens"""
        return self.per_token(self.sum(x))

    def per_token(self, y):
        """(S,), or one number for all responses, divided by each response's trained tokens -> (S,)"""
        return y / self.counts

    def expand(self, y):
        """(S,) per response -> (N,) per trained token"""
        return y.repeat_interleave(self.counts, output_size=sum(self.lengths))

    def pairs(self, y):
        """(S,) of a batch of pairs -> (B,) of the chosen responses and (B,) of the rejected ones"""
        return y.view(-1, 2).unbind(1)

    def chosen(self, x):
        """(N,) of a batch of pairs -> the tokens of the chosen responses"""
        return torch.cat(x.split(self.lengths)[::2]) if self.lengths else x

    def extra(self, name: str):
        """The examples' `extras` of this name: (S,) if they are numbers per response, (N,) if per trained
        token. Raises RunError for an unknown name."""
        parts = []
        for example in self.examples:
            if name not in example.extras:
                known = [key for key, value in example.extras.items() if torch.is_tensor(value)]
                raise RunError(f"the batch has no {name!r}; it has {', '.join(known) or 'no extra values'}; "
                               "fix: correct the name, or store these values first")
            parts.append(example.extras[name])
        values = torch.cat(parts or [torch.zeros(0)])
        if values.dtype == torch.float64:      # fp32, like the log-probs beside them
            values = values.float()
        values, = together_to([values], self.tokens.device)
        return values

    def to(self, device) -> "Batch":
        names = ("tokens", "positions", "source", "target", "last", "counts")
        moved = together_to([getattr(self, name) for name in names], device)
        units = self.units and self.units.to(device)
        return replace(self, units=units, **dict(zip(names, moved)))


def collate(examples: list[Example], share_prompt: bool = True) -> Batch:
    """Lay examples out in one row. `share_prompt=False` repeats the prompt before every response. An empty
    list gives the filler (one context token, N = 0) for a rank with fewer micro-batches than another."""
    tokens, positions, source, target = [], [], [], []             # arrays, one after the other in the row
    last, lengths, segments = [], [], []
    prefix = start = 0                                             # index in the row of the next token

    def lay_out(ids, first_position):
        tokens.append(ids)
        positions.append(first_position + np.arange(len(ids)))

    if share_prompt and examples:
        prefix = start = common_prefix([example.prompt for example in examples])
        lay_out(examples[0].prompt[:prefix], 0)
    for example in examples:
        prompt = example.prompt[prefix:]
        for responses in example.groups(share_prompt):
            lay_out(prompt, prefix)
            start += len(prompt)
            end_of_prompt = start - 1
            segments.append((len(prompt), []))
            for response in responses:
                length = len(response.tokens)
                lay_out(response.tokens, len(example.prompt))
                predictors = start - 1 + np.arange(length)     # the token before predicts each ...
                predictors[0] = end_of_prompt                  # ... and the prompt's end the first
                source.append(predictors[response.trained])
                target.append(response.tokens[response.trained])
                lengths.append(response.num_trained)
                segments[-1][1].append(length)
                start += length
                last.append(start - 1)
    if not examples:
        lay_out([0], 0)
        segments.append((1, []))
    return Batch(joined(tokens), joined(positions), joined(source), joined(target),
                 torch.tensor(last).long(), lengths, torch.tensor(lengths).long(), segments, prefix, examples)


def joined(arrays) -> torch.Tensor:
    """One int64 tensor of all arrays, also of none."""
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *arrays]))
