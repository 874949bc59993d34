"""`torchrun tests/own_algorithm.py FOLDER x.yml`: train.py, with the files in FOLDER/algorithms/ too."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import algorithms  # noqa: E402
import train  # noqa: E402
from data.errors import run_program  # noqa: E402
from engine import definition  # noqa: E402

folder, config = sys.argv[1:]
definition.ROOT = Path(folder)
algorithms.__path__ = [f"{folder}/algorithms", str(ROOT / "algorithms")]
run_program(lambda _: train.main([config]))
