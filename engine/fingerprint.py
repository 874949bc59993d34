"""Digests of every file, model and hub commit that a configuration names.

A run that continued with another start model, reference, reward file or prompt template under the same name
would be two halves of two runs. So `run.json` holds a digest of each, and a resumed run compares them before
it loads anything.
"""
import os
import re

from huggingface_hub import try_to_load_from_cache

from data.errors import UserError
from data.files import digest_of
from data.hub import NAME
from engine import checkpoint
from model.load import base_of, is_adapter
from model.modelscope import MODEL

# the files of a model directory that change numbers: weights, configuration, tokenizer and templates ...
INPUT = re.compile(r".*\.(safetensors|jinja|model)|.*model.*\.bin|.*\.index\.json|(merges|vocab)\.txt"
                   r"|(config|adapter_config|tokenizer|tokenizer_config|special_tokens_map)\.json"
                   r"|(added_tokens|vocab)\.json")
# ... and these of a checkpoint, which only its own run reads
NO_INPUT = re.compile(r"(optimizer|rollout|remembered)(-\d{5}-of-\d{5})?\.safetensors")
# keys without digests here; the reports of the data files hold the digests of those
NOT_HERE = ("algorithm", "data", "eval_data", "output", "resume")
HUB_NAME = re.compile(f"{NAME}/{NAME}")


def fingerprints(values: dict) -> dict[str, dict[str, str]]:
    """{key: {file: sha256}} for every string in `values` that names a file, a function in a file
    (`file.py:name`), a model directory (with an adapter's base, and the model of a run), a model of
    ModelScope or one of the hub ({name: commit}). A string may hold several names between commas."""
    found = {}
    for key, value in values.items():
        if key in NOT_HERE or not isinstance(value, str):
            continue
        digests = {}
        for name in value.split(","):
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
    if os.path.isdir(name) or MODEL.fullmatch(name):
        return model_files(checkpoint.model_path(name, lambda text: None))
    if not HUB_NAME.fullmatch(name):
        return {}
    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:                             # such as a name with ".." in it
        return {}
    if not isinstance(config, str):                # not in the cache
        return {}
    commit = os.path.basename(os.path.dirname(config))
    return {name: commit}


def model_files(directory: str) -> dict[str, str]:
    """{file: sha256} of the model in a directory, and of its base if it is an adapter."""
    digests = {}
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        is_input = INPUT.fullmatch(name) and not NO_INPUT.fullmatch(name)
        if is_input and os.path.isfile(path):
            digests[path] = digest_of(path)
    if is_adapter(directory):
        digests |= contents(base_of(directory))
    return digests


def check_unchanged(started: dict, now: dict, directory: str) -> None:
    """UserError that names the first file that has changed since the run in `directory` started."""
    for key in started.keys() & now.keys():
        before, after = started[key], now[key]
        for path in sorted(before.keys() | after.keys()):
            if before.get(path) != after.get(path):
                raise UserError(f"{key}: {path} has changed since the run in {directory} started; "
                                "fix: restore it, or choose another output")
