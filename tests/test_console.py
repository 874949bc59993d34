"""What a run shows: on a terminal lines that stay and bars that do not, none wider than the window; elsewhere
plain lines."""
import contextlib
import fcntl
import io
import json
import os
import pty
import re
import signal
import struct
import sys
import termios
import threading
import time
import unicodedata

import pytest
import robust_helpers as child
from helpers import prompt_rows, tiny_model, write_jsonl

import evaluate
from engine import console
from engine.console import Console, clock, counted, cut, fitting
from engine.opening import short
from rewards.guard import _time_limit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs pseudo-terminals")


# ---- a terminal

class Screen:
    """The rows of a terminal, those scrolled away included, after a text was written to it. `wrapped`: the
    rows that went on in the next one because the window was too narrow for them."""

    def __init__(self, columns, text):
        self.columns, self.rows, self.row, self.column, self.wrapped = columns, [""], 0, 0, set()
        for part in re.findall(r"\x1b\[[AK]|[^\x1b]", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.down()
            elif part == "\x1b[A":
                self.row -= 1
                assert self.row >= 0
            elif part == "\x1b[K":
                self.rows[self.row] = self.rows[self.row][:self.column]
            else:
                assert unicodedata.category(part) != "Cc", text
                self.put(part)

    def down(self):
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append("")

    def put(self, character):
        if self.column == self.columns:
            self.wrapped.add(self.row)
            self.down()
            self.column = 0
        line = self.rows[self.row].ljust(self.column)
        self.rows[self.row] = line[:self.column] + character + line[self.column + 1:]
        self.column += 1

    def lines(self):
        """The rows without those that are empty, wrapped ones joined."""
        joined = "".join(row if i in self.wrapped else row.rstrip() + "\n" for i, row in enumerate(self.rows))
        return [line for line in joined.splitlines() if line]


def resize(descriptor, columns):
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))


@contextlib.contextmanager
def terminal(columns):
    """(the name of a terminal with that many columns, what was written to it so far: a function)."""
    master, slave = pty.openpty()
    resize(slave, columns)
    read, end = bytearray(), b"\x05"

    def pump():
        with contextlib.suppress(OSError):      # EIO: nobody has it open any more
            while data := os.read(master, 65536):
                read.extend(data)

    def text():
        os.write(slave, end)
        while not read.endswith(end):
            time.sleep(0.001)
        del read[-1:]
        return read.decode()

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    try:
        yield os.ttyname(slave), text
    finally:
        os.close(slave)
        thread.join(5)
        os.close(master)


@pytest.fixture
def stream(monkeypatch):
    """stream(columns) -> (a text stream on a terminal, what was written to it so far: a function)."""
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.ExitStack() as stack:
        def stream(columns):
            name, text = stack.enter_context(terminal(columns))
            return stack.enter_context(open(name, "w", encoding="utf-8")), text
        yield stream
        console.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


# ---- what is patched in the process of train.py

def to_terminal(name, patch=None, *arguments):
    os.environ["TERM"] = "xterm"
    os.dup2(os.open(name, os.O_RDWR | os.O_NOCTTY), 2)
    if patch:
        patch(*arguments)


def train(directory, columns, *words, patch=None, arguments=()):
    """-> (exit code, what was written to the terminal)."""
    with terminal(columns) as (name, text):
        result = child.train(directory, *words, patch=to_terminal, arguments=(name, patch, *arguments))
        return result.code, text()


def losing(kind):
    """Standard error is lost in the second update: its terminal is closed, its reader gone, its disk full; or
    was never there."""
    from engine.loop import Engine
    os.environ["TERM"] = "xterm"
    if kind == "none":
        sys.stderr = None
        return
    if kind == "full":
        reader, writer = os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = pty.openpty() if kind == "terminal" else os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    child.before(Engine, "clip_gradients", lambda: os.close(reader), lambda engine: engine.step.index == 2)


def broken_clock():
    """Of the two clocks, one runs backwards and one stands still."""
    import itertools
    seconds = itertools.count(2e9, -1)
    time.time = lambda: next(seconds)
    time.perf_counter = lambda: 5.0


def slow_evaluations(algorithm):
    """An update takes 2 seconds of the clock, an evaluation 1000, and nothing else takes time."""
    from engine.loop import Engine
    from engine.rollouts import Rollouts
    now = [5.0]
    time.perf_counter = lambda: now[0]

    def later(seconds):
        now[0] += seconds

    child.before(Engine, "clip_gradients", lambda: later(2), lambda engine: engine.step.index > 0)
    if algorithm == "dpo":
        child.before(Engine, "batches", lambda: later(1000), lambda *arguments: arguments[2:])
    else:
        child.before(Rollouts, "sample_held_out", lambda: later(1000))


PRINTING = """
def reward(prompts, completions, **columns):
    print("the reward says hello", file=__import__("sys").stderr)
    return [len(completion) % 7 / 7 for completion in completions]
"""


def trained_rows(directory):
    rows = [json.loads(line) for line in (directory / "run" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


# ---- numbers and their room

@pytest.mark.parametrize("seconds, text", [
    (-119, "0:00"), (0, "0:00"), (12.9, "0:12"), (59.99, "0:59"), (60, "1:00"), (3599, "59:59"),
    (3600, "1:00:00"), (5025, "1:23:45"), (86399, "23:59:59"), (86400, "1 d 0 h"),
    (6999 * 60 + 55, "4 d 20 h"), (4e7, "462 d 23 h")])
def test_time_left(seconds, text):
    assert clock(seconds) == text


def test_rates_and_times_under_a_clock_that_stands_still_or_runs_backwards(monkeypatch):
    now = time.perf_counter()
    for moved in (0.0, -120.0):
        monkeypatch.setattr(time, "perf_counter", lambda moved=moved: now + moved)
        assert console.per_second(1283, now) == 0 and console.time_left(3, 5, now) == "0:00 left"
    monkeypatch.setattr(time, "perf_counter", lambda: now + 30)
    assert console.per_second(60, now) == 2 and console.time_left(3, 5, now) == "0:50 left"
    assert console.time_left(0, 5, now) == "2:30 left"      # nothing is done yet: as if one were


def width(text):
    return sum(2 if unicodedata.east_asian_width(character) in "FW" else 1 for character in text)


def test_parts_are_left_out_whole_where_there_is_no_room():
    parts = ["4 d 20 h left", "2133 tokens/s", "loss 0.0005404", "rewards/准确率 0.8125"]
    order = [parts[1], parts[0], *parts[2:]]
    everything = sum(2 + width(part) for part in parts)
    for columns in range(everything + 5):
        shown = fitting(parts, order, columns)
        kept = shown.split("  ")[1:]
        assert kept == [part for part in parts if part in order[len(parts) - len(kept):]]
        assert width(shown) <= columns
        if len(kept) < len(parts):      # the one that was left out last would not have fitted
            assert columns < width(shown) + 2 + width(order[len(parts) - len(kept) - 1])


@pytest.mark.parametrize("text", ["rollout 123: completions 12/256", "数学题：completions 12/256"])
def test_a_text_is_cut_to_the_window_with_dots(text):
    for columns in range(3, 40):
        shown = cut(text, columns)
        assert width(shown) <= columns
        assert shown == text or (shown.endswith("...") and text.startswith(shown[:-3]))
        assert shown == text or width(shown) >= columns - 1
        if columns >= 10:
            head = counted(text, 12, 256, columns)
            assert head == cut(text, columns - 7) + " 12/256" and width(head) <= columns


# ---- lines and bars

def test_redirected_there_are_plain_lines_only():
    stream = io.StringIO()
    plain, since = Console(stream), time.perf_counter() - 1
    plain.start(0, 4)
    plain.count("reference log-probs", 1, 4, " rows/s", since)
    plain.count("reference log-probs", 4, 4, " rows/s", since, line=True)
    plain.say("a notice")
    plain.progress(1, 4, "7 tokens/s", {"loss": 0.69314718, "reward": 1.0}, since, 0, line=True)
    plain.progress(2, 4, "7 tokens/s", {}, since, 0, line=False)
    with plain.cleared():
        stream.write("own\n")
    plain.close()
    assert re.sub(r"\d\.\d rows", "4.0 rows", stream.getvalue()).splitlines() == [
        "reference log-probs 4/4  0:00 left  4.0 rows/s", "a notice",
        "step 1/4  0:03 left  7 tokens/s  loss 0.6931  reward 1", "own"]


@pytest.mark.parametrize("term, columns, redrawn", [
    ("xterm", 80, True), ("", 80, True), ("dumb", 80, False), ("xterm", 0, True)])
def test_terminals_that_know_no_width_or_cannot_move(term, columns, redrawn, stream, monkeypatch):
    file, text = stream(columns)
    monkeypatch.setenv("TERM", term)
    shown = Console(file)
    shown.start(0, 9)
    shown.progress(1, 9, "7 tokens/s", {"loss": 0.5}, time.perf_counter() - 1, 0, line=True)
    shown.close()
    assert shown.terminal == redrawn == ("\x1b" in text())
    assert Screen(80, text()).lines() == ["step 1/9  0:08 left  7 tokens/s  loss 0.5"]


def test_the_bars(stream):
    """The run's stays below the lines, with the last values; a counter's below it, until it is done."""
    file, text = stream(60)
    shown, since = Console(file), time.perf_counter() - 1
    shown.start(3, 9)
    assert re.fullmatch(r"step 3/9 \|█+.? +\|", Screen(60, text()).lines()[-1])
    shown.count("rollout 4: completions", 2, 8, "/s", since)
    bars = Screen(60, text()).lines()[-2:]
    assert bars[0].startswith("step 3/9 |")
    assert re.fullmatch(r"rollout 4: completions 2/8 \|█+.? +\|  0:0\d left  [12].\d/s", bars[1])
    shown.count("rollout 4: completions", 8, 8, "/s", since)
    shown.progress(4, 9, "7 tokens/s", {"loss": 0.5, "reward": 0.25}, since, 3, line=True)
    shown.progress(5, 9, "8 tokens/s", {}, since, 3, line=False)
    line, bar = Screen(60, text()).lines()
    assert line == "step 4/9  0:05 left  7 tokens/s  loss 0.5  reward 0.25"
    assert re.fullmatch(r"step 5/9 \|█+.? +\|  0:02 left  loss 0.5  reward 0.25", bar)
    assert len(bar + "^C^C") == 59
    with shown.cleared():
        assert Screen(60, text()).lines() == [line]
        file.write("own\n")
        file.flush()
    assert Screen(60, text()).lines() == [line, "own", bar]
    shown.close()
    assert Screen(60, text()).lines() == [line, "own"] and not Screen(60, text()).wrapped


def test_a_window_that_changes_its_size(stream):
    file, text = stream(100)
    shown = Console(file)
    shown.start(0, 9)
    for done, columns in enumerate((100, 30, 12, 160, 100), start=1):
        before = len(text())
        resize(file, columns)
        values = {"loss": 0.5, "reward": 0.25}
        shown.progress(done, 9, "7 tokens/s", values, time.perf_counter(), 0, line=True)
        screen = Screen(columns, text()[before:])
        assert not screen.wrapped and len(screen.lines()[-1] + "^C^C") == columns - 1, screen.rows
        assert screen.lines()[-2].startswith(f"step {done}/9")


def test_a_forked_process_that_dies_in_a_drawing_does_not_stop_the_run(stream):
    file, text = stream(80)
    before = threading.enumerate()
    shown = Console(file)
    shown.start(0, 9)
    # no thread of tqdm's, which a fork would not survive
    assert set(threading.enumerate()) <= set(before)
    lock = console.Bar.get_lock()
    for forked_in, action in ((contextlib.nullcontext(), lock.acquire), (lock, lock.acquire),
                              (lock, lambda: shown.say("from a forked process"))):
        with forked_in:
            process = os.fork()
            if not process:
                action()
                os._exit(7)
        deadline = time.monotonic() + 10
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline or os.kill(process, signal.SIGKILL), "it waits for a lock"
            time.sleep(0.01)
        try:
            with _time_limit(10, "the console"):
                shown.progress(1, 9, "7 tokens/s", {"loss": 0.5}, time.perf_counter(), 0, line=True)
        except BaseException as late:      # with a lock that can be taken, so that the test can end
            console.Bar.set_lock(threading.RLock())
            raise AssertionError("the run waits for a lock") from late
    shown.close()
    line = "step 1/9  0:00 left  7 tokens/s  loss 0.5"
    assert Screen(80, text()).lines() == [line, line, "from a forked process", line]


def test_what_others_write_to_a_lost_stream_does_not_fail_either():
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        shown = Console(stream)
        shown.say("a")
        assert os.read(reader, 10) == b"a\n"
        os.close(reader)
        shown.say("b")
        assert shown.stream is None
        print("a library", file=stream, flush=True)
        shown.say("c")


# ---- runs

@pytest.mark.parametrize("columns", [80, 40])
def test_every_update_of_an_online_run_stays_on_the_terminal(columns, model, tmp_path):
    (tmp_path / "rewards.py").write_text(PRINTING)
    child.project(tmp_path, "grpo", model, max_steps=6, reward="rewards.py:reward", rollout_batch_size=3)
    code, text = train(tmp_path, columns)
    screen = Screen(columns, text)
    lines = screen.lines()
    assert code == 0
    assert re.search(r"rollout 1: comp\S* 3/16 \|", text)
    assert re.search(r"held-out prompts: comp\S* 3/4 \|", text)
    updates = [line for line in lines if line.startswith("step ")]
    for row, line in zip(trained_rows(tmp_path), updates, strict=True):
        rest = r"  \d:\d\d left  \d+ tokens/s" if columns == 80 else r".*"
        values = rf"  (loss {row['loss']:.4g}  )?reward {row['reward']:.4g}"
        assert re.fullmatch(rf"step {row['step']}/6{rest}{values}", line)
    others = [line for line in lines if not line.startswith("step ")]
    assert others.count("the reward says hello") == 5      # two rollouts and three evaluations
    assert not [line for line in others if " |" in line or "completions" in line]
    assert all(len(line) < columns for line in updates)


def test_an_offline_run_stopped_and_continued_on_a_terminal(model, tmp_path):
    child.project(tmp_path, "dpo", model, log_every=2, max_steps=5)
    code, text = train(tmp_path, 80, patch=child.signal_in_update, arguments=(signal.SIGTERM, 3))
    *lines, last = Screen(80, text).lines()
    command = f"python {child.ROOT}/train.py config.yml"
    assert code == 143 and last == f"stopped by SIGTERM; continue with: {command}"
    assert [line.split("  ")[0] for line in lines if line[:5] == "step "] == ["step 1/5", "step 2/5"]
    assert "reference log-probs 4/14 |" in text and "step 3/5 |" in text
    assert not [line for line in lines if " |" in line or line.startswith("reference log-probs ")]
    code, text = train(tmp_path, 80)
    lines = Screen(80, text).lines()
    assert code == 0 and "step 3/5 |" in text and "step 0/5" not in text
    assert [line.split("  ")[0] for line in lines if line[:5] == "step "] == ["step 4/5", "step 5/5"]
    assert lines[-1].startswith("held-out rows at step 5: ")


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_a_quiet_run_shows_notices_and_the_summary(algorithm, model, tmp_path):
    """On a terminal there is no bar, and one line says how long it will take; events.log and metrics.jsonl
    are complete. A stop is told as ever."""
    child.project(tmp_path, algorithm, model, max_steps=5, quiet="true")
    code, text = train(tmp_path, 80, patch=child.signal_in_update, arguments=(signal.SIGTERM, 4))
    assert code == 143 and "|" not in text.replace("<|", "").replace("|>", "") and "\x1b" not in text
    lines = Screen(80, text).lines()
    assert [line for line in lines if line.startswith("step ")] == [
        line for line in lines if re.fullmatch(r"step 3/5  \d:\d\d left", line)]
    assert "step 3/5" in text and "reference log-probs" not in text and "held-out" not in text
    assert "run run" in lines and f"{algorithm} trains all " in text
    assert lines[-1].startswith("stopped by SIGTERM; continue with: ")
    code, text = train(tmp_path, 80)
    assert code == 0 and "step 5/5" not in text
    assert "(4 held out): 5 updates, 4 of them made, in fp32" in text.replace("\r\n", "")
    events = (tmp_path / "run" / "events.log").read_text()
    assert f"held-out {'rows' if algorithm == 'dpo' else 'prompts'} at step 0: " in events
    assert [row["step"] for row in trained_rows(tmp_path)] == [1, 2, 3, 4, 5]
    assert "model    run/final" in (tmp_path / "stdout.txt").read_text()


def test_the_sentence_with_which_a_run_begins(model, tmp_path):
    """Its numbers by hand: two layers of width 32, a head of its own."""
    child.project(tmp_path, "sft", model, lora_r=2, lora_targets="q_proj", max_length=500)
    layer = 32 * 32 + 32 + 2 * (32 * 16 + 16) + 32 * 32 + 3 * 32 * 64 + 2 * 32
    weights = 2 * 259 * 32 + 2 * layer + 32
    adapter = 2 * 2 * (32 + 32)
    said = child.train(tmp_path, "max_steps=1").err
    assert re.search(rf"sft trains {adapter} of {(weights + adapter) / 1000:.3g}K parameters of {model} on "
                     r"\d+ examples \(\d+ held out\): 1 update, in fp32 on the CPU with 1 thread\n", said)


@pytest.mark.parametrize("count, text", [
    (512, "512"), (822_016, "822K"), (999_600, "1000K"), (134_515_008, "135M"), (7_615_616_512, "7.62B"),
    (1_000, "1K"), (72_706_203_648, "72.7B")])
def test_numbers_of_parameters(count, text):
    assert short(count) == text


def test_an_error_starts_on_a_line_of_its_own(model, tmp_path):
    child.project(tmp_path, "sft", model)
    code, text = train(tmp_path, 80, patch=child.infinite_loss, arguments=(2,))
    lines = Screen(80, text).lines()
    assert code == 1 and lines[-1].startswith("error: loss nan") and lines[-2].startswith("step 1/6  ")
    assert not [line for line in lines if " |" in line]


def test_a_second_signal_leaves_no_bar(model, tmp_path):
    child.project(tmp_path, "dpo", model)
    code, text = train(tmp_path, 80, patch=child.signal_in_update, arguments=(signal.SIGINT, 2, 2))
    assert code == 130 and Screen(80, text).lines()[-1].startswith("step 1/6  ")


@pytest.mark.parametrize("kind", ["terminal", "pipe", "full", "none"])
def test_a_console_that_is_lost_stops_no_run(kind, model, tmp_path):
    child.project(tmp_path, "dpo", model, max_steps=4)
    result = child.train(tmp_path, patch=losing, arguments=(kind,))
    assert result.code == 0 and (tmp_path / "run" / "final").is_dir()
    assert [row["step"] for row in trained_rows(tmp_path)] == [1, 2, 3, 4]
    assert "held-out rows: step 0 -> step 4" in result.out and "held-out rows at step 4" not in result.out
    assert "held-out rows at step 4" in (tmp_path / "run" / "events.log").read_text()


@pytest.mark.parametrize("algorithm", ["dpo", "ppo"])
def test_a_broken_clock_stops_no_run(algorithm, model, tmp_path):
    child.project(tmp_path, algorithm, model, max_steps=4)
    result = child.train(tmp_path, patch=broken_clock)
    assert result.code == 0, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("step ")]
    assert len(lines) == 4 and all("  0:00 left  0 tokens/s  loss " in line for line in lines)
    assert all(row["tokens_per_second"] == 0 for row in trained_rows(tmp_path))


@pytest.mark.parametrize("algorithm", ["dpo", "grpo", "distill"])
def test_evaluations_are_no_training(algorithm, model, tmp_path):
    """Each update takes 2 seconds, so that the mean of their tokens per second is that of the run."""
    child.project(tmp_path, algorithm, model, max_steps=4, eval_every=4)
    result = child.train(tmp_path, patch=slow_evaluations, arguments=(algorithm,))
    assert result.code == 0, result.err
    lines = re.findall(r"^step ./4  (\S+) left  (\d+) tokens/s", result.err, re.MULTILINE)
    assert [left for left, _ in lines] == ["0:06", "0:04", "0:02", "0:00"]
    speeds = [row["tokens_per_second"] for row in trained_rows(tmp_path)]
    assert int(lines[-1][1]) == pytest.approx(sum(speeds) / 4, abs=1) and min(speeds) > 10


def test_rows_of_an_evaluation(model, stream, tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text(PRINTING)
    data = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(7))
    file, text = stream(80)
    monkeypatch.setattr(sys, "stderr", file)
    evaluate.main([model, f"data={data}", f"reward={tmp_path}/rewards.py:reward", f"output={tmp_path}/out",
                   "max_completion_length=10", "rollout_batch_size=3"])
    lines = Screen(80, text()).lines()
    assert re.search(r"\rrow 3/7 \|█+.? *\|  0:\d\d left  \d+\.\d rows/s\x1b", text())
    assert lines[-3:] == ["the reward says hello"] * 3
    assert not [line for line in lines if line.startswith("row ")]
