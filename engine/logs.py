"""A run's directory and its console.

    config.yaml run.json metrics.jsonl samples.jsonl events.log checkpoints/ final/

Only rank 0 writes. The console (console.py) is a view of metrics.jsonl.
"""
import json
import os
import platform
import re
import shlex
import sys
import time

import yaml

from data.errors import RunError, UserError
from engine import checkpoint
from engine.console import Console

# a run may be continued with other values of these; every other key changes the numbers
FREE = {"output", "resume", "max_steps", "epochs", "eval_every", "save_every", "log_every", "sample_every", "keep", "merge"}


def read_config(directory: str) -> dict | None:
    """The configuration a run directory was started with; None if it is not a run."""
    try:
        with open(os.path.join(directory, "config.yaml"), encoding="utf-8") as file:
            config = yaml.load(file, yaml.BaseLoader)      # everything as text: the comparison is of texts
        return config if isinstance(config, dict) else None
    except (OSError, ValueError, yaml.YAMLError):      # no such file, not text, or somebody else's
        return None


def differing(directory: str, config_yaml: str) -> list[str]:
    old, new = read_config(directory) or {}, yaml.load(config_yaml, yaml.BaseLoader)
    return sorted(key for key in (old.keys() | new.keys()) - FREE if old.get(key) != new.get(key))


def finished(directory: str) -> bool:
    return checkpoint.broken(os.path.join(directory, "final")) is None


def choose_directory(output: str | None, stem: str, resume: str, config_yaml: str) -> tuple[str, str | None]:
    """(run directory, checkpoint to continue from or None) for this configuration, before anything is written.

    Explicit `output`: continued if it holds an unfinished run of the same configuration. Default: runs/<stem>, or the next
    free -2, -3 where that is finished or configured otherwise. `resume: PATH` names a checkpoint or a run."""
    def notice(text):
        print(text, file=sys.stderr)

    if resume not in ("auto", "never"):
        path = os.path.normpath(resume)
        run = path if read_config(path) else os.path.dirname(os.path.dirname(path))
        if read_config(run) is None:
            raise UserError(f"resume: {resume} is neither a run nor a checkpoint of one; "
                            "fix: pass runs/<name> or runs/<name>/checkpoints/step-…")
        start = checkpoint.newest(run, notice) if path == run else path
        fault = "it has no whole checkpoint" if start is None else checkpoint.broken(start)
        if fault:
            raise UserError(f"resume: {resume} cannot be continued: {fault}; fix: pass another checkpoint or resume=auto")
        if output is not None and os.path.normpath(output) != run:
            raise UserError(f"output: {output} is not the run that resume={resume} belongs to; fix: leave output out")
        check_same(run, config_yaml, "resume")
        return run, start
    candidates = [output] if output is not None else (f"runs/{stem}" + (f"-{i}" if i > 1 else "") for i in range(1, 10 ** 6))
    for path in candidates:
        if os.path.exists(path) and not os.path.isdir(path):
            raise UserError(f"output: {path} is a file; fix: choose another output")
        if not os.path.isdir(path) or not os.listdir(path):
            return path, None
        explicit = output is not None
        if read_config(path) is None:
            if explicit:
                raise UserError(f"output: {path} is not empty and is not a run; fix: choose another output")
            continue
        if explicit:
            check_same(path, config_yaml, "output")
        same = not differing(path, config_yaml)
        if resume == "auto" and same:
            start = checkpoint.newest(path, notice)
            if not finished(path) or (explicit and start):
                return path, start
        if explicit:
            raise UserError(f"output: {path} holds a {'finished ' if finished(path) else ''}run of this configuration; "
                            "fix: choose another output" + (" or resume=auto" if resume == "never" else ""))


def check_same(directory: str, config_yaml: str, key: str) -> None:
    keys = differing(directory, config_yaml)
    if keys:
        raise UserError(f"{key}: {directory} holds a run with another configuration ({', '.join(keys)} differ); "
                        "fix: choose another output or the same values")


class Run:
    """Writes one run's files and prints its console; does nothing on ranks other than 0."""

    def __init__(self, directory: str, main: bool = True):
        self.directory, self.main = directory, main
        self.console = Console(sys.stderr if main else None)

    def path(self, *names: str) -> str:
        return os.path.join(self.directory, *names)

    def begin(self, config_yaml: str, reports: dict, step: int) -> None:
        """Create the directory, or take up the one there: what an interrupted save left is removed and the rows of updates
        that will be done again are cut from metrics.jsonl and samples.jsonl. UserError if a data file is not what it was."""
        if not self.main:
            return
        if step:
            self.check_data(reports)
        try:
            os.makedirs(self.directory, exist_ok=True)
            checkpoint.clean(self.directory, after=step)
            self.write("config.yaml", config_yaml)
            for name in ("metrics.jsonl", "samples.jsonl"):
                self.write(name, "".join(line for line in self.rows(name) if json.loads(line)["step"] <= step and step > 0))
            self.write("run.json", json.dumps({**environment(), "data": reports, "resumed_from_step": step}, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"output: {self.directory} cannot be written ({error.strerror}); fix: choose a writable output") from error

    def check_data(self, reports: dict) -> None:
        """The order of the data is a function of the step, so a run can only go on with the same rows."""
        with open(self.path("run.json")) as file:
            started = json.load(file)["data"]
        for split, report in reports.items():
            if report and started[split] and report["sha256"] != started[split]["sha256"]:
                raise UserError(f"{report['source']} has changed since the run in {self.directory} started; "
                                "fix: restore the file, or choose another output")

    def write(self, name: str, text: str) -> None:
        with open(self.path(name + ".tmp"), "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(self.path(name + ".tmp"), self.path(name))

    def rows(self, name: str) -> list[str]:
        """The complete lines of a .jsonl file of this run; a kill may have cut the last one, a power failure left zeros."""
        if not os.path.exists(self.path(name)):
            return []
        with open(self.path(name), encoding="utf-8", errors="replace") as file:
            return [line for line in file if line.startswith("{") and line.endswith("}\n")]

    def append(self, name: str, row) -> None:
        if self.main and os.path.isdir(self.directory):
            try:
                with open(self.path(name), "a", encoding="utf-8") as file:
                    file.write((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n")
            except OSError as error:
                raise RunError(f"cannot write {self.path(name)} ({error.strerror}); checkpoints are untouched; "
                               "fix: free disk space and run the same command again") from error

    def notice(self, text: str) -> None:
        """A sentence the user should read once; kept in events.log."""
        if self.main:
            self.console.say(text)
            self.append("events.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def summary(self, chat: bool = True) -> None:
        """What the run changed on held-out rows (else on its own rows), where the model lies and how to talk to it."""
        if not self.main:
            return
        rows = [json.loads(line) for line in self.rows("metrics.jsonl")]
        split = "eval" if any(row["split"] == "eval" for row in rows) else "train"
        first, *_, last = [row for row in rows if row["split"] == split] * 2
        self.erase()
        console = Console(sys.stdout)
        console.say(f"\n{'held-out rows' if split == 'eval' else 'training rows'}: step {first['step']} -> step {last['step']}")
        hidden = ("step", "split", "epoch", "lr", "grad_norm", "tokens_per_second")
        for name in [name for name in first if name in last and name not in hidden]:       # an update of kto may lack one class
            console.say(f"  {name:<20} {first[name]:9.4f} -> {last[name]:9.4f}")
        console.say(f"model    {self.path('final')}\n" + (f"chat     python chat.py {self.directory}\n" if chat else "")
                    + f"metrics  {self.path('metrics.jsonl')}")

    def erase(self) -> None:
        """Remove the bars from the terminal, so that what is printed next has a line of its own."""
        self.console.close()


def redact(text: str) -> str:
    return re.sub(r"hf_[A-Za-z0-9]{16,}", "hf_…", text)


def environment() -> dict:
    """What a reader needs to reproduce the run: versions, command, machine."""
    import torch
    import transformers
    return {
        "command": redact(" ".join(["python", *map(shlex.quote, sys.argv)])),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(),
                    "threads": torch.get_num_threads(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
        "world_size": int(os.environ.get("WORLD_SIZE", 1)),
    }
