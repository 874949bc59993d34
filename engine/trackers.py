"""Trackers: TensorBoard, wandb, SwanLab and trackio get the rows of metrics.jsonl, if `report_to` names them.

A row's numbers have the names that they have in metrics.jsonl, with the split before them: train/loss,
eval/rewards/margins. A tracker is a view: one that fails is told once and left out, and the run goes on.
"""
import contextlib
import importlib
import importlib.util
import math
import os
import secrets

import yaml

from data.errors import UserError, said_first
from engine.cast import nearest, show

PROJECT = "minimal-llm-alignment"       # where no variable such as WANDB_PROJECT names another one
IDENTITY = "tracker-id"                 # a file in the run's directory: a resumed run goes on under this id
POSITION = ("step", "split")            # of a row, not numbers of it


def names_in(report_to: str | list[str] | None) -> list[str]:
    """The trackers that a value of `report_to` names: between commas, or in a list."""
    words = report_to.split(",") if isinstance(report_to, str) else report_to or []
    return list(dict.fromkeys(word.strip().lower() for word in words))


def check_trackers(report_to: str | list[str] | None, where: str) -> None:
    """UserError where `report_to` names an unknown tracker, or one whose package is missing."""
    for name in names_in(report_to):
        if name not in TRACKERS:
            fix = nearest(name, TRACKERS) or f"one of {', '.join(TRACKERS)}"
            raise UserError(f"report_to ({where}) is {show(name)}; fix: give {fix}")
        found = importlib.util.find_spec(name)
        # a folder of that name, such as the one that wandb makes, is found without a file
        if found is None or found.origin is None:
            raise UserError(f"report_to ({where}) is {name}, whose package is not installed; "
                            f"fix: pip install {name}")


class TensorBoard:
    """Event files in the run's directory: `tensorboard --logdir runs`."""

    def __init__(self, directory: str, config: dict, identity: str, step: int):
        from torch.utils.tensorboard import SummaryWriter
        # what an earlier process logged of the updates that are made again is taken back
        first = step + 1 if step else 0
        self.writer = SummaryWriter(os.path.join(directory, "tensorboard"), purge_step=first)
        if step == 0:
            self.writer.add_text("config", f"```\n{yaml.safe_dump(config, sort_keys=False)}```", 0)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class Service:
    """What wandb, SwanLab and trackio have in common: a module with `init`, `log` and `finish`. Who is logged
    in, and where they send the numbers, their own commands and environment variables say."""
    module = ""

    def __init__(self, directory: str, config: dict, identity: str, step: int):
        self.service = importlib.import_module(self.module)
        name = os.path.basename(os.path.abspath(directory))
        project = os.environ.get(f"{self.module.upper()}_PROJECT", PROJECT)
        options = self.options(directory, name, identity)
        self.service.init(project=project, config=config, resume="allow", **options)

    def log(self, values: dict[str, float], step: int) -> None:
        self.service.log(values, step=step)

    def finish(self) -> None:
        self.service.finish()


class Wandb(Service):
    module = "wandb"

    def options(self, directory: str, name: str, identity: str) -> dict:
        return {"name": name, "id": identity, "dir": directory}


class SwanLab(Service):
    module = "swanlab"

    def options(self, directory: str, name: str, identity: str) -> dict:
        return {"name": name, "id": identity, "log_dir": os.path.join(directory, "swanlab")}


class Trackio(Service):
    module = "trackio"

    def options(self, directory: str, name: str, identity: str) -> dict:
        return {"name": f"{name}-{identity[:6]}"}      # it has no ids: the name tells runs apart


TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "swanlab": SwanLab, "trackio": Trackio}


class Trackers:
    """The trackers of a run. None of their failures is one of the run's."""

    def __init__(self, report_to: str | list[str] | None, notice):
        self.names, self.notice = names_in(report_to), notice
        self.open = {}               # name -> tracker

    def start(self, directory: str, config: dict, step: int) -> None:
        """Begin, or go on behind update `step`."""
        identity = identity_of(directory, step) if self.names else ""
        for name in self.names:
            try:
                self.open[name] = TRACKERS[name](directory, config, identity, step)
            except Exception as error:  # noqa: BLE001  somebody else's code, which may ask a server
                self.give_up(name, error)

    def log(self, row: dict) -> None:
        """Pass on the numbers of a row of metrics.jsonl."""
        values = {}
        for name, value in row.items():
            is_number = isinstance(value, (int, float)) and math.isfinite(value)
            if name not in POSITION and is_number:
                values[f"{row['split']}/{name}"] = value
        for name in list(self.open):
            self.call(name, "log", values, row["step"])

    def finish(self) -> None:
        for name in list(self.open):
            self.call(name, "finish")
        self.open = {}

    def call(self, name: str, method: str, *arguments) -> None:
        try:
            getattr(self.open[name], method)(*arguments)
        except Exception as error:  # noqa: BLE001  as above
            self.give_up(name, error)

    def give_up(self, name: str, error: Exception) -> None:
        self.open.pop(name, None)
        self.notice(f"warning: {name} fails ({said_first(error)}) and gets no more numbers of this run; "
                    "metrics.jsonl has all of them")


def identity_of(directory: str, step: int) -> str:
    """The id under which services know this run: new for a new one, stored for one that goes on."""
    path = os.path.join(directory, IDENTITY)
    identity = secrets.token_hex(8)
    with contextlib.suppress(OSError):       # a full disk is not the trackers' to tell
        if step and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                return file.read().strip() or identity
        with open(path, "w", encoding="utf-8") as file:
            file.write(identity + "\n")
    return identity
