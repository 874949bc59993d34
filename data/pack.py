"""Token examples -> flat, padding-free, prompt-shared micro-batches.

One example is laid out once, however many responses it has:

    tokens     p p p p | c c c | r r r r        the prompt is computed once, not K times
    positions  0 1 2 3 | 4 5 6 | 4 5 6 7        every response restarts after its prompt
    may see    causal, and (key in the prompt, or key in the same response), and same example

A micro-batch is such examples one after the other in one row. The token before `r` is the last `c`, so shifting by one would
be wrong: `source` and `target` say which hidden state predicts which token, for the trained tokens only.

    >>> example = Example(np.array([5, 6]), [Response.all_trained([7, 8]), Response.all_trained([9])], "doc")
    >>> batch = collate([example])
    >>> batch.tokens.tolist(), batch.positions.tolist()
    ([5, 6, 7, 8, 9], [0, 1, 2, 3, 2])
    >>> batch.source.tolist(), batch.target.tolist(), batch.lengths     # 7 and 9 are both predicted by 6, the last prompt token
    ([1, 2, 1], [7, 8, 9], [2, 1])
"""
import math
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Response:
    """One response's token ids and which of them are trained (multi-turn conversations hold untrained turns in between)."""
    tokens: np.ndarray   # (L,) int32
    trained: np.ndarray  # (L,) bool

    @classmethod
    def all_trained(cls, tokens):
        return cls(np.asarray(tokens, np.int32), np.ones(len(tokens), bool))


@dataclass
class Example:
    """A prompt and its K responses: K=1 for sft, K=2 for a pair (chosen, rejected), K=G for a group."""
    prompt: np.ndarray           # (P,) int32, P >= 1
    responses: list[Response]
    where: str                   # "file:line", for errors that name the row
    extras: dict = field(default_factory=dict)

    def size(self, share_prompt: bool = True) -> int:
        """Laid-out tokens."""
        copies = 1 if share_prompt else len(self.responses)
        return copies * len(self.prompt) + sum(len(response.tokens) for response in self.responses)

    def part(self, which: list[int]):
        """This example with only the responses `which`, and their share of the tensors in `extras`."""
        ends = np.cumsum([0] + [len(response.tokens) for response in self.responses])

        def share(value):
            if not torch.is_tensor(value):
                return value
            if len(value) == len(self.responses):          # a number per response, else one per token
                return value[which]
            return torch.cat([value[ends[i]:ends[i + 1]] for i in which])

        return Example(self.prompt, [self.responses[i] for i in which], self.where,
                       {name: share(value) for name, value in self.extras.items()})

    @property
    def num_trained(self) -> int:
        return sum(int(response.trained.sum()) for response in self.responses)


@dataclass
class Batch:
    """One micro-batch of B examples, S responses, N trained tokens and T laid-out tokens."""
    tokens: torch.Tensor      # (T,) ids
    positions: torch.Tensor   # (T,) position of each token in its own prompt + response
    source: torch.Tensor      # (N,) index into the T hidden states of the one that predicts ...
    target: torch.Tensor      # (N,) ... this token id
    last: torch.Tensor        # (S,) index of each response's last token
    lengths: list[int]        # S trained-token counts; they sum to N
    segments: list[tuple[int, list[int]]]   # per laid-out prompt: its length, and the lengths of the responses that follow it
    examples: list[Example]

    def sum(self, x):
        """(N,) per trained token -> (S,) per response. A stack of plain sums: `index_add_` would not be bit-stable on CUDA."""
        return torch.stack([part.sum() for part in x.split(self.lengths)]) if self.lengths else x

    def mean(self, x):
        """(N,) -> (S,): the mean over each response's trained tokens."""
        return self.per_token(self.sum(x))

    def per_token(self, y):
        """(S,), or one number for all responses, divided by each response's trained tokens -> (S,)."""
        return y / torch.tensor(self.lengths, dtype=torch.float32, device=self.source.device)

    def extra(self, name):
        """What `extras[name]` of its examples hold: (S,) where it is a number per response, (N,) where it is one per trained token."""
        parts = [example.extras[name] for example in self.examples]
        values = torch.cat(parts) if parts else torch.zeros(0)
        if values.dtype == torch.float64:      # as the log-probs beside them
            values = values.float()
        return values.to(self.tokens.device)

    def pairs(self, y):
        """(S,) of a batch of pairs -> the chosen responses' (B,) and the rejected ones' (B,)."""
        return y.view(-1, 2).unbind(1)

    def chosen(self, x):
        """(N,) of a batch of pairs -> the tokens of the chosen responses."""
        return torch.cat(x.split(self.lengths)[::2]) if self.lengths else x

    def expand(self, y):
        """(S,) per response -> (N,) per trained token."""
        return y.repeat_interleave(torch.tensor(self.lengths, dtype=torch.long, device=y.device), output_size=sum(self.lengths))

    def to(self, device):
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "positions", "source", "target", "last")}
        return Batch(**moved, lengths=self.lengths, segments=self.segments, examples=self.examples)


def collate(examples: list[Example], share_prompt: bool = True) -> Batch:
    """Lay examples out in one row. `share_prompt=False` repeats the prompt before every response. An empty list gives the
    filler (one context token, N = 0) that keeps ranks in step when one has fewer micro-batches than another."""
    tokens, positions, source, target, last, lengths, segments = [], [], [], [], [], [], []
    start = 0                                                              # index in the row of the next token to lay out
    for example in examples:
        groups = [example.responses] if share_prompt else [[response] for response in example.responses]
        for responses in groups:
            prompt_length = len(example.prompt)
            tokens.append(example.prompt)
            positions.append(np.arange(prompt_length))
            end_of_prompt = start + prompt_length - 1
            start += prompt_length
            for response in responses:
                length = len(response.tokens)
                tokens.append(response.tokens)
                positions.append(np.arange(prompt_length, prompt_length + length))
                predictors = np.arange(start - 1, start + length - 1)      # each token is predicted by the one before it ...
                predictors[0] = end_of_prompt                              # ... and the first by the end of the prompt
                source.append(predictors[response.trained])
                target.append(response.tokens[response.trained])
                lengths.append(int(response.trained.sum()))
                last.append(start + length - 1)
                start += length
            segments.append((prompt_length, [len(response.tokens) for response in responses]))
    if not examples:
        tokens, positions, segments = [np.zeros(1)], [np.zeros(1)], [(1, [])]
    tensors = [torch.from_numpy(np.concatenate(parts or [np.zeros(0)]).astype(np.int64))
               for parts in (tokens, positions, source, target)]
    return Batch(*tensors, torch.tensor(last, dtype=torch.long), lengths, segments, examples)


def order(count: int, batch_size: int, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """The updates of one epoch, each a list of example indices: a pure function, so the data position is the step number.
    The last update of an epoch may be smaller."""
    indices = np.random.default_rng((seed, epoch)).permutation(count).tolist() if shuffle else list(range(count))
    return [indices[i:i + batch_size] for i in range(0, count, batch_size)]


def pack(sizes: list[int], micro_batch_tokens: int, world: int = 1) -> list[list[list[int]]]:
    """Deal one update's examples (given by their sizes in tokens) to ranks and micro-batches.

    Returns, per rank, the same number of lists of positions in `sizes` (some may be empty). Largest first into the emptiest
    bin, with the fewest bins that keep within `micro_batch_tokens`; an example larger than that has a bin of its own."""
    largest_first = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    needed = sum(min(size, micro_batch_tokens) for size in sizes)
    rounds = max(1, math.ceil(needed / (micro_batch_tokens * world)))
    while True:
        bins, loads = [[] for _ in range(rounds * world)], [0] * (rounds * world)
        for i in largest_first:
            emptiest = min(range(len(bins)), key=lambda b: (loads[b], b))
            bins[emptiest].append(i)
            loads[emptiest] += sizes[i]
        if all(load <= micro_batch_tokens or len(members) == 1 for load, members in zip(loads, bins)):
            return [[sorted(members) for members in bins[rank::world]] for rank in range(world)]
        rounds += 1
