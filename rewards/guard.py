"""Run the user's own Python code so that it comes to an end, cannot end the run, and leaves the process as it
was.

`with guarded(seconds, what):` stands around an import or a call of that code. The code may start processes;
they take the default action at a signal and end with the run. This is no sandbox: the code can do all
that its user can.
"""
import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial

import torch

from data.errors import RunError

ALARMS = 10                              # more alarms, a second apart, for code that swallows the first
ENDING = "_exit", "execv", "execve"      # functions of os that end a process without an exception
leave = os._exit                         # guarded code finds another function under that name


class TimedOut(BaseException):
    """Not an Exception: the code's own `except Exception` must not stop it."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, as opposed to a KeyboardInterrupt that the code raises itself."""


def _interrupt(number, frame):
    raise Interrupted


def _on_main_thread():
    return threading.current_thread() is threading.main_thread()


# ---- signals, in this process only ----

_handlers = {}                # signal -> (our handler in this process, its replacement in a forked child)
_owner = None                 # the number of the process that handles them
_fork = threading.local()     # what a child has to know about its fork
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


def handle(number: int, handler, in_child=signal.SIG_DFL):
    """Let `handler` handle a signal in this process, and `in_child` in processes forked from it: our handler
    would keep a child alive, and multiprocessing.Pool would wait for its workers for ever. Returns the
    handler before."""
    global _owner
    if _owner is None and hasattr(os, "register_at_fork"):
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
    _owner = os.getpid()
    _handlers[number] = handler, in_child
    return signal.signal(number, handler)


def _before_fork():
    # Python forgets the signals that reach a child before its hook runs, so block them until then
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handlers)
    _fork.parent = os.getpid() if _on_main_thread() else None


def _after_fork():
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


def _in_child():
    for number, (handler, in_child) in _handlers.items():
        if signal.getsignal(number) is handler:
            signal.signal(number, in_child)
    # In Linux a parent is a thread, and only the main thread ends with the process. A child's own children
    # are left alone: code that forks twice wants to outlive us.
    if _prctl and _fork.parent == _owner:
        _prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGTERM))
        if os.getppid() != _owner:      # the parent has ended already
            leave(1)
    _after_fork()


# ---- an end ----

@contextmanager
def _time_limit(seconds, what):
    """Raise TimedOut after `seconds`, again every second until the block ends, and after the block if it has
    swallowed that. After ALARMS more, end the process, with one line. An outer timer continues afterwards.
    Threads other than the main one, and Windows, have no limit."""
    if not hasattr(signal, "setitimer") or not _on_main_thread():
        yield
        return
    alarms = 0

    def stop(number, frame):
        nonlocal alarms
        alarms += 1
        if alarms > ALARMS:
            _give_up(f"{what} took longer than {seconds:g} s and swallows the exception that should stop it; "
                     "fix: make it faster, and let it catch Exception, not BaseException")
        raise TimedOut

    started = time.monotonic()
    handler = handle(signal.SIGALRM, stop)
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    signal.setitimer(signal.ITIMER_REAL, min(seconds, left or seconds), 1.0)
    try:
        yield
    except Exception:
        if not alarms:                 # else the code has turned our exception into its own
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 1e-6), interval)
    if alarms:
        raise TimedOut


def interrupt() -> None:
    """End the guarded code that runs now, if any does, as if its time were over."""
    handler, _ = _handlers.get(signal.SIGALRM, (None, None))
    if handler and signal.getsignal(signal.SIGALRM) is handler:
        signal.setitimer(signal.ITIMER_REAL, 1e-3, 1.0)


def _give_up(text):
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):      # the code may have been writing to it just now
            stream.flush()
    os.write(2, f"error: {text}\n".encode(errors="backslashreplace"))
    leave(RunError.exit_code)


@contextmanager
def _one_process():
    """Let the functions of ENDING raise SystemExit in this process; in its children they work as usual. A
    child that leaves the block (by sys.exit, or by returning) ends there, or it would be a second run."""
    originals = {name: getattr(os, name) for name in ENDING}
    process = os.getpid()

    def refusing(name):
        def function(*arguments, **options):
            if os.getpid() == process:
                raise SystemExit(f"os.{name}")
            return originals[name](*arguments, **options)
        return function

    for name in ENDING:
        setattr(os, name, refusing(name))
    try:
        yield
    except SystemExit as error:
        if os.getpid() != process and not error.code:
            leave(0)
        raise
    finally:
        if os.getpid() != process:
            leave(1)
        for name, original in originals.items():
            setattr(os, name, original)


# ---- the process as it was ----

def _directory():
    try:
        return os.getcwd()
    except FileNotFoundError:      # deleted
        return None


def _attribute(owner, name):
    return partial(getattr, owner, name), partial(setattr, owner, name)


_replaced = []      # streams of the user's: when Python frees one, it closes the stream of ours below it


def _stream(name):
    def put_back(stream):
        _replaced.append(getattr(sys, name))
        with suppress(AttributeError, ValueError):      # None, or a stream that was closed or detached
            stream.write("")
            setattr(sys, name, stream)
    return partial(getattr, sys, name), put_back


# pairs of functions: one reads a value, one puts it back
KEPT = [
    (_directory, lambda path: path and os.chdir(path)),
    _stream("stdout"),
    _stream("stderr"),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, lambda _: torch.set_default_device(None)),      # we never set one
    (torch.get_num_threads, torch.set_num_threads),
    # torch.get_float32_matmul_precision raises where code has set these two
    _attribute(torch.backends.cuda.matmul, "fp32_precision"),
    _attribute(torch.backends.mkldnn.matmul, "fp32_precision"),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
]
KEPT_SIGNALS = [(partial(signal.getsignal, number), partial(signal.signal, number))
                for number in (signal.SIGTERM, signal.SIGINT)]


@contextmanager
def _unchanged():
    """Put back the values of KEPT and KEPT_SIGNALS after the block; in it Ctrl-C raises Interrupted."""
    kept = KEPT + KEPT_SIGNALS if _on_main_thread() else KEPT
    values = [read() for read, _ in kept]
    if _on_main_thread() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for (read, put_back), value in zip(kept, values):
            if read() != value:
                put_back(value)


@contextmanager
def guarded(seconds: float, what: str):
    """Run the block, which is the user's code, for at most `seconds`, and put back the working directory,
    signal handlers, standard streams and torch's defaults. It raises what the code raises, TimedOut after its
    time, Interrupted at Ctrl-C, and SystemExit where the code calls os._exit. `what` is the subject of the
    line with which the process ends if the code cannot be stopped otherwise."""
    with _unchanged(), _one_process(), _time_limit(seconds, what):
        yield
