"""The exceptions whose text is meant for the user, how a program ends with them, and what a terminal can show."""
import re
import sys

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


def run_program(main) -> None:
    """`main(arguments)`, whose UserError is one line on stderr and its exit code (with --debug its traceback), and Ctrl-C code 130."""
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        print(printable(f"error: {error}", keep=""), file=sys.stderr)
        sys.exit(error.exit_code)
