"""Draw the curves of these pages from the metrics.jsonl of the runs that the pages name:

    python docs/learn/curves.py              # all pages
    python docs/learn/curves.py dpo grpo

Every picture is written beside its page. The drawing is benchmark/figure.py's.
"""
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from benchmark import figure  # noqa: E402
from data.errors import UserError, run_program  # noqa: E402


class Picture(NamedTuple):
    """One metric of one split (train or eval), over updates; `runs`: directories below runs/."""
    metric: str
    split: str
    title: str
    runs: list[str]


KIN = ["tiny-dr_grpo", "tiny-dapo", "tiny-rloo"]
PREFERENCE = ["tiny-dpo", "tiny-kto", "tiny-apo", "tiny-rpo"]
PICTURES = {      # by the page
    "sft": Picture("loss", "eval", "Held-out loss", ["tiny-sft"]),
    "dpo": Picture("loss", "train", "Training loss", ["tiny-dpo"]),
    "preference": Picture("rewards/margins", "eval", "Held-out margin", PREFERENCE),
    "rm": Picture("accuracy", "eval", "Held-out accuracy", ["tiny-rm"]),
    "ppo": Picture("reward", "train", "Training reward", ["tiny-ppo"]),
    "grpo": Picture("reward", "train", "Training reward", ["tiny-grpo"]),
    "kin": Picture("reward", "train", "Training reward", KIN),
    "distill": Picture("loss", "train", "Training loss", ["tiny-distill"]),
}


def svg(picture: Picture) -> str:
    lines = []
    for run in picture.runs:
        word = f"{run.removeprefix('tiny-')}={ROOT / 'runs' / run}"
        lines.append(figure.read_line(word, picture.metric, picture.split))
    is_share = False if picture.metric == "loss" else None      # a loss below 1 is no percentage
    return figure.draw(lines, (picture.title, "updates", picture.metric), is_share)


def main(argv: list[str]) -> None:
    unknown = [name for name in argv if name not in PICTURES]
    if unknown:
        raise UserError(f"{unknown[0]} is no page; fix: name some of {', '.join(PICTURES)}")
    for name in argv or PICTURES:
        path = HERE / f"{name}.svg"
        path.write_text(svg(PICTURES[name]), encoding="utf-8")
        print(f"docs/learn/{name}.svg")


if __name__ == "__main__":
    run_program(main)
