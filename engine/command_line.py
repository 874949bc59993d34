"""The words of a command line: key=value, --key=value, --key value and --overrides key=value ... mean the
same; a word that ends in .yml is the configuration file."""
import os
import re
import sys

from data.errors import UserError
from engine.cast import name_of, nearest, show

YAML = (".yml", ".yaml")
FLAGS = {"--help": "help", "-h": "help", "--dry-run": "dry-run", "--debug": "debug"}
ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z_][\w.-]*)=(.*)", re.DOTALL)
OPTION = re.compile(r"--([A-Za-z_][\w.-]*)")
NEGATIVE = re.compile(r"-\.?\d")       # how a negative number begins


def parse_argv(argv: list[str]) -> tuple[str | None, dict[str, tuple[str | None, str]], set[str]]:
    """-> (path of the YAML file or None, {key: (text, "command line")}, flags). The text of a `--key` without
    a value is None."""
    path = None
    overrides = {}
    flags = set()
    words = list(argv)
    while words:
        word = words.pop(0)
        assignment = ASSIGNMENT.fullmatch(word)
        option = OPTION.fullmatch(word)
        if word in FLAGS:
            flags.add(FLAGS[word])
        elif word == "--overrides":    # key=value words follow
            continue
        elif assignment:
            override(overrides, assignment[1], assignment[2])
        elif option and not nearest(option[1], FLAGS.values()):
            override(overrides, option[1], value_of(words))
        elif not is_file(word):
            raise unknown_word(word)
        elif path is not None:
            raise UserError(f"two config files in the command line, {show(path)} and {show(word)}; "
                            "fix: give one")
        else:
            path = word
    return path, overrides, flags


def override(overrides: dict, key: str, text: str | None) -> None:
    key = name_of(key)
    if key in overrides:
        print(f"note: {key} is given more than once on the command line; the last one is used",
              file=sys.stderr)
    overrides[key] = text, "command line"


def is_file(word: str) -> bool:
    return not word.startswith("-") and (word.endswith(YAML) or os.path.exists(word))


def value_of(words: list[str]) -> str | None:
    """Take the value of a `--key` off the words that follow it. None where the next word is none: an option,
    key=value or the YAML file."""
    following = words[0] if words else "-"
    is_option = following.startswith("-") and not NEGATIVE.match(following)
    is_other = re.match(r"[A-Za-z_][\w.-]*=", following) or following.endswith(YAML)
    return None if is_option or is_other else words.pop(0)


def unknown_word(word: str) -> UserError:
    name = word.lstrip("-").replace("-", "_")
    flag = nearest(name, FLAGS.values())
    fix = f"{name}=VALUE" if name.isidentifier() else "key=value, such as lr=2e-5"
    if flag:
        fix = f"--{flag}"
    return UserError(f"{show(word)} in the command line is neither a .yml file nor key=value; "
                     f"fix: write {fix}")
