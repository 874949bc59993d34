"""The text of a key or of a value, cast to what the program works with; and such text in messages."""
import difflib
import json
import math
import re
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NewType, Union, get_args, get_origin

import yaml

from engine.options import Range

Lines = NewType("Lines", str)      # text of one or more lines
Name = NewType("Name", str)        # text without a comma; in other texts commas may mean something
Columns = NewType("Columns", dict)     # {our name: the file's} of columns

BOOL = {
    "true": True, "yes": True, "on": True, "1": True,
    "false": False, "no": False, "off": False, "0": False,
}
NULL = ("", "null", "none")
ALIASES = {"local_rollout_forward_batch_size": "rollout_batch_size"}    # TRL's names with the same meaning
QUOTED_LIST = re.compile(r"""\s*\[\s*["'].*["']\s*,?\s*\]\s*""", re.DOTALL)


def name_of(key: str) -> str:
    """A key as it is called here: with _ for -, and ours for an alias."""
    key = key.replace("-", "_")
    return ALIASES.get(key, key)


def cast(text: str | list, kind) -> Any:
    """`text` as `kind`: str, Lines, int, float, bool, dict or a Literal, each perhaps `| None`, or
    `str | list[str]`. Ranges in `kind` are not tested. ValueError says what is expected."""
    if list[str] in get_args(kind):
        return cast_texts(text)
    if isinstance(text, list):             # data sources, which read_sources has checked
        return text
    word = text.strip().lower()
    if NoneType in get_args(kind) and word in NULL:
        return None
    if get_origin(kind) in (Annotated, Union, UnionType):
        return cast(text, get_args(kind)[0])
    if kind is bool:
        return choose(word, BOOL)
    if get_origin(kind) is Literal:
        return choose(word, {str(choice).lower(): choice for choice in get_args(kind)})
    if kind in (str, Name):
        if word and text.isprintable():
            return text
        raise ValueError("text on one line, without control characters")
    if kind is Lines:
        if word and text.replace("\n", "").isprintable():
            return text.strip("\n")
        raise ValueError("text without control characters")
    if kind is dict:
        return read_mapping(text)
    if kind is Columns:
        return read_columns(text)
    return cast_number(text, kind)


def choose(word: str, choices: dict) -> Any:
    if word in choices:
        return choices[word]
    raise ValueError(f"{nearest(word, choices) or 'one'} (choices: {', '.join(choices)})")


def cast_number(text: str, kind: type) -> int | float:
    assert kind in (int, float), f"a config field cannot have the type {kind}"
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if kind is float and not math.isfinite(number):
        raise ValueError("a number such as 2e-5")
    is_exact = number % 1 == 0 and abs(number) <= 2**53    # above, a float loses digits
    if kind is int and not is_exact:
        raise ValueError("a whole number")
    return kind(number)


def cast_texts(value: str | list[str]) -> str | list[str] | None:
    """A list of texts, or one text, unchanged; None for "null". On the command line ["a", "b"], with the
    quotes, is a list: [a] is a text."""
    if isinstance(value, str) and QUOTED_LIST.fullmatch(value):
        try:
            value = yaml.load(value, yaml.BaseLoader)
        except yaml.YAMLError:
            raise ValueError('a list such as ["one", "two"], with every text in quotes') from None
    if value == [] or (isinstance(value, str) and value.strip(" ").lower() in NULL):
        return None
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, str) or not text:
            raise ValueError('a list of texts that are not empty, such as ["one", "two"]')
    return value


def read_mapping(text: str) -> dict:
    """A YAML mapping of names to values that JSON knows. ValueError says what is expected."""
    try:
        values = yaml.safe_load(text)
        names = [isinstance(name, str) and name.isidentifier() for name in values]
        json.dumps(values, allow_nan=False)
        if isinstance(values, dict) and all(names):
            return values
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        pass
    raise ValueError("a mapping such as {enable_thinking: false}")


def read_columns(text: str) -> dict[str, str]:
    """A YAML mapping of names to names, each as it is written. ValueError says what is expected."""
    try:
        columns = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        columns = None
    names = [*columns.keys(), *columns.values()] if isinstance(columns, dict) else [None]
    if all(isinstance(name, str) and name for name in names):
        return columns
    raise ValueError("our names and the file's, such as {prompt: Question, chosen: good_answer}")


def ranges_of(kind) -> list[Range]:
    """The ranges in a field's type, outermost last."""
    found = []
    for part in get_args(kind):
        found += [part] if isinstance(part, Range) else ranges_of(part)
    return found


def nearest(name: str, names) -> str | None:
    """The most similar one of some names; None for a single letter, since a name that holds it may mean the
    opposite: n means no, not on."""
    matches = difflib.get_close_matches(name.lower(), list(names), 1) if len(name) > 1 else []
    return matches[0] if matches else None


def show(text: str) -> str:
    """`text` for a message: quoted, on one line, short, without anything that looks like an access token."""
    text = re.sub(r"hf_\w{16,}", "hf_...", str(text))
    return repr(text if len(text) <= 80 else text[:77] + "...")
