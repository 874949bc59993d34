"""Each English page and its Chinese one say the same things in the same order, and what they name exists and
runs."""
import importlib
import math
import re
import shlex
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers import (
    ONLINE,
    ROOT,
    algorithms_of,
    metrics,
    pair_rows,
    prompt_rows,
    tiny_model,
    tracked,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import sample
from engine import definition, options
from engine.config import load_config
from engine.grid import grid_of, members_of
from engine.results import read_settings

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README_zh.md"
GUIDE = ROOT / "docs" / "adding-an-algorithm.md"
PAIRS = [(ENGLISH, CHINESE)]
for page in sorted(ROOT.glob("docs/*_zh.md")):
    PAIRS.append((page.with_name(page.name.replace("_zh", "")), page))
PAGES = [path for pair in PAIRS for path in pair]


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(text):
    """The code blocks, verbatim."""
    return re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)


def structure(text):
    """Headings' levels, code blocks and, of every table row, the number of cells and its code spans."""
    outside = re.sub(r"^```.*?^```", "```", text, flags=re.MULTILINE | re.DOTALL)
    headings, rows = [], []
    for line in outside.splitlines():
        if line.startswith("#"):
            headings.append(line.split(" ")[0])
        if line.startswith("|"):
            rows.append((line.count("|"), re.findall(r"`[^`]+`", line)))
    return headings, blocks(text), rows


def files_of(text, algorithm):
    """The files from which an algorithm is understood, as the page lists them."""
    lines = []
    for line in text.splitlines():
        if f"`algorithms/{algorithm}.py`" in line and "`data/pack.py`" in line:
            lines.append(line)
    assert len(lines) == 1
    return re.findall(r"`([\w/]+\.py)`", lines[0])


def test_every_page_has_both_languages():
    assert set(ROOT.glob("docs/*.md")) <= set(PAGES)
    assert GUIDE in PAGES


@pytest.mark.parametrize("english, chinese", PAIRS, ids=lambda path: path.name)
def test_both_have_the_same_structure(english, chinese):
    for ours, theirs in zip(structure(read(english)), structure(read(chinese)), strict=True):
        assert ours == theirs


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_what_is_named_exists_and_nothing_is_left_to_fill_in(page):
    text = read(page)
    assert "@@" not in text
    rooms = "algorithms|engine|model|rewards|data|docs|tests|example|benchmark"
    pattern = rf"(?<![\w/-])(?:{rooms})/[\w/.-]+\.(?:py|yml|md)\b"
    named = set(re.findall(pattern, text)) - {"algorithms/my_dpo.py"}      # the user's own
    assert [name for name in named if not (ROOT / name).exists()] == []
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("english, chinese", PAIRS, ids=lambda path: path.name)
def test_every_page_is_reached_and_leads_to_the_other_language(english, chinese):
    """Its third line links the other language, and of a page in docs/ the README of its own."""
    for page, other, home in [(english, chinese, ENGLISH), (chinese, english, CHINESE)]:
        links = read(page).splitlines()[2]
        assert f"]({other.name})" in links
        if page != home:
            assert f"](../{home.name})" in links
            assert f"](docs/{page.name})" in read(home)


@pytest.mark.parametrize("home, page", [(ENGLISH, "results.md"), (CHINESE, "results_zh.md")])
def test_the_results_of_the_readme_are_rows_of_the_whole_table(home, page):
    whole = {}
    for line in read(ROOT / "docs" / page).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9:
            whole.setdefault(cells[0], cells)
    table = read(home).partition("| SmolLM2 |")[2].partition("\n\n")[0]
    rows = table.splitlines()[2:]
    assert len(rows) > 10
    for line in rows:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        _, right, exact, _, greedy, _, pairs, divergence, _ = whole[name]
        assert cells == [right, exact, greedy, pairs, divergence], name


def commands_of(program):
    """The words behind this program in all commands of the pages."""
    found = set()
    for page in [*PAGES, *ROOT.glob("docs/learn/*.md")]:
        for block in blocks(read(page)):
            if block.startswith("```bash"):
                found.update(re.findall(rf"^(?:python|torchrun .*?|.*&& python) {program} (.*)", block, re.M))
    return sorted(found)


@pytest.mark.parametrize("command", commands_of("train.py"))
def test_a_training_command_of_the_pages_names_keys_and_values_that_there_are(command, monkeypatch):
    """vLLM counts as installed."""
    monkeypatch.setattr(options, "find_spec", lambda name: name)
    words = shlex.split(command)
    if grid := grid_of(words):
        assert len(members_of(words, grid)[0]) > 1
    else:
        assert load_config(words).common.model


@pytest.mark.parametrize("program, settings", [
    ("evaluate.py", evaluate.Config), ("sample.py", sample.Config)])
def test_other_commands_of_the_pages_name_keys_that_there_are(program, settings):
    commands = commands_of(program)
    assert commands
    for command in commands:
        assert read_settings(shlex.split(command), settings, program).data


@pytest.mark.parametrize("script", ["docs/options/build.py", "docs/pictures/build.py"])
def test_what_is_generated_is_what_the_code_says(script):
    """`docs/pictures` reads the mask from the attention itself, counts the rows of an update, and finds the
    lines of dpo.py that it shows."""
    done = subprocess.run([sys.executable, script, "--check"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_algorithm_is_in_the_table():
    """And each has its examples."""
    names = [path.stem for path in tracked("algorithms/*.py") if not path.stem.startswith("_")]
    assert len(names) >= 18
    for name in names:
        row = f"| [`algorithms/{name}.py`](algorithms/{name}.py) |"
        assert read(ENGLISH).count(row) == read(CHINESE).count(row) == 1
        assert (ROOT / "example" / f"tiny-{name}.yml").exists()
        assert (ROOT / "example" / f"qwen2.5-{name}.yml").exists()


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
def test_both_list_the_same_files_to_read(algorithm):
    assert files_of(read(ENGLISH), algorithm) == files_of(read(CHINESE), algorithm)


def test_a_file_that_is_still_being_written_is_not_tracked(tmp_path, monkeypatch):
    """With git it is left out; without git every file counts."""
    import helpers
    monkeypatch.setattr(helpers, "ROOT", tmp_path)
    (tmp_path / "algorithms").mkdir()
    done, draft = tmp_path / "algorithms" / "done.py", tmp_path / "algorithms" / "draft.py"
    done.touch()
    draft.touch()
    assert tracked("algorithms/*.py") == [done, draft]
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "algorithms/done.py"], cwd=tmp_path, check=True)
    assert tracked("algorithms/*.py") == [done]


# ---- docs/adding-an-algorithm.md ----

@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(name, source, rows, key=value, ...) -> the metrics of a run of algorithms/<name>.py with that
    source."""
    folder = algorithms_of(tmp_path, monkeypatch)

    def train(name, source, rows, **values):
        (folder / f"{name}.py").write_text(source)
        model = tiny_model(tmp_path / "model")
        data = write_jsonl(tmp_path / "rows.jsonl", rows)
        keys = dict(
            algorithm=name, model=model, data=data, output=tmp_path / name, batch_size=5, max_length=200,
            lr=1e-3, shuffle="false", save_every="null")
        train_here(write_config(tmp_path / f"{name}.yml", **keys | values))
        return metrics(tmp_path / name)
    return train


def code(number):
    """The guide's Python block of this number, from 0."""
    found = [block for block in blocks(read(GUIDE)) if block.startswith("```python")]
    return found[number].removeprefix("```python\n").removesuffix("```")


def test_the_whole_file_of_the_guide_runs(train):
    """At step 0 all margins are 0, so that the loss is the mean weight, less the bonus."""
    rows = [row | {"weight": 1 + i % 3} for i, row in enumerate(pair_rows(10))]
    held_out = write_jsonl(definition.ROOT / "held-out.jsonl", rows[:4])
    plain = train("from_the_guide", code(0), rows, entropy_coef=0, eval_data=held_out)
    assert [row["step"] for row in plain] == [1, 2]
    assert plain[0]["loss"] == pytest.approx((1 + 2 + 3 + 1 + 2) / 5, rel=1e-6)
    with_bonus = train("with_bonus", code(0), rows, entropy_coef=0.5)
    assert plain[0]["loss"] - 0.5 * 6 < with_bonus[0]["loss"] < plain[0]["loss"] - 0.5


def softplus(x):
    return math.log(1 + math.exp(x))


def hinge(margin, weight, swapped):
    return (1 - swapped) * max(0, 1 - margin) + swapped * max(0, 1 + margin)


def robust(margin, weight, swapped):
    return ((1 - swapped) * softplus(-margin) - swapped * softplus(margin)) / (1 - 2 * swapped)


def weighted(margin, weight, swapped):
    return weight * ((1 - swapped) * softplus(-margin) + swapped * softplus(margin))


def exercise(number):
    """The lines of the guide's diff of this number, from 0."""
    found = [block for block in blocks(read(GUIDE)) if block.startswith("```diff")]
    return found[number].splitlines(keepends=True)[1:-1]


def applied(lines, source):
    """The source after a diff: "-" is before an old line, "+" before a new one, " " before others."""
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert source.count(old) == 1
    return source.replace(old, new)


def slope(loss, margin, weight, swapped, size=1e-4):
    return (loss(margin + size, weight, swapped) - loss(margin - size, weight, swapped)) / (2 * size)


def plain(margin, weight, swapped):
    return weighted(margin, 1, swapped)


MARGINS = [-3, -1.5, -0.5, 0, 0.5, 1.5, 3]       # on both sides of the hinge's corners


@pytest.mark.parametrize("number, loss, of_margin", [
    (0, hinge, hinge), (1, robust, robust), (2, weighted, plain)])
def test_an_exercise_of_the_guide(train, number, loss, of_margin):
    """One pair per update: its loss from its margin, and at a margin of 0 its gradient beside that of dpo.
    Then the loss function alone, values and gradients."""
    lines = exercise(number)
    assert sum(line[0] in "+-" for line in lines) <= 6
    name, source = f"exercise_{number}", read(ROOT / "algorithms" / "dpo.py")
    keys = dict(batch_size=1, max_steps=2, label_smoothing=0.2, beta=0.5)
    weights = [3, 2]
    rows = [row | {"weight": weight} for row, weight in zip(pair_rows(2), weights)]
    made, of_dpo = train(name, applied(lines, source), rows, **keys), train("plain_dpo", source, rows, **keys)
    for row, weight in zip(made, weights, strict=True):
        assert row["loss"] == pytest.approx(loss(row["rewards/margins"], weight, 0.2), rel=1e-5)
    assert made[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and made[1]["rewards/margins"] != 0
    steeper = slope(loss, 0, weights[0], 0.2) / slope(plain, 0, 1, 0.2)
    assert made[0]["grad_norm"] == pytest.approx(steeper * of_dpo[0]["grad_norm"], rel=1e-5)

    margins = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros_like(margins)
    dpo_loss = importlib.import_module(f"algorithms.{name}").dpo_loss
    losses, _ = dpo_loss(margins, zero, zero, zero, 1.0, 0.2)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([of_margin(margin, 1, 0.2) for margin in MARGINS])
    slopes = [slope(of_margin, margin, 1, 0.2) for margin in MARGINS]
    assert margins.grad.tolist() == pytest.approx(slopes, rel=1e-6)


def test_a_weight_counts_like_copies_of_a_pair(train):
    """Three rows in both: pairs with the weights 2, 1 and 0, and their copies in plain dpo."""
    source = read(ROOT / "algorithms" / "dpo.py")
    first, second, third = pair_rows(3)
    rows = [first | {"weight": 2}, second | {"weight": 1}, third | {"weight": 0}]
    keys = dict(batch_size=3, max_steps=1)
    made, = train("weighted_dpo", applied(exercise(2), source), rows, **keys)
    copies, = train("plain_dpo", source, [first, first, second], **keys)
    for name in ("loss", "grad_norm"):
        assert made[name] == pytest.approx(copies[name], rel=1e-5)


def test_the_online_lines_of_the_guide_run(train):
    """In a copy of grpo.py: a reference that follows the policy has a smaller KL than one that stays."""
    source = read(ROOT / "algorithms" / "grpo.py")
    once, extra = code(1).splitlines()
    for line in (once, extra):
        assert re.sub(r" +#.*", "", line) in source.replace(" if reference else None", "")
    lines = code(2).splitlines()
    created, used, follow = lines[:3], lines[3:5], lines[5:]
    reference = re.search(r"^    reference = .*\n", source, re.MULTILINE).group()
    scored = re.search(r"^ +engine.score\(rollout\) .*\n", source, re.MULTILINE).group()
    cleared = re.search(r"^ +optimizer.zero_grad\(\)\n", source, re.MULTILINE).group()
    edited = source.replace(reference, textwrap.indent("\n".join(created) + "\n", 4 * " "))
    edited = edited.replace(scored, textwrap.indent("\n".join(used) + "\n", 8 * " ") + scored)
    added = textwrap.indent("\n".join(follow) + "\n", 12 * " ").replace("0.01", "1.0")
    edited = edited.replace(cleared, cleared + added)
    keys = ONLINE["grpo"] | dict(num_iterations=1, num_mini_batches=1, beta=0.5, max_steps=3, batch_size=2)
    fixed = train("fixed", source, prompt_rows(6), **keys)
    following = train("following", edited, prompt_rows(6), **keys)
    assert fixed[2]["kl"] > 1e-6 > abs(following[2]["kl"])


# ---- CONTRIBUTING.md ----

def test_the_twenty_lines_of_contributing_run(train, tmp_path):
    """The first update's loss is that of mean log-probs which the plain model gives for the same bytes."""
    indented, = re.findall(r"^   ```python\n(.*?)^   ```", read(ROOT / "CONTRIBUTING.md"), re.M | re.S)
    source = textwrap.dedent(indented)
    lines = [line for line in source.splitlines() if line]
    assert len(lines) <= 20
    rows = pair_rows(5)
    first, = train("twenty_lines", source, rows, max_steps=1)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    losses = []
    for row in rows:
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt = tokenizer(text).input_ids
        means = []
        for side in ("chosen", "rejected"):
            response = tokenizer(row[side][0]["content"]).input_ids + [tokenizer.eos_token_id]
            logits = lm(torch.tensor([prompt + response])).logits[0, len(prompt) - 1:-1]
            logps = logits.log_softmax(-1)[range(len(response)), response]
            means.append(logps.mean().item())
        losses.append(softplus(-2.0 * (means[0] - means[1])))
    assert first["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
