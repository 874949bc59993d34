"""docs/learn: what its pages show is the code, their exercises and commands work, the notebook runs."""
import importlib
import importlib.util
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch
from helpers import (
    ONLINE,
    ROOT,
    ROWS,
    algorithms_of,
    metrics,
    pair_rows,
    prompt_rows,
    refused,
    sft_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from test_reading import added
from test_readme import blocks, read, structure

from engine.config import load_config

FOLDER = ROOT / "docs" / "learn"
PAGES = sorted(FOLDER.glob("*.md"))
ENGLISH = [page for page in PAGES if not page.stem.endswith("_zh")]
STEPS = ["sft", "dpo", "preference", "rm", "ppo", "grpo", "kin", "distill"]
NOTEBOOK = FOLDER / "alignment.ipynb"


def script(name):
    """The module docs/learn/<name>.py."""
    spec = importlib.util.spec_from_file_location(f"learn_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


build, curves = script("build"), script("curves")


# ---- the pages ----

def test_the_pages_show_the_code():
    result = subprocess.run([sys.executable, FOLDER / "build.py", "--check"], cwd="/", text=True,
                            capture_output=True)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("algorithm, old, new, page", [
    ("dpo", "chosen_rewards - rejected_rewards", "rejected_rewards - chosen_rewards", "dpo"),
    ("dpo", "# (B,) eq. 7", "# (B,) eq. 8", "dpo"),
    ("ipo", "    losses = (chosen", "    bonus = 0\n    losses = (chosen", "README"),
])
def test_a_change_of_the_code_is_found(tmp_path, monkeypatch, algorithm, old, new, page):
    """And the script writes it into the page, so that nothing differs any more."""
    shutil.copytree(ROOT / "algorithms", tmp_path / "algorithms")
    pages = tmp_path / "pages"
    pages.mkdir()
    for name in (page, f"{page}_zh"):
        shutil.copy(FOLDER / f"{name}.md", pages)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "HERE", pages)
    build.main(["--check"])
    source = tmp_path / "algorithms" / f"{algorithm}.py"
    assert old in read(source)
    source.write_text(read(source).replace(old, new))
    assert "does not show the code as it is" in refused(build.main, ["--check"])
    build.main([])
    build.main(["--check"])


def test_a_statement_that_is_not_there_is_named():
    assert "has 0 statements that begin with 'nothing'" in refused(build.statement, "dpo", "nothing")
    assert "no function" in refused(build.function, "dpo.nothing")
    assert "not there" in refused(build.function, "nothing.dpo_loss")


@pytest.mark.parametrize("old, new", [("dpo", "ipo"), ("grpo", "dapo"), ("ppo", "reinforce_pp")])
def test_the_counts_of_the_family_tree(old, new):
    """Beside the count of another test; both pages have it."""
    for page in (FOLDER / "README.md", FOLDER / "README_zh.md"):
        command = f"diff algorithms/{old}.py algorithms/{new}.py"
        count, = re.findall(rf"^\| `{command}` \| (\d+) \|", read(page), re.M)
        assert int(count) == len(added(old, new))


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)
def test_both_languages_have_the_same_structure(page):
    chinese = page.with_name(f"{page.stem}_zh.md")
    for ours, theirs in zip(structure(read(page)), structure(read(chinese)), strict=True):
        assert ours == theirs


def test_there_is_a_page_for_every_step():
    assert {page.stem for page in ENGLISH} == {"README", *STEPS}
    for name in STEPS:
        headings = re.findall(r"^## (.*)$", read(FOLDER / f"{name}.md"), re.M)
        assert headings == ["Equation and code", "Symbols", "Run it", "The curve to expect",
                            "What to look at", "What goes wrong", "Exercises"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files_exist(page):
    text = read(page)
    targets = re.findall(r"\]\(([^)#:]+)\)", text)
    assert targets and [name for name in targets if not (FOLDER / name).exists()] == []
    named = re.findall(r"(?<![\w/-])(?:algorithms|docs|example|benchmark|engine)/[\w/.-]+\.(?:py|yml)", text)
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    assert not re.search(r"@[A-Z]+@", text)


def commands():
    """The words after `python train.py` of every command in the pages and their tables."""
    found = set()
    for page in PAGES:
        found.update(re.findall(r"python train\.py ([^`\n]+)", read(page)))
    return sorted(found)


@pytest.mark.parametrize("command", commands())
def test_a_command_has_a_valid_configuration(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_config(shlex.split(command)).config is not None


# ---- the curves ----

@pytest.mark.parametrize("name", STEPS)
def test_a_picture_is_drawn_as_its_page_says(name, tmp_path, monkeypatch):
    """The stored picture has as many lines as runs, and the script draws one like it from made runs."""
    picture = curves.PICTURES[name]
    stored = ElementTree.fromstring(read(FOLDER / f"{name}.svg"))
    monkeypatch.setattr(curves, "ROOT", tmp_path)
    for run in picture.runs:
        folder = tmp_path / "runs" / run
        folder.mkdir(parents=True)
        write_jsonl(folder / "metrics.jsonl", [
            {"step": step, "split": picture.split, picture.metric: 0.1 * step} for step in (1, 5, 9)])
    for root in (stored, ElementTree.fromstring(curves.svg(picture))):
        lines = list(root.iter("{http://www.w3.org/2000/svg}polyline"))
        assert len(lines) == len(picture.runs)


def test_the_script_writes_the_named_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(curves, "HERE", tmp_path)
    monkeypatch.setattr(curves, "svg", lambda picture: picture.title)
    curves.main(["sft"])
    assert [path.name for path in tmp_path.iterdir()] == ["sft.svg"]
    assert "is no page" in refused(curves.main, ["nothing"])


# ---- the exercises ----

def exercises(page):
    """The diffs of a page as (algorithm, its hunks); a line of three dots is between two hunks."""
    found = []
    for block in blocks(read(page)):
        if block.startswith("```diff"):
            first, *lines = block.splitlines()[1:-1]
            name, = re.fullmatch(r"--- algorithms/(\w+)\.py", first).groups()
            hunks = [[]]
            for line in lines:
                if line == "...":
                    hunks.append([])
                else:
                    hunks[-1].append(line)
            found.append((name, hunks))
    return found


def changed(algorithm, hunks):
    """The source of an algorithm after these hunks, each of which fits at one place."""
    source = read(ROOT / "algorithms" / f"{algorithm}.py")
    for lines in hunks:
        old = "".join(f"{line[1:]}\n" for line in lines if line[0] in " -")
        new = "".join(f"{line[1:]}\n" for line in lines if line[0] in " +")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


@pytest.mark.parametrize("name", STEPS)
def test_exercises_fit_the_code(name):
    found = exercises(FOLDER / f"{name}.md")
    assert found and len(re.findall(r"^\*\*\d\. ", read(FOLDER / f"{name}.md"), re.M)) == 3
    for algorithm, hunks in found:
        source = changed(algorithm, hunks)
        compile(source, algorithm, "exec")
        assert max(len(line) for line in source.splitlines()) <= 110
        num_changed = sum(line[0] in "+-" for lines in hunks for line in lines)
        assert num_changed <= 8


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(algorithm, rows, source=None, key=value, ...) -> metrics of two updates, of a copy with that
    source where one is given."""
    folder = algorithms_of(tmp_path, monkeypatch)
    model = tiny_model(tmp_path / "model")

    def train(algorithm, rows, source=None, **values):
        name = f"changed_{algorithm}" if source else f"plain_{algorithm}"
        (folder / f"{name}.py").write_text(source or read(ROOT / "algorithms" / f"{algorithm}.py"))
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        keys = dict(algorithm=name, model=model, data=data, output=tmp_path / f"run-{name}", batch_size=4,
                    max_length=200, max_steps=2, lr=1e-3, shuffle="false", save_every="null")
        train_here(write_config(tmp_path / f"{name}.yml", **keys | values))
        return metrics(tmp_path / f"run-{name}")
    return train


def all_exercises():
    found = []
    for name in STEPS:
        for number, (algorithm, hunks) in enumerate(exercises(FOLDER / f"{name}.md")):
            found.append(pytest.param(algorithm, hunks, id=f"{name}-{number}"))
    return found


@pytest.mark.parametrize("algorithm, hunks", all_exercises())
def test_an_exercise_trains(train, algorithm, hunks):
    rows = ROWS[algorithm](8)
    made = train(algorithm, rows, changed(algorithm, hunks), **ONLINE.get(algorithm, {}))
    assert [row["step"] for row in made if row["split"] == "train"] == [1, 2]


ALONE = dict(ONLINE["grpo"], num_iterations=1, num_mini_batches=1, beta=0, batch_size=2)
SUMS = dict(beta=0.5, average_log_prob="false")


@pytest.mark.parametrize("page, number, other, rows, keys, of_other", [
    ("sft", 0, "dft", sft_rows, {}, {}),
    ("dpo", 0, "ipo", pair_rows, dict(beta=0.5), SUMS),
    ("grpo", 0, "dr_grpo", prompt_rows, ALONE, ALONE),
])
def test_an_exercise_is_another_algorithm(train, page, number, other, rows, keys, of_other):
    """Its losses and gradients are those of the file that the page names."""
    algorithm, hunks = exercises(FOLDER / f"{page}.md")[number]
    made = train(algorithm, rows(8), changed(algorithm, hunks), **keys)
    wanted = train(other, rows(8), **of_other)
    for ours, theirs in zip(made, wanted, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7)
    assert made[0]["grad_norm"] > 1e-4


def test_rpo_without_its_likelihood_is_dpo(train):
    of_rpo, of_dpo = train("rpo", pair_rows(8), rpo_alpha=0), train("dpo", pair_rows(8))
    for ours, theirs in zip(of_rpo, of_dpo, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(page, number) -> the module of a changed algorithm."""
    folder = algorithms_of(tmp_path, monkeypatch)

    def made(page, number):
        algorithm, hunks = exercises(FOLDER / f"{page}.md")[number]
        (folder / f"{page}_{number}.py").write_text(changed(algorithm, hunks))
        return importlib.import_module(f"algorithms.{page}_{number}")
    return made


def test_closed_forms_of_changed_losses(made):
    chosen, rejected, zero = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 0.5]), torch.zeros(2)
    losses, _ = made("rm", 0).rm_loss(chosen, rejected)
    assert losses.tolist() == [0.0, 2.5]
    losses, _ = made("preference", 1).apo_zero_loss(chosen, rejected, zero, zero, 1.0)
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    assert losses.tolist() == pytest.approx([sigmoid(2) + sigmoid(-1.5), sigmoid(-1) + sigmoid(1.5)])
    advantages = made("kin", 0).leave_one_out(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert advantages.tolist() == pytest.approx([3 / 4 * 1, *[3 / 4 * -1 / 3] * 3])
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    both = made("distill", 0).distill_loss(student, teacher, 1).sum().item()
    forward = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    backward = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert both == pytest.approx(forward + backward)


def test_the_advantages_that_the_ppo_page_asks_for():
    from algorithms.ppo import gae
    rewards, values = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.5])
    assert gae(rewards, values, lam=0)[0].tolist() == [0, 0, 0.5]
    assert gae(rewards, values, lam=1)[0].tolist() == [0.5, 0.5, 0.5]


# ---- the notebook ----

def test_the_notebook_has_no_outputs():
    notebook = json.loads(read(NOTEBOOK))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            compile("".join(cell["source"]), "cell", "exec")


def test_the_notebook_runs(tmp_path):
    """Its cells compare by themselves what they compute by hand with the project's functions. Where Jupyter
    is not installed they run as one script."""
    notebook = json.loads(read(NOTEBOOK))
    try:
        import ipykernel  # noqa: F401
        import nbclient
        import nbformat
    except ImportError:
        cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        source = "\n\n".join("".join(cell["source"]) for cell in cells)
        result = subprocess.run([sys.executable, "-c", source], cwd=FOLDER, text=True, capture_output=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, result.stderr[-2000:]
        return
    made = nbformat.reads(json.dumps(notebook), as_version=4)
    nbclient.NotebookClient(made, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert any("image/svg+xml" in output.get("data", {}) for output in made.cells[-2]["outputs"])
