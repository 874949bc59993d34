"""A grid: `python train.py x.yml seed=0,1,2 lr=1e-4,3e-4` makes all combinations, one run after the other.

Each run is a process of its own with an explicit output, so that the same command continues an interrupted
grid: the runs that are finished are not trained again. It ends with the comparison of report.py.
"""
import itertools
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

from data.errors import UserError, notice
from engine.cast import Name, cast, show
from engine.command_line import parse_argv
from engine.config import (
    Common,
    algorithm_names,
    config_of,
    hints_of,
    load_parsed,
    read_given,
)
from engine.report import as_markdown, page, read_run

IN_GRID = "RUN_OF_A_GRID"      # set in the environment of a grid's runs
FROM_TORCHRUN = ("RANK", "LOCAL_", "WORLD_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


class Member(NamedTuple):
    """One run of a grid."""
    words: list[str]     # its command line
    directory: str


def grid_of(argv: list[str]) -> dict[str, list[str]]:
    """{key: its values} of the keys to which the command line gives several; {} where it is one run. Where a
    single value may hold commas, as in reward=a,b, the key's type says so, and it is no grid."""
    if not any("," in word for word in argv):
        return {}
    path, overrides, _ = parse_argv(argv)
    hints = hints_of(Common)
    given = read_given(path, overrides)
    algorithm, _ = given.get("algorithm", ("", ""))
    for name in values_of(algorithm):
        if name in algorithm_names():
            hints |= hints_of(config_of(name))
    grid = {}
    for key, (text, where) in overrides.items():
        if text and "," in text and key in hints and is_without_commas(hints[key]):
            grid[key] = values_of(text)
            check_values(key, grid[key], where, hints[key])
    return grid


def values_of(text: str) -> list[str]:
    return [value.strip() for value in text.split(",")]


def is_without_commas(kind) -> bool:
    """Whether no value of this type holds a comma: a number, true or false, one of several words, a name."""
    if get_origin(kind) is Annotated:
        return is_without_commas(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return all(part is NoneType or is_without_commas(part) for part in get_args(kind))
    return kind in (int, float, bool, Name) or get_origin(kind) is Literal


def check_values(key: str, values: list[str], where: str, kind) -> None:
    """UserError where a value is missing or stands there twice. Other bad values are `load_parsed`'s."""
    known = {}
    for text in values:
        if not text:
            raise UserError(f"{key} ({where}) has a comma with no value beside it; "
                            f"fix: write {key}={','.join(filter(None, values))}")
        try:
            value = cast(text, kind)
        except ValueError:
            value = text
        if value in known:
            raise UserError(f"{key} ({where}) holds the value {show(known[value])} twice; fix: remove one")
        known[value] = text


def run_grid(argv: list[str], grid: dict[str, list[str]]) -> int:
    """Make the runs of a grid, and compare them; the exit code: 0 where all are finished. UserError, before
    the first one starts, where one of the configurations is wrong."""
    flags = set(argv) & {"--dry-run"}
    members, base = members_of(argv, grid)
    if os.environ.get("RANK", "0") != "0":
        return 0                     # under torchrun rank 0 starts torchrun once more for every run
    if "LOCAL_RANK" in os.environ and os.environ["LOCAL_WORLD_SIZE"] != os.environ["WORLD_SIZE"]:
        raise UserError("a grid runs on one machine, and this torchrun has several; "
                        "fix: start its runs one by one, with one value for each key")
    signals = []
    failed = []
    for number, member in enumerate(members, 1):
        notice(f"run {number} of {len(members)}: {member.directory}")
        code = run_one(member.words, signals)
        if signals:
            notice("the grid is stopped; the same command continues it")
            return 128 + signals[0]
        if code:
            failed.append(member.directory)
            notice(f"{member.directory} failed with exit code {code}; the grid goes on")
    if not flags:
        compare(members, f"{base}-{'-'.join(grid)}.html")
    if failed:
        notice(f"{len(failed)} of {len(members)} runs failed: {', '.join(failed)}; "
               "the same command makes these again")
    return 1 if failed else 0


def members_of(argv: list[str], grid: dict[str, list[str]]) -> tuple[list[Member], str]:
    """The runs of a grid, the last key varying fastest, and what their directories begin with."""
    path, overrides, flags = parse_argv(argv)
    members = []
    for settings in combinations(grid):
        own = overrides | {key: (value, "command line") for key, value in settings.items()}
        run_config = load_parsed(path, own, flags)
        if run_config.common.resume not in ("auto", "never"):
            raise UserError(f"resume ({run_config.sources['resume']}) names one run, and this is a grid; "
                            "fix: remove it: the same command continues what is not finished")
        base = os.path.normpath(run_config.common.output or f"runs/{run_config.stem}")
        output = base
        for key, value in settings.items():
            output += f"-{key}-{value}"
        own["output"] = output, "command line"
        load_parsed(path, own, flags)                # its directory's name may be too long
        words = [path]
        for key, (text, _) in own.items():
            words.append(f"{key}={text}")
        for flag in sorted(flags):
            words.append(f"--{flag}")
        members.append(Member(words, output))
    return members, base


def combinations(grid: dict[str, list[str]]) -> Iterator[dict[str, str]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values))


def run_one(words: list[str], signals: list[int]) -> int:
    """The exit code of a run. SIGINT and SIGTERM are added to `signals` and passed on, so that the run saves
    and ends; a terminal or a scheduler may have sent them to it, too (see `Signals`)."""
    program = [sys.executable]
    if "LOCAL_RANK" in os.environ:
        count = os.environ["LOCAL_WORLD_SIZE"]
        program += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", count]
    environment = {IN_GRID: "1"}
    for name, value in os.environ.items():
        if not name.startswith(FROM_TORCHRUN):
            environment[name] = value
    process = None

    def catch(number, frame):
        signals.append(number)
        if process:
            process.send_signal(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen([*program, sys.argv[0], *words], env=environment)
        if signals:                  # it came while the process was started
            process.send_signal(signals[0])
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def compare(members: list[Member], path: str) -> None:
    """Print the tables of report.py for the runs that have logged something, and write its page to `path`."""
    runs = []
    for member in members:
        run = read_run(member.directory)
        if run and (run.train or run.held_out):
            runs.append(run)
    if not runs:
        return
    print(f"\n{as_markdown(runs)}")
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page(runs))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); "
                        f"fix: python report.py {shlex.join(run.directory for run in runs)}") from error
    print(f"report  {path}")
