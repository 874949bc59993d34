"""The exceptions whose text is meant for the user: `train.py` prints it as one line on stderr and exits with their code."""


class UserError(Exception):
    """Bad input: what is wrong, where (`file:line` or the key), and one fix. `UserError("what in where; fix: do this")`."""
    exit_code = 2


class RunError(UserError):
    """The run cannot go on (non-finite loss, full disk, a broken checkpoint); what was saved stays."""
    exit_code = 1
