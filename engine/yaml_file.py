"""A flat YAML file as text. Nothing is constructed, so no YAML tag can run code, and a value keeps the form
in which it is written: YAML would make 5e-7 a string and `no` a bool."""
import os
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import yaml

from data.errors import UserError
from data.sources import read_sources
from engine.advice import SECRET
from engine.cast import name_of, nearest, show

REFERS = re.compile(r"\$\{(\w+)[\w.]*\}")     # ${exp_name} stands for that key's value in other projects
FLAT = "fix: keys are flat, write one 'key: value' per line"


class Nested(NamedTuple):
    """A value that is neither one text nor a list of texts."""
    names: list[str]       # the dotted names of the values below the key: ["optim.lr"] of {optim: {lr: 1}}
    mapping: str | None    # its YAML text, if it is a mapping


def read_yaml(path: str) -> dict[str, tuple[str | list | Nested, str]]:
    """{key: (text as written, list of texts, data's list of sources or Nested, "path:line")}."""
    text = read_text(path)
    root = parse(text, path)
    found = {}
    for key_node, value_node in root.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"nested value of {show(str(key_node.value))} in {where}; {FLAT}")
        key = name_of(key_node.value)
        is_list = isinstance(value_node, yaml.SequenceNode)
        if is_list and key in ("data", "eval_data"):
            value = read_sources(value_node, key, path)
        else:
            value = value_of(value_node, text)
        if key in found:
            raise UserError(f"duplicate key {show(key)} in {where}, first in {found[key][1]}; "
                            "fix: remove one")
        found[key] = value, where
    check_references(found)
    return found


def read_text(path: str) -> str:
    file = Path(path)
    if not file.is_file():
        raise no_file(file, path)
    try:
        raw = file.read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; fix: check its permissions") from None
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise UserError(f"text that is not UTF-8 in {path}:{line}; fix: save the file as UTF-8") from None


def no_file(file: Path, path: str) -> UserError:
    others = {}
    for folder in (Path("example"), file.parent):
        for other in folder.glob("*.y*ml"):
            others[other.name] = other
    near = others.get(nearest(file.name, others))
    state = "is a directory" if file.is_dir() else "does not exist"
    fix = f"python train.py {shlex.quote(str(near))}" if near else "give the path of a .yml file"
    return UserError(f"config file {show(path)} {state}; fix: {fix}")


def parse(text: str, path: str) -> yaml.MappingNode:
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise syntax_error(error, path, text) from None
    except RecursionError:
        raise UserError(f"deeply nested values in {path}; {FLAT}") from None
    if root is None or root.value == "":    # the second: only '---'
        raise UserError(f"empty config file {path}; fix: add lines such as 'algorithm: dpo'")
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path} is not a mapping; "
                        "fix: write 'key: value' lines, with a space after the colon")
    return root


def value_of(node: yaml.Node, text: str) -> str | list[str] | Nested:
    """The value of a key; `text` is the whole file's."""
    if isinstance(node, yaml.ScalarNode):
        is_null = (node.value, node.style) == ("~", None)
        return "" if is_null else node.value
    if isinstance(node, yaml.MappingNode):
        start, end = node.start_mark, node.end_mark
        return Nested(leaves(node), " " * start.column + text[start.index:end.index])
    if all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return [item.value for item in node.value]
    return Nested(leaves(node), None)


def leaves(node: yaml.Node) -> list[str]:
    """The dotted names of the scalars below a YAML node; [] for a scalar."""
    names = []
    if isinstance(node, yaml.SequenceNode):
        for element in node.value:
            names += leaves(element)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            below = leaves(value_node)
            names += [f"{key_node.value}.{name}" for name in below] or [str(key_node.value)]
    return names


def check_references(found: dict) -> None:
    """UserError where a value holds ${other key}."""
    for key, (text, where) in found.items():
        other = REFERS.search(text) if isinstance(text, str) else None
        if other and name_of(other[1]) in found:
            raise UserError(f"{key} ({where}) is {show(text)}, but the value of {other[1]} is not put there; "
                            "fix: write the value itself")


def syntax_error(error: yaml.YAMLError, path: str, text: str) -> UserError:
    """PyYAML's error in one line: file:line:column, what, the offending line and a hint."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return UserError(f"control character in {path}:{line}; fix: remove it")
    mark = error.problem_mark
    if error.context == "while scanning a simple key":    # the problem's mark is already on the next line
        mark = error.context_mark
    lines = text.splitlines() + [""]
    line = lines[mark.line]
    hint = "replace the tab by spaces" if "\t" in line else "put unusual values in quotes"
    for i in (mark.line - 1, mark.line):
        if re.match(r"\s*[\w-]+:[^\s:/]", lines[max(i, 0)]):
            hint = f"put a space after the colon in line {i + 1}"
    near = "a line with a secret" if SECRET.search(line) else show(line.strip())
    where = f"{path}:{mark.line + 1}:{mark.column + 1}"
    return UserError(f"invalid YAML in {where}: {error.problem} in {near}; fix: {hint}")


def read_config(directory: str) -> dict | None:
    """The configuration a run directory was started with; None if it is not a run."""
    try:
        with open(os.path.join(directory, "config.yaml"), encoding="utf-8") as file:
            config = yaml.load(file, yaml.BaseLoader)      # every value a string, for `differing`
        return config if isinstance(config, dict) else None
    except (OSError, ValueError, yaml.YAMLError):          # no such file, not text, or somebody else's
        return None
