"""engine/definition.py: a Config without the rest of its file. That torch is not imported shows in a fresh
process."""
import dataclasses
import importlib
import inspect
import subprocess
import sys
from typing import Literal, get_type_hints

import pytest
from helpers import ROOT, ROWS, tiny_model, train_here, write_config, write_jsonl

from data.errors import RunError, UserError
from engine import definition
from engine.config import config_of, load_config
from engine.definition import class_of
from engine.help import help_text

PROGRAM = """
import sys
from data.errors import UserError
from engine.config import load_config
from engine.help import help_for
try:
    load_config(sys.argv[1:])
    print("read")
except UserError as error:
    print(error)
help_for(["algorithm=grpo", "--help"])
print([name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""


@pytest.mark.parametrize("words, says", [
    ("lrr=1", "unknown key 'lrr' (command line); fix: write lr"),
    ("lr=1e-5", "read"), ("algorithm=grpo reward=gsm8k", "read"),
    ("train_on=all", "train_on (command line) is used by dft, sft, not by dpo; fix: remove it"),
])
def test_no_torch(words, says):
    arguments = ["example/tiny-dpo.yml", *words.split()]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith(says) and done.stdout.endswith("\n[]\n"), done


@pytest.mark.parametrize("name", ROWS)
def test_real_configs(name):
    """As the import makes them: fields, defaults, types, bases."""
    found, imported = config_of(name), importlib.import_module(f"algorithms.{name}").Config
    assert found is config_of(name) and get_type_hints(found) == get_type_hints(imported)
    pairs = zip(dataclasses.fields(found), dataclasses.fields(imported), strict=True)
    assert all((ours.name, ours.default) == (theirs.name, theirs.default) for ours, theirs in pairs)
    assert [base.__name__ for base in found.__mro__] == [base.__name__ for base in imported.__mro__]
    assert inspect.getsource(found) == inspect.getsource(imported)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """-> a function: write algorithms/<name>.py of a project of its own. `boom` is a module that cannot be
    imported."""
    (tmp_path / "algorithms").mkdir()
    monkeypatch.setattr(definition, "ROOT", tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    class_of.cache_clear()

    def write(name, text):
        (tmp_path / "algorithms" / f"{name}.py").write_text(text)
    yield write
    class_of.cache_clear()


def test_only_what_the_class_uses_is_run(project):
    project("mine", """
from __future__ import annotations
import math, boom
from dataclasses import dataclass, field as new
from boom import nothing
from typing import Literal
from algorithms.base import Config as Base, FACTOR
boom.run()
KINDS = {}
KINDS["a"] = FACTOR * 2
def half(x):
    return x / 2
def train(engine, config):
    boom.run()
@dataclass
class Config(Base):
    share: float = half(KINDS["a"])       # half of it
    kind: Literal["x", "y"] = "x"
    root: float = new(default=math.sqrt(4))
    words: list[str] | None = new(default_factory=list)
    def total(self) -> float:
        return half(self.share) + self.beta
later = boom.run()
""")
    project("base", """
import os
from dataclasses import dataclass
from engine.options import Options
FACTOR = 3
@dataclass
class Config(Options):
    beta: float | None = 0.5              # of the base
import os
""")
    config = config_of("mine")
    types = {"beta": float | None, "share": float, "kind": Literal["x", "y"], "root": float,
             "words": list[str] | None}
    assert get_type_hints(config) == types
    assert (config().share, config().root, config(beta=1.0).total()) == (3.0, 2.0, 2.5)
    assert config.__mro__[1] is config_of("base")
    text = help_text("mine")
    assert "    share: a number (default 3.0)\n        half of it\n" in text and "keys of mine" in text
    assert "    words: a list of texts, or null (default [])\n" in text
    assert "    beta: a number, or null (default 0.5)\n        of the base\n" in text


GOOD = """
from dataclasses import dataclass
from engine.options import Options
@dataclass
class Config(Options):
    beta: float = 1.0
"""


def test_errors_of_a_file_are_told(project, tmp_path):
    project("good", GOOD)
    project("cut", "import boom\n\nclass Config:\n    beta: float = (\n")
    with pytest.raises(UserError, match=r"cut.py:4 is not Python \(.* was never closed\); fix: correct"):
        config_of("cut")
    project("empty", "X = 1\n")
    with pytest.raises(UserError, match="algorithms/empty.py has no class Config; fix: add one"):
        config_of("empty")
    project("wrong", "\n\nclass Config:\n    beta: float = nothing\n")
    with pytest.raises(NameError) as caught:
        config_of("wrong")
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(tmp_path / "algorithms" / "wrong.py"), 4)


def test_other_files_do_not_stop_a_run(project, tmp_path):
    """Helpers without a Config, files that are not Python, and Configs that cannot be made."""
    project("good", GOOD)
    project("common", '"""Functions of several algorithms."""\nimport boom\ndef half(x):\n    return x / 2\n')
    project("cut", "import boom\n\nclass Config:\n    beta: float = (\n")
    project("wrong", "class Config:\n    beta: float = nothing\n")
    project("plain", "class Config:\n    beta: float = 1.0\n")
    path = str(tmp_path / "x.yml")
    (tmp_path / "x.yml").write_text("algorithm: good\nmodel: m\ndata: d\n")
    assert load_config([path, "beta=2"]).config.beta == 2
    with pytest.raises(UserError, match="unknown key 'betta' .*fix: write beta"):
        load_config([path, "betta=2"])
    with pytest.raises(UserError, match="algorithms/ holds good, plain, wrong; fix: give good"):
        load_config([path, "algorithm=godo"])
    with pytest.raises(UserError, match="algorithms/common.py has no class Config"):
        load_config([path, "algorithm=common"])
    assert "    good" in help_text() and "common:" not in help_text().partition("algorithms:")[2]
    assert "beta: a number (default 1.0)" in help_text("good")


def test_what_methods_use_may_stand_behind_the_class(project):
    project("late", """
from dataclasses import dataclass
import boom
from engine.options import Options
@dataclass
class Config(Options):
    beta: float = 1.0
    def __post_init__(self):
        check(self.beta)
def check(beta):
    if floor(beta) > MOST:
        raise ValueError(beta)
MOST: int = 3
OTHER = boom.run(MOST)
from math import floor
""")
    assert config_of("late")(beta=3.5).beta == 3.5
    with pytest.raises(ValueError):
        config_of("late")(beta=4.0)


@pytest.mark.parametrize("text, says", [
    ("class Config:\n    beta: float = 1.0\n", "is no dataclass; fix: write @dataclass above it"),
    ("from engine.options import Sampling\nclass Config(Sampling):\n    beta: float = 1.0\n",
     "is no dataclass; fix: write @dataclass above it"),
    (GOOD.replace("(Options)", ""), r"fix: write class Config\(Options\)"),
    (GOOD.replace("beta", "lr"), "has the key lr, which every algorithm has; fix: give it another name"),
])
def test_a_config_that_is_none(project, text, says):
    project("mine", text)
    with pytest.raises(UserError, match="Config in algorithms/mine.py .*" + says):
        config_of("mine")


def test_training_gets_a_config_of_the_file_s_own_class(tmp_path, monkeypatch):
    import algorithms.sft
    seen = []
    monkeypatch.setattr(algorithms.sft, "train", lambda engine, config: seen.append(config))
    data = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "q", "response": "a"}])
    path = write_config(tmp_path / "x.yml", algorithm="sft", model=tiny_model(tmp_path / "model"), data=data,
                        output=tmp_path / "run", train_on="all", max_length=200)
    with pytest.raises(RunError, match="nothing was trained"):
        train_here(path)
    assert isinstance(seen[0], algorithms.sft.Config) and seen[0].train_on == "all"
