"""Which directory a run gets: the one of an unfinished run that it continues, or a free one; it has it alone."""
import os
import sys
from typing import NamedTuple

import yaml

from data.errors import UserError
from engine import checkpoint
from engine.claim import LOCK, claim, release

# what changes neither a number nor the final model ...
SILENT = {"output", "resume", "eval_every", "save_every", "log_every", "sample_every", "keep"}
# ... and what a run may be continued with other values of; every other key changes the numbers
FREE = SILENT | {"max_steps", "epochs", "merge", "save_dtype"}


class Place(NamedTuple):
    """A run's directory, the checkpoint to continue from or None, and whether all of this run is done already."""
    directory: str
    start: str | None = None
    finished: bool = False


def read_config(directory: str) -> dict | None:
    """The configuration a run directory was started with; None if it is not a run."""
    try:
        with open(os.path.join(directory, "config.yaml"), encoding="utf-8") as file:
            config = yaml.load(file, yaml.BaseLoader)      # everything as text: the comparison is of texts
        return config if isinstance(config, dict) else None
    except (OSError, ValueError, yaml.YAMLError):      # no such file, not text, or somebody else's
        return None


def differing(directory: str, config_yaml: str, free: set = FREE) -> list[str]:
    """The keys, without the `free` ones, that have other values in `config_yaml` than in the run."""
    old, new = read_config(directory) or {}, yaml.load(config_yaml, yaml.BaseLoader)
    return sorted(key for key in (old.keys() | new.keys()) - free if old.get(key) != new.get(key))


def is_free(directory: str) -> bool:
    """Whether a directory holds nothing, or only what a run leaves that was killed before its config.yaml was whole."""
    return all(name == LOCK or name.endswith(".tmp") for name in os.listdir(directory))


def choose_directory(output: str | None, stem: str, resume: str, config_yaml: str) -> Place:
    """The place of a run with this configuration, claimed for this process; nothing but the claim is written.

    Explicit `output`: continued if it holds an unfinished run of the same configuration. Default: runs/<stem>, or the next
    free -2, -3 where that is finished, in use or configured otherwise. `resume: PATH` names a checkpoint or a run."""
    if resume not in ("auto", "never"):
        return named_checkpoint(output, resume, config_yaml)
    names = [output] if output is not None else (f"runs/{stem}" + (f"-{i}" if i > 1 else "") for i in range(1, 10 ** 6))
    for directory in names:
        explicit = output is not None
        if place_at(directory, explicit, resume, config_yaml, silent) is None:
            continue
        if not take(directory, explicit):
            continue
        place = place_at(directory, explicit, resume, config_yaml, tell)      # it may have changed before it was ours
        if place is not None:
            return place
        release(directory)


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def silent(text: str) -> None:
    pass


def take(directory: str, explicit: bool) -> bool:
    """Claim a directory; where another process has it, UserError for an `explicit` one, else False."""
    try:
        holder = claim(directory)
    except OSError as error:
        raise UserError(f"output: {directory} cannot be written ({error.strerror}); fix: choose a writable output") from error
    if holder and explicit:
        raise UserError(f"output: {directory} is in use by {holder}; fix: wait for its end, or choose another output")
    return not holder


def place_at(directory: str, explicit: bool, resume: str, config_yaml: str, notice) -> Place | None:
    """What this configuration finds in one directory; None where a default name is to be passed over, UserError where an
    explicit one cannot be used."""
    if os.path.exists(directory) and not os.path.isdir(directory):
        raise UserError(f"output: {directory} is a file; fix: choose another output")
    if not os.path.isdir(directory) or is_free(directory):
        return Place(directory)
    if read_config(directory) is None:
        if explicit:
            raise UserError(f"output: {directory} is not empty and is not a run; fix: choose another output")
        return None
    if explicit:
        check_same(directory, config_yaml, "output")
    done = checkpoint.finished(directory)
    if resume == "auto" and not differing(directory, config_yaml):
        if not done:
            return Place(directory, newest_whole(directory, notice))
        if explicit:
            return finished_place(directory, config_yaml, notice)
    if explicit:
        raise UserError(f"output: {directory} holds a {'finished ' if done else ''}run of this configuration; "
                        f"fix: choose another output{' or resume=auto' if resume == 'never' else ''}")
    return None


def finished_place(directory: str, config_yaml: str, notice) -> Place:
    """A finished run goes on where a key asks for more of it (max_steps, merge, ...); else there is nothing to do."""
    if not differing(directory, config_yaml, SILENT):
        return Place(directory, None, finished=True)
    start = newest_whole(directory, notice)
    if start is None:
        raise UserError(f"output: {directory} holds a finished run of this configuration without a checkpoint to continue from; "
                        "fix: choose another output")
    return Place(directory, start)


def newest_whole(directory: str, notice) -> str | None:
    """The newest whole checkpoint, None where there are no checkpoints; UserError where there are, and none of them is whole:
    to start again would delete them, though one flaky disk or a half-made copy may be all that is wrong."""
    start = checkpoint.newest(directory, notice)
    damaged = checkpoint.checkpoints(directory)
    if start is None and damaged:
        raise UserError(f"output: no checkpoint of {directory} is whole ({checkpoint.broken(damaged[-1])}); "
                        "fix: restore one, or start a new run beside it with resume=never (and another output, if it is given)")
    return start


def named_checkpoint(output: str | None, resume: str, config_yaml: str) -> Place:
    """The place of `resume: PATH`, a run or one of its checkpoints."""
    path = os.path.normpath(resume)
    run = path if read_config(path) else os.path.dirname(os.path.dirname(path))
    if read_config(run) is None:
        raise UserError(f"resume: {resume} is neither a run nor a checkpoint of one; "
                        "fix: pass runs/<name> or runs/<name>/checkpoints/step-…")
    start = checkpoint.newest(run, tell) if path == run else path
    fault = "it has no whole checkpoint" if start is None else checkpoint.broken(start)
    if fault:
        raise UserError(f"resume: {resume} cannot be continued: {fault}; fix: pass another checkpoint or resume=auto")
    if output is not None and os.path.normpath(output) != run:
        raise UserError(f"output: {output} is not the run that resume={resume} belongs to; fix: leave output out")
    check_same(run, config_yaml, "resume")
    take(run, explicit=True)
    return Place(run, start)


def check_same(directory: str, config_yaml: str, key: str) -> None:
    keys = differing(directory, config_yaml)
    if keys:
        raise UserError(f"{key}: {directory} holds a run with another configuration ({', '.join(keys)} differ); "
                        "fix: choose another output or the same values")


def changed_rates(directory: str, config_yaml: str) -> str | None:
    """A sentence where a run goes on for another number of updates than it was started with, and its learning rates depend
    on that number; else None."""
    old, new = read_config(directory) or {}, yaml.load(config_yaml, yaml.BaseLoader)
    changed = [key for key in ("max_steps", "epochs") if old.get(key) != new.get(key)]
    if not changed or new["schedule"] == "constant" and not 0 < float(new["warmup"]) < 1:
        return None
    was = ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed)
    return (f"{was}: under this schedule the learning rates of the updates to come are not those that a run started with "
            "these values would have had")
