"""What the scripts build.py of this folder have in common."""
import os
from pathlib import Path

from data.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def write_or_check(path: Path, text: str, is_check: bool, script: str) -> None:
    """Write a generated file where it differs; for a check UserError, which names the script that writes
    it."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    if is_check:
        shown = os.path.relpath(path, ROOT)
        raise UserError(f"{shown} does not show the code as it is; fix: python {script}")
    path.write_text(text, encoding="utf-8")
