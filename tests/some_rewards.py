"""Rewards that the tests' configurations name."""
import math


def number(completion, answer):
    """Different for almost every completion, and for another answer another."""
    return sum(map(ord, completion)) * (3 + int(answer)) % 97


def varied(prompts, completions, answer, **columns):
    return [number(*pair) / 97 for pair in zip(completions, answer)]


def coarse(prompts, completions, answer, **columns):
    """0 or 1: some groups are all alike."""
    return [float(number(*pair) % 2) for pair in zip(completions, answer)]


def some(prompts, completions, answer, **columns):
    """None for two in five, and for every completion of two answers."""
    return [None if answer in ("1", "5") or number(completion, answer) % 5 < 2 else number(completion, answer) / 97
            for completion, answer in zip(completions, answer)]


def some_low(prompts, completions, answer, **columns):
    """None for answers of 8 and above, which are held out."""
    return [None if int(answer) >= 8 else value for value, answer in zip(varied(prompts, completions, answer), answer)]


def none(prompts, completions, **columns):
    return [None] * len(completions)


def nan(prompts, completions, answer, **columns):
    return [math.nan if answer == "2" else 1.0 for answer in answer]
