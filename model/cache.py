"""Keys and values of the tokens so far, and the attention that reads them while completions are sampled."""
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from model.attention import segments_attention
from model.scores import scored_attention
from model.varlen import varlen_attention

SHOWN = 128                            # a step in place computes a multiple of so many columns
CACHE_BYTES = 2 ** 31                  # keys and values at a time on a CPU; on a GPU half of its free memory


def tokens_in_memory(lm) -> int:
    """How many tokens the memory for keys and values holds, those of all rows together."""
    config = lm.config.get_text_config()
    query_heads = getattr(config, "num_attention_heads", None) or 1              # Mamba has none
    heads = getattr(config, "num_key_value_heads", None) or query_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
    dtype = lm.dtype
    if torch.is_autocast_enabled(lm.device.type):
        dtype = torch.get_autocast_dtype(lm.device.type)
    per_token = config.num_hidden_layers * 2 * heads * head_dim * dtype.itemsize
    room = CACHE_BYTES
    if lm.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(lm.device)
        kept = torch.cuda.memory_reserved(lm.device) - torch.cuda.memory_allocated(lm.device)
        room = (free + kept) // 2                # PyTorch gives again what it keeps of freed tensors
    return room // per_token


class Cache:
    """Keys and values of every layer, one row per completion. The tokens of all rows end in the same column,
    so that each step writes one column for all rows; `mask` hides the columns before a shorter row."""

    def __init__(self, device):
        self.device = device
        self.start = torch.zeros(0, dtype=torch.long)              # (rows,): where each row's prompt begins
        self.column = 0                                            # the one that the next step writes
        self.width = 0                                             # how many columns there are
        self.layers = {}                                           # layer: [keys, values]
        self.prompts = []                                          # the groups that the next forward computes
        self.prefix = 0                                            # how many tokens they all begin with
        self.mask = None                                           # (rows, 1, 1, width)
        self.hidden = 0                                            # columns that it hides from some row

    @property
    def rows(self) -> int:
        return len(self.start)

    def add(self, groups: list[tuple[np.ndarray, slice]], room: int) -> None:
        """Make rows for new prompts. What the old rows hold moves to the columns where the longest of all
        rows, old and new, begins in the first one.

        `groups`: each new prompt's ids and its rows, a slice; they follow the old rows. `room`: how many
        columns follow the prompts."""
        lengths = torch.zeros(groups[-1][1].stop, dtype=torch.long)
        lengths[:self.rows] = self.column - self.start
        for prompt, rows in groups:
            lengths[rows] = len(prompt)
        old_column = self.column
        self.column = int(lengths.max())
        self.width = self.column + room
        self.start = self.column - lengths
        self.hide()
        for stored in self.layers.values():
            for i, old in enumerate(stored):                       # one by one: memory holds both of one only
                stored[i] = self.moved(old, old_column)

    def hide(self) -> None:
        """Set the mask, which hides the columns before each prompt; None where there are no such columns."""
        self.hidden = int(self.start.max())
        self.mask = None
        if self.hidden:
            visible = torch.arange(self.width) >= self.start[:, None]
            self.mask = visible[:, None, None].to(self.device)

    def moved(self, old, old_column: int):
        """One layer's keys or values with room for the new rows; those that ended at `old_column` end at
        `column`."""
        made = self.empty(old)
        count = min(old_column, self.column)
        columns = slice(self.column - count, self.column)
        made[:len(old), :, columns] = old[:, :, old_column - count:old_column]
        return made

    def store_prompts(self, layer: int, key, value) -> None:
        """Copy the keys and values (1, heads, T, head_dim) of `prompts` to each prompt's rows: those of their
        prefix, which come first, and those of the rest of each."""
        if layer not in self.layers:
            self.layers[layer] = [self.empty(key), self.empty(value)]
        for stored, new in zip(self.layers[layer], (key[0], value[0])):
            end = self.prefix
            for prompt, rows in self.prompts:
                start = end
                end += len(prompt) - self.prefix
                first = self.column - len(prompt)
                own = first + self.prefix
                if self.prefix:
                    stored[rows, :, first:own] = new[:, :self.prefix]
                stored[rows, :, own:self.column] = new[:, start:end]

    def empty(self, new):
        """Room for one layer's keys or values, of the shape and type of `new`."""
        _, heads, _, head_dim = new.shape
        made = new.new_empty(self.rows, heads, self.width, head_dim)
        made[:, :, :self.hidden].zero_()               # the mask hides these columns, but 0 times NaN is NaN
        return made

    def show(self) -> bool:
        """Steps compute the columns that there are."""
        return False

    def start_step(self) -> None:
        """There is nothing to prepare."""

    def append(self, layer: int, key, value, sliding_window: int | None):
        """Write a step's keys and values (rows, heads, 1, head_dim). Returns those that its queries see, and
        a mask (rows, 1, 1, columns), or None where each row sees all of them."""
        keys, values = self.layers[layer]
        column = self.column
        keys[:, :, column] = key[:, :, 0]
        values[:, :, column] = value[:, :, 0]
        end = column + 1
        start = 0 if sliding_window is None else max(0, end - sliding_window)
        mask = None if self.mask is None else self.mask[..., start:end]
        return keys[:, :, start:end], values[:, :, start:end], mask

    def compact(self, alive: list[int]) -> list[int]:
        """Keep the rows `alive`: the last of them fill the gaps. Returns the rows in their new order."""
        size = len(alive)
        kept = set(alive)
        gaps = [row for row in range(size) if row not in kept]
        movers = [row for row in alive if row >= size]
        for stored in self.layers.values():
            for i, whole in enumerate(stored):
                filled = whole[:, :, :self.column]
                if gaps:
                    filled[gaps] = filled[movers]
                stored[i] = whole[:size]
        order = list(range(size))
        for gap, mover in zip(gaps, movers):
            order[gap] = mover
        self.start = self.start[order]
        if self.mask is not None:
            self.mask = self.mask[order]
        return order


class CacheInPlace(Cache):
    """A Cache for a step that a GPU replays (model/recorded.py): its tensors stay where they are until rows
    come or leave. `place` (1,) is the column that the last step wrote. A step computes the first `shown`
    columns, and `mask` hides those that it does not see."""

    def hide(self) -> None:
        self.shown = 0
        self.hidden = self.width
        self.place = torch.tensor([self.column - 1], device=self.device)
        columns = torch.arange(self.width)
        visible = (columns >= self.start[:, None]) & (columns < self.column)
        self.mask = visible[:, None, None].to(self.device)

    def show(self) -> bool:
        """Let steps compute the columns up to the next one; whether that changes anything."""
        if self.column < self.shown:
            return False
        self.shown = min(self.width, (self.column // SHOWN + 1) * SHOWN)
        return True

    def start_step(self) -> None:
        self.place += 1
        self.mask.index_fill_(3, self.place, True)

    def append(self, layer: int, key, value, sliding_window: int | None):
        keys, values = self.layers[layer]
        keys.index_copy_(2, self.place, key)
        values.index_copy_(2, self.place, value)
        mask = self.mask[..., :self.shown]
        if sliding_window is not None:
            columns = torch.arange(self.shown, device=mask.device)
            mask = mask & (columns > self.place - sliding_window)
        return keys[:, :, :self.shown], values[:, :, :self.shown], mask

    def compact(self, alive: list[int]) -> list[int]:
        order = torch.tensor(alive, dtype=torch.long, device=self.device)
        for stored in self.layers.values():
            for i, whole in enumerate(stored):
                stored[i] = whole.index_select(0, order)
        self.mask = self.mask.index_select(0, order)
        self.start = self.start[alive]
        return alive


def rollout_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    rollout_cache=None,
    segments=None,
    prefix=0,
    units=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **_,
):
    """Attention while sampling: within whole prompts (`segments`, or their `units`), or of one new token per
    row over what `rollout_cache` holds. Shapes are those of `segments_attention`."""
    key = key.to(value.dtype)                                      # as in segments_attention
    within = None
    if segments is not None:
        within = partial(segments_attention, segments=segments, prefix=prefix)
    elif units is not None:
        within = partial(varlen_attention, units=units)
    if within:
        rollout_cache.store_prompts(module.layer_idx, key, value)
        options = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
        return within(module, query, key, value, None, **options)
    key, value, mask = rollout_cache.append(module.layer_idx, key, value, sliding_window)
    # the query heads of a key's head are its queries: fewer and larger products than with a copy for each
    rows, _, _, head_dim = query.shape
    grouped = query.to(value.dtype).view(rows, key.shape[1], -1, head_dim)
    if softcap or s_aux is not None:
        sinks = None if s_aux is None else s_aux.view(1, key.shape[1], -1, 1)
        attended = scored_attention(grouped, key, value, mask, scaling, softcap, sinks)
    else:
        attended = F.scaled_dot_product_attention(grouped, key, value, mask, scale=scaling)
    return attended.reshape(rows, 1, -1, head_dim), None


AttentionInterface.register("rollout", rollout_attention)
