"""What a reader meets: tokens, widths, the diffs that are papers, and the order of every algorithm file."""
import ast
import difflib
import io
import re
import tokenize
import unicodedata

import pytest
from helpers import ROOT, tracked

FOLDERS = ("algorithms", "engine", "model", "rewards", "data", "benchmark", "")
SPACE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
         tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.ClassDef)
HEADINGS = ("Paper", "Formula", "Symbols", "Shapes", "Trains", "Data", "Normalised by", "Metrics", "Step 0",
            "Differences from the paper", "Run")


def files_in(folder):
    """The Python files that git knows in a folder, not below it."""
    return [path for path in tracked(f"{folder}/*.py" if folder else "*.py") if path.parent == ROOT / folder]


def docstring_lines(tree):
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            first = node.body[0]
            lines.update(range(first.lineno, first.end_lineno + 1))
    return lines


def code_of(path):
    """{line number: its tokens} without comments, docstrings and blank lines."""
    source = path.read_text(encoding="utf-8")
    documented = docstring_lines(ast.parse(source))
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in SPACE or token.start[0] in documented:
            continue
        lines.setdefault(token.start[0], []).append(token.string)
        for number in range(token.start[0] + 1, token.end[0] + 1):      # a text of several lines
            lines.setdefault(number, [])
    return lines


def num_tokens(path):
    return sum(len(tokens) for tokens in code_of(path).values())


def comprehensions_in(node):
    return [part for part in ast.walk(node) if isinstance(part, COMPREHENSIONS)]


# ---- density -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_tokens_and_comprehensions(folder):
    paths = files_in(folder)
    assert paths
    lines = tokens = comprehensions = 0
    for path in paths:
        lines += len(code_of(path))
        tokens += num_tokens(path)
        comprehensions += len(comprehensions_in(ast.parse(path.read_text(encoding="utf-8"))))
    assert tokens / lines <= 10
    assert comprehensions / lines <= 0.03, (comprehensions, lines)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_comprehension_is_nested(folder):
    found = []
    for path in files_in(folder):
        for node in comprehensions_in(ast.parse(path.read_text(encoding="utf-8"))):
            if len(comprehensions_in(node)) > 1 or len(node.generators) > 1:
                found.append(f"{path.name}:{node.lineno}")
    assert not found


@pytest.mark.parametrize("folder", FOLDERS)
def test_lines_and_functions_are_short(folder):
    found = []
    for path in files_in(folder):
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.split("\n"), 1):
            wide = [character for character in line if unicodedata.east_asian_width(character) in "WF"]
            if len(line) + len(wide) > 110:
                found.append(f"{path.name}:{number}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                found.append(f"{path.name}: {node.name}")
    assert not found


# ---- what must be read ---------------------------------------------------------------------------------

@pytest.mark.parametrize("algorithm, most", [("DPO", 7_500), ("GRPO", 13_000)])
def test_reading_paths(algorithm, most):
    """The files that README names for it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    line, = re.findall(rf"^{algorithm} is understood from (.*)$", readme, re.MULTILINE)
    names = re.findall(r"`([\w/]+\.py)`", line)
    assert f"algorithms/{algorithm.lower()}.py" in names and "engine/loop.py" in names
    assert sum(num_tokens(ROOT / name) for name in names) <= most


# ---- a diff is a paper ---------------------------------------------------------------------------------

def code_lines(name):
    lines = code_of(ROOT / "algorithms" / f"{name}.py")
    return [" ".join(tokens) for tokens in lines.values()]


def added(old, new):
    """The code lines of algorithms/<new>.py that are not in <old>.py at their place."""
    difference = difflib.ndiff(code_lines(old), code_lines(new))
    return [line[2:] for line in difference if line.startswith("+ ")]


@pytest.mark.parametrize("old, new, most", [
    ("grpo", "dr_grpo", 6), ("dpo", "ipo", 12), ("grpo", "gspo", 13), ("grpo", "cispo", 10),
    ("sft", "dft", 6)])
def test_a_diff_is_short(old, new, most):
    assert len(added(old, new)) <= most, added(old, new)


DAPO = {
    "clip-higher": ["epsilon_high : Positive = 0.28", "epsilon_high = 0.28"],
    "dynamic sampling": ["dynamic_sample", "max_resample_times", "flat"],
    "token-level loss": ["( losses . sum ( ) / step . num_tokens ) . backward ( )"],
    "overlong penalty and filter": [
        "soft_overlong", "max_completion_length - cache", "longest", "penalties", "rollout . lengths",
        "rewards = rollout . rewards", "group_advantages ( rewards )", "mask_truncated_completions", "skip"],
}
RPO = {
    "the likelihood": ["nll", "rpo_alpha", "token_logps", "loss = losses . sum ( ) / step . num_examples"],
    "a reference is needed": ["return True", "reference_logps = batch . sum ( reference ( batch ) )"],
    "always sums": ["policy . tolerance ,"],
}
APO = {
    "a term for each response": ["chosen_rewards ) . sigmoid ( ) + rejected_rewards . sigmoid ( )"],
    "a reference is needed": RPO["a reference is needed"],
    "always sums": ["logps = batch . sum ( policy ( batch ) )", "policy . tolerance ,"],
}


@pytest.mark.parametrize("old, new, changes", [
    ("grpo", "dapo", DAPO), ("dpo", "rpo", RPO), ("dpo", "apo", APO)])
def test_a_diff_is_the_paper(old, new, changes):
    """Every added line belongs to a named change, and every change is there. The loss's name and the imports
    of option types differ besides."""
    lines = [line for line in added(old, new) if not line.startswith("from engine . options")]
    found = set()
    for line in lines:
        names = [name for name, parts in changes.items() if any(part in line for part in parts)]
        assert names or re.search(rf"{new}_\w*loss \(", line), line
        found.update(names)
    assert found == set(changes)


# ---- every algorithm file ------------------------------------------------------------------------------

@pytest.mark.parametrize("path", files_in("algorithms"), ids=lambda path: path.stem)
def test_an_algorithm_file_has_its_order(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = re.findall(r"^([A-Z][\w ]*):", ast.get_docstring(tree).partition("\n\n")[2], re.MULTILINE)
    assert tuple(found) == HEADINGS
    names = [node.name for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    assert names[0] == "Config" and names[-1] == "train"
    arguments = [ast.unparse(argument) for argument in tree.body[-1].args.args]
    assert arguments == ["engine: Engine", "config: Config"]
