"""Rewards that start processes, end or hang the run, or change the process they are called in."""
import multiprocessing
import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import robust_helpers as child
import torch
from helpers import assert_same_weights, final_weights, metrics, tiny_model

from data.errors import RunError, UserError
from data.pack import Example
from rewards import functions, guard
from rewards.functions import Reward, load_reward, score

FAST = dict(num_iterations=1, num_mini_batches=1, max_completion_length=4, batch_size=2, max_steps=2,
            save_every=1, eval_data="null")
REWARD = "def reward(prompts, completions, **columns):\n    return [len(text) / 10 for text in completions]\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def project(model, tmp_path):
    """project(code, key=value, ...) -> the directory of a grpo run whose reward is that code's `reward`."""
    def project(code, name="project", **values):
        values = FAST | {"reward": "mine.py:reward"} | values
        directory = child.project(tmp_path / name, "grpo", model, **values)
        (directory / "mine.py").write_text(textwrap.dedent(code))
        return directory
    return project


@pytest.fixture
def load(tmp_path):
    """load(code) -> the reward of that file."""
    def load(code, name="mine.py"):
        (tmp_path / name).write_text(textwrap.dedent(code))
        return load_reward(f"{tmp_path / name}:reward")[0]
    return load


def called(function, timeout=60.0):
    return score(Reward("mine", 1.0, function), ["p", "q"], ["one", "two"], {}, timeout)


def refused(kind, function, *arguments):
    with pytest.raises(kind) as caught:
        function(*arguments)
    message = str(caught.value)
    assert type(caught.value) is kind and message.isprintable() and "; fix: " in message
    return message


def error_of(result):
    """The one line with which a run ended."""
    assert "Traceback" not in result.err, result.err
    found = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and result.err.endswith(found[0] + "\n"), result.err
    return found[0]


# ---- processes ----

POOLS = """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    fork = multiprocessing.get_context("fork")

    def work(text):
        return len(text) / 10

    def reward(prompts, completions, **columns):
        for _ in range(2):
            with fork.Pool(2) as pool:
                values = pool.map(work, completions)
        with ProcessPoolExecutor(2, fork) as pool:
            assert list(pool.map(work, completions)) == values
        sleeper = fork.Process(target=multiprocessing.Event().wait)
        sleeper.start()
        sleeper.terminate()
        sleeper.join(20)
        assert sleeper.exitcode == -15
        return values
"""


def test_processes_in_a_reward_end(project):
    result = child.train(project(POOLS, max_steps=4, save_every="null"))
    assert result.code == 0 and "step 4/4" in result.err, result.err


def forked(function):
    """What waitpid says of a child that does it and then exits with 7."""
    process = os.fork()
    if not process:
        try:
            function()
        finally:
            os._exit(7)
    return process, lambda: os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@pytest.fixture
def handlers():
    """Signals that the run handles, as the engine does; after the test as before."""
    before = {number: guard.handle(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGALRM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_reaches_a_child_however_young_it_is(handlers):
    for i in range(24):
        process, code = forked(lambda: time.sleep(20))
        time.sleep(0.0005 * (i % 4))
        os.kill(process, signal.SIGTERM)
        assert code() == -signal.SIGTERM
    assert forked(lambda: os.kill(os.getpid(), signal.SIGALRM))[1]() == -signal.SIGALRM
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_handlers_of_others_are_left_alone(handlers):
    before = signal.signal(signal.SIGTERM, lambda *_: os._exit(3))      # not the run's
    try:
        assert forked(lambda: os.kill(os.getpid(), signal.SIGTERM))[1]() == 3
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_a_killed_run_leaves_no_processes(project):
    directory = project("""
        import multiprocessing, os, signal, time

        def reward(prompts, completions, **columns):
            pool = multiprocessing.get_context("fork").Pool(2)
            pool.apply(os.getpid)
            pool.map_async(time.sleep, [99, 99])
            time.sleep(0.3)
            with open("pids", "w") as file:
                file.write(" ".join(str(process.pid) for process in pool._pool))
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    assert child.train(directory).code == -signal.SIGKILL
    processes = list(map(int, (directory / "pids").read_text().split()))
    until = time.monotonic() + 20
    while (alive := [process for process in processes if is_alive(process)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(processes) == 2 and not alive


def is_alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


SIGNALLED = """
    import multiprocessing, os, signal, time

    def work(text):
        time.sleep(0.2)
        return len(text) / 10

    def reward(prompts, completions, **columns):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.apply(os.getpid)
            values = pool.map_async(work, completions)
            if os.path.exists("signal") and "step 1/" in open("stderr.txt").read():
                time.sleep(0.1)
                os.remove("signal")
                for process in [*pool._pool, multiprocessing.current_process()]:
                    os.kill(process.pid, signal.{})
            return values.get()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_to_the_reward_s_processes_too(name, project):
    """A Ctrl-C at a terminal reaches all of them, and so does the SIGTERM of a cluster."""
    directory = project(SIGNALLED.format(name), save_every="null")
    (directory / "signal").touch()
    started = time.monotonic()
    result = child.train(directory)
    number = getattr(signal, name)
    assert result.code == 128 + number and f"stopped by {name}; continue with" in result.err, result.err
    assert "Traceback" not in result.err and "step 2" not in result.err and time.monotonic() - started < 50
    assert os.listdir(directory / "run" / "checkpoints") == ["step-000001"]
    assert child.train(directory).code == 0
    undisturbed = project(REWARD, "undisturbed", save_every="null")
    assert child.train(undisturbed).code == 0
    assert metrics(directory / "run") == metrics(undisturbed / "run")
    assert_same_weights(final_weights(directory / "run"), final_weights(undisturbed / "run"))


def test_a_child_does_not_become_a_second_run(load):
    ends = {"sys.exit(0)": 0, "sys.exit(3)": 1, "return []": 1, "raise ValueError": 1, "os._exit(5)": 5}
    for end, code in ends.items():
        reward = load(f"""
            import os, sys
            def reward(prompts, completions, **columns):
                process = os.fork()
                if not process:
                    {end}
                code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                return [code] * len(completions)
        """, f"forks_{code}_{len(end)}.py")
        process, waited = os.getpid(), score(reward, ["p"], ["c"], {})
        assert os.getpid() == process and waited == [float(code)]


# ---- it ends the run ----

ENDS = {"exit(0)": "SystemExit: 0", "sys.exit()": "SystemExit",
        "os._exit(0)": "SystemExit: os._exit", "os._exit(status=1)": "os._exit",
        "os.execvp('true', ['true'])": "SystemExit: os.execv", "raise KeyboardInterrupt": "KeyboardInterrupt",
        "raise type('Own', (BaseException,), {})('it')": "Own: it"}


@pytest.mark.parametrize("end", ENDS)
def test_what_would_end_the_run_is_an_error(end, load):
    message = refused(UserError, load, f"import os, sys\n{end}\n{REWARD}", "at_import.py")
    assert "at_import.py in reward cannot be loaded (" in message and ENDS[end] in message
    reward = load(f"import os, sys\ndef reward(prompts, completions, **columns):\n    {end}\n", "in_call.py")
    message = refused(RunError, score, reward, ["p", "q"], ["one", "two"], {})
    assert message.startswith("reward reward raised ") and ENDS[end] in message
    assert "completion 'one'" in message
    assert os._exit is guard.leave


@pytest.mark.parametrize("code, exit_code, says", [
    (f"import os\nos._exit(0)\n{REWARD}", 2, "mine.py in reward cannot be loaded (SystemExit: os._exit)"),
    ("def reward(prompts, completions, **columns):\n    exit(0)", 1,
     "reward reward raised SystemExit: 0, prompt")])
def test_a_run_does_not_end_well_untrained(code, exit_code, says, project):
    directory = project(code)
    result = child.train(directory)
    assert result.code == exit_code and error_of(result).startswith(f"error: {says}")
    assert not (directory / "run" / "final").exists()


def test_ctrl_c_is_no_fault_of_the_reward():
    def function(prompts, completions, **columns):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            called(function)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


# ---- it does not end ----

def test_an_import_that_hangs(load, monkeypatch):
    monkeypatch.setattr(functions, "IMPORT_SECONDS", 0.2)
    message = refused(UserError, load, f"while True:\n    pass\n{REWARD}", "hangs.py")
    assert "hangs.py in reward cannot be loaded (its import took longer than 0.2 s); fix: correct" in message


def test_a_swallowed_time_limit_is_still_one():
    """Else `except:` around the check of one completion would silently give it a wrong reward."""
    def function(prompts, completions, **columns):
        try:
            time.sleep(9)
        except:  # noqa: E722
            return [0.0, 0.0]

    def another(prompts, completions, **columns):
        try:
            time.sleep(9)
        except BaseException as error:
            raise ValueError from error

    for swallows in (function, another):
        assert "took longer than 0.1 s for 2 completions" in refused(RunError, called, swallows, 0.1)


def short_limits():
    guard.ALARMS = 1


def test_a_reward_that_swallows_everything(project):
    directory = project("""
        import os, time

        def reward(prompts, completions, **columns):
            print("called", flush=True)
            while os.path.exists("run/checkpoints"):
                try:
                    time.sleep(1)
                except BaseException:
                    pass
            return [len(text) / 10 for text in completions]
    """, reward_timeout=0.5)
    result = child.train(directory, patch=short_limits)
    assert result.code == 1 and result.out == "called\n" * 2
    assert error_of(result).startswith("error: reward reward took longer than 0.5 s and swallows the")
    assert os.listdir(directory / "run" / "checkpoints") == ["step-000001"]


# ---- it changes the process ----

CHANGES = """
    import os, signal, sys, tempfile, torch

    def change():
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)                                   # which is gone afterwards
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(torch.get_num_threads() + 1)
        torch.set_float32_matmul_precision("medium")
        torch.use_deterministic_algorithms(True)
        torch.manual_seed(1)

    change()

    def reward(prompts, completions, **columns):
        change()
        return [len(text) / 10 for text in completions]
"""


def state():
    signals = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    modes = torch.is_grad_enabled(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    precisions = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    defaults = torch.get_default_dtype(), torch.get_default_device(), *precisions
    return os.getcwd(), sys.stdout, sys.stderr, signals, modes, defaults


def test_the_process_is_as_before(load):
    before = state()
    reward = load(CHANGES)
    assert state() == before
    assert score(reward, ["p"], ["long"], {}) == [0.4] and state() == before
    errors = {"raised ZeroDivisionError": lambda: 1 / 0, "took longer than 0.1 s": lambda: time.sleep(9)}
    for says, last in errors.items():
        def fails(prompts, completions, last=last, **columns):
            os.chdir("/")
            last()

        assert says in refused(RunError, called, fails, 0.1) and state() == before


def test_a_run_is_that_of_a_reward_that_changes_nothing(project):
    runs = [project(code, name) for name, code in (("plain", REWARD), ("changes", CHANGES))]
    results = [child.train(directory) for directory in runs]
    assert [result.code for result in results] == [0, 0], results[1].err
    assert "step 2/2" in results[1].err
    plain, changed = (directory / "run" for directory in runs)
    assert metrics(plain) == metrics(changed)
    assert_same_weights(final_weights(plain), final_weights(changed))


# ---- what it says, and what lies beside it ----

def test_its_texts_reach_no_terminal_raw(load):
    text = "\x1b[31mred\x07\x9b2J\u202eback\ud800"
    shown = "\\x1b[31mred\\x07\\x9b2J\\u202eback\\ud800"

    def raises(prompts, completions, **columns):
        raise type("Odd\x1b", (Exception,), {})(text)

    assert f"raised Odd\\x1b: {shown}, prompt" in refused(RunError, called, raises)
    assert shown in refused(UserError, load, f"raise ValueError({text!r})", "raises.py")
    value = type("Value", (), {"__repr__": lambda self: text})()
    assert f"returned {shown}" in refused(RunError, called, lambda **_: [value, 1.0])
    methods = dict.fromkeys(("__str__", "__repr__", "__float__"), lambda self: 1 / 0)
    broken = type("Broken", (Exception,), methods)

    def raises_broken(prompts, completions, **columns):
        raise broken

    assert "raised Broken: (a Broken), prompt" in refused(RunError, called, raises_broken)
    assert "returned (a Broken)" in refused(RunError, called, lambda **_: [broken(), 1.0])
    without_gold = refused(UserError, lambda: functions.gsm8k(["p"], ["1"], **{text: ["1"]}))
    assert f"columns found: {shown}; fix" in without_gold
    example = Example(np.array([1]), [], "x.jsonl:1", {"prompt": "q", "columns": {"answer": "\x1bno\ud800"}})
    wrong_gold = refused(UserError, functions.check_gold, load_reward("gsm8k"), [example])
    assert "x.jsonl:1 ('\\x1bno\\ud800')" in wrong_gold


NEIGHBOUR = """
    import multiprocessing
    from neighbour_one import ten

    def work(text):
        from neighbour_two import one
        return len(text) * one / ten

    def reward(prompts, completions, **columns):
        with multiprocessing.get_context("{}").Pool(1) as pool:
            return pool.map(work, completions)
"""


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_modules_beside_it_and_processes_of_every_kind(start, load, tmp_path):
    """A process that is not forked (Python 3.14's default) has to import the reward's file by a name."""
    (tmp_path / "neighbour_one.py").write_text("ten = 10")
    (tmp_path / "neighbour_two.py").write_text("one = 1")
    for module in ("neighbour_one", "neighbour_two"):
        sys.modules.pop(module, None)
    reward = load(NEIGHBOUR.format(start), f"starts_{start}.py")
    assert score(reward, ["p"] * 2, ["abc", "abcd"], {}) == [0.3, 0.4]
    assert not multiprocessing.active_children()


def test_a_file_is_run_once_and_hides_no_module(load, tmp_path):
    other = "def other(prompts, completions, **columns):\n    return [len(prompts)]\n"
    (tmp_path / "random.py").write_text(REWARD + other)
    two = load_reward(f"{tmp_path}/random.py:reward,{tmp_path}/random.py:other")
    assert two[0].function.__globals__ is two[1].function.__globals__ and two[1].function([], []) == [0]
    import random
    assert hasattr(random, "shuffle")
