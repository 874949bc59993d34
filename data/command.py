"""How the programs are started here: `python train.py` in a checkout, `align train` in an installed copy. All
texts are written for a checkout; `as_typed` changes their commands before they are shown."""
import os
import re
import shlex
import sys

BY_ALIGN = "STARTED_BY_ALIGN"      # `align` sets this environment variable for the program that it starts
PROGRAM = r"(train|evaluate|sample|chat|report)\.py\b"
WITH_PYTHON = re.compile(rf"\bpython {PROGRAM}")
WITH_TORCHRUN = re.compile(rf"(\btorchrun .*?){PROGRAM}")


def as_typed(text: str) -> str:
    """A text with the commands that start the programs here in the place of a checkout's."""
    return for_align(text) if BY_ALIGN in os.environ else text


def for_align(text: str) -> str:
    """A text with the commands of an installed copy in the place of a checkout's."""
    text = WITH_PYTHON.sub(r"align \1", text)
    return WITH_TORCHRUN.sub(r"\1-m minimal_llm_alignment \2", text)


def own_command(words: list[str], launcher: str = "python") -> str:
    """The command that starts this program with the arguments `words`; `launcher` is what stands before it in
    a checkout."""
    program = sys.argv[0]
    if BY_ALIGN in os.environ:
        program = os.path.basename(program)
    return as_typed(f"{launcher} {shlex.join([program, *words])}")


def beside_this_program(name: str) -> str:
    """The path of another program of this project, as one would type it: this one may have been started from
    another directory than its own."""
    path = os.path.join(os.path.dirname(sys.argv[0]), name)
    has_path = os.path.isfile(path) and BY_ALIGN not in os.environ
    return shlex.quote(path) if has_path else name
