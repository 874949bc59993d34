"""Choose the directory of a run: the one of an unfinished run that it continues, or a free one.

A run has its directory alone (claim.py).
"""
import os
from typing import NamedTuple

import yaml

from data.errors import UserError, notice
from engine import checkpoint, sealed
from engine.claim import LOCK, claim, release
from engine.ranks import TOKEN
from engine.report import read_started
from engine.yaml_file import read_config

# these keys change neither a number nor the final model ...
SILENT = {"output", "resume", "eval_every", "save_every", "log_every", "sample_every",
          "show_samples", "report_to", "quiet", "keep", "reward_timeout"}
# ... and a run may be continued with other values of these; every other key changes the numbers
MAY_CHANGE = SILENT | {"max_steps", "epochs", "merge", "save_dtype"}
OFF = ("null", "false")      # how config.yaml writes an option that changes nothing


class Place(NamedTuple):
    """A run's directory, the checkpoint to continue from or None, and whether this run is done already."""
    directory: str
    start: str | None = None
    finished: bool = False


def differing(directory: str, config_yaml: str, ignored: set = MAY_CHANGE) -> list[str]:
    """The keys, without the `ignored` ones, that have other values in `config_yaml` than in the run. A key
    that the run's version did not have is the same while it is off."""
    old = read_config(directory) or {}
    new = yaml.load(config_yaml, yaml.BaseLoader)
    for key in new.keys() - old.keys():
        if new[key] in OFF:
            ignored = ignored | {key}
    compared = (old.keys() | new.keys()) - ignored
    return sorted(key for key in compared if old.get(key) != new.get(key))


def is_free(directory: str) -> bool:
    """Whether a directory is empty, or holds only what a run leaves if it is killed before it has written its
    config.yaml."""
    return set(os.listdir(directory)) <= {LOCK, TOKEN, "config.yaml.tmp"}


def choose_directory(output: str | None, stem: str, resume: str, config_yaml: str) -> Place:
    """The place of a run with this configuration, claimed for this process; nothing but the claim is written.

    An explicit `output` is continued if it holds an unfinished run of the same configuration. The default is
    runs/<stem>, or the next free -2, -3 where that is finished, in use or configured otherwise.
    `resume: PATH` names a checkpoint or a run."""
    if resume not in ("auto", "never"):
        return named_checkpoint(output, resume, config_yaml)
    explicit = output is not None
    names = [output] if explicit else default_names(stem)
    for directory in names:
        if place_at(directory, explicit, resume, config_yaml, silent) is None:
            continue
        if not take(directory, explicit):
            continue
        # the directory may have changed before the claim, so look again
        place = place_at(directory, explicit, resume, config_yaml, notice)
        if place is not None:
            return place
        release(directory)


def default_names(stem: str):
    """runs/<stem>, runs/<stem>-2, runs/<stem>-3 ..."""
    yield f"runs/{stem}"
    for number in range(2, 10 ** 6):
        yield f"runs/{stem}-{number}"


def silent(text: str) -> None:
    pass


def take(directory: str, explicit: bool) -> bool:
    """Claim a directory. Where another process has it: UserError for an `explicit` one, else False."""
    try:
        holder = claim(directory)
    except OSError as error:
        raise UserError(f"output: {directory} cannot be written ({error.strerror}); "
                        "fix: choose a writable output") from error
    if holder and explicit:
        raise UserError(f"output: {directory} is in use by {holder}; "
                        "fix: wait for its end, or choose another output")
    return not holder


def place_at(directory: str, explicit: bool, resume: str, config_yaml: str, notice) -> Place | None:
    """What this configuration finds in one directory. Where it cannot be used: None for a default name, which
    is passed over, and UserError for an explicit one."""
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
    if not explicit and (resume != "auto" or differing(directory, config_yaml)):
        return None
    done = checkpoint.finished(directory)
    if resume == "auto":
        if not done:
            return Place(directory, newest_whole(directory, notice))
        if explicit:
            return finished_place(directory, config_yaml, notice)
    if explicit:
        kind = "finished run" if done else "run"
        other_fix = " or resume=auto" if resume == "never" else ""
        raise UserError(f"output: {directory} holds a {kind} of this configuration; "
                        f"fix: choose another output{other_fix}")
    return None


def finished_place(directory: str, config_yaml: str, notice) -> Place:
    """A finished run continues where a key asks for more of it (max_steps, merge, ...); else it is done."""
    if has_made_final(directory, config_yaml):
        return Place(directory, None, finished=True)
    start = newest_whole(directory, notice)
    if start is None:
        raise UserError(f"output: {directory} holds a finished run of this configuration "
                        "without a checkpoint to continue from; fix: choose another output")
    return Place(directory, start)


def shape_of_final(config_yaml: str) -> dict[str, str]:
    """The values of the keys that decide when a run ends and what its final/ holds, as text."""
    values = yaml.load(config_yaml, yaml.BaseLoader)
    return {key: values.get(key) for key in sorted(MAY_CHANGE - SILENT)}


def made_final(directory: str) -> dict | None:
    """What run.json says that the final/ in a directory was made with; None if it does not say."""
    return read_started(directory).get("final")      # the file may be lost, or of an earlier version


def has_made_final(directory: str, config_yaml: str) -> bool:
    """Whether the final/ in a directory is what this configuration asks for. The config.yaml beside it may be
    of a run that was to continue and was killed, so run.json says it."""
    made = made_final(directory)
    if made is None:
        return not differing(directory, config_yaml, SILENT)
    return made == shape_of_final(config_yaml)


def newest_whole(directory: str, notice) -> str | None:
    """The newest whole checkpoint; None where there are no checkpoints; UserError where none of them is
    whole: a new start would delete them, though a flaky disk or a half-made copy may be all that is wrong."""
    start = checkpoint.newest(directory, notice)
    damaged = checkpoint.checkpoints(directory)
    if start is None and damaged:
        fault = sealed.broken(damaged[-1])
        raise UserError(f"output: no checkpoint of {directory} is whole ({fault}); fix: restore one, or "
                        "start a new run beside it with resume=never (and another output, if it is given)")
    return start


def named_checkpoint(output: str | None, resume: str, config_yaml: str) -> Place:
    """The place of `resume: PATH`, a run or one of its checkpoints."""
    path = os.path.normpath(resume)
    run = path if read_config(path) else os.path.dirname(os.path.dirname(path))
    if read_config(run) is None:
        raise UserError(f"resume: {resume} is neither a run nor a checkpoint of one; "
                        "fix: pass runs/<name> or runs/<name>/checkpoints/step-…")
    start = checkpoint.newest(run, notice) if path == run else path
    fault = "it has no whole checkpoint" if start is None else sealed.broken(start)
    if fault:
        raise UserError(f"resume: {resume} cannot be continued: {fault}; "
                        "fix: pass another checkpoint or resume=auto")
    if output is not None and os.path.normpath(output) != run:
        raise UserError(f"output: {output} is not the run that resume={resume} belongs to; "
                        "fix: leave output out")
    check_same(run, config_yaml, "resume")
    take(run, explicit=True)
    return Place(run, start)


def check_same(directory: str, config_yaml: str, key: str) -> None:
    """UserError, at `key`, where the run in `directory` was started with another configuration."""
    keys = differing(directory, config_yaml)
    if keys:
        named = ", ".join(keys)
        raise UserError(f"{key}: {directory} holds a run with another configuration ({named} differ); "
                        "fix: choose another output or the same values")


def changed_rates(directory: str, config_yaml: str) -> str | None:
    """A sentence where a run continues with another number of updates than it was started with, and its
    learning rates depend on that number; else None."""
    old = read_config(directory) or {}
    new = yaml.load(config_yaml, yaml.BaseLoader)
    changed = [key for key in ("max_steps", "epochs") if old.get(key) != new.get(key)]
    if not changed:
        return None
    warmup_is_a_share = 0 < float(new["warmup"]) < 1      # else a number of updates
    if new["schedule"] == "constant" and not warmup_is_a_share:
        return None
    was = ", ".join(f"{key} was {old.get(key)} and is {new.get(key)}" for key in changed)
    return (f"{was}: under this schedule the learning rates of the updates to come are not those that a run "
            "started with these values would have had")
