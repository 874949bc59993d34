"""Write into the pages of this folder what comes from algorithms/, so that they show the code as it is:

    python docs/learn/build.py            # writes
    python docs/learn/build.py --check    # writes nothing; an error names a page that differs

A page has blocks, each from a comment to `<!-- end -->`. What stands between them is generated:

    <!-- code dpo.dpo_loss -->            a function as it stands in its file
    <!-- equations dpo                    a table: an equation beside the statement that computes it, which
    $m = ...$ :: margins =                is found by its beginning, in one function or in the whole file
    -->
    <!-- diffs                            a table: the command that compares two files, the number of code
    dpo ipo :: a squared distance         lines that the second one adds, and what they are
    -->
"""
import ast
import difflib
import io
import re
import sys
import tokenize
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from generated import write_or_check  # noqa: E402

from data.errors import UserError, run_program  # noqa: E402

BLOCK = re.compile(r"(<!-- (code|equations|diffs)\b(.*?)-->\n)(.*?)(<!-- end -->)", re.DOTALL)
HEADS = {      # of the tables: (equations, diffs), by whether the page is Chinese
    False: (("equation", "code"), ("command", "code lines", "what changes")),
    True: (("公式", "代码"), ("命令", "代码行数", "改动")),
}
NOT_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER)
DOCUMENTED = (ast.Module, ast.FunctionDef, ast.ClassDef)


# ---- the algorithm files -----------------------------------------------------------------------------

@lru_cache
def source_of(name: str) -> str:
    path = ROOT / "algorithms" / f"{name}.py"
    if not path.is_file():
        raise UserError(f"algorithms/{name}.py is not there; fix: correct its name in the page")
    return path.read_text(encoding="utf-8")


def function(name: str) -> str:
    """The source of FILE.FUNCTION, from its `def` to its last line."""
    file, _, wanted = name.partition(".")
    source = source_of(file)
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == wanted:
            return "\n".join(source.splitlines()[node.lineno - 1:node.end_lineno])
    raise UserError(f"algorithms/{file}.py has no function {wanted}; fix: correct it in the page")


def on_one_line(source: str) -> str:
    """A statement without its comments and line breaks."""
    lines = []
    for line in source.splitlines():
        lines.append(re.sub(r"\s*#.*", "", line).strip())
    joined = " ".join(lines)
    return re.sub(r"(?<=[(\[]) | (?=[)\]])", "", joined)


@lru_cache
def statements(file: str) -> list[str]:
    """The statements of algorithms/<file>.py without others inside, each on one line."""
    source = source_of(file)
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.Expr, ast.Return)):
            found.append(on_one_line("\n".join(lines[node.lineno - 1:node.end_lineno])))
    return found


def statement(file: str, start: str) -> str:
    """The only statement of algorithms/<file>.py that begins with `start`, on one line."""
    found = {line for line in statements(file) if line.startswith(start)}
    if len(found) != 1:
        raise UserError(f"algorithms/{file}.py has {len(found)} statements that begin with {start!r}; "
                        "fix: write more of it, or what the file says now, in the page")
    return found.pop()


@lru_cache
def code_lines(name: str) -> list[str]:
    """The code lines of a file without comments and docstrings, their tokens joined by spaces."""
    source = source_of(name)
    documented = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            documented.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE and token.start[0] not in documented:
            lines.setdefault(token.start[0], []).append(token.string)
    return [" ".join(tokens) for tokens in lines.values()]


def num_added(old: str, new: str) -> int:
    """How many code lines of `new` are not in `old` at their place."""
    matcher = difflib.SequenceMatcher(None, code_lines(old), code_lines(new), autojunk=False)
    same = sum(block.size for block in matcher.get_matching_blocks())
    return len(code_lines(new)) - same


# ---- the blocks --------------------------------------------------------------------------------------

def table(head: tuple, rows: list[tuple]) -> str:
    """A table in Markdown. A `|` inside a cell is escaped."""
    lines = []
    for row in [head, ("---",) * len(head), *rows]:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def equations(file: str, lines: list[str], head: tuple) -> str:
    rows = []
    for line in lines:
        equation, _, start = line.partition(" :: ")
        rows.append((equation, f"`{statement(file, start)}`"))
    return table(head, rows)


def diffs(lines: list[str], head: tuple) -> str:
    rows = []
    for line in lines:
        names, _, words = line.partition(" :: ")
        old, new = names.split()
        rows.append((f"`diff algorithms/{old}.py algorithms/{new}.py`", str(num_added(old, new)), words))
    return table(head, rows)


def built(text: str, is_chinese: bool) -> str:
    """The page with its blocks made anew."""
    equation_head, diff_head = HEADS[is_chinese]

    def filled(match):
        start, kind, wanted, _, end = match.groups()
        first, *lines = wanted.strip(" ").splitlines() or [""]
        if kind == "code":
            made = f"```python\n{function(first.strip())}\n```\n"
        elif kind == "equations":
            made = equations(first, lines, equation_head)
        else:
            made = diffs(lines, diff_head)
        return f"{start}\n{made}\n{end}"

    return BLOCK.sub(filled, text)


def main(argv: list[str]) -> None:
    if argv not in ([], ["--check"]):
        return print(__doc__)
    for read in (source_of, statements, code_lines):
        read.cache_clear()      # the files may have changed since they were read
    for page in sorted(HERE.glob("*.md")):
        text = built(page.read_text(encoding="utf-8"), is_chinese=page.stem.endswith("_zh"))
        write_or_check(page, text, bool(argv), "docs/learn/build.py")


if __name__ == "__main__":
    run_program(main)
