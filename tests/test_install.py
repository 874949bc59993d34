"""`pip install .`: a package of its own, whose command does what the programs of the checkout do and is
named in what they print."""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, metrics, tracked

WORDS = ["example/tiny-dpo.yml", "max_steps=2", "eval_data=null"]
pytestmark = pytest.mark.skipif(not importlib.util.find_spec("setuptools"), reason="setuptools is missing")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder into which a wheel of the tracked files is installed, without what it depends on."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in tracked("**"):
        copy = source / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
           "--target", site, source]
    subprocess.run(pip, check=True, capture_output=True, cwd=source)
    return site


@pytest.fixture(scope="module")
def trained(installed, tmp_path_factory):
    """(The folder with the copied examples and a run of two updates, what `align train` printed.)"""
    folder = tmp_path_factory.mktemp("trained")
    copied = align(installed, folder, "example")
    assert copied.returncode == 0, copied.stderr
    done = align(installed, folder, "train", *WORDS)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def align(installed, folder, *arguments, **options):
    """`align ...` in a folder; its CompletedProcess with texts."""
    return called(installed, folder, [sys.executable, installed / "bin" / "align", *arguments], **options)


def called(installed, folder, command, **options):
    path = f"{installed / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "PATH": path}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
                          **options)


def test_one_package_of_its_own_is_installed(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"minimal_llm_alignment", "bin"}
    missing = []
    for folder in ("algorithms", "data", "engine", "example", "model", "rewards"):
        for path in tracked(f"{folder}/**"):
            if not (installed / "minimal_llm_alignment" / path.relative_to(ROOT)).exists():
                missing.append(path)
    assert missing == []


def test_it_trains_from_an_empty_directory(installed, trained):
    """The same numbers as the checkout's train.py."""
    folder, _ = trained
    ours = [sys.executable, ROOT / "train.py", *WORDS, "output=runs/checkout"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(ours, cwd=folder, env=environment, check=True, capture_output=True)
    assert metrics(folder / "runs" / "tiny-dpo") == metrics(folder / "runs" / "checkout")
    report = align(installed, folder, "report", "runs/tiny-dpo", "runs/checkout")
    assert report.stdout == "report  report.html\n", report.stderr


def test_what_a_run_prints_and_keeps_names_commands_that_exist(installed, trained):
    """The summary, run.json, the model card, the page; and the command of the summary talks to the model."""
    folder, printed = trained
    run = folder / "runs" / "tiny-dpo"
    chat, = [line for line in printed.splitlines() if line.startswith("chat")]
    assert chat == "chat     align chat runs/tiny-dpo"
    words = " ".join(WORDS)
    assert json.loads((run / "run.json").read_text())["command"] == f"align train {words}"
    assert f"    align train {words}\n" in (run / "final" / "README.md").read_text(encoding="utf-8")
    assert f"<pre>align train {words}</pre>" in (run / "report.html").read_text(encoding="utf-8")
    answered = called(installed, folder, chat.split()[1:], input="Hello\n")
    assert answered.returncode == 0 and answered.stdout.strip(), answered.stderr


@pytest.mark.parametrize("words, says", [
    (["train"], "error: no config file in the command line; fix: align train example/tiny-dpo.yml\n"),
    (["report"], "error: no run is named; fix: align report runs/NAME\n"),
    (["evaluate", "MODEL"], "error: data is missing in the command line; "
                            "fix: align evaluate MODEL data=... reward=...\n")])
def test_errors_name_commands_that_exist(installed, tmp_path, words, says):
    refused = align(installed, tmp_path, *words)
    assert (refused.returncode, refused.stdout, refused.stderr) == (2, "", says)


@pytest.mark.parametrize("program", ["train", "evaluate", "sample", "chat", "report"])
def test_help_names_commands_that_exist(installed, tmp_path, program):
    asked = align(installed, tmp_path, program, "--help")
    assert asked.returncode == 0 and f"align {program}" in asked.stdout, asked.stderr
    assert not re.search(r"python \w+\.py", asked.stdout)


def test_the_examples_run_what_exists(installed, trained):
    """None of the copied files names a program of the checkout, and a script of several commands runs."""
    folder, _ = trained
    for path in (folder / "example").rglob("*"):
        if path.suffix in (".md", ".py", ".sh", ".yml"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"(python|torchrun) .*\b(train|evaluate|sample|chat|report)\.py", text), path
    settings = ["env", "CONFIG=example/tiny-dpo.yml", "LOSSES=dpo", "BETAS=0.1"]
    script = ["bash", "example/recipes/preference-scan.sh", "max_steps=1", "eval_data=null"]
    done = called(installed, folder, [*settings, *script])
    assert done.returncode == 0, done.stderr
    assert (folder / "runs" / "preference-scan" / "report.html").exists()


def test_version_and_what_is_not_a_command(installed, tmp_path):
    assert align(installed, tmp_path, "--version").stdout == (ROOT / "VERSION").read_text()
    (tmp_path / "example").mkdir()
    for word, reason in (("trian", "trian is not a command"), ("example", "example exists here already")):
        refused = align(installed, tmp_path, word)
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr.startswith(f"error: {reason}; fix: ")
