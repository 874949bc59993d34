"""Sealed directories: whole, or ignored.

Files are written to a temporary directory beside their place, synced, sealed by `manifest.json` (size and
sha256 of every file, written last) and renamed. A reader trusts only a directory whose manifest holds.
"""
import errno
import json
import os
import re
import secrets
import shutil

from data.errors import RunError, UserError
from data.files import digest_of, sha256
from model.load import first_line

MANIFEST = "manifest.json"
WEIGHTS = ".safetensors"          # ending of files with tensors


def sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_sealed(directory: str, write, trial: bool = False) -> None:
    """Call `write(temporary directory)`, seal what it wrote and move it to `directory` in one rename; a
    `trial` removes it instead. RunError whatever fails; what stood there before stays until its replacement
    is complete."""
    temporary = temporary_beside(directory)

    def fill():
        os.makedirs(temporary)
        write(temporary)
        seal(temporary, durable=not trial)
        if not trial:
            put_in_place(temporary, directory)

    try:
        explained(directory, fill, trial=trial)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def temporary_beside(directory: str) -> str:
    """A new name; not the process's number, since containers share disks, and number 1."""
    return f"{os.path.normpath(directory)}.tmp-{secrets.token_hex(4)}"


def put_in_place(temporary: str, directory: str) -> None:
    """Move a sealed directory to its place. What stands there is removed then, or comes back where that
    fails."""
    previous = f"{temporary}-old"
    directory = os.path.normpath(directory)
    try:
        if os.path.isdir(directory):
            os.rename(directory, previous)
        os.rename(temporary, directory)
        sync(os.path.dirname(directory) or ".")
    except OSError:
        if os.path.isdir(previous) and not os.path.exists(directory):
            os.rename(previous, directory)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def explained(directory: str, function, *arguments, trial: bool = False) -> None:
    """Call `function`, which writes the directory; RunError whatever fails."""
    try:
        function(*arguments)
    except UserError:
        raise
    except Exception as error:     # the disk fails, or a tokenizer or configuration cannot be written
        kept = "this was tried before the first update" if trial else "earlier checkpoints are untouched"
        raise RunError(f"cannot write {directory} ({first_line(error)}); {kept}; "
                       f"fix: {remedy(error)}") from error


def seal(directory: str, durable: bool = True, known: dict[str, tuple[int, str]] | None = None) -> None:
    """Make everything below `directory` readable for others, list it in the manifest, which is written last,
    and put it on the disk; where it need not be `durable`, the directories only. `known`: entries of files
    that are sealed already, as `read_manifest` gives them."""
    known = known or {}
    manifest = {}
    for name in files_below(directory):
        path = os.path.join(directory, name)
        if name in known:
            size, digest = known[name]
        else:
            os.chmod(path, 0o644)     # safetensors writes 0600: unreadable for another user's server
            if durable:
                sync(path)
            size, digest = os.path.getsize(path), sha256(path)
        manifest[name] = {"bytes": size, "sha256": digest}
    path = os.path.join(directory, MANIFEST)
    with open(path, "w") as file:
        json.dump(manifest, file, indent=1)
    if durable:
        sync(path)
    for folder, _, _ in os.walk(directory):
        if folder != directory:
            os.chmod(folder, 0o755)
        sync(folder)


def files_below(directory: str) -> list[str]:
    """The paths of all files in `directory` and its subdirectories, relative to it, in order."""
    found = []
    for folder, _, names in os.walk(directory):
        found += [os.path.relpath(os.path.join(folder, name), directory) for name in names]
    return sorted(found)


def remedy(error: Exception) -> str:
    """What helps where a save failed. safetensors names the system's error in its text only."""
    named = re.search(r"os error (\d+)", str(error))
    number = int(named[1]) if named else getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free disk space and run the same command again"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make its directory writable and run the same command again"
    if number is not None:
        return "check that nothing else moves or removes this directory, then run the same command again"
    if isinstance(error, MemoryError):
        return "free memory and run the same command again"
    return "correct the files of the start model (its tokenizer and configuration) that this error speaks of"


def read_manifest(directory: str) -> dict[str, tuple[int, str]] | None:
    """{file: (bytes, sha256)} of a sealed directory; None if there is no such manifest."""
    try:
        with open(os.path.join(directory, MANIFEST)) as file:
            entries = json.load(file).items()
        return {name: (entry["bytes"], entry["sha256"]) for name, entry in entries}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # a flipped bit can leave valid JSON of another shape
        return None


def broken(directory: str, ending: str = "") -> str | None:
    """What is wrong with a sealed directory, naming the file; None if it is whole. With `ending` only the
    files that end so are checked."""
    manifest = read_manifest(directory)
    if manifest is None:
        return f"{os.path.join(directory, MANIFEST)} is missing or unreadable"
    for name, (size, digest) in manifest.items():
        path = os.path.join(directory, name)
        if not name.endswith(ending):
            continue
        if not os.path.isfile(path):
            return f"{path} is missing"
        if os.path.getsize(path) != size:
            return f"{path} has {os.path.getsize(path)} bytes instead of {size}"
        if digest_of(path) != digest:
            return f"{path} is damaged (its sha256 differs from the manifest)"
    return None


def set_aside(directory: str) -> str | None:
    """If files of a sealed directory were edited, added or damaged, rename it to make room for its successor.
    Returns its new path, or None."""
    if not os.path.isdir(directory):
        return None
    added = set(files_below(directory)) - {MANIFEST, *(read_manifest(directory) or {})}
    if not added and broken(directory) is None:
        return None
    number = 1
    while os.path.exists(f"{directory}-{number}"):
        number += 1
    try:
        os.rename(directory, f"{directory}-{number}")
    except OSError as error:
        raise RunError(f"cannot rename {directory}, in which files were changed ({error.strerror}); "
                       "fix: move it away and run the same command again") from error
    return f"{directory}-{number}"
