"""A run's directory and its console.

    config.yaml run.json metrics.jsonl samples.jsonl events.log checkpoints/ final/ report.html

Only rank 0 writes. The console (console.py) is a view of metrics.jsonl.
"""
import contextlib
import json
import math
import os
import platform
import re
import shlex
import sys
import time
from typing import NamedTuple

import yaml

from data.command import as_typed, beside_this_program, own_command
from data.errors import RunError, UserError, printable
from engine import checkpoint, sealed
from engine.claim import release
from engine.console import Console
from engine.directory import made_final, shape_of_final
from engine.fingerprint import check_unchanged, together
from engine.report import NO_METRICS, REPORT, write_report
from engine.trackers import Trackers

ROWS = ("metrics.jsonl", "samples.jsonl")
REPLACED = ".replaced"     # ending of a copy of a file of rows, kept from when a run goes back until it saves
DAMAGED = ".damaged"       # ending of a copy of a file of rows with the lines that were no rows

# halves of files, left by a kill, that no later write replaces
LEFTOVERS = ["run.json.tmp"]
for rows_file in ROWS:
    LEFTOVERS += [f"{rows_file}{REPLACED}.tmp", f"{rows_file}{DAMAGED}.tmp"]


class Run:
    """Writes one run's files, prints its console and feeds its trackers; does nothing on ranks other than 0.
    """

    def __init__(self, directory: str, main: bool = True, report_to: str | list[str] | None = None,
                 quiet: bool = False):
        self.directory = directory
        self.main = main
        self.console = Console(sys.stderr if main else None, quiet)
        self.trackers = Trackers(report_to if main else None, self.notice)
        self.begun = False           # whether the directory is a run
        self.early = []              # what to log as soon as it is one
        self.newer = []              # checkpoints of later steps than the one this run continues from

    def path(self, *names: str) -> str:
        return os.path.join(self.directory, *names)

    def begin(self, config_yaml: str, reports: dict, digests: dict, step: int) -> None:
        """Make the directory a run, or continue the one there from `step` on: remove what an interrupted save
        left, and cut the rows of updates that will be done again. Where a run goes back behind whole
        checkpoints, these and their rows stay until `replace`: before that the run still needs them."""
        if not self.main:
            return
        saved = checkpoint.checkpoints(self.directory)
        self.newer = [path for path in saved if checkpoint.step_of(path) > step]
        whole = [path for path in self.newer if sealed.broken(path) is None]
        goes_back = bool(whole) or checkpoint.finished(self.directory)
        try:
            os.makedirs(self.directory, exist_ok=True)
            checkpoint.tidy(self.directory)
            self.write_file("config.yaml", config_yaml)
            self.take_back()
            for name in ROWS:
                self.take_up(name, step, goes_back)
            self.started = {**environment(), "data": reports, "digests": digests, "resumed_from_step": step,
                            "final": made_final(self.directory)}
            self.write_file("run.json", json.dumps(self.started, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"output: {self.directory} cannot be written ({error.strerror}); "
                            "fix: choose a writable output") from error
        self.begun = True
        for line in self.early:
            self.append("events.log", line)
        self.trackers.start(self.directory, yaml.safe_load(config_yaml), step)

    def finish(self, pace: NamedTuple) -> None:
        """Say in run.json what the final/ that now stands in the directory was made with and at what pace,
        and write the report."""
        if self.begun:
            try:
                write_report(self.directory)
            except Exception as error:  # noqa: BLE001  it never stops a run
                self.notice(f"report.html is not written ({error})")
            self.started["final"] = shape_of_final(self.text("config.yaml"))
            self.started["pace"] = pace._asdict()
            with contextlib.suppress(OSError):      # the same command then writes the same final/ once more
                self.write_file("run.json", json.dumps(self.started, indent=1) + "\n")

    def take_back(self) -> None:
        """Undo what an earlier process left half done: remove halves of files, and restore the rows of before
        a run went back that then saved nothing: its own do not count."""
        for name in LEFTOVERS:
            if self.main and os.path.exists(self.path(name)):
                os.remove(self.path(name))
        for name in ROWS:
            kept = self.path(name + REPLACED)
            if self.main and os.path.exists(kept):
                os.replace(kept, self.path(name))

    def take_up(self, name: str, step: int, goes_back: bool) -> None:
        """Cut a file of rows after `step`. A copy of it is kept if lines are no rows, or if it `goes_back`
        behind whole checkpoints."""
        lines = []
        damaged = 0
        for line in self.rows(name):
            at = step_of_row(line)
            damaged += at is None
            if at is not None and at <= step and step > 0:
                lines.append(line)
        if damaged:
            path = self.path(name)
            self.notice(f"{path}: {damaged} lines are no rows of this run and are left out; "
                        f"the original file is kept as {path}{DAMAGED}")
            self.write_file(name + DAMAGED, self.text(name))
        if goes_back:
            self.write_file(name + REPLACED, self.text(name))
        self.write_file(name, "".join(lines))

    def replace(self, root: str, saved: str | None = None) -> None:
        """Remove what a run that went back has replaced, once it has saved a checkpoint (at the path `saved`)
        or its final model. `root`: its directory, absolute where the working directory may be another."""
        for path in self.newer:
            path = os.path.join(root, os.path.relpath(path, self.directory))
            if path != saved:
                checkpoint.remove(path)
        self.newer = []
        for name in ROWS:
            kept = os.path.join(root, name + REPLACED)
            if os.path.exists(kept):
                os.remove(kept)

    def check_started(self, digests: dict) -> None:
        """UserError where a file or a model that the configuration names has changed since the run started. A
        notice where libraries, threads or processes have changed: numbers are then equal to rounding only."""
        started = self.started_with()
        self.check_digests(digests)
        before = arithmetic(started)
        changed = []
        for name, value in arithmetic(environment()).items():
            if before.get(name, value) != value:
                changed.append(f"{name} {before[name]} -> {value}")
        if changed:
            self.notice(f"since the run in {self.directory} started: {', '.join(changed)}; "
                        "its numbers go on equal to rounding, not bit for bit")

    def check_digests(self, digests: dict) -> dict:
        """UserError where one of the digests has changed since the run started; all that are known, else."""
        started = self.started_with().get("digests", {})
        check_unchanged(started, digests, self.directory)
        return together(started, digests)

    def check_data(self, reports: dict) -> None:
        """UserError where a data file has changed since the start. The order of the data is a function of the
        step, so a run can only continue with the same rows."""
        started = self.started_with()["data"]
        for split, report in reports.items():
            before = started.get(split)
            if report and before and report["sha256"] != before["sha256"]:
                raise UserError(f"{report['source']} has changed since the run in {self.directory} started; "
                                "fix: restore the file, or choose another output")

    def started_with(self) -> dict:
        """run.json; UserError if it cannot be read: without it nothing tells whether data and models are
        still the same."""
        try:
            started = json.loads(self.text("run.json"))
            if is_started(started):
                return started
            fault = "not what a run writes"
        except (OSError, ValueError, RecursionError) as error:
            fault = getattr(error, "strerror", None) or "not JSON"
        path = self.path("run.json")
        raise UserError(f"output: {path} is damaged ({fault}), so whether data and models are the same "
                        "cannot be known; fix: restore it, or start a new run with another output")

    def check_there(self) -> None:
        """RunError if the directory was deleted or moved during the run. A save would make a new one, without
        what was in it."""
        if not self.begun:
            return
        try:
            os.stat(self.path("config.yaml"))
        except (FileNotFoundError, NotADirectoryError):
            raise RunError(f"output: {self.directory} was deleted or moved during the run; "
                           "fix: put it back and run the same command again") from None
        except OSError:
            pass                         # a network disk that does not answer now may answer at the next save

    def write_file(self, name: str, text: str) -> None:
        write_whole(self.path(name), text)

    def rows(self, name: str) -> list[str]:
        """The complete lines of a .jsonl file of this run. A kill may have cut the last line, and a power
        failure may have left zeros."""
        if not os.path.exists(self.path(name)):
            return []
        lines = self.text(name).split("\n")[:-1]           # not splitlines: texts may hold other line breaks
        return [line + "\n" for line in lines if line.startswith("{") and line.endswith("}")]

    def text(self, name: str) -> str:
        with open(self.path(name), encoding="utf-8", errors="replace", newline="\n") as file:
            return file.read()

    def append(self, name: str, row) -> None:
        if self.main and not self.begun:
            self.early.append(row)                     # the directory is not a run yet
        elif self.main:
            try:
                line = row if isinstance(row, str) else as_json(row)
                # UTF-8 has no half surrogates: they are written as \udc80, which JSON reads as the same text
                with open(self.path(name), "a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(line + "\n")
            except OSError as error:
                self.check_there()
                path = self.path(name)
                raise RunError(f"cannot write {path} ({error.strerror}); checkpoints are untouched; "
                               "fix: free disk space and run the same command again") from error

    def log(self, row: dict) -> None:
        """Write a row into metrics.jsonl, and pass it on to the trackers."""
        self.append("metrics.jsonl", row)
        self.trackers.log(row)

    def notice(self, text: str, is_progress: bool = False) -> None:
        """A sentence the user should read once; kept in events.log. One on the progress of a quiet run stands
        there only."""
        if self.main:
            text = printable(text, keep="")
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            if not (is_progress and self.console.quiet):
                self.console.say(text)
            self.append("events.log", f"{now} {text}")

    def show_samples(self, rows: list[dict]) -> None:
        """Print rows of samples.jsonl that have the same prompt."""
        lines = [f"samples at step {rows[0]['step']} for {rows[0]['prompt']!r}"]
        for row in rows:
            shown = f"{row['reward']:8.3g}" if "reward" in row else ""
            lines.append(f"{shown}  {row['completion']!r}")
        if self.main:
            self.console.block(lines)

    def summary(self, chat: bool = True) -> None:
        """Print what the run changed on held-out rows (else on its own rows), where the model is, and with
        `chat` how to talk to it."""
        if not self.main:
            return
        rows = {"eval": [], "train": []}
        for line in self.rows("metrics.jsonl"):
            if step_of_row(line) is not None:
                row = json.loads(line)
                rows.setdefault(row.get("split"), []).append(row)
        title = "held-out rows" if rows["eval"] else "training rows"
        shown = rows["eval"] or rows["train"] or [{"step": "?"}]      # the file of a finished run may be lost
        first = shown[0]
        last = shown[-1]
        self.erase()
        console = Console(sys.stdout)
        console.say(f"\n{title}: step {first['step']} -> step {last['step']}")
        for name in first:
            # an update of kto may lack one class; what was not finite is null
            known = first[name] is not None and last.get(name) is not None
            if known and name not in NO_METRICS:
                console.say(f"  {name:<20} {first[name]:9.4f} -> {last[name]:9.4f}")
        console.say(f"model    {self.path('final')}")
        if chat:
            program = beside_this_program("chat.py")
            console.say(as_typed(f"chat     python {program} {shlex.quote(self.directory)}"))
        console.say(f"metrics  {self.path('metrics.jsonl')}")
        if os.path.isfile(self.path(REPORT)):
            console.say(f"report   {self.path(REPORT)}")

    def close(self) -> None:
        """End the trackers, which may send what they still hold, and let others have the directory."""
        self.trackers.finish()
        if self.main:
            release(self.directory)

    def erase(self) -> None:
        """Remove the bars from the terminal, so that what is printed next has a line of its own."""
        self.console.close()


def write_whole(path: str, text: str) -> None:
    """Write a file in one step: it is whole, or as it was before."""
    temporary = path + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(temporary, path)


def is_started(found) -> bool:
    """Whether something read from run.json has the form in which a run writes it."""
    if not isinstance(found, dict) or not isinstance(found.get("data"), dict):
        return False
    reports = [report for report in found["data"].values() if report is not None]
    digests = found.get("digests", {})
    parts = [digests, found.get("versions", {}), found.get("machine", {}), *reports]
    if isinstance(digests, dict):
        parts += digests.values()
    for part in parts:
        if not isinstance(part, dict):
            return False
    return all("sha256" in report for report in reports)


def arithmetic(started: dict) -> dict:
    """{name: value} for what the last bits of a number depend on: versions, threads and processes."""
    machine = started.get("machine", {})
    found = dict(started.get("versions", {}))
    found["threads"] = machine.get("threads")
    found["processes"] = started.get("world_size")
    return {name: value for name, value in found.items() if value is not None}


def step_of_row(line: str) -> int | None:
    """The step of a line of metrics.jsonl or samples.jsonl; None if it is no row of either."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def as_json(row: dict) -> str:
    """One line of JSON, which has no NaN and no infinity: they become null."""
    def known(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    row = {key: known(value) for key, value in row.items()}
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def redact(text: str) -> str:
    return re.sub(r"hf_[A-Za-z0-9]{16,}", "hf_…", text)


def environment() -> dict:
    """What a reader needs to reproduce the run: versions, command, machine."""
    import torch
    import transformers
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": transformers.__version__}
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    machine = {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(),
               "threads": torch.get_num_threads(), "gpu": gpu}
    return {
        "command": redact(own_command(sys.argv[1:])),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions,
        "machine": machine,
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }
