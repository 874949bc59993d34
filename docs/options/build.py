"""Write docs/options.md and docs/options_zh.md: every key with its values, default and meaning, as --help
has them.

    python docs/options/build.py            # writes both
    python docs/options/build.py --check    # writes nothing; an error names a page that differs

chinese.yml has the Chinese of each English text; one that is missing there, or not used any more, is an
error.
"""
import sys
from dataclasses import fields
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from generated import write_or_check  # noqa: E402

import evaluate  # noqa: E402
import sample  # noqa: E402
from data.errors import UserError, run_program  # noqa: E402
from engine.config import Common, all_configs, hints_of  # noqa: E402
from engine.help import comments_of, default_of, describe_type  # noqa: E402

TRANSLATED = yaml.safe_load((HERE / "chinese.yml").read_text(encoding="utf-8"))
USED = set()      # those that the page has
HEAD = """\
# All options

{links}

`python train.py algorithm=NAME --help` prints these keys for one algorithm.
This page is generated: `python docs/options/build.py`.
"""


def rows_of(configs: dict[str, type]) -> dict[tuple, list[str]]:
    """{(key, values, default, meaning): the names of the configurations that have it}, keys in order."""
    by_key = {}
    for name, config in configs.items():
        comments = comments_of(config)
        hints = hints_of(config)
        for field in fields(config):
            row = (field.name, describe_type(hints[field.name]), default_of(field).removeprefix("default "),
                   comments.get(field.name, ""))
            by_key.setdefault(field.name, {}).setdefault(row, []).append(name)
    rows = {}
    for variants in by_key.values():
        rows.update(variants)
    return rows


def table(configs: dict[str, type], head: list[str], say) -> list[str]:
    """A Markdown table; with several configurations, their names are its second column."""
    lines = ["| " + " | ".join(map(say, head)) + " |", "|---" * len(head) + "|"]
    for (key, values, default, meaning), names in rows_of(configs).items():
        default = say(default) if default == "required" else f"`{default}`"
        cells = [f"`{key}`", ", ".join(names), say(values), default, say(meaning)]
        if len(configs) == 1:
            del cells[1]
        lines.append("| " + " | ".join(cells).replace("<", "\\<") + " |")
    return lines


def page(links: str, say) -> str:
    head = ["key", "values", "default", "meaning"]
    parts = [say(HEAD).format(links=links)]
    parts += [say("## Keys of every algorithm"), "", *table({"": Common}, head, say), ""]
    shared = ["key", "algorithms", *head[1:]]
    parts += [say("## Keys of some algorithms"), "", *table(published(), shared, say), ""]
    programs = {"evaluate.py": evaluate.Config, "sample.py": sample.Config}
    shared = ["key", "programs", *head[1:]]
    parts += [say("## Keys of evaluate.py and sample.py"), "", *table(programs, shared, say), ""]
    return "\n".join(parts)


def published() -> dict[str, type]:
    """The configurations of the algorithms that README.md names: a draft is not among them."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return {name: config for name, config in all_configs().items() if f"(algorithms/{name}.py)" in readme}


def chinese(text: str) -> str:
    """Raises UserError where chinese.yml does not have it."""
    if not text:
        return ""
    if text not in TRANSLATED:
        raise UserError(f"docs/options/chinese.yml has no Chinese of {text!r}; fix: add it")
    USED.add(text)
    return TRANSLATED[text]


def main(arguments: list[str]) -> None:
    pages = {
        "options.md": page("English · [中文](options_zh.md) · [README](../README.md)", str),
        "options_zh.md": page("[English](options.md) · 中文 · [README](../README_zh.md)", chinese),
    }
    for text in set(TRANSLATED) - USED:
        raise UserError(f"docs/options/chinese.yml has {text!r}, which no key says; fix: remove it")
    for name, text in pages.items():
        write_or_check(HERE.parent / name, text, "--check" in arguments, "docs/options/build.py")


if __name__ == "__main__":
    run_program(main)
