"""The text of --help: keys with type, range, default and sentence, out of the fields and their comments."""
import inspect
import json
import re
import textwrap
from dataclasses import MISSING, fields
from types import NoneType
from typing import Annotated, Literal, get_args, get_origin

from data.command import as_typed
from engine.cast import Columns, Lines, Name, ranges_of
from engine.command_line import parse_argv
from engine.config import (
    Common,
    algorithm_names,
    algorithm_of,
    config_of,
    hints_of,
    is_required,
    read_given,
)
from engine.definition import summary_of

USAGE = """\
usage: python train.py FILE.yml [key=value ...] [--dry-run] [--debug] [--help]

Keys come from the YAML file and the command line, where key=value, --key=value,
--key value and --overrides key=value ... mean the same. The command line wins.
seed=0,1,2 lr=1e-4,3e-4 makes all six runs, one by one, and compares them.
--dry-run shows what the run would do, and does not train.
--debug shows the traceback of an error.
"""
COLUMNS = 80
FIELD = re.compile(r"^    (\w+): [^#\n]*(?:\n +)?(#.*(?:\n +#.*)*)", re.MULTILINE)
TYPES = {bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping", list: "a list",
         Columns: "a mapping", str: "text", Lines: "text", Name: "text", NoneType: "null",
         list[str]: "a list of texts"}


def help_for(argv: list[str]) -> str | None:
    """The help that the command line of train.py asks for, about the algorithm that it names; None where it
    asks for none."""
    if not {"--help", "-h"}.intersection(argv):
        return None
    path, overrides, _ = parse_argv(argv)
    given = read_given(path, overrides)
    if path is None and "algorithm" not in given:
        return as_typed(help_text())
    return as_typed(help_text(algorithm_of(given, path)))


def help_text(algorithm: str | None = None) -> str:
    """The usage, the keys of one algorithm (or the list of all) and the common keys."""
    if algorithm is None:
        parts = [USAGE, "common keys:", *key_lines(Common), "", *algorithm_lines()]
    else:
        summary = wrap(summary_of(f"algorithms.{algorithm}"), "")
        parts = [USAGE, summary, "", f"keys of {algorithm}:", *key_lines(config_of(algorithm)), ""]
        parts += ["common keys:", *key_lines(Common)]
    return "\n".join(parts)


def algorithm_lines() -> list[str]:
    lines = ["algorithms:"]
    for name in algorithm_names():
        lines.append(wrap(f"{name}: {summary_of(f'algorithms.{name}')}", "    "))
    return [*lines, "", "python train.py algorithm=NAME --help shows an algorithm's own keys."]


def key_lines(config_class: type) -> list[str]:
    """Two paragraphs per key: "key: type and range (default)", and the sentence."""
    comments = comments_of(config_class)
    hints = hints_of(config_class)
    lines = []
    for field in fields(config_class):
        kind = describe_type(hints[field.name])
        lines.append(wrap(f"{field.name}: {kind} ({default_of(field)})", "    "))
        if field.name in comments:
            lines.append(wrap(comments[field.name], "        "))
    return lines


def comments_of(config_class: type) -> dict[str, str]:
    """{field: the comment beside it and on the lines below}; a base's fields too."""
    comments = {}
    for part in reversed(config_class.__mro__[:-1]):
        for name, comment in FIELD.findall(inspect.getsource(part)):
            lines = [line.strip().removeprefix("#").strip() for line in comment.splitlines()]
            comments[name] = " ".join(lines)
    return comments


def describe_type(kind) -> str:
    """"a number above 0, or null"; of several ranges the last one, which is the narrowest."""
    if get_origin(kind) is Annotated:
        ranges = ranges_of(kind)
        return ranges[-1].wanted if ranges else describe_type(get_args(kind)[0])
    if get_origin(kind) is Literal:
        *choices, last = map(str, get_args(kind))
        return f"{', '.join(choices)} or {last}" if choices else last
    if kind in TYPES:
        return TYPES[kind]
    return ", or ".join(map(describe_type, get_args(kind)))


def default_of(field) -> str:
    """"required", or the default as YAML has it: "default true"."""
    if is_required(field):
        return "required"
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return f"default {value if isinstance(value, str) else json.dumps(value)}"


def wrap(text: str, indent: str) -> str:
    return textwrap.fill(text, COLUMNS, initial_indent=indent, subsequent_indent=indent + "  ",
                         break_long_words=False, break_on_hyphens=False)
