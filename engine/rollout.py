"""A rollout: sampled completions, and what is known of each of them."""
import difflib
from collections.abc import Sequence

import numpy as np
import torch

from data.errors import RunError
from data.pack import Example, Response
from model.sampler import Completion

PerPrompt = Sequence[torch.Tensor]      # a tensor per prompt: a number per completion (G,), or one per token


OWN = ("number", "rows", "examples", "metrics", "kept", "attempts")      # what a Rollout holds beside numbers


class Numbers:
    """An attribute of a Rollout that is a PerPrompt, stored beside the prompts, where `batch.extra` finds
    it."""

    def __init__(self, missing: str):
        self.missing = missing

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, rollout, owner=None) -> PerPrompt:
        if rollout is None:
            return self
        if not rollout.knows(self.name):
            raise RunError(f"rollout.{self.name} is not known yet; fix: {self.missing}")
        return rollout[self.name]

    def __set__(self, rollout, values: PerPrompt) -> None:
        rollout[self.name] = values


class Rollout:
    """The completions of one batch of prompts. `examples`: one per prompt, with its group of G responses;
    `rows`: where these prompts stand in the data."""

    truncated = Numbers("sample it with engine.rollouts")            # (G,) bool: at max_completion_length
    sampler_logps = Numbers("sample it with engine.rollouts")        # per token, under the sampler
    rewards = Numbers("add the line engine.score(rollout) before")   # (G,); NaN: no reward scored it
    scores = Numbers("set it from rollout.rewards")                  # (G,): rewards less a penalty
    advantages = Numbers("set it from rollout.rewards")              # (G,), or per token
    returns = Numbers("set it beside the advantages")                # per token
    kl = Numbers("set it from old_logps and reference_logps")        # per token
    old_logps = Numbers("rollout.once('old_logps', engine.logps, policy, rollout)")
    reference_logps = Numbers("rollout.once('reference_logps', engine.logps, reference, rollout)")
    old_values = Numbers("rollout.once(('old_logps', 'old_values'), engine.logps_and_values, rollout)")

    def __init__(self, number: int, rows: list[int], examples: list[Example]):
        self.number, self.rows, self.examples = number, list(rows), examples
        self.metrics: dict = {}                           # joins the metrics of this rollout's updates
        self.kept = ["sampler_logps", "truncated"]        # the names that a checkpoint holds
        self.attempts = 0                                 # calls of engine.resample so far

    def once(self, names: str | tuple[str, ...], function, *arguments) -> PerPrompt | list[PerPrompt]:
        """`function(*arguments)`, called once per rollout: a resumed run finds the values in its
        checkpoint. They become known to `batch.extra(name)`. With several `names` the function returns as
        many lists."""
        several = isinstance(names, tuple)
        names = names if several else (names,)
        if not all(map(self.knows, names)):
            found = function(*arguments)
            for name, values in zip(names, found if several else [found], strict=True):
                self[name] = values
        self.kept += [name for name in names if name not in self.kept]
        values = [self[name] for name in names]
        return values if several else values[0]

    def skip_zero_gradients(self) -> None:
        """Leave the prompts whose advantages are all 0 out of the updates' forwards. They still count in the
        means. Right only where nothing but the advantages gives a gradient."""
        for example, advantages in zip(self.examples, self.advantages):
            example.has_gradient = bool(advantages.nan_to_num().any())

    def knows(self, name: str) -> bool:
        return all(name in example.extras for example in self.examples)

    def __getitem__(self, name: str) -> PerPrompt:
        return tuple(example.extras[name] for example in self.examples)      # to assign into it is an error

    def __setitem__(self, name: str, values: PerPrompt) -> None:
        values = list(values)
        if len(values) != len(self.examples):
            raise RunError(f"{name} has {len(values)} entries for a rollout of {len(self.examples)} prompts; "
                           "fix: give a list with one tensor per prompt")
        for example, value in zip(self.examples, values):
            example.extras[name] = checked(name, value, example)

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)                    # what copy and pickle ask for
        raise unknown(name)

    def __setattr__(self, name: str, value) -> None:
        if not hasattr(type(self), name) and name not in OWN:
            raise unknown(name)
        object.__setattr__(self, name, value)

    @property
    def lengths(self) -> PerPrompt:
        """The tokens of each completion, (G,) per prompt, in fp64 as rewards are."""
        lengths = []
        for example in self.examples:
            counts = [len(response.tokens) for response in example.responses]
            lengths.append(torch.tensor(counts, dtype=torch.float64))
        return lengths


def unknown(name: str) -> RunError:
    names = [key for key, value in vars(Rollout).items() if isinstance(value, Numbers)]
    near = difflib.get_close_matches(name, names, n=1)
    fix = f"write rollout.{near[0]}" if near else f"rollout.once({name!r}, function) for numbers of your own"
    return RunError(f"a rollout has no {name!r} (it has {', '.join(names)}); fix: {fix}")


def checked(name: str, value, example: Example) -> torch.Tensor:
    """`value` as a tensor; RunError if it is neither per completion nor per token."""
    value = torch.as_tensor(value)
    if example.sizes_in(value) is None:
        completions, tokens = len(example.responses), example.num_trained
        raise RunError(f"{name} has the shape {tuple(value.shape)} for a prompt with {completions} "
                       f"completions and {tokens} tokens; fix: give one number per completion, "
                       f"({completions},), or one per token, ({tokens},)")
    return value


def alike(rewards: torch.Tensor) -> bool:
    """Whether the rewards of a group (G,), or of a batch, are one value, NaN (no reward) aside. They give no
    gradient then, and their advantage is 0: the mean of equal numbers may differ from them by rounding, and
    AdamW makes full steps of that."""
    known = rewards[~rewards.isnan()]
    return len(known) == 0 or bool(known.min() == known.max())


def with_completions(example: Example, completions: list[Completion]) -> Example:
    """A prompt's example with its completions as responses; extras "sampler_logps" per token, "truncated" per
    response."""
    responses = [Response.all_trained(completion.tokens) for completion in completions]
    logps = np.concatenate([completion.logps for completion in completions])
    truncated = [not completion.finished for completion in completions]
    known = {"sampler_logps": torch.from_numpy(logps), "truncated": torch.tensor(truncated)}
    return Example(example.prompt, responses, example.where, example.extras | known)
