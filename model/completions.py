"""Completions while they are drawn, and what ends them."""
from typing import NamedTuple

import numpy as np

from data.tokenise import stop_ids


class Completion(NamedTuple):
    """One completion: token ids (L,) int32 up to and including what stopped it, their log-probs (L,) fp32
    under the policy at the sampling temperature (before top_p and top_k), and whether it stopped by
    itself."""
    tokens: np.ndarray
    logps: np.ndarray
    finished: bool


class Stops:
    """What ends a completion: a stop token, or a string in the text so far."""

    def __init__(self, tokenizer, strings: list[str]):
        self.tokenizer, self.strings = tokenizer, strings
        self.ids = set(stop_ids(tokenizer))
        longest = max((len(string.encode()) for string in strings), default=0)
        self.window = longest + 4                      # a token is a byte at least

    def __call__(self, tokens) -> bool:
        if int(tokens[-1]) in self.ids:
            return True
        if not self.strings:
            return False
        text = self.tokenizer.decode(tokens[-self.window:])
        return any(string in text for string in self.strings)


class Drawn:
    """What was drawn so far: tokens and log-probs (rows, limit), and by row the completions that have
    ended."""

    def __init__(self, rows: int, limit: int):
        self.tokens = np.zeros((rows, limit), np.int32)
        self.logps = np.zeros((rows, limit), np.float32)
        self.completions = {}

    def add(self, step: int, active: list[int], tokens, logps, stops: Stops) -> bool:
        """Note the tokens that a step drew for the rows `active`; whether any of them has ended now."""
        self.tokens[active, step] = tokens.cpu().numpy()
        self.logps[active, step] = logps.cpu().numpy()
        before = len(self.completions)
        length = step + 1
        limit = self.tokens.shape[1]
        for row in active:
            if row in self.completions:
                continue
            tokens = self.tokens[row, :length]
            logps = self.logps[row, :length]
            stopped = stops(tokens)
            if stopped or length == limit:
                self.completions[row] = Completion(tokens, logps, stopped)
        return len(self.completions) > before
