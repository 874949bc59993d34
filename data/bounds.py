"""Limits of time per row and of memory for a chat template, which is somebody else's program."""
import os
import signal
import threading
from contextlib import contextmanager

from data.errors import UserError

SECONDS = 3             # computing time for one row, which usually takes milliseconds
MEMORY = 2 ** 30        # bytes
PER_CHARACTER = 32      # more bytes for every character of the rows: it goes in, comes out and is cut


class _TooLong(BaseException):
    """Not an Exception: no `except Exception` on the way may stop it."""


@contextmanager
def bounded(where, characters=0):
    """Limit a block that renders texts with this number of `characters`. The block gets a function and calls
    it with the name of every row that it begins; `where` names the first one. UserError, naming it, where
    one row takes more than SECONDS to 2 * SECONDS, or the block more than the memory above.

    Time is limited on the main thread of Unix, memory on Linux."""
    timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    seen = None

    def row(name):
        nonlocal where
        where = name

    def tick(number, frame):
        nonlocal seen
        if seen == where:
            raise _TooLong
        seen = where

    limits = _limit_memory(MEMORY + PER_CHARACTER * characters)
    if timed:       # the timer counts computing time: a sleeping machine is not the template's fault
        handler = signal.signal(signal.SIGVTALRM, tick)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS)
    try:
        yield row
    except _TooLong:
        fault = f"takes longer than {SECONDS} s"
        raise UserError(f"the chat template {fault} in {where}; fix: use another template") from None
    except MemoryError:
        fault = f"takes more than {MEMORY >> 20} MiB"
        raise UserError(f"the chat template {fault} in {where}; fix: use another template") from None
    finally:
        if timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, signal.SIG_DFL if handler is None else handler)
        _restore_memory(limits)


def _limit_memory(size):
    """Let this process take `size` bytes more than it has. Returns the limits for `_restore_memory`, or None
    where the system has none."""
    try:
        import resource
        limits = resource.getrlimit(resource.RLIMIT_AS)
        with open("/proc/self/statm") as file:
            most = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE") + size
        if limits[0] == resource.RLIM_INFINITY or limits[0] > most:
            resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
        return limits
    except (ImportError, OSError, ValueError):
        return None


def _restore_memory(limits):
    if limits:
        import resource
        resource.setrlimit(resource.RLIMIT_AS, limits)
