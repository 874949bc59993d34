"""Rollouts: completions drawn from the policy, and what an algorithm then knows of each of them."""
import numpy as np
import torch

from data.pack import Example, Response
from model.sampler import Completion


class Rollout:
    """The completions of one batch of prompts: `examples`, one per prompt with its group of responses. `rollout[name]` is a list with
    one tensor per prompt, a number for each of its responses (G,) or for each of their tokens; `batch.extra(name)` finds it again."""

    def __init__(self, number: int, examples: list[Example], restored: bool = False):
        self.number, self.examples, self.restored = number, examples, restored
        self.metrics = {}                                  # of the rewards; joins the metrics of this rollout's updates

    def __contains__(self, name: str) -> bool:
        return all(name in example.extras for example in self.examples)

    def __getitem__(self, name: str) -> list[torch.Tensor]:
        return [example.extras[name] for example in self.examples]

    def __setitem__(self, name: str, values) -> None:
        for example, value in zip(self.examples, values, strict=True):
            example.extras[name] = value

    @property
    def lengths(self) -> list[torch.Tensor]:
        """Per prompt (G,), in fp64 as rewards are: the tokens of each completion."""
        lengths = []
        for example in self.examples:
            counts = [len(response.tokens) for response in example.responses]
            lengths.append(torch.tensor(counts, dtype=torch.float64))
        return lengths


def alike(rewards: torch.Tensor) -> bool:
    """Whether the rewards of a group (G,), or of a batch, are one value, NaN (no reward) aside. They teach
    nothing then, and their advantage is 0: the mean of equal numbers may differ from them by rounding, and
    AdamW makes full steps of that."""
    judged = rewards[~rewards.isnan()]
    return len(judged) == 0 or bool(judged.min() == judged.max())


def with_completions(example: Example, completions: list[Completion]) -> Example:
    """A prompt's example with its completions as responses; extras "sampler_logps" per token, "truncated" per response."""
    return Example(example.prompt, [Response.all_trained(completion.tokens) for completion in completions], example.where, {
        **example.extras, "sampler_logps": torch.from_numpy(np.concatenate([completion.logps for completion in completions])),
        "truncated": torch.tensor([not completion.finished for completion in completions])})
