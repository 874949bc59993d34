"""Local data of several files -> rows: a directory, a glob, or what the package `datasets` wrote.

    pairs.jsonl                  one file (data/files.py)
    parts/   "parts/*.jsonl"     all files in it and below, one after the other, in the order of their names;
                                 links to other directories are followed
    parts/:test                  those whose name, or whose directory's, says test
    saved/   saved/:test         `save_to_disk` of a dataset, or of several splits
    clone/   clone/subset:test   a clone of a hub dataset whose README.md lists its subsets ("configs")

Where the names in a directory tell held-out files (test, validation) from others, the others are read, and a
notice names what is not. The package reads only what has its format: our reader names the line of an error.
"""
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.errors import UserError, said_first
from data.files import SUFFIXES, digest_of, find_file, read_rows
from data.hub import front_matter

SPLITS = {      # a word in a file's name -> the split
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval", "evaluation"), "validation"),
}
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")       # of the hub's datasets
NAMED = 20      # files that a notice names


class Local(NamedTuple):
    """What a name of local data stands for."""
    name: str
    files: list[Path]                      # they are read in this order
    left_out: list[Path] = ()              # held-out files beside them
    others: list[Path] = ()                # files beside them that are no data files
    load: Callable | None = None           # () -> a dataset, where the package reads the files

    def rows(self, counts: Counter) -> Iterator[tuple[str, dict]]:
        """Yield (where, row), and count the rows of every file in `counts`."""
        if self.load:
            for number, row in enumerate(self.load(), 1):
                yield f"{self.name}:row {number}", row
            return
        for path in self.files:
            for where, row in read_rows(path):
                counts[path] += 1
                yield where, row

    def digest(self) -> str:
        """sha256 of the only file, or of the names and digests of all."""
        if len(self.files) == 1 and not self.load:
            return digest_of(self.files[0])
        digest = hashlib.sha256(self.name.encode())
        for path in self.files:
            digest.update(f"{path} {digest_of(path)}\n".encode())
        return digest.hexdigest()

    def notices(self, counts: Counter) -> list[str]:
        """Sentences on what was read of which file, and what was not read."""
        lines = []
        if len(counts) > 1:
            parts = []
            for path, count in counts.items():
                parts.append(f"{path.name} {count:,} rows")
            if len(parts) > NAMED:
                others = sum(list(counts.values())[NAMED:])
                parts[NAMED:] = [f"{len(parts) - NAMED} others {others:,} rows"]
            lines.append(f"{self.name}: {len(counts)} files: {', '.join(parts)}")
        if self.left_out:
            split = split_of(self.left_out[0])
            lines.append(f"{self.name}: held-out files are not read: {named(self.left_out)}; "
                         f"{self.name.partition(':')[0]}:{split} reads those of {split}")
        if self.others:
            lines.append(f"{self.name}: no data files, not read: {named(self.others)}")
        return lines


def named(paths: list[Path]) -> str:
    names = [path.name for path in paths[:NAMED]]
    rest = len(paths) - len(names)
    return ", ".join(names) + (f" and {rest} others" if rest else "")


def is_local_set(name: str) -> bool:
    """Whether the name means something here of several files: a directory, perhaps with a split, or a
    glob."""
    path, split, subset = parts_of(name)
    return Path(name).exists() or bool(split or subset) or is_glob(name)


def local_data(name: str, base=None) -> Local:
    """What `name` stands for. UserError where that is nothing, or does not hold the split that it names."""
    path, split, subset = parts_of(name)
    if is_glob(name):
        return Local(name, matching(name))
    if not path.is_dir():
        return Local(name, [find_file(path, base)])
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return saved(name, path, split)
    subsets = subsets_of(path)
    if subsets:
        if subset is None and len(subsets) > 1 and "default" not in subsets:
            raise UserError(f"{path} has the subsets {', '.join(subsets)}; "
                            f"fix: name one: {path}/{subsets[0]}")

        def load():
            return by_library(name, "load_dataset", str(path), subset, split=split or "train")

        return Local(name, below(path), load=load)
    return read_directory(name, path, split)


def parts_of(name: str) -> tuple[Path, str | None, str | None]:
    """(directory, split, subset) of `directory:split` and `clone/subset:split`; else (path, None, None)."""
    if os.path.exists(name):
        return Path(name), None, None
    head, colon, split = name.partition(":")       # the split may be train[:1000]
    path = Path(head if colon else name)
    if colon and path.is_dir():
        return path, split, None
    if not path.exists() and path.name in subsets_of(path.parent):
        return path.parent, split or None if colon else None, path.name
    return Path(name), None, None


def is_glob(name: str) -> bool:
    head, _, _ = name.partition(":")               # owner/name:train[:1000] is no glob
    return glob.has_magic(head) and not os.path.exists(name)


def matching(pattern: str) -> list[Path]:
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    files = [path for path in paths if path.is_file()]
    if not files:
        raise UserError(f"no file matches {pattern}; fix: correct the pattern, such as 'parts/*.jsonl'")
    return files


# ---- directories -----------------------------------------------------------------------------------------

def below(folder: Path, around: tuple[Path, ...] = ()) -> list[Path]:
    """The files in a directory and below it, in the order of their names, without hidden ones. Links are
    followed, but not back to a directory that is, or holds, one of those `around`."""
    here = folder.resolve()
    if any(path.is_relative_to(here) for path in around):
        return []
    found = []
    for path in in_order(folder):
        if os.path.isdir(path):
            found += below(path, (*around, here))
        elif os.path.isfile(path):
            found.append(path)
    return found


def in_order(folder: Path) -> list[Path]:
    """What a directory holds, without what is hidden; nothing where we may not look into it."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except PermissionError:
        return []


def read_directory(name: str, folder: Path, split: str | None) -> Local:
    files, others = [], []
    for path in below(folder):
        is_data = path.name.lower().endswith(SUFFIXES) and path.name not in DESCRIPTIONS
        (files if is_data else others).append(path)
    if not files:
        raise UserError(f"{folder} is a directory without data files ({', '.join(SUFFIXES)}); "
                        "fix: name a file, or another directory")
    by_split = {}
    for path in files:
        by_split.setdefault(split_of(path.relative_to(folder)), []).append(path)
    if split is None and len(by_split) == 1:
        return Local(name, files, others=others)
    wanted = SPLITS.get(split or "train", split)
    chosen = by_split.get(wanted, [])
    if wanted == "train":
        held_out = {*by_split.get("test", []), *by_split.get("validation", [])}
        chosen = [path for path in files if path not in held_out]
    if not chosen:
        known = ", ".join(filter(None, by_split)) or "no splits by the names of its files"
        raise UserError(f"{folder} has {known}, not {wanted}; fix: name a file, or another split")
    if split:
        return Local(name, chosen)
    known = set(chosen)
    return Local(name, chosen, [path for path in files if path not in known], others)


def split_of(path: Path) -> str | None:
    """The split that the name of a file, or else of a directory above it, says."""
    for part in reversed(path.parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


# ---- what the package datasets wrote or reads ------------------------------------------------------------

def saved(name: str, folder: Path, split: str | None) -> Local:
    """What `save_to_disk` wrote: a dataset, or a directory for each split."""
    splits = []
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split is None and len(splits) == 1:
            split, = splits
        split = split or "train"
    if split is not None and split not in splits:
        known = ", ".join(splits) or "no splits"
        raise UserError(f"{folder} holds {known}, not {split}; fix: name another split, or none")
    part = folder / split if split else folder

    def load():
        return by_library(name, "load_from_disk", str(part))

    return Local(name, below(part), load=load)


def subsets_of(folder: Path) -> list[str]:
    """The subsets that the README.md of a hub dataset's clone lists; [] where it lists none."""
    configs = front_matter(folder / "README.md").get("configs")
    try:
        return [config["config_name"] for config in configs]
    except (LookupError, TypeError):
        return []


def by_library(name: str, function: str, *arguments, **options):
    """`datasets.<function>(...)`; UserError where it fails, or the dataset is empty."""
    import datasets  # slow to import and not needed for other files
    try:
        dataset = getattr(datasets, function)(*arguments, **options)
    except Exception as error:  # noqa: BLE001  no common type
        reason = f"{type(error).__name__}: {said_first(error)}"
        raise UserError(f"the package datasets cannot read {name} ({reason}); "
                        "fix: correct the split or subset, or copy the directory again") from None
    if not len(dataset):
        raise UserError(f"the dataset is empty, no rows in {name}; fix: choose another split")
    return dataset
