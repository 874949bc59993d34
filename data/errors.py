"""The exceptions whose text is meant for the user, and how a program ends with them."""
import sys


class UserError(Exception):
    """Bad input: what is wrong, where (`file:line` or the key), and one fix. `UserError("what in where; fix: do this")`."""
    exit_code = 2


class RunError(UserError):
    """The run cannot go on (non-finite loss, full disk, a broken checkpoint); what was saved stays."""
    exit_code = 1


def run_program(main, close=lambda: None) -> None:
    """`main(arguments)`, whose UserError is one line on stderr and its exit code (with --debug its traceback), and Ctrl-C code 130.
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
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
