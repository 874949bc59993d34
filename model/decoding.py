"""The computation of a rollout: the prompts once, then a token at a time for all rows."""
import itertools

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule

from model.cache import Cache, CacheInPlace
from model.draw import draw
from model.form import trunk_of
from model.head import HeadLogits
from model.recorded import Recorded

PREFILL_TOKENS = 8192                  # prompt tokens in one forward


class Decoding:
    """The n rows that are decoded together. A step works on tensors that stay in place, so that it can be
    recorded on a GPU."""

    def __init__(self, lm, prompts: list[np.ndarray], uniforms: np.ndarray, sampling):
        self.lm, self.sampling = lm, sampling
        rows, limit = uniforms.shape
        self.cache, hidden = prefill(lm, prompts, room=limit)          # hidden (n, D)
        self.head_logits = HeadLogits(lm, rows)
        lengths = [len(prompt) for prompt in prompts]
        device = lm.device
        self.positions = torch.tensor(lengths, device=device)[:, None]      # (n, 1) of the next step's tokens
        self.uniforms = torch.from_numpy(uniforms).to(device)           # (n, limit)
        self.tokens = torch.zeros(rows, limit, dtype=torch.long, device=device)
        self.logps = torch.zeros(rows, limit, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)    # which of the `limit` is drawn next
        self.length = 0                                                 # the same on the host
        # a sharded layer waits for other streams, which a recorded step cannot
        is_sharded = any(isinstance(module, FSDPModule) for module in lm.modules())
        self.recorded = Recorded(self.step, device.type == "cuda" and not is_sharded)
        self.draw(hidden)
        self.length += 1

    def draw(self, hidden) -> None:
        """The next token of each row, from hidden states (n, D)."""
        sampling = self.sampling
        tokens, logps = draw(
            self.head_logits(hidden),
            self.uniforms.index_select(1, self.place)[:, 0],
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
        )
        self.tokens.index_copy_(1, self.place, tokens[:, None])
        self.logps.index_copy_(1, self.place, logps[:, None])
        self.place += 1

    def step(self) -> None:
        """The hidden states of the last tokens, and the tokens after them."""
        tokens = self.tokens.index_select(1, self.place - 1)            # (n, 1)
        self.cache.start_step()
        states = last_hidden(self.lm, self.cache, tokens, self.positions)
        self.cache.end_step()
        self.positions += 1
        self.draw(states[:, 0])

    def advance(self, steps: int) -> None:
        """Draw `steps` more tokens for each row."""
        for _ in range(steps):
            if self.cache.show(self.length):
                self.recorded.forget()
            self.recorded()
            self.length += 1

    def drawn(self, start: int):
        """Tokens and log-probs (n, c) of the steps from `start` on."""
        return self.tokens[:, start:self.length], self.logps[:, start:self.length]

    def compact(self, alive: list[int]) -> list[int]:
        """Go on with the rows `alive` only; returns them in their new order."""
        order = self.cache.compact(alive)
        places = torch.tensor(order, device=self.lm.device)
        for name in ("positions", "uniforms", "tokens", "logps"):
            setattr(self, name, getattr(self, name).index_select(0, places))
        self.recorded.forget()
        return order


def prefill(lm, prompts: list[np.ndarray], room: int):
    """A Cache of every prompt's keys and values, with `room` columns more, and the last hidden state of every
    row's prompt (rows, D). Each prompt is computed once, together with as many others as PREFILL_TOKENS
    allow."""
    groups = copies_together(prompts)
    kind = CacheInPlace if lm.device.type == "cuda" else Cache
    cache = kind(groups, room, lm.device)
    hidden = []
    while groups:
        ends = np.cumsum([len(prompt) for prompt, _ in groups])
        fitting = int((ends <= PREFILL_TOKENS).sum())
        count = max(1, fitting)
        cache.prompts = groups[:count]
        groups = groups[count:]
        ids, positions, segments = [], [], []
        for prompt, _ in cache.prompts:
            length = len(prompt)
            ids.append(prompt)
            positions.append(np.arange(length))
            segments.append((length, []))                          # a prompt without responses
        ids = torch.from_numpy(np.concatenate(ids)).long()
        positions = torch.from_numpy(np.concatenate(positions))
        ids = ids[None].to(lm.device)
        positions = positions[None].to(lm.device)
        states = last_hidden(lm, cache, ids, positions, segments)[0]
        for end, (_, rows) in zip(ends, cache.prompts):
            copies = rows.stop - rows.start
            hidden.append(states[end - 1].expand(copies, -1))
    return cache, torch.cat(hidden)


def copies_together(prompts: list[np.ndarray]) -> list[tuple[np.ndarray, slice]]:
    """Per prompt: its ids and its rows, the copies of it that are neighbours in `prompts`."""
    groups = []
    start = 0
    for _, copies in itertools.groupby(prompts, key=id):
        copies = list(copies)
        end = start + len(copies)
        groups.append((copies[0], slice(start, end)))
        start = end
    return groups


def last_hidden(lm, cache: Cache, ids, positions, segments=None):
    """(B, T) ids and positions -> hidden states (B, T, D); `cache` takes their keys and values."""
    options = {"use_cache": False, "cache": cache, "segments": segments}
    return trunk_of(lm)(input_ids=ids, position_ids=positions, **options).last_hidden_state
