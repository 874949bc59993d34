"""The commands of an installed copy: `align train FILE.yml` is `python train.py FILE.yml` of a checkout.

    align example                    copies the examples, with the embedded model, into ./example
    align train FILE.yml [key=value ...]
    align evaluate | sample | chat | report ...
    align path                       prints the folder of the sources
    align --version

On several GPUs: torchrun --nproc-per-node 8 -m minimal_llm_alignment train FILE.yml
"""
import os
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))      # the folders import each other by their own names, as in a checkout

from data.command import BY_ALIGN, for_align  # noqa: E402

WITH_COMMANDS = (".md", ".py", ".sh", ".yml")      # files of example/ that name commands
PROGRAMS = ("train", "evaluate", "sample", "chat", "report")


def main() -> None:
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in PROGRAMS:
        program = str(HERE / f"{command}.py")
        environment = {**os.environ, BY_ALIGN: "1"}
        os.execve(sys.executable, [sys.executable, program, *arguments], environment)
    if command == "example":
        return copy_examples()
    if command == "path":
        return print(HERE)
    if command == "--version":
        return print((HERE / "VERSION").read_text().strip())
    if command not in ("-h", "--help", "help"):
        fail(f"{command} is not a command; fix: align {', '.join(PROGRAMS)}, example or path")
    print(__doc__)


def copy_examples() -> None:
    """Copy the folder of examples, whose files name each other by paths such as example/tiny/model. What they
    name or run as `python train.py` becomes `align train`."""
    try:
        shutil.copytree(HERE / "example", "example", copy_function=copy_example)
    except FileExistsError:
        fail("example exists here already; fix: go to another directory, or move it away")
    except OSError as error:
        fail(f"example cannot be written ({error}); fix: go to a directory that you may write")
    print("example  try: align train example/tiny-dpo.yml")


def copy_example(source: str, target: str) -> None:
    shutil.copy2(source, target)
    if source.endswith(WITH_COMMANDS):
        text = Path(target).read_text(encoding="utf-8")
        Path(target).write_text(for_align(text), encoding="utf-8")


def fail(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
