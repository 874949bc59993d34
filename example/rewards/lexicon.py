"""A lexicon: how many of a completion's words are in a list, weighted.

    LEXICON=polite.txt python train.py example/qwen2.5-grpo.yml reward=example/rewards/lexicon.py:lexicon

The file named by LEXICON has a word on every line, and after it, if it should not count 1, a weight:
"thanks", "please 0.5", "stupid -2". The reward is the weights' sum per word of the completion, so that length
earns nothing; an empty completion gets 0.
"""
import functools
import os
import re

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def lexicon(prompts, completions, **columns):
    weights = read(os.environ.get("LEXICON", ""))
    rewards = []
    for completion in completions:
        words = WORD.findall(completion.lower())
        total = sum(weights.get(word, 0.0) for word in words)
        rewards.append(total / max(1, len(words)))
    return rewards


@functools.cache
def read(path: str) -> dict[str, float]:
    """{word: weight}"""
    if not path:
        raise RuntimeError("the environment variable LEXICON is not set; fix: export LEXICON=words.txt")
    weights = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            word, *weight = line.split()[:2] or [""]
            try:
                weights[word.lower()] = float(weight[0]) if weight else 1.0
            except ValueError:
                raise RuntimeError(f"{path}:{number} has no number after {word}; "
                                   "fix: write a weight") from None
    weights.pop("", None)
    return weights
