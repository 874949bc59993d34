"""The exceptions with a text for the user, how a program ends with them, and what a terminal can show."""
import atexit
import json
import os
import select
import signal
import sys
import time
import unicodedata

from data.command import as_typed

# to Python unprintable, but a part of words (the soft hyphen) and of emoji (the joiners)
ORDINARY = "\u00ad\u200c\u200d"


class UserError(Exception):
    """Bad input: what is wrong, where (`file:line` or the key), and one fix:
    `UserError("what in where; fix: do this")`."""
    exit_code = 2


class RunError(UserError):
    """The run cannot go on (non-finite loss, full disk, a broken checkpoint); what was saved stays."""
    exit_code = 1


def printable(text: str, keep: str = "\n\t") -> str:
    """Text from a file, a model or the user's code as a terminal may get it: what steers a terminal, turns
    the text around or cannot be written is escaped as in a Python string, but for the characters in `keep`.
    """
    return "".join(shown_as(character, keep) for character in text)


def shown_as(character: str, keep: str) -> str:
    is_space = unicodedata.category(character) == "Zs"      # Python prints only one of them
    ordinary = character.isprintable() or is_space or character in ORDINARY
    return character if ordinary or character in keep else repr(character)[1:-1]


def said_first(error: Exception | str) -> str:
    """The first line of what somebody else's code said, or the error's name where that is nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def notice(text: str) -> None:
    """Tell the user a sentence before there is a run that could log it."""
    print(printable(text, keep=""), file=sys.stderr, flush=True)


def run_program(main, close=lambda: None) -> None:
    """Call `main(arguments)`. A UserError ends the program with one line on stderr and its exit code (with
    --debug with a traceback), Ctrl-C with code 130. Under torchrun one process prints the line, and a process
    that fails because another one ended prints nothing. `close()` is called before the line is printed, to
    remove progress bars."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:      # as the program had it for its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = exit_code(main, close)
    except Exception:
        if "LOCAL_RANK" not in os.environ:
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if "LOCAL_RANK" in os.environ:
        # A thread of gloo's may still free a tensor. Python aborts the process if it is finalizing then, and
        # torchrun takes that for a failed run, so this process leaves without finalizing. After an error it
        # would also wait for threads, which may wait for other ranks.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def exit_code(main, close) -> int:
    """The code with which a program ends that calls `main`; its last line is on stderr already."""
    try:
        try:
            main(sys.argv[1:])
            sys.stdout.flush()
        finally:
            close()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if "--debug" in sys.argv or not reader_left():
            raise
        return 128 + signal.SIGPIPE
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        tell(printable(as_typed(f"error: {error}"), keep=""))
        return error.exit_code
    except Exception:
        if "--debug" in sys.argv or not told():
            raise
        return 1
    return 0


def reader_left() -> bool:
    """Whether the program that reads our stdout, such as `head`, has ended. Then no more is written there."""
    stdout = select.poll()
    stdout.register(sys.stdout.fileno(), 0)
    if not stdout.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def tell(line: str) -> None:
    """Print the last line of a run on stderr. Where several processes of torchrun have the same line, one
    prints it."""
    give_reason(line)
    with open(told_file() or os.devnull, "a+", encoding="utf-8") as file:
        if told_file():
            import fcntl  # Unix only; with the lock no process leaves before the line is printed
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if line not in file.read().splitlines():
            print(line, file=sys.stderr, flush=True)
            file.write(line + "\n")


def told() -> bool:
    """Whether a process of this torchrun has printed why it ends."""
    return os.path.exists(told_file() or "")


def told_file() -> str | None:
    """A file in the log directory that torchrun makes for each start of its processes on a machine; None
    without torchrun."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not own:
        return None
    logs = os.path.dirname(os.path.dirname(own))
    return os.path.join(logs, "told.txt")


def give_reason(line: str) -> None:
    """Make torchrun's table of failed processes show `line` as the reason of this one."""
    if own := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        now = str(int(time.time()))
        reason = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": now}}
        with open(own, "w", encoding="utf-8") as file:
            json.dump({"message": reason}, file)
