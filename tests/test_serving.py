"""docs/serving.md: every command is run here, where its package is installed, or says with which versions it
was run by hand, or that it was not run."""
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
RUN = ("lm_eval ", "python evaluate.py ")      # what the tests below run
FEW = 8                                        # problems


def blocks(language):
    """(code, the text that follows it up to the next heading or block) of the page's blocks."""
    return re.findall(rf"```{language}\n(.*?)```\n(.*?)(?=\n#|\n```|\Z)", PAGE, re.DOTALL)


def command(start):
    found = [code for code, _ in blocks("bash") if code.startswith(start)]
    assert len(found) == 1
    return found[0].split()


def test_every_command_is_run_or_marked():
    """Commands that take a server or files of another project are run by hand, with the versions that the
    text names."""
    for code, text in blocks("bash"):
        says = text.strip()
        by_hand = re.match(r"Run (with|on) .*\d\.\d", says, re.DOTALL) is not None
        assert code.startswith(RUN) + by_hand + says.startswith("Not run here") == 1, code


def test_the_pipeline_answers(monkeypatch):
    """And ends at the template's stop token by itself."""
    monkeypatch.chdir(ROOT)
    (code, _), = blocks("python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue().strip().endswith("<answer>41</answer>")


def test_lm_eval_agrees_with_evaluate(tmp_path):
    """On the first problems: both count the same number of right answers."""
    program = shutil.which("lm_eval")
    if not program:
        pytest.skip("lm_eval is not installed: pip install lm_eval")
    words = [*command("lm_eval ")[1:], "--limit", str(FEW), "--output_path", tmp_path / "lm_eval"]
    subprocess.run([program, *words], cwd=ROOT, check=True, capture_output=True)
    theirs, = (tmp_path / "lm_eval").rglob("results_*.json")
    found = json.loads(theirs.read_text())["results"]["tiny_sums"]
    assert found["exact_match,answer"] == evaluated(tmp_path)["accuracy"]


def test_evaluate_runs(tmp_path):
    assert evaluated(tmp_path)["num_examples"] == FEW


def evaluated(folder):
    """The summary of the page's command, on FEW problems."""
    words = [*command("python evaluate.py ")[1:], f"limit={FEW}", f"output={folder}/evaluated"]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
    path, = (folder / "evaluated").glob("*_summary.json")
    return json.loads(path.read_text())
