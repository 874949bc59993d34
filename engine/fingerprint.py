"""Digests of every file and model that a configuration names.

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


def fingerprints(values: dict) -> dict[str, dict]:
    """{key: {file: sha256}} for every string in `values` that names a file, a function in a file
    (`file.py:name`), a model directory (with an adapter's base, and the model of a run), a model of
    ModelScope or one of the hub ({name: what `hub_model` gives}). A string may hold several names between
    commas."""
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


def contents(name: str) -> dict:
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
    return {name: hub_model(os.path.dirname(config))}


def model_files(directory: str) -> dict:
    """{file: sha256} of the model in a directory, and of its base if it is an adapter."""
    digests = {path: digest_of(path) for path in input_files(directory)}
    if is_adapter(directory):
        digests |= contents(base_of(directory))
    return digests


def hub_model(snapshot: str) -> dict:
    """{"commit": its name, "files": {name: digest}} of a hub model in the cache. A file there is a link to
    one whose name is a digest, so that none is read; without links the digest is its sha256."""
    digests = {}
    for path in input_files(snapshot):
        is_link = os.path.islink(path)
        digest = os.path.basename(os.readlink(path)) if is_link else digest_of(path)
        digests[os.path.basename(path)] = digest
    return {"commit": os.path.basename(snapshot), "files": digests}


def input_files(directory: str) -> list[str]:
    """The paths of the files in a model directory that change numbers."""
    found = []
    for name in sorted(os.listdir(directory)):
        path = os.path.join(directory, name)
        is_input = INPUT.fullmatch(name) and not NO_INPUT.fullmatch(name)
        if is_input and os.path.isfile(path):
            found.append(path)
    return found


# ---- digests of two times --------------------------------------------------------------------------------

def changed(before: dict, after: dict) -> list[str]:
    """The files and hub models, by name, whose digests differ in two dictionaries {name: digest}."""
    found = []
    for name in sorted(before.keys() | after.keys()):
        if not is_same(before.get(name), after.get(name)):
            found.append(name)
    return found


def is_same(before, after) -> bool:
    """Whether two digests are of the same file or hub model. Of a hub model those files are compared that
    both have: a cache has only what was asked for, and a resumed run asks for less. So a commit that changes
    the model's README alone changes nothing."""
    if isinstance(before, str) and isinstance(after, dict):      # an earlier version wrote the commit alone
        after = after["commit"]
    if isinstance(before, str) or isinstance(after, str):
        return before == after
    files = (after or {}).get("files", {})
    known = (before or {}).get("files", {})
    return all(files.get(name, digest) == digest for name, digest in known.items())


def check_unchanged(started: dict, now: dict, directory: str) -> None:
    """UserError that names the first file or model that has changed since the run in `directory` started."""
    for key in sorted(started.keys() & now.keys()):
        for name in changed(started[key], now[key]):
            is_hub_model = isinstance(now[key].get(name), dict)
            remedy = "choose another output" if is_hub_model else "restore it, or choose another output"
            raise UserError(f"{key}: {name} has changed since the run in {directory} started; fix: {remedy}")


def together(started: dict, now: dict) -> dict:
    """All digests that are known, where none has changed: those of now, and of hub models also those of files
    that the cache does not have now."""
    found = started | now
    for key in sorted(started.keys() & now.keys()):
        for name, before in started[key].items():
            if isinstance(before, dict):
                after = now[key].get(name, before)
                files = before.get("files", {}) | after["files"]
                found[key] = found[key] | {name: after | {"files": files}}
    return found
