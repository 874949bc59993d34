"""Models of ModelScope, a hub that answers where huggingface.co does not: `modelscope:owner/name`, wherever a
model is named, is the model of that name, which the package modelscope keeps in its cache."""
import logging
import re

from data.errors import UserError, said_first
from data.hub import NAME

PREFIX = "modelscope:"
MODEL = re.compile(f"{PREFIX}({NAME}/{NAME})")
directories = {}      # {name with the prefix: directory}, of this process


def check_form(name: str, key: str = "model") -> None:
    """UserError where what follows the prefix cannot be a model's name, or the package is missing."""
    if not MODEL.fullmatch(name):
        raise UserError(f"{key}: {name} does not name a model; fix: write {PREFIX}owner/name")
    try:
        from modelscope import snapshot_download  # noqa: F401
    except ImportError as error:
        raise UserError(f"{key}: {name} needs the package modelscope, which cannot be imported ({error}); "
                        "fix: pip install modelscope") from error


def directory_of(name: str, notice) -> str:
    """The directory of a model, which is downloaded first where the cache lacks it or holds an older one. A
    notice tells if ModelScope cannot be asked and the cache is used as it is; UserError where that lacks the
    model."""
    if name in directories:
        return directories[name]
    check_form(name)
    from modelscope import snapshot_download
    repo = MODEL.fullmatch(name)[1]
    logging.disable(logging.WARNING)      # it reports every new attempt
    try:
        try:
            directory = snapshot_download(repo)
        except Exception as error:  # noqa: BLE001  each version has errors of its own
            reason = said_first(error)
            directory = in_cache(snapshot_download, repo)
            if directory is None:
                raise UserError(f"model: ModelScope does not give {name} ({reason}), and it is not in the "
                                "cache; fix: correct the name, or connect to the network") from None
            notice(f"{name}: ModelScope cannot be asked ({reason}); the cache is used as it is")
    finally:
        logging.disable(logging.NOTSET)
    directories[name] = directory
    return directory


def in_cache(snapshot_download, repo: str) -> str | None:
    """The directory of a model in the package's cache; None where it has none."""
    try:
        return snapshot_download(repo, local_files_only=True)
    except Exception:  # noqa: BLE001  as above
        return None


def as_written(path: str) -> str:
    """The name of the model that was downloaded into a directory; any other path or name as it is."""
    for name, directory in directories.items():
        if directory == path:
            return name
    return path
