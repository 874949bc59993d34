"""The console of a run: a line for every update, notices, and on a terminal bars below them.

A terminal shows a bar of the run and, below it, a bar of what is being counted (rows of the reference pass,
completions, held-out rows), which disappears when it is done. Elsewhere (a file, a pipe, TERM=dumb) there are
the same lines and nothing else. A console that can no longer be written to does not stop the run:
metrics.jsonl and events.log hold what it would show.
"""
import contextlib
import math
import os
import threading
import time
import weakref

from tqdm import tqdm
from tqdm.utils import disp_len, disp_trim

BAR = 9                          # columns of the shortest bar with its frame
TYPED = 4                        # columns kept free after a bar, where the terminal shows ^C^C
MEASURED = 3                     # updates after which a quiet run says how long it will take
PAUSE = 0.1                      # seconds between two drawings of a counter
CONSOLES = weakref.WeakSet()     # all consoles of this process


# ---- numbers and their room --------------------------------------------------------------------------

def clock(seconds: float) -> str:
    """`0:12`, `1:23:45`, `4 d 20 h`."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour} h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def per_second(count: float, since: float) -> float:
    """`count` per second since `since`, a time.perf_counter(); 0 if the clock has not moved on."""
    elapsed = time.perf_counter() - since
    return count / elapsed if elapsed > 0 else 0.0


def time_left(done: int, left: int, since: float) -> str:
    """How long `left` more will take, if `done` have taken the time since `since`."""
    elapsed = max(0.0, time.perf_counter() - since)
    each = elapsed / max(1, done)
    return f"{clock(each * max(0, left))} left"


def cut(text: str, columns: float) -> str:
    """The text in at most `columns`; dots mark that something is missing."""
    if disp_len(text) <= columns:
        return text
    return disp_trim(text, max(0, columns - 3)) + "..."


def counted(label: str, done: int, total: int, columns: float) -> str:
    """`step 7/24` in at most `columns`, the numbers whole."""
    numbers = f" {done}/{total}"
    return cut(label, columns - len(numbers)) + numbers


def fitting(parts: list[str], leave_out: list[str], columns: float) -> str:
    """The parts, with two spaces before each, in at most `columns`. Where there is no room, whole parts are
    left out, in the order of `leave_out`: a number cut in the middle reads as another number."""
    kept = [f"  {part}" for part in parts]
    for part in leave_out:
        if disp_len("".join(kept)) <= columns:
            break
        kept.remove(f"  {part}")
    return "".join(kept)


# ---- the terminal ------------------------------------------------------------------------------------

def can_redraw(stream) -> bool:
    """Whether a line of this stream can be written over."""
    with contextlib.suppress(AttributeError, ValueError):      # the stream is None, or it was closed
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


def columns_of(stream) -> int:
    """How many columns of this terminal to use: not the last, after which some terminals begin a new line."""
    columns = 0
    with contextlib.suppress(OSError, ValueError):
        columns = os.get_terminal_size(stream.fileno()).columns
    if columns <= 0:                # some terminals of CI systems say 0
        columns = 80
    return max(1, columns - 1)


class Bar(tqdm):
    """A bar at the bottom of a terminal, `step 7/24 |###   |  parts`, as wide as the window is now."""

    monitor_interval = 0            # no thread beside the training: rewards may fork

    def __init__(self, stream, label: str, done: int, total: int):
        self.stream = stream
        self.label = label
        self.parts = []
        self.leave_out = []
        super().__init__(total=total, initial=done, file=stream, leave=False, nrows=20, delay=0)

    def set(self, done: int, parts: list[str], leave_out: list[str]) -> None:
        self.n = done
        self.parts = parts
        self.leave_out = leave_out

    def __str__(self):
        columns = max(1, columns_of(self.stream) - TYPED)
        head = counted(self.label, self.n, self.total, columns - 4)
        rest = fitting(self.parts, self.leave_out, columns - BAR - disp_len(head))
        elapsed = 0                 # we show no times or rates of tqdm: its clock may run backwards
        return self.format_meter(self.n, self.total, elapsed, columns, ascii=self.ascii, colour=self.colour,
                                 bar_format="{head} |{bar}|{rest}", head=head, rest=rest)

    @staticmethod
    def status_printer(file):
        """A function that overwrites the line. It clears to the end of the line; tqdm would write as many
        spaces as there were characters, which are too many after the window was made narrower."""
        def show(text):
            file.write(f"\r{text}\033[K")
            file.flush()
        return show


# tqdm's own lock is shared with forked processes: a child killed while it holds that lock would stop the run
Bar.set_lock(threading.RLock())


class Console:
    """Writes lines and bars to `stream`; writes nothing if that is None. A quiet one writes what is said, no
    bars and no lines of updates, and once how long the run will take."""

    def __init__(self, stream, quiet: bool = False):
        self.stream = stream
        self.quiet = quiet
        self.terminal = can_redraw(stream) and not quiet
        self.bar = None              # the run's bar
        self.shown = []              # the values of the last line, kept in that bar
        self.counter = None          # a second bar, of what is being counted
        self.drawn = -math.inf       # when the counter was last drawn
        CONSOLES.add(self)

    def say(self, text: str) -> None:
        """Write one or more lines above the bars."""
        if self.stream is not None:
            with self.writing():
                Bar.write(text, file=self.stream)
                self.stream.flush()

    def block(self, lines: list[str]) -> None:
        """Write lines, each of which fits a terminal."""
        columns = columns_of(self.stream) if self.terminal else math.inf
        self.say("\n".join(cut(line, columns) for line in lines))

    def line(self, label: str, done: int, total: int, parts: list[str], leave_out: list[str]) -> None:
        columns = columns_of(self.stream) if self.terminal else math.inf
        head = counted(label, done, total, columns)
        rest = fitting(parts, leave_out, columns - disp_len(head))
        self.say(cut(head + rest, columns))

    def start(self, done: int, total: int) -> None:
        """Show the bar of a run that has made `done` of its `total` updates."""
        self.close()
        if self.terminal:
            with self.writing():
                self.bar = Bar(self.stream, "step", done, total)

    def progress(self, done: int, total: int, rate: str, values: dict, since: float, first: int, line: bool):
        """Move the run's bar to update `done` of `total`, of which `first` were made before the time `since`;
        with `line` write `step 7/24  1:51 left  2133 tokens/s  loss 0.4231  …`. The bar keeps the last line's
        values. A narrow window keeps the last value in the line, and the time left in the bar."""
        left = time_left(done - first, total - done, since)
        if self.quiet:
            if done - first == MEASURED and done < total:
                self.say(f"step {done}/{total}  {left}")
            return
        if line:
            self.shown = [f"{name} {value:.4g}" for name, value in values.items()]
        parts = [left, rate, *self.shown]
        with self.writing():
            if self.bar:
                self.bar.set(done, parts, [rate, *self.shown, left])
            if line:
                self.line("step", done, total, parts, [rate, left, *self.shown])
            elif self.bar:
                self.bar.refresh()

    def count(self, label: str, done: int, total: int, unit: str, since: float, first: int = 0, line=False):
        """Show that `done` of `total` things are done: on a terminal in a bar, which ends with the last one;
        elsewhere, with `line`, in a line. `first` of them were done before the time `since`."""
        left = time_left(done - first, total - done, since)
        rate = f"{per_second(done - first, since):.1f}{unit}"
        if self.terminal:
            self.move_counter(label, done, total, [left, rate], [rate, left])
        elif line and not self.quiet:
            self.line(label, done, total, [left, rate], [])

    def move_counter(self, label: str, done: int, total: int, parts: list[str], leave_out: list[str]):
        with self.writing():
            other_label = self.counter and label != self.counter.label
            if done >= total or other_label:
                self.close_counter()
            now = time.perf_counter()
            if done < total and now - self.drawn >= PAUSE:
                self.counter = self.counter or Bar(self.stream, label, done, total)
                self.counter.set(done, parts, leave_out)
                self.counter.refresh()
                self.drawn = now

    def close_counter(self) -> None:
        if self.counter:
            self.counter.close()
            self.counter = None
            self.drawn = -math.inf

    @contextlib.contextmanager
    def cleared(self):
        """Take the bars off the terminal for this block, so that what it prints has lines of its own."""
        with self.writing():
            for bar in filter(None, [self.counter, self.bar]):
                bar.clear()
        yield
        with self.writing():
            for bar in filter(None, [self.bar, self.counter]):
                bar.refresh()

    def close(self) -> None:
        """Remove the bars; what is printed next has a line of its own."""
        with self.writing():
            self.close_counter()
            if self.bar:
                self.bar.close()
                self.bar = None

    @contextlib.contextmanager
    def writing(self):
        """Give up a stream that cannot be written to: its terminal or reader is gone, or its disk is full."""
        try:
            yield
        except (OSError, ValueError):
            stream = self.stream
            self.stream = None
            self.terminal = False
            for bar in filter(None, [self.counter, self.bar]):
                bar.disable = True
            self.bar = None
            self.counter = None
            # text that the stream still holds, or that others write to it, must not fail either
            with contextlib.suppress(OSError, ValueError, AttributeError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())


def close() -> None:
    """Remove all bars of this process, before it ends."""
    for console in list(CONSOLES):
        console.close()
