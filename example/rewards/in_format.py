"""A reward for the format alone: the completion ends in `</think> <answer> ... </answer>`, right or wrong.

    python train.py example/tiny-gdpo.yml

The verifier r1_zero asks for the same format, and for the right answer in it.
"""
import re

END = re.compile(r"</think>\s+<answer>[^<]*</answer>\s*\Z")


def in_format(prompts, completions, **columns):
    """1.0 where the completion ends so, and thinks and answers only once, else 0.0."""
    rewards = []
    for completion in completions:
        ends = completion.count("</think>"), completion.count("<answer>"), completion.count("</answer>")
        rewards.append(float(ends == (1, 1, 1) and END.search(completion) is not None))
    return rewards
