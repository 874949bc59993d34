"""The computation of a rollout: each prompt once, then a token at a time for all rows."""
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule

from data.pack import Example
from model.cache import Cache, CacheInPlace
from model.draw import draw
from model.form import trunk_of
from model.head import HeadLogits
from model.recorded import Recorded
from model.varlen import layout_of

PREFILL_TOKENS = 8192                  # prompt tokens in one forward


class Decoding:
    """The n rows, at most `rows`, that are decoded together: there is none before `add`. A step works on
    tensors that stay in place until rows come or leave, so that it can be recorded on a GPU."""

    def __init__(self, policy, rows: int, sampling):
        lm = policy.lm
        device = lm.device
        limit = sampling.max_completion_length
        self.policy, self.lm, self.sampling = policy, lm, sampling
        kind = CacheInPlace if device.type == "cuda" else Cache
        self.cache = kind(device)
        self.head_logits = HeadLogits(lm, rows)
        # (n, 1), of the tokens that the next step computes:
        self.positions = torch.zeros(0, 1, dtype=torch.long, device=device)
        self.last_position = 0                                          # of the longest prompt's completion
        # (n, limit), from the last token on that each row had when rows were added:
        self.uniforms = torch.zeros(0, limit, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(0, limit, dtype=torch.long, device=device)
        self.logps = torch.zeros(0, limit, device=device)
        self.place = torch.ones(1, dtype=torch.long, device=device)     # which of the `limit` is drawn next
        self.length = 1                                                 # the same on the host
        # a sharded layer waits for other streams, which a recorded step cannot
        is_sharded = any(isinstance(module, FSDPModule) for module in lm.modules())
        self.recorded = Recorded(device.type == "cuda" and not is_sharded)

    def add(self, prompts: list[np.ndarray], uniforms: np.ndarray):
        """Go on with a row more for each of `prompts`, copies of which are neighbours and the same object.
        `uniforms` (m, limit). Returns these rows' first tokens and log-probs (m, 1)."""
        device = self.lm.device
        limit = uniforms.shape[1]
        lengths = [len(prompt) for prompt in prompts]
        hidden = prefill(self.policy, self.cache, prompts, room=limit)      # (m, D)
        uniforms = torch.from_numpy(uniforms).to(device)
        tokens, logps = self.draw(hidden, uniforms[:, 0])
        positions = torch.tensor(lengths, device=device)[:, None]
        self.positions = torch.cat([self.positions, positions])
        self.last_position = max(self.last_position, max(lengths) + limit - 1)
        used = self.length - 1
        left = F.pad(self.uniforms[:, used:], (0, used))
        self.uniforms = torch.cat([left, uniforms])
        last = torch.cat([self.tokens[:, used:self.length], tokens])            # (n, 1)
        self.tokens = F.pad(last, (0, limit - 1))
        self.logps = torch.zeros(self.tokens.shape, device=device)
        self.length = 1
        self.place.fill_(1)
        self.recorded.forget()
        return tokens, logps

    def draw(self, hidden, uniforms):
        """Tokens and log-probs (m, 1) from hidden states (m, D) and uniform numbers (m,)."""
        sampling = self.sampling
        tokens, logps = draw(
            self.head_logits(hidden),
            uniforms,
            sampling.temperature,
            sampling.top_p,
            sampling.top_k,
        )
        return tokens[:, None], logps[:, None]

    def step(self) -> None:
        """The hidden states of the last tokens, and the tokens after them."""
        tokens = self.tokens.index_select(1, self.place - 1)            # (n, 1)
        self.cache.start_step()
        states = last_hidden(self.lm, self.cache, tokens, self.positions)
        # rows that have ended are computed on; some rotary embeddings (longrope) would change for all rows if
        # one had a position that no completion reaches
        self.positions.add_(1).clamp_(max=self.last_position)
        uniforms = self.uniforms.index_select(1, self.place)
        tokens, logps = self.draw(states[:, 0], uniforms[:, 0])
        self.tokens.index_copy_(1, self.place, tokens)
        self.logps.index_copy_(1, self.place, logps)
        self.place += 1

    def advance(self, steps: int):
        """Draw so many more tokens for each row, or as many as there is room for: tokens and log-probs
        (n, c)."""
        start = self.length
        end = min(start + steps, self.tokens.shape[1])
        for _ in range(start, end):
            if self.cache.show():
                self.recorded.forget()
            self.recorded(self.step)
            self.cache.column += 1
        self.length = end
        return self.tokens[:, start:end], self.logps[:, start:end]

    def compact(self, alive: list[int]) -> list[int]:
        """Go on with the rows `alive` only; returns them in their new order."""
        order = self.cache.compact(alive)
        places = torch.tensor(order, dtype=torch.long, device=self.lm.device)
        for name in ("positions", "uniforms", "tokens", "logps"):
            setattr(self, name, getattr(self, name).index_select(0, places))
        self.recorded.forget()
        return order


def prefill(policy, cache: Cache, prompts: list[np.ndarray], room: int):
    """Add rows to the cache for the m `prompts`, with their keys and values and `room` columns behind them;
    the last hidden state (m, D) of every row's prompt. Each prompt is computed once, together with as many
    others as PREFILL_TOKENS allow, and their common prefix once for all of these."""
    groups = copies_together(prompts, first=cache.rows)
    cache.add(groups, room)
    hidden = []
    while groups:
        ends = np.cumsum([len(prompt) for prompt, _ in groups])
        fitting = int((ends <= PREFILL_TOKENS).sum())
        count = max(1, fitting)
        cache.prompts = groups[:count]
        groups = groups[count:]
        batch = policy.collate([Example(prompt, [], "a prompt") for prompt, _ in cache.prompts])
        cache.prefix = batch.prefix
        states = last_hidden(
            policy.lm, cache, batch.tokens[None], batch.positions[None], **layout_of(batch))[0]
        end = batch.prefix
        for prompt, rows in cache.prompts:
            end += len(prompt) - batch.prefix
            copies = rows.stop - rows.start
            hidden.append(states[end - 1].expand(copies, -1))
    return torch.cat(hidden)


def copies_together(prompts: list[np.ndarray], first: int) -> list[tuple[np.ndarray, slice]]:
    """Per prompt: its ids and its rows, the copies of it that are neighbours in `prompts`; rows are counted
    from `first` on."""
    groups = []
    for _, copies in itertools.groupby(prompts, key=id):
        copies = list(copies)
        end = first + len(copies)
        groups.append((copies[0], slice(first, end)))
        first = end
    return groups


def last_hidden(lm, cache: Cache, ids, positions, **layout):
    """(B, T) ids and positions -> hidden states (B, T, D); `cache` takes their keys and values. `layout`: the
    segments or units of whole prompts."""
    return trunk_of(lm)(
        input_ids=ids,
        position_ids=positions,
        use_cache=False,
        rollout_cache=cache,      # `cache` and `past_key_values` are the layers' own
        **layout,
    ).last_hidden_state
