"""The strict measure of task 1: `reward: example/smollm2/reward.py:strict`.

The verifier `gsm8k` is the lenient one: the last number of the answer is right, whatever follows it. Here
nothing may follow but a full stop, so an answer that goes on after the number, or is cut off, is wrong.
"""
import re

AT_THE_END = re.compile(r"(?<![\d.,-])(-?\d{1,9})\.?\s*\Z")


def strict(prompts, completions, answer, **columns):
    """1.0 where the completion ends with the gold number, else 0.0."""
    rewards = []
    for completion, gold in zip(completions, answer):
        found = AT_THE_END.search(completion)
        rewards.append(float(found is not None and int(found[1]) == int(gold)))
    return rewards
