"""The reference: a frozen model as a table of log-probs, computed once and kept for every later run that needs the same ones.

The table lies beside the runs, in `.reference/<digest of the model>/`, as sealed parts: each run adds what it found missing. A
sweep over dpo, ipo and their betas computes the log-probs of its pairs once and then loads no reference at all.
"""
import glob
import hashlib
import os

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from data.errors import RunError, UserError
from data.files import sha256
from engine import checkpoint
from engine.claim import claim, release
from model.load import base_of, check_name, first_line, is_adapter


class Reference:
    """`reference(batch)` -> (N,) log-probs of the batch's trained tokens, on its device, without a gradient.

    `table` maps `response_key` to that response's (L,) fp32 log-probs on the CPU."""

    def __init__(self, table: dict):
        self.table = table

    def __call__(self, batch):
        rows = [self.table[key] for example in batch.examples for key in response_keys(example)]
        return torch.cat(rows).to(batch.source.device) if rows else torch.zeros(0, device=batch.source.device)


def response_keys(example) -> list[bytes]:
    """For each response of an example, 16 bytes that name it: a digest of prompt, response and which tokens are trained."""
    keys = []
    for response in example.responses:
        digest = hashlib.blake2b(digest_size=16)
        for part in (example.prompt, response.tokens, response.trained):
            digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        keys.append(digest.digest())
    return keys


def lacking(examples: list, table: dict) -> list:
    """The examples with a response that is not in the table, without those that hold only responses of earlier ones."""
    seen, found = set(table), []
    for example in examples:
        keys = response_keys(example)
        if not seen.issuperset(keys):
            found.append(example)
            seen.update(keys)
    return found


def model_key(path: str, arithmetic: str) -> str:
    """A digest of a model and of how its log-probs are computed: of the files in a local directory (an adapter's base too), of a
    hub model's name and commit."""
    digest = hashlib.sha256(arithmetic.encode())
    if os.path.isdir(path):
        for file in sorted(file for ending in ("*.safetensors", "*.bin", "*config.json") for file in glob.glob(os.path.join(path, ending))):
            digest.update(f"{os.path.basename(file)} {sha256(file)}\n".encode())
        if is_adapter(path):
            digest.update(model_key(base_of(path), arithmetic).encode())
    else:
        check_name(path, "reference")
        try:
            snapshot = os.path.dirname(cached_file(path, "config.json"))       # .../snapshots/<commit>
        except OSError as error:
            raise UserError(f"reference: {path} is neither a local directory nor reachable on the hub ({first_line(error)}); "
                            "fix: check the name") from error
        digest.update(f"{path} {os.path.basename(snapshot)}".encode())
    return digest.hexdigest()[:16]


def read_table(store: str, wanted: set, notice) -> dict:
    """The log-probs of the `wanted` responses that the whole parts in `store` hold, the oldest part first, since a run may have
    started with them; a damaged part is passed over with a notice."""
    table = {}
    parts = [part for part in glob.glob(os.path.join(store, "part-*")) if ".tmp-" not in part]      # those are being written
    for part in sorted(parts, key=lambda part: (os.path.getmtime(part), part)):
        if fault := checkpoint.broken(part):
            notice(f"reference log-probs ignored: {fault}")
            continue
        stored = load_file(os.path.join(part, "logps.safetensors"))
        keys = [bytes(key) for key in stored["keys"].numpy()]
        found = zip(keys, stored["logps"].split(stored["lengths"].tolist()))
        table = {key: logps for key, logps in found if key in wanted} | table
    return table


def write_part(store: str, computed: dict) -> None:
    """Seal `computed` as a part of `store`. One process at a time writes into it, so a half-written part was
    left by a process that was killed."""
    keys = [list(key) for key in computed]
    lengths = [len(logps) for logps in computed.values()]
    tensors = {"keys": torch.tensor(keys, dtype=torch.uint8), "lengths": torch.tensor(lengths),
               "logps": torch.cat(list(computed.values()))}
    part = os.path.join(store, "part-" + hashlib.sha256(b"".join(computed)).hexdigest()[:16])
    try:
        claim(store, wait=True)
    except OSError as error:
        raise RunError(f"cannot write {store} ({error.strerror}); "
                       "fix: make it writable, or choose another output") from error
    try:
        checkpoint.tidy(store)
        if checkpoint.broken(part):
            checkpoint.write_sealed(part, lambda directory: save_file(tensors, os.path.join(directory, "logps.safetensors")))
    finally:
        release(store)


def packed(function, *arguments) -> tuple:
    """The table that `function` returns as three objects, cheap to send to other ranks; `unpacked` is its inverse."""
    table = function(*arguments)
    return b"".join(table), [len(logps) for logps in table.values()], torch.cat([*table.values(), torch.zeros(0)])


def unpacked(keys: bytes, lengths: list[int], logps: torch.Tensor) -> dict:
    return dict(zip((keys[i:i + 16] for i in range(0, len(keys), 16)), logps.split(lengths) if lengths else ()))
