"""`benchmark/gpu.py --cpu` runs every section; no time is asserted."""
import json
import math
import subprocess
import sys

from helpers import ROOT

SECTIONS = ["env", "check", "train", "peer", "decode", "profile"]


def numbers_in(value):
    """Every number in a parsed line of JSON."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        found = []
        for part in value:
            found += numbers_in(part)
        return found
    return [value] if isinstance(value, float | int) else []


def test_every_section_runs_and_its_rows_are_in_the_table_and_the_json(tmp_path):
    stored = tmp_path / "gpu.json"
    command = [sys.executable, "benchmark/gpu.py", "--cpu", "--output", str(stored)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    report = json.loads(lines[-1])
    assert json.loads(stored.read_text()) == report
    assert list(report) == SECTIONS
    numbers = numbers_in(report)
    assert numbers and all(map(math.isfinite, numbers))
    table = [line for line in lines if line.startswith("| ")]
    widths = {line.count(" | ") for line in table}
    assert table[0].startswith("| section | model | case | form | ms |") and len(widths) == 1
    rows = [line.split(" | ")[0].removeprefix("| ") for line in table[1:]]
    expected = []
    for name, section in report.items():
        assert section["rows"], name
        expected += [name] * len(section["rows"])
    assert rows == expected
