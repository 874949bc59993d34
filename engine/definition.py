"""A class out of a Python file, without running the rest of the file.

`python train.py x.yml lrr=1` needs the fields of an algorithm's Config, and torch takes seconds to import. The Config
does not use torch: `class_of` runs the class and those statements of its file that it names, imports among them. A
class that is imported from another file of this project is found in the same way, so that `class Config(Sampling)`
does not run engine/rollout.py either.
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
    """The class `name` of `module` ("algorithms.dpo"): an object of its own, beside the one that importing the module
    makes. Raises what running these statements raises; SyntaxError where the file is not Python, AttributeError
    where it has no such class."""
    path = path_of(module)
    body = statements(path)
    definition = next((node for node in reversed(body) if is_class(node, name)), None)
    if definition is None:
        return getattr(importlib.import_module(module), name)      # made in another way
    part = types.ModuleType(f"{module} as far as {name} needs it")
    part.__file__, part.__package__ = str(path), module.rpartition(".")[0]
    sys.modules[part.__name__] = part        # where dataclass, get_type_hints and getsource look for it
    kept = []
    for statement in needed(body, definition):
        kept += without_classes(statement, vars(part))
    exec(compile(ast.Module(kept, []), path, "exec"), vars(part))
    return vars(part)[name]


def path_of(module: str) -> Path:
    return ROOT.joinpath(*module.split(".")).with_suffix(".py")


def statements(path: Path) -> list[ast.stmt]:
    """Those of a file of this project; [] where there is no such file."""
    return ast.parse(path.read_bytes(), str(path)).body if path.is_file() else []


def is_class(statement: ast.stmt, name: str) -> bool:
    return isinstance(statement, ast.ClassDef) and statement.name == name


def needed(body: list[ast.stmt], definition: ast.stmt) -> list[ast.stmt]:
    """`definition` and the statements before it that it uses, directly or through others; in their order."""
    before = body[:body.index(definition)]
    wanted, kept = names_in(definition), [definition]
    for statement in reversed(before):
        bound = bound_by(statement)
        if not bound.isdisjoint(wanted | {"*", "annotations"}):
            kept.append(statement)
            wanted |= names_in(statement)
    return kept[::-1]


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


def without_classes(statement: ast.stmt, namespace: dict) -> list[ast.stmt]:
    """What is left of a statement, [it] or [], once the classes that it imports from this project stand in `namespace`."""
    if not isinstance(statement, ast.ImportFrom) or statement.level:
        return [statement]
    body, others = statements(path_of(statement.module)), []
    for alias in statement.names:
        if any(is_class(node, alias.name) for node in body):
            namespace[alias.asname or alias.name] = class_of(statement.module, alias.name)
        else:
            others.append(alias)
    rest = ast.ImportFrom(statement.module, others, 0)
    return [ast.copy_location(rest, statement)] if others else []
