"""What a run depends on besides its configuration's words: the contents of every file, model and hub commit that they name.

A run that goes on with another start model, reference, reward file or prompt template under the same name would be two halves of
two runs. So `run.json` holds a digest of each, and a resumed run compares them before it loads anything."""
import functools
import os
import re

from huggingface_hub import try_to_load_from_cache

from data.errors import UserError
from data.files import sha256
from engine import checkpoint
from engine.load import base_of, is_adapter

ENDINGS = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt")      # weights, configuration, tokenizer, templates
NO_INPUT = ("generation_config.json", checkpoint.MANIFEST, "trainer.json", "optimizer.safetensors", checkpoint.ROLLOUT)
NOT_HERE = ("algorithm", "data", "eval_data", "output", "resume")      # data files have digests of their own, in their reports
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def fingerprints(values: dict) -> dict[str, dict[str, str]]:
    """{key: {file: sha256}} for every text in `values` that names a file, a file's function (`file.py:name`), a model directory
    (an adapter's base and a run's model included) or a model of the hub (its commit); several names stand between commas."""
    found = {}
    for key, value in values.items():
        digests = {}
        for name in value.split(",") if isinstance(value, str) and key not in NOT_HERE else ():
            digests |= contents(name.strip())
        if digests:
            found[key] = digests
    return found


def contents(name: str) -> dict[str, str]:
    """{file: sha256} of what a configuration calls `name`; {} where it names nothing."""
    path, colon, _ = name.rpartition(":")
    if os.path.isfile(name):
        return {name: digest_of(name)}
    if colon and os.path.isfile(path):
        return {path: digest_of(path)}
    if os.path.isdir(name):
        return model_files(checkpoint.model_path(name, lambda text: None))
    config = try_to_load_from_cache(name, "config.json") if HUB_NAME.fullmatch(name) else None
    return {name: os.path.basename(os.path.dirname(config))} if isinstance(config, str) else {}


def model_files(directory: str) -> dict[str, str]:
    digests = {}
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        if name.endswith(ENDINGS) and name not in NO_INPUT and os.path.isfile(path):
            digests[path] = digest_of(path)
    return digests | contents(base_of(directory)) if is_adapter(directory) else digests


def digest_of(path: str) -> str:
    """The sha256 of a file, computed once per process as long as the file stays as it is."""
    status = os.stat(path)
    return digest_at(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.cache
def digest_at(path: str, size: int, modified: int) -> str:
    return sha256(path)


def check_unchanged(started: dict, now: dict, directory: str) -> None:
    """UserError that names the first file which is not what it was when the run in `directory` started."""
    for key in started.keys() & now.keys():
        before, after = started[key], now[key]
        for path in sorted(before.keys() | after.keys()):
            if before.get(path) != after.get(path):
                raise UserError(f"{key}: {path} has changed since the run in {directory} started; "
                                "fix: restore it, or choose another output")
