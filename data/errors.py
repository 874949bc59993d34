"""The exceptions whose text is meant for the user, how a program ends with them, and what a terminal can show."""
import json
import os
import re
import sys
import time

# C0, DEL and C1 steer a terminal, bidirectional controls turn what it shows around, half a surrogate cannot be written
UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(Exception):
    """Bad input: what is wrong, where (`file:line` or the key), and one fix. `UserError("what in where; fix: do this")`."""
    exit_code = 2


class RunError(UserError):
    """The run cannot go on (non-finite loss, full disk, a broken checkpoint); what was saved stays."""
    exit_code = 1


def printable(text: str, keep: str = "\n\t") -> str:
    """Text from a file, a model or the user's code as a terminal may get it: control characters are escaped as in a
    Python string, but for those in `keep`."""
    def escape(match):
        character = match[0]
        return character if character in keep else repr(character)[1:-1]

    return UNPRINTABLE.sub(escape, text)


def run_program(main, close=lambda: None) -> None:
    """`main(arguments)`, whose UserError is one line on stderr and its exit code (with --debug its traceback), and Ctrl-C
    code 130. Under torchrun the line stands once for all processes, and a process that another one's end broke is silent.
    `close()` comes before that line: it leaves the console as an error finds it best, without progress bars."""
    try:
        try:
            main(sys.argv[1:])
        finally:
            close()
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        tell(printable(f"error: {error}", keep=""))
        sys.exit(error.exit_code)
    except Exception:
        if "--debug" in sys.argv or not told():
            raise
        sys.exit(1)


def tell(line: str) -> None:
    """Print the line that a run ends with on stderr. Of several processes under torchrun with the same one, one does."""
    give_reason(line)
    with open(told_file() or os.devnull, "a+", encoding="utf-8") as file:
        if told_file():
            import fcntl  # of Unix; locked, so that no process leaves before the line is out
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if line not in file.read().splitlines():
            print(line, file=sys.stderr, flush=True)
            file.write(line + "\n")


def told() -> bool:
    """Whether a process of this torchrun has told why it ends."""
    return os.path.exists(told_file() or "")


def told_file() -> str | None:
    """A file in the log directory that torchrun makes for each start of its processes on a machine; else None."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return os.path.join(os.path.dirname(os.path.dirname(own)), "told.txt") if own else None


def give_reason(line: str) -> None:
    """Make torchrun's table of failed processes show `line` as the reason of this one."""
    if own := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        reason = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        with open(own, "w", encoding="utf-8") as file:
            json.dump({"message": reason}, file)
