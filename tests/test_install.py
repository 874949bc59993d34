"""`pip install .`: a package of its own, whose command does what the programs of the checkout do."""
import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, metrics, tracked

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


def align(installed, folder, *arguments):
    """`align ...` in a folder; its CompletedProcess with texts."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, installed / "bin" / "align", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_one_package_of_its_own_is_installed(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"minimal_llm_alignment", "bin"}
    missing = []
    for folder in ("algorithms", "data", "engine", "example", "model", "rewards"):
        for path in tracked(f"{folder}/**"):
            if not (installed / "minimal_llm_alignment" / path.relative_to(ROOT)).exists():
                missing.append(path)
    assert missing == []


def test_it_trains_from_an_empty_directory(installed, tmp_path):
    """The same numbers as the checkout's train.py; what is printed names commands that exist."""
    copied = align(installed, tmp_path, "example")
    assert copied.returncode == 0, copied.stderr
    words = ["example/tiny-dpo.yml", "max_steps=2", "eval_data=null"]
    trained = align(installed, tmp_path, "train", *words)
    assert trained.returncode == 0, trained.stderr
    ours = [sys.executable, ROOT / "train.py", *words, "output=runs/checkout"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(ours, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert metrics(tmp_path / "runs" / "tiny-dpo") == metrics(tmp_path / "runs" / "checkout")
    chat, = [line for line in trained.stdout.splitlines() if line.startswith("chat")]
    assert os.path.isfile(chat.split()[2])
    report = align(installed, tmp_path, "report", "runs/tiny-dpo", "runs/checkout")
    assert report.stdout == "report  report.html\n", report.stderr


def test_version_and_what_is_not_a_command(installed, tmp_path):
    assert align(installed, tmp_path, "--version").stdout == (ROOT / "VERSION").read_text()
    (tmp_path / "example").mkdir()
    for word, reason in (("trian", "trian is not a command"), ("example", "example exists here already")):
        refused = align(installed, tmp_path, word)
        assert refused.returncode == 2 and refused.stdout == ""
        assert refused.stderr.startswith(f"error: {reason}; fix: ")
