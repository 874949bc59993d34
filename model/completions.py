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
        self.can_end = {}                              # token id: whether a string can end with it

    def __call__(self, tokens) -> bool:
        last = int(tokens[-1])
        if last in self.ids:
            return True
        if not self.strings:
            return False
        if last not in self.can_end:
            self.can_end[last] = self.may_end(last)
        if not self.can_end[last]:                        # most tokens: decoding each row's text takes longer
            return False
        text = self.tokenizer.decode(tokens[-self.window:])
        return any(string in text for string in self.strings)

    def may_end(self, token: int) -> bool:
        """Whether a string can end with this token. A tokenizer may drop a space at the start of a text, and
        writes a part of a character as U+FFFD."""
        text = self.tokenizer.decode([token])
        if not text or "\ufffd" in text:
            return True
        return any(string[-1] in text or string[-1].isspace() for string in self.strings)


class Drawn:
    """What was drawn so far: tokens and log-probs (rows, limit), how many of them each row has, and by row
    the completions that have ended."""

    def __init__(self, rows: int, limit: int):
        self.tokens = np.zeros((rows, limit), np.int32)
        self.logps = np.zeros((rows, limit), np.float32)
        self.lengths = [0] * rows
        self.completions = {}

    def add(self, rows: list[int], tokens, logps, stops: Stops) -> bool:
        """Note the tokens and log-probs (n, c) that c steps drew for `rows`; whether any of them has ended
        now. What was drawn after the end of a row is dropped."""
        tokens = tokens.tolist()                       # numbers of NumPy one by one take longer than Python's
        logps = logps.tolist()
        before = len(self.completions)
        for place, row in enumerate(rows):
            if row not in self.completions:
                self.append(row, tokens[place], logps[place], stops)
        return len(self.completions) > before

    def append(self, row: int, drawn_tokens: list[int], drawn_logps: list[float], stops: Stops) -> None:
        """Note tokens and log-probs of a row up to its end, and its completion if they hold the end."""
        limit = self.tokens.shape[1]
        for token, logp in zip(drawn_tokens, drawn_logps):
            length = self.lengths[row]
            self.tokens[row, length] = token
            self.logps[row, length] = logp
            length += 1
            self.lengths[row] = length
            tokens = self.tokens[row, :length]
            stopped = stops(tokens)
            if stopped or length == limit:
                logps = self.logps[row, :length]
                self.completions[row] = Completion(tokens, logps, stopped)
                return
