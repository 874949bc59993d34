"""The reference: a frozen model as a table of log-probs, computed once and kept for every later run that
needs the same ones.

The table lies beside the runs, in `.reference/<digest of the model>/`, as sealed parts: each run adds what it
found missing. A sweep over dpo, ipo and their betas computes the log-probs of its pairs once and then loads
no reference at all.
"""
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from transformers.utils import cached_file

from data.errors import RunError, UserError
from data.files import sha256
from data.pack import Example
from data.store import Examples, mapped, response_keys
from engine import checkpoint, sealed
from engine.claim import claim, release
from engine.ranks import from_main
from model.load import base_of, check_name, first_line, is_adapter

ARRAYS = ("keys", "starts", "logps")      # of a part, see `Table`
WEIGHTS_AND_CONFIG = (".safetensors", ".bin", "config.json")      # endings of the files that matter


# ---- the table -------------------------------------------------------------------------------------------

class Table:
    """The log-probs of responses in parts on disk, the oldest first. A part holds those of R responses:

    keys    (R,)      S16      `response_keys`, sorted
    starts  (R + 1,)  int64    where each response begins in `logps`, and the end of the last one
    logps             float32  of the trained tokens, one response after the other"""

    def __init__(self, parts: list[dict[str, np.ndarray]]):
        self.parts = parts

    def lacks(self, keys: np.ndarray) -> np.ndarray:
        """(n,) bool: which of the (n,) keys are in no part. Sorted keys are found several times as fast."""
        lacks = np.ones(len(keys), bool)
        for part in self.parts:
            left = lacks.nonzero()[0]
            lacks[left] = places_in(part, keys[left]) < 0
        return lacks

    def logps(self, keys: list[bytes]) -> list[torch.Tensor]:
        """The (L,) log-probs of each of these responses. Where two parts hold the same one the older counts,
        since a run may have started with it."""
        keys = np.array(keys, "S16")
        found = [None] * len(keys)
        for part in reversed(self.parts):
            for i, place in enumerate(places_in(part, keys).tolist()):
                if place >= 0:
                    start, end = part["starts"][place:place + 2]
                    found[i] = torch.from_numpy(part["logps"][start:end].copy())
        return found


def places_in(part: dict[str, np.ndarray], keys: np.ndarray) -> np.ndarray:
    """(n,) the number of each of the (n,) keys in a part, -1 where it is not there."""
    places = np.searchsorted(part["keys"], keys)
    places = np.minimum(places, len(part["keys"]) - 1)
    return np.where(part["keys"][places] == keys, places, -1)


class Reference:
    """`reference(batch)` -> (N,) log-probs of the batch's trained tokens, on its device, without a
    gradient."""

    def __init__(self, table: Table):
        self.table = table

    def __call__(self, batch):
        keys = []
        for example in batch.examples:
            keys += response_keys(example)
        return torch.cat([torch.zeros(0), *self.table.logps(keys)]).to(batch.source.device)


def lacking(groups: list[Examples], table: Table) -> tuple[list[Examples], int, int]:
    """Of each group the examples with a response that is neither in the table nor in an example before; and
    how many responses are in the table, of how many. The same response counts once."""
    keys = [group.all_keys() for group in groups]
    every = np.concatenate([part.ravel() for part in keys])
    distinct, first = np.unique(every, return_index=True)      # sorted
    is_absent = table.lacks(distinct)
    is_new = np.zeros(len(every), bool)
    is_new[first[is_absent]] = True
    missing = []
    start = 0
    for group, part in zip(groups, keys):
        of_group = is_new[start:start + part.size].reshape(part.shape)
        missing.append(group.take(of_group.any(axis=1).nonzero()[0]))
        start += part.size
    return missing, len(distinct) - int(is_absent.sum()), len(distinct)


@torch.no_grad()
def check_reference(engine, reference: Reference) -> None:
    """Step-0 invariant: where the reference is the start model, policy and reference agree, per token in fp32
    and on average in bf16."""
    first_rows = [engine.train_set[row] for row in engine.plan.rows(1)]
    batch = engine.policy.collate([max(first_rows, key=Example.size)])
    differences = (engine.policy(batch) - reference(batch)).abs()
    difference = differences.max() if engine.policy.precision == "fp32" else differences.mean()
    if not difference <= engine.policy.rounding:                                     # a NaN stops too
        raise RunError(f"policy and reference differ by {difference:.2g} per token before the first update, "
                       f"though both are {engine.config.model}; "
                       "fix: use a model whose forward is deterministic")


# ---- how it is found -------------------------------------------------------------------------------------

def store_of(engine, path: str | None) -> str:
    """The directory with the reference's log-probs, beside the runs, by model and arithmetic."""
    policy = engine.policy
    bits = " 4-bit" if engine.config.load_in_4bit else ""
    arithmetic = f"{policy.precision} {policy.device.type} {policy.lm.dtype}{bits}"
    key = from_main(model_key, path or engine.config.model, arithmetic)
    runs = os.path.dirname(os.path.normpath(engine.run.directory))
    return os.path.join(runs, ".reference", key)


def model_key(path: str, arithmetic: str) -> str:
    """A digest of a model and of how its log-probs are computed. A local directory counts by its files (and
    those of an adapter's base), a hub model by its name and commit."""
    digest = hashlib.sha256(arithmetic.encode())
    if os.path.isdir(path):
        for name in sorted(os.listdir(path)):
            if name.endswith(WEIGHTS_AND_CONFIG):
                digest.update(f"{name} {sha256(os.path.join(path, name))}\n".encode())
        if is_adapter(path):
            digest.update(model_key(base_of(path), arithmetic).encode())
    else:
        digest.update(f"{path} {hub_commit(path)}".encode())
    return digest.hexdigest()[:16]


def hub_commit(name: str) -> str:
    """The commit of a hub model that would be loaded; UserError where there is none."""
    check_name(name, "reference")
    try:
        config = cached_file(name, "config.json")      # .../snapshots/<commit>/config.json
    except OSError as error:
        reason = first_line(error)
        raise UserError(f"reference: {name} is neither a local directory nor reachable on the hub "
                        f"({reason}); fix: check the name") from error
    return os.path.basename(os.path.dirname(config))


def whole_parts(store: str, notice) -> list[str]:
    """The parts of `store` that can be read; a damaged one is skipped with a notice."""
    found = []
    for part in finished_parts(store):
        if fault := sealed.broken(part):
            notice(f"reference log-probs ignored: {fault}")
        else:
            found.append(str(part))
    return found


def read_table(directories: list[str]) -> Table:
    """The table in these directories, whose arrays are mapped, not read."""
    tables = []
    for directory in directories:
        tables.append({name: mapped(directory, name) for name in ARRAYS})
    return Table(tables)


def finished_parts(store: str) -> list[Path]:
    """The parts of a store that are not being written (`table-….tmp-…`), the oldest first."""
    parts = Path(store).glob("table-" + "[0-9a-f]" * 16)
    return sorted(parts, key=lambda part: (part.stat().st_mtime, part))


# ---- how it is written -----------------------------------------------------------------------------------

def write_part(store: str, keys: list[bytes], logps: list[torch.Tensor]) -> None:
    """Seal the log-probs of these responses as a part of `store`. One process at a time writes into it, so a
    half-written part was left by a process that was killed."""
    logps_of = dict(zip(keys, logps))
    ordered = sorted(logps_of)
    rows = [logps_of[key] for key in ordered]
    arrays = {
        "keys": np.array(ordered, "S16"),
        "starts": np.cumsum([0, *map(len, rows)]),
        "logps": torch.cat(rows).numpy(),
    }
    name = hashlib.sha256(b"".join(keys)).hexdigest()
    part = os.path.join(store, f"table-{name[:16]}")

    def save(directory):
        for name, array in arrays.items():
            np.save(os.path.join(directory, f"{name}.npy"), array, allow_pickle=False)

    write_into(store, part, save)


def write_into(store: str, directory: str, save) -> None:
    """Seal what `save(temporary directory)` writes as `directory` in `store`, unless it is there, whole. One
    process at a time does so, others wait: they find it there."""
    try:
        claim(store, wait=True)
    except OSError as error:
        raise RunError(f"cannot write {store} ({error.strerror}); "
                       "fix: make it writable, or choose another output") from error
    try:
        checkpoint.tidy(store)
        if sealed.broken(directory):
            sealed.write_sealed(directory, save)
    finally:
        release(store)
