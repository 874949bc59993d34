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

from data.errors import UserError
from data.files import sha256
from engine import checkpoint
from engine.load import base_of, first_line, is_adapter


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
    """A digest of a model's files (those of an adapter's base too) and of how its log-probs are computed."""
    try:
        directory = path if os.path.isdir(path) else os.path.dirname(cached_file(path, "config.json"))
    except OSError as error:
        raise UserError(f"reference: {path} is neither a local directory nor reachable on the hub ({first_line(error)}); "
                        "fix: check the name") from error
    digest = hashlib.sha256(arithmetic.encode())
    for file in sorted(glob.glob(os.path.join(directory, "*.safetensors")) + glob.glob(os.path.join(directory, "*.bin"))
                       + glob.glob(os.path.join(directory, "*config.json"))):
        digest.update(f"{os.path.basename(file)} {sha256(file)}\n".encode())
    if is_adapter(directory):
        digest.update(model_key(base_of(directory), arithmetic).encode())
    return digest.hexdigest()[:16]


def read_table(store: str, wanted: set, notice) -> dict:
    """The log-probs of the `wanted` responses that the whole parts in `store` hold; a damaged part is passed over with a notice."""
    table = {}
    for part in sorted(glob.glob(os.path.join(store, "part-*"))):
        if ".tmp-" in part:                                        # another run is writing it
            continue
        if fault := checkpoint.broken(part):
            notice(f"reference log-probs ignored: {fault}")
            continue
        stored = load_file(os.path.join(part, "logps.safetensors"))
        keys = [bytes(key) for key in stored["keys"].numpy()]
        table |= {key: logps for key, logps in zip(keys, stored["logps"].split(stored["lengths"].tolist())) if key in wanted}
    return table


def write_table(store: str, table: dict) -> None:
    """Add a part to `store`, named by its content, so that two runs that write the same one do not disturb each other."""
    tensors = {"keys": torch.tensor([list(key) for key in table], dtype=torch.uint8),
               "lengths": torch.tensor([len(logps) for logps in table.values()]), "logps": torch.cat(list(table.values()))}
    part = os.path.join(store, "part-" + hashlib.sha256(b"".join(table)).hexdigest()[:16])
    checkpoint.write_sealed(part, lambda directory: save_file(tensors, os.path.join(directory, "logps.safetensors")))
