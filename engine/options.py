"""The keys of every online algorithm."""
from dataclasses import dataclass

from data.errors import UserError


@dataclass
class Sampling:
    """The keys of every online algorithm that say how completions are drawn and judged."""
    reward: str                            # gsm8k, r1_zero, math, path/to/file.py:function, or the run of a
    #                                        reward model; several: a, b
    reward_weights: str | None = None      # of several rewards: 1, 0.5; null = each counts 1
    prompt_template: str | None = None     # a name in data/prompts/, such as r1_zero, or a file with {question}; null = the chat template
    max_completion_length: int = 512       # tokens; longer completions are cut there ("truncated")
    temperature: float = 1.0               # of sampling, and of every log-prob
    top_p: float = 1.0                     # below 1: only the likeliest tokens that together have this probability are drawn
    top_k: int = 0                         # above 0: only the k likeliest tokens are drawn
    stop: str | list[str] | None = "auto"  # strings that end a completion, besides stop tokens: </answer>.
    #                                        A text is cut at its commas, \n in it is a newline; a list, such
    #                                        as ["\n\n", "Question:"], stands as it is. auto = </answer> with
    #                                        the template r1_zero, else none
    reward_timeout: float = 60.0           # seconds that a call of a reward may take
    rollout_batch_size: int = 64           # completions decoded together on one device: memory and speed, not the result

    def __post_init__(self):
        if self.stop == "auto":
            self.stop = usual_stop(self.prompt_template)
        if self.stop is not None and not stop_strings(self.stop):
            raise UserError(f"stop is {self.stop!r}, which holds no string; "
                            "fix: give strings, such as </answer>, or a list of them, or null")

    def rollout_shape(self):
        g = lambda n, d=1: getattr(self, n, d)
        return g('num_generations'), g('num_iterations', g('num_ppo_epochs')), g('num_mini_batches')

    def stop_strings(self) -> list[str]:
        return stop_strings(self.stop)


def usual_stop(prompt_template: str | None) -> str | None:
    """What ends a completion where `stop` does not say it: the tag that ends an answer in the template
    r1_zero. Text after it would make a right answer a wrong one."""
    return "</answer>" if prompt_template == "r1_zero" else None


def stop_strings(stop: str | list[str] | None) -> list[str]:
    """The strings that a value of `stop` means: those of a list as they are. A text is cut at commas; spaces
    around the parts do not count, and \\n and \\t in them are a newline and a tab."""
    if stop == "auto":
        raise UserError("stop was not set; "
                        "fix: let __post_init__ of the algorithm's Config call super().__post_init__()")
    if stop is None or isinstance(stop, list):
        return stop or []
    parts = [part.strip(" ") for part in stop.split(",")]
    return [part.replace("\\n", "\n").replace("\\t", "\t") for part in parts if part]
