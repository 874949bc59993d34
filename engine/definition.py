"""A class out of a Python file, without running the rest of the file.

`python train.py x.yml lrr=1` needs the fields of an algorithm's Config, and torch takes seconds to import.
The Config does not use torch: `class_of` runs the class and those statements of its file that it names,
imports among them. A class that is imported from another file of this project is found in the same way, so
that `class Config(Sampling)` does not run engine/options.py either.
"""
import ast
import copy
import functools
import importlib
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@functools.cache
def class_of(module: str, name: str) -> type:
    """The class `name` of `module` ("algorithms.dpo"): an object of its own, beside the one that importing
    the module makes. Raises what running these statements raises; SyntaxError where the file is not Python,
    AttributeError where it has no such class."""
    path = path_of(module)
    body = statements(path)
    definitions = [statement for statement in body if is_class(statement, name)]
    if not definitions and not sets(body, name):
        raise AttributeError(f"{path} has no {name}")
    if not definitions:                      # made in another way
        return getattr(importlib.import_module(module), name)
    part = types.ModuleType(f"{module} as far as {name} needs it")
    part.__file__ = str(path)
    part.__package__ = module.rpartition(".")[0]
    sys.modules[part.__name__] = part        # where dataclass, get_type_hints and getsource look for it
    rest = []
    for statement in needed(body, definitions[-1]):
        alias = imported_class(statement)
        if alias:
            setattr(part, alias.asname or alias.name, class_of(statement.module, alias.name))
        else:
            rest.append(statement)
    exec(compile(ast.Module(rest, []), path, "exec"), vars(part))
    return vars(part)[name]


def modules_in(package: str) -> list[str]:
    """The names of a folder's Python files, but those that begin with _."""
    names = [path.stem for path in (ROOT / package).glob("*.py")]
    return sorted(name for name in names if not name.startswith("_"))


def defines(module: str, name: str) -> bool:
    """Whether a file defines, imports or assigns `name` at its top; False for one that is not Python."""
    try:
        body = statements(path_of(module))
    except (SyntaxError, ValueError):
        return False
    return sets(body, name)


def sets(body: list[ast.stmt], name: str) -> bool:
    return any(name in set_by(statement) for statement in body)


def summary_of(module: str) -> str:
    """The first line of a file's docstring."""
    tree = ast.parse(path_of(module).read_bytes())
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def path_of(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def statements(path: Path) -> list[ast.stmt]:
    """The statements of a file of this project, each import with one name; [] where there is no such file."""
    if not path.is_file():
        return []
    found = []
    for statement in ast.parse(path.read_bytes(), str(path)).body:
        found += single_imports(statement)
    return found


def is_class(statement: ast.stmt, name: str) -> bool:
    return isinstance(statement, ast.ClassDef) and statement.name == name


def needed(body: list[ast.stmt], definition: ast.stmt) -> list[ast.stmt]:
    """`definition` and the statements that it uses, directly or through others, in their order: those before
    it, and behind it what its methods may use when they are called."""
    place = body.index(definition)
    binds = {}
    for i, statement in enumerate(body):
        binds[statement] = bound_by(statement) if i < place else set_by(statement)
    kept = {definition}
    # `from __future__ import annotations` is always kept: it changes what annotations are
    wanted = names_in(definition) | {"*", "annotations"}
    found = [definition]
    while found:
        found = []
        for statement in body:
            if statement not in kept and not binds[statement].isdisjoint(wanted):
                found.append(statement)
        kept.update(found)
        for statement in found:
            wanted |= names_in(statement)
    return [statement for statement in body if statement in kept]


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def bound_by(statement: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file may give a meaning to or change; "*" for any."""
    if isinstance(statement, DEFINITIONS):
        return {statement.name}
    names = names_in(statement)
    for node in ast.walk(statement):
        if isinstance(node, ast.alias):
            imported = node.asname or node.name
            names.add(imported.partition(".")[0])
        elif isinstance(node, DEFINITIONS):
            names.add(node.name)
    return names


def set_by(statement: ast.stmt) -> set[str]:
    """The names that a definition, an import or an assignment gives a meaning to; none for other
    statements."""
    if isinstance(statement, (*DEFINITIONS, ast.Import, ast.ImportFrom)):
        return bound_by(statement)
    targets = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    names = set()
    for target in targets:
        names |= names_in(target)
    return names


def single_imports(statement: ast.stmt) -> list[ast.stmt]:
    """A statement, but an import of several names as one import of each."""
    if not isinstance(statement, (ast.Import, ast.ImportFrom)):
        return [statement]
    parts = []
    for alias in statement.names:
        part = copy.copy(statement)
        part.names = [alias]
        parts.append(part)
    return parts


def imported_class(statement: ast.stmt) -> ast.alias | None:
    """The name that a statement imports, if that is a class in a file of this project that is not loaded
    yet."""
    if not isinstance(statement, ast.ImportFrom) or statement.level or statement.module in sys.modules:
        return None
    alias = statement.names[0]
    for other in statements(path_of(statement.module)):
        if is_class(other, alias.name):
            return alias
    return None
