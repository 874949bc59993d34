"""The reference: a frozen model as a table of log-probs, computed once and kept for every later run that
needs the same ones.

The table lies beside the runs, in `.reference/<digest of the model>/`, as sealed parts: each run adds what it
found missing. A sweep over dpo, ipo and their betas computes the log-probs of its pairs once and then loads
no reference at all.
"""
import hashlib
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from data.errors import RunError, UserError
from data.files import sha256
from engine import checkpoint
from engine.claim import claim, release
from model.load import base_of, check_name, first_line, is_adapter

LOGPS = "logps.safetensors"
WEIGHTS_AND_CONFIG = (".safetensors", ".bin", "config.json")      # endings of the files that matter


# ---- the table -------------------------------------------------------------------------------------------

class Reference:
    """`reference(batch)` -> (N,) log-probs of the batch's trained tokens, on its device, without a gradient.

    `table` maps `response_key` to that response's (L,) fp32 log-probs on the CPU."""

    def __init__(self, table: dict):
        self.table = table

    def __call__(self, batch):
        logps = [torch.zeros(0)]
        for example in batch.examples:
            for key in response_keys(example):
                logps.append(self.table[key])
        return torch.cat(logps).to(batch.source.device)


def response_keys(example) -> list[bytes]:
    """16 bytes per response that identify it: a digest of prompt, response and which tokens are trained."""
    keys = []
    for response in example.responses:
        digest = hashlib.blake2b(digest_size=16)
        for part in (example.prompt, response.tokens, response.trained):
            digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        keys.append(digest.digest())
    return keys


def lacking(examples: list, table: dict) -> list:
    """The examples with a response that is not in the table; an example is left out if earlier ones already
    hold all its responses."""
    seen = set(table)
    missing = []
    for example in examples:
        keys = response_keys(example)
        if not seen.issuperset(keys):
            missing.append(example)
            seen.update(keys)
    return missing


# ---- how it is found -------------------------------------------------------------------------------------

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


def read_table(store: str, wanted: set, notice) -> dict:
    """The log-probs of the `wanted` responses in the whole parts of `store`. Where two parts hold the same
    response the older one counts, since a run may have started with it; a damaged part is skipped with a
    notice."""
    table = {}
    for part in finished_parts(store):
        if fault := checkpoint.broken(part):
            notice(f"reference log-probs ignored: {fault}")
            continue
        stored = load_file(part / LOGPS)
        rows = stored["logps"].split(stored["lengths"].tolist())
        for row, logps in zip(stored["keys"].numpy(), rows):
            key = bytes(row)
            if key in wanted:
                table.setdefault(key, logps)
    return table


def finished_parts(store: str) -> list[Path]:
    """The parts of a store that are not being written (`part-….tmp-…`), the oldest first."""
    parts = Path(store).glob("part-" + "[0-9a-f]" * 16)
    return sorted(parts, key=lambda part: (part.stat().st_mtime, part))


# ---- how it is written -----------------------------------------------------------------------------------

def write_part(store: str, computed: dict) -> None:
    """Seal `computed` as a part of `store`. One process at a time writes into it, so a half-written part was
    left by a process that was killed."""
    rows = [list(key) for key in computed]
    lengths = [len(logps) for logps in computed.values()]
    tensors = {
        "keys": torch.tensor(rows, dtype=torch.uint8),
        "lengths": torch.tensor(lengths),
        "logps": torch.cat(list(computed.values())),
    }
    name = hashlib.sha256(b"".join(computed)).hexdigest()
    part = os.path.join(store, f"part-{name[:16]}")

    def save(directory):
        save_file(tensors, os.path.join(directory, LOGPS))

    try:
        claim(store, wait=True)
    except OSError as error:
        raise RunError(f"cannot write {store} ({error.strerror}); "
                       "fix: make it writable, or choose another output") from error
    try:
        checkpoint.tidy(store)
        if checkpoint.broken(part):
            checkpoint.write_sealed(part, save)
    finally:
        release(store)


def packed(function, *arguments) -> tuple:
    """The table that `function` returns as (keys, lengths, log-probs), three objects that are cheap to send
    to other ranks; `unpacked` is its inverse."""
    table = function(*arguments)
    lengths = [len(logps) for logps in table.values()]
    logps = torch.cat([*table.values(), torch.zeros(0)])
    return b"".join(table), lengths, logps


def unpacked(keys: bytes, lengths: list[int], logps: torch.Tensor) -> dict:
    names = [keys[i:i + 16] for i in range(0, len(keys), 16)]
    return dict(zip(names, logps.split(lengths)))
