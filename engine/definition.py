"""A class out of a Python file, without running the rest of the file.

`python train.py x.yml lrr=1` needs the fields of an algorithm's Config, and torch takes seconds to import.
The Config does not use torch: `class_of` runs the class and those statements of its file that it names,
imports among them. A class that is imported from another file of this project is found in the same way, so
that `class Config(Sampling)` does not run engine/options.py either.
"""
import ast
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
    definition = next((node for node in reversed(body) if is_class(node, name)), None)
    if definition is None:
        return getattr(importlib.import_module(module), name)      # made in another way
    part = types.ModuleType(f"{module} as far as {name} needs it")
    part.__file__, part.__package__ = str(path), module.rpartition(".")[0]
    sys.modules[part.__name__] = part        # where dataclass, get_type_hints and getsource look for it
    rest = []
    for statement in needed(body, definition):
        if alias := imported_class(statement):
            setattr(part, alias.asname or alias.name, class_of(statement.module, alias.name))
        else:
            rest.append(statement)
    exec(compile(ast.Module(rest, []), path, "exec"), vars(part))
    return vars(part)[name]


def path_of(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def statements(path: Path) -> list[ast.stmt]:
    """Those of a file of this project, each import with one name; [] where there is no such file."""
    tree = ast.parse(path.read_bytes(), str(path)) if path.is_file() else ast.Module([], [])
    found = []
    for statement in tree.body:
        found += single_imports(statement)
    return found


def is_class(statement: ast.stmt, name: str) -> bool:
    return isinstance(statement, ast.ClassDef) and statement.name == name


def needed(body: list[ast.stmt], definition: ast.stmt) -> list[ast.stmt]:
    """`definition` and the statements that it uses, directly or through others, in their order: those before
    it, and behind it what its methods may use when they are called."""
    place = body.index(definition)
    binds = {node: bound_by(node) for node in body[:place]}
    binds |= {node: set_by(node) for node in body[place + 1:]}
    wanted, kept = names_in(definition), [definition]
    while True:
        # `from __future__ import annotations` is always kept: it changes what annotations are
        names = wanted | {"*", "annotations"}
        found = [node for node in binds if node not in kept and not binds[node].isdisjoint(names)]
        if not found:
            return [node for node in body if node in kept]
        kept += found
        wanted = wanted.union(*map(names_in, found))


def names_in(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def bound_by(statement: ast.stmt) -> set[str]:
    """The names that a statement at the top of a file may give a meaning to or change; "*" for any."""
    if isinstance(statement, DEFINITIONS):
        return {statement.name}
    names = names_in(statement)
    for node in ast.walk(statement):
        if isinstance(node, ast.alias):
            names.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, DEFINITIONS):
            names.add(node.name)
    return names


def set_by(statement: ast.stmt) -> set[str]:
    """The names that a definition, an import or an assignment gives a meaning to; of other statements
    none."""
    if isinstance(statement, (*DEFINITIONS, ast.Import, ast.ImportFrom)):
        return bound_by(statement)
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    return set().union(*map(names_in, targets))


def single_imports(statement: ast.stmt) -> list[ast.stmt]:
    """A statement, but an import of several names as one import of each."""
    if isinstance(statement, ast.Import):
        parts = [ast.Import([alias]) for alias in statement.names]
    elif isinstance(statement, ast.ImportFrom):
        parts = [ast.ImportFrom(statement.module, [alias], statement.level) for alias in statement.names]
    else:
        parts = [statement]
    return [ast.copy_location(part, statement) for part in parts]


def imported_class(statement: ast.stmt) -> ast.alias | None:
    """The name that a statement imports, if that is a class in a file of this project that is not loaded
    yet."""
    if not isinstance(statement, ast.ImportFrom) or statement.level or statement.module in sys.modules:
        return None
    body, alias = statements(path_of(statement.module)), statement.names[0]
    return alias if any(is_class(node, alias.name) for node in body) else None
