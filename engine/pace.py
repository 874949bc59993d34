"""How long a run will take, where one of the same kind has ended on this machine: `--dry-run` says it."""
import glob
import os
from dataclasses import fields
from typing import NamedTuple

from engine.directory import SILENT, differing
from engine.logs import environment
from engine.report import read_started

# keys that change how many updates are made or what they learn, not how long one takes
UNTIMED = SILENT | {"max_steps", "epochs", "seed", "shuffle", "lr", "schedule", "warmup", "weight_decay",
                    "max_grad_norm", "merge", "save_dtype", "data", "eval_data", "eval_fraction", "columns"}


class Pace(NamedTuple):
    """What the last process of a run trained, and in how many seconds: with checkpoints and, online,
    rollouts, without evaluations."""
    updates: int
    tokens: int
    seconds: float


def expected_seconds(common, config, stored: str, updates: int, tokens: float) -> tuple[float, str] | None:
    """(how long a run will take, the run that tells). The run is the newest of those beside this one that had
    the same model, work per update, machine and number of processes; None where there is no such run.

    `stored`: the configuration as YAML; `updates`, `tokens`: what the run will train, with 0 tokens where
    they are not known before, since completions are sampled. Then an update must have as many completions."""
    ignored = UNTIMED
    if tokens:
        ignored = UNTIMED | {field.name for field in fields(config)} | {"batch_size"}
    beside = os.path.dirname(common.output or "runs/run") or "."
    files = glob.glob(os.path.join(glob.escape(beside), "*", "run.json"))
    now = environment()
    for file in sorted(files, key=written, reverse=True):
        directory = os.path.dirname(file)
        pace = pace_of(read_started(directory), now)
        if pace and not differing(directory, stored, ignored):
            share = tokens / pace.tokens if tokens else updates / pace.updates
            return pace.seconds * share, directory
    return None


def written(file: str) -> float:
    """When a file was written; a link to nothing counts as one."""
    return os.lstat(file).st_mtime


def pace_of(started: dict, now: dict) -> Pace | None:
    """The pace that a run.json says, if the run ended on a machine like that of `now`, with as many
    processes."""
    try:
        pace = Pace(**started["pace"])
        is_like = all(started[key] == now[key] for key in ("machine", "world_size"))
        return pace if is_like and min(pace) > 0 else None
    except (LookupError, TypeError):
        return None                                # of an earlier version, or damaged
