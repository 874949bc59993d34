"""Data that are tokenised once: rank 0 reads the rows and writes their tokens beside the runs, in
`.tokens/<digest>/`; all processes, and all later runs that need the same, map them.

The digest covers whatever the tokens depend on: the files, the tokenizer with its template, the keys and this
project's own code. So nothing in there is ever out of date, and it can be deleted while no run uses it.
"""
import datetime
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import jinja2
import tokenizers
import transformers

from data import dataset, hub
from data.errors import UserError
from data.files import digest_of
from data.formats import read_template
from data.local import local_data
from data.sources import source_name
from data.store import Examples
from data.tokenise import stop_ids
from engine import sealed
from engine.ranks import from_all_ranks, from_main
from engine.reference import write_into

STORE = ".tokens"
READERS = Path(dataset.__file__).parent      # whose files say how rows become tokens
CODE = (".py", ".jinja")
KEYS = ("data", "eval_data", "columns", "eval_fraction", "max_length", "truncate", "hh", "system_prompt")
REPORTS = "reports.json"


class Data(NamedTuple):
    train_set: Examples
    eval_set: Examples
    reports: dict      # {"train", "eval"}, see `Dataset`


def read_data(common, config, kind: str, tokenizer, notice, runs: str | None) -> Data:
    """The examples that a configuration names, from the store in the directory `runs` or, where that is None,
    from the files themselves. UserError as `load_datasets`. Where some prompts keep the responses that they
    have in the data, these are read too."""
    if config.sampled_share() < 1:
        kind = "responses"

    def from_files(tell):
        found = dataset.load_datasets(
            common, kind, tokenizer, tell,
            config.train_on, config.prompt_template, config.max_completion_length)
        return Data(*found)

    def digest_now():
        return digest_of_data(common, config, kind, tokenizer)

    digest = None if runs is None else from_main(digest_now)
    if digest is None:
        return from_files(notice)
    store = os.path.join(runs, STORE)
    folder = os.path.join(store, digest)
    unstored = []      # on rank 0 the data, where they could not be stored
    fault = from_main(prepare, store, folder, from_files, digest_now, notice, unstored)
    if not fault and from_all_ranks([] if os.path.isdir(folder) else [folder]):
        fault = f"some process does not see {folder}"
    if fault:
        notice(f"data: their tokens are not kept for later runs: {fault}")
        return unstored[0] if unstored else from_files(silent)
    return opened(folder)


def silent(text: str) -> None:
    """The same was told before."""


def prepare(store: str, folder: str, from_files, digest_now, notice, unstored: list) -> str | None:
    """Write the data into `folder`, unless they are there. None, or why that cannot be done; then they are in
    the list `unstored`. What `load_datasets` tells of them is told, now or again."""
    fault = sealed.broken(folder)
    if fault is None:
        for line in json.loads(Path(folder, REPORTS).read_text())["notices"]:
            notice(line)
        return None
    if os.path.isdir(folder):
        notice(f"data: the tokens in {store} are ignored: {fault}")
    notices = []

    def tell(line):
        notices.append(line)
        notice(line)

    found = from_files(tell)
    unstored.append(found)
    if digest_now() != os.path.basename(folder):
        return "a file was changed while it was read"

    def save(directory):
        found.train_set.write(os.path.join(directory, "train"))
        found.eval_set.write(os.path.join(directory, "eval"))
        texts = {"reports": found.reports, "notices": notices}
        Path(directory, REPORTS).write_text(json.dumps(texts, indent=1))

    try:
        write_into(store, folder, save)
    except UserError as error:
        return str(error)
    unstored.clear()
    return None


def opened(folder: str) -> Data:
    """The data in a folder of the store, mapped."""
    reports = json.loads(Path(folder, REPORTS).read_text())["reports"]
    train_set = Examples.read(os.path.join(folder, "train"))
    eval_set = Examples.read(os.path.join(folder, "eval"))
    return Data(train_set, eval_set, reports)


# ---- the digest ------------------------------------------------------------------------------------------

def digest_of_data(common, config, kind: str, tokenizer) -> str | None:
    """A digest of all that the tokens of a run depend on; None where a source or the tokenizer has none."""
    sources = []
    for data in (common.data, common.eval_data):
        sources += [{"path": data}] if isinstance(data, str) else data or []
    names = list(map(source_name, sources))
    of_sources = list(map(digest_of_source, names))
    if None in of_sources:
        return None
    parts = {name: getattr(common, name) for name in KEYS}
    parts |= {
        "kind": kind,
        "train_on": config.train_on,
        "template": config.prompt_template and read_template(config.prompt_template),
        "room": config.max_completion_length,
        "sources": of_sources,
        "tokenizer": digest_of_tokenizer(tokenizer),
        "stops": stop_ids(tokenizer),
        "code": digest_of_code(),
        "date": str(datetime.date.today()) if "strftime_now" in str(tokenizer.chat_template) else None,
        "versions": [module.__version__ for module in (jinja2, tokenizers, transformers)],
    }
    is_weighted = isinstance(common.data, list) or isinstance(common.eval_data, list)
    has_draws = is_weighted or common.eval_fraction or not all(map(dataset.is_local, names))
    if has_draws:
        parts["seed"] = common.seed
    if parts["tokenizer"] is None:
        return None
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_code() -> list[str]:
    paths = [Path(__file__)]
    for path in sorted(READERS.rglob("*")):
        if path.suffix in CODE:
            paths.append(path)
    return list(map(digest_of, paths))


def digest_of_source(name: str) -> str | None:
    """Of local data their name and sha256, of a hub dataset the library's own fingerprint."""
    if dataset.is_local(name):
        return f"{name} {local_data(name).digest()}"
    return hub.fingerprint(name)


def digest_of_tokenizer(tokenizer) -> str | None:
    """A digest of the files that the tokenizer is saved as, its chat template among them; None where it
    cannot be saved, which ends the run later."""
    digest = hashlib.sha256(type(tokenizer).__name__.encode())
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception:  # noqa: BLE001  an error of any kind, in somebody else's code
            return None
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
