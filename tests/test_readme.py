"""README.md and README_zh.md say the same things in the same order, and what they name exists."""
import re
from pathlib import Path

import pytest
from helpers import ROOT

ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))


def structure(text):
    """Headings' levels, code blocks (verbatim) and, of every table row, the number of cells and its code spans."""
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    outside = re.sub(r"^```.*?^```", "```", text, flags=re.MULTILINE | re.DOTALL)
    rows = [(line.count("|"), re.findall(r"`[^`]+`", line)) for line in outside.splitlines() if line.startswith("|")]
    return [line.split(" ")[0] for line in outside.splitlines() if line.startswith("#")], blocks, rows


def test_both_have_the_same_structure():
    for ours, theirs in zip(structure(ENGLISH), structure(CHINESE)):
        assert ours == theirs


@pytest.mark.parametrize("text", [ENGLISH, CHINESE])
def test_what_is_named_exists_and_nothing_is_left_to_fill_in(text):
    assert "@@" not in text
    named = re.findall(r"\b(?:algorithms|engine|data|tests|example|benchmark)/[\w/.-]+\.(?:py|yml|md)\b", text)
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target


def test_every_algorithm_is_in_the_table():
    for path in Path(ROOT, "algorithms").glob("[a-z]*.py"):
        assert f"`algorithms/{path.name}`" in ENGLISH
