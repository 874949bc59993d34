"""SIGTERM and SIGINT: the first one ends a run after its update, with a checkpoint."""
import contextlib
import os
import signal
import time

from engine.grid import IN_GRID
from engine.ranks import sum_over_ranks
from rewards.guard import handle, interrupt, leave


class Signals:
    """Catches the first SIGTERM or SIGINT, which asks for a stop after this update (or this part of the
    reference pass, or before a rollout's first update); the second one exits at once.

    Under torchrun and in a grid the second one may be the first again: a scheduler signals every process,
    and torchrun or the grid, which got it too, passes it on. SIGTERM ends processes that a reward forks, as
    usual. They ignore a Ctrl-C, which reaches them too: the run handles it."""

    def __init__(self, run):
        self.number, self.since, self.run = None, 0.0, run
        is_passed_on = "LOCAL_RANK" in os.environ or IN_GRID in os.environ
        self.same_request = 5.0 if is_passed_on else 0.0      # seconds
        handle(signal.SIGTERM, self.catch)
        handle(signal.SIGINT, self.catch, in_child=lambda number, frame: None)

    def catch(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
            interrupt()
        elif time.monotonic() - self.since >= self.same_request:
            with contextlib.suppress(RuntimeError):      # the signal came during a write to the terminal
                self.run.erase()
            leave(128 + number)

    def requested(self, device) -> int | None:
        """The signal, if any rank got one."""
        total, = sum_over_ranks([float(self.number or 0)], device)
        return (self.number or signal.SIGTERM) if total else None


class Stopped(Exception):
    """A signal ended the run after an update, with a checkpoint; `train.py` exits with 128 + its number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number
