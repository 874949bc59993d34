"""`data:` as a list: several files or hub datasets, each a mapping with `path` and perhaps `split`, `weight`
and `columns`.

    data:
      - path: pairs.jsonl
        weight: 2                                # every row twice; 0.5: a random half, the same for the
                                                 # same seed; 1 if not given
        columns: {chosen: good, rejected: bad}   # our name: the file's
      - path: hh
        split: test
"""
import difflib
import math

import yaml

from data.errors import UserError

KEYS = ("path", "split", "weight", "columns")


def read_sources(node, key, file):
    """The YAML list under `key` -> [{"path": str, "split": str, "weight": float, "columns": {ours: theirs}}],
    as far as given."""
    if not node.value:
        raise UserError(f"{key} is an empty list in {_where(node, file)}; "
                        "fix: add an entry such as '- path: pairs.jsonl'")
    sources = []
    for i, element in enumerate(node.value):
        sources.append(_entry(element, f"{key}[{i}]", file))
    return sources


def source_name(source):
    """A file's path, or "name:split"."""
    return source["path"] + (f":{source['split']}" if "split" in source else "")


def rename(row, columns, where):
    """The row with the columns {ours: theirs} under our names."""
    for theirs in columns.values():
        if theirs not in row:
            near = difflib.get_close_matches(theirs, row, n=3, cutoff=0.4) or list(row)
            raise UserError(f"no column {theirs!r} in {where}, nearest: {', '.join(near)}; "
                            "fix: correct `columns`, {our name: the file's name}")
    renamed = dict(row)
    for theirs in columns.values():
        renamed.pop(theirs, None)
    for ours, theirs in columns.items():
        renamed[ours] = row[theirs]
    return renamed


def _entry(node, name, file):
    if not isinstance(node, yaml.MappingNode):
        key = name.partition("[")[0]
        raise UserError(f"nested value of {key!r} in {_where(node, file)}: {name} is not a mapping; "
                        "fix: write '- path: pairs.jsonl'")
    entry = {}
    for key_node, value_node in node.value:
        key, where = str(key_node.value), _where(key_node, file)
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            fix = f"write {near[0]}" if near else f"use {', '.join(KEYS)}"
            raise UserError(f"unknown key {key!r} of {name} in {where}; fix: {fix}")
        if key in entry:
            raise UserError(f"duplicate key {key!r} of {name} in {where}; fix: remove one")
        wanted, form = yaml.ScalarNode, "one value"
        if key == "columns":
            wanted, form = yaml.MappingNode, "{chosen: good, rejected: bad}"
        if not isinstance(value_node, wanted):
            raise UserError(f"{name}.{key} is nested wrongly in {where}; fix: write {form}")
        entry[key] = _value(key, value_node, name, where)
    if "path" not in entry:
        raise UserError(f"{name} has no path in {_where(node, file)}; fix: add 'path: pairs.jsonl'")
    if "split" in entry and ":" in entry["path"]:
        raise UserError(f"{name} has a split in its path and as a key in {_where(node, file)}; "
                        "fix: keep one of them")
    return entry


def _value(key, node, name, where):
    if key == "columns":
        columns = {}
        for ours, theirs in node.value:
            scalars = isinstance(ours, yaml.ScalarNode) and isinstance(theirs, yaml.ScalarNode)
            if not scalars or not ours.value or not theirs.value:
                raise UserError(f"{name}.columns is not a mapping of names in {where}; "
                                "fix: write {chosen: good, rejected: bad}")
            columns[ours.value] = theirs.value
        return columns
    if key == "weight":
        try:
            weight = float(node.value)
        except ValueError:
            weight = math.nan
        if not (math.isfinite(weight) and weight > 0):
            raise UserError(f"{name}.weight is {node.value!r} in {where}; "
                            "fix: give a number above 0, such as 0.5")
        return weight
    if not node.value or not node.value.isprintable():
        raise UserError(f"{name}.{key} is {node.value!r} in {where}; fix: give text on one line")
    return node.value


def _where(node, file):
    return f"{file}:{node.start_mark.line + 1}"
