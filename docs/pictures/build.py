"""Draw the pictures of README.md from the code and from the tables of docs/speed.md, as SVG:

    python docs/pictures/build.py            # writes them
    python docs/pictures/build.py --check    # writes nothing; an error names a picture that differs

flat-row.svg    two pairs as `data.pack.collate` lays them out; the mask is what `segments_attention` sees
update.svg      the first update of example/tiny-dpo.yml: what it has, beside the lines of algorithms/dpo.py
speed.svg       pairs per second and peak memory beside TRL, from the tables of docs/speed.md
"""
import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from generated import write_or_check  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmark.figure import COLORS, GREY, rule, text  # noqa: E402
from data.dataset import build_dataset  # noqa: E402
from data.errors import UserError, run_program  # noqa: E402
from data.pack import Batch, Example, Response, collate  # noqa: E402
from engine.config import load_config  # noqa: E402
from engine.plan import Plan  # noqa: E402
from model.attention import segments_attention  # noqa: E402

WIDTH = 760
SMALL = "style='font-size:11px'"
CODE = "style='font-family:ui-monospace,monospace;font-size:11px'"
BOLD = "font-weight='600'"


def picture(title: str, height: int, parts: list[str]) -> str:
    size = f"viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'"
    head = f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'>"
    return "\n".join([head, f"<title>{title}</title>", *parts, "</svg>\n"])


def box(x: float, y: float, width: float, height: float, color: str, opacity: float) -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' rx='3'"
    return f"<rect {place} fill='{color}' fill-opacity='{opacity}'/>"


def small(x: float, y: float, words: str, anchor: str = "start") -> str:
    return text(x, y, words, anchor, SMALL)


# ---- flat-row.svg ------------------------------------------------------------------------------------

PAIRS = [      # prompt, chosen, rejected
    ("2 + 2 =", "4 </s>", "5 </s>"),
    ("Ice is ?", "cold </s>", "a hot drink </s>"),
]
ROLES = {"prompt": GREY, "chosen": COLORS[0], "rejected": COLORS[1]}
LEFT = 70
TOP = 48
CELL = 40      # width of a token
LINE = 20      # height of a row of the mask


class Row(NamedTuple):
    """Both pairs in one row: a word and a role for each of its T tokens, whose ids are their places."""
    words: list[str]
    roles: list[str]
    batch: Batch


def row_of_pairs() -> Row:
    words = []
    roles = []
    examples = []
    for pair in PAIRS:
        parts = []
        for role, spoken in zip(ROLES, pair):
            new = spoken.split()
            parts.append(range(len(words), len(words) + len(new)))
            words += new
            roles += [role] * len(new)
        prompt, chosen, rejected = map(np.array, parts)
        responses = [Response.all_trained(chosen), Response.all_trained(rejected)]
        examples.append(Example(prompt, responses, "picture"))
    return Row(words, roles, collate(examples))


def predictions(row: Row) -> list[str]:
    """The words that each token is trained to predict: the end of a prompt has two."""
    found = [[] for _ in row.words]
    for source, target in zip(row.batch.source.tolist(), row.batch.target.tolist()):
        found[source].append(row.words[target])
    return [" / ".join(words) for words in found]


def visible(batch: Batch) -> list[list[bool]]:
    """(T, T): which keys each query sees. With equal scores and one-hot values the output of attention is
    the row of its mask."""
    length = len(batch.tokens)
    zeros = torch.zeros(1, 1, length, length)
    values = torch.eye(length)[None, None]
    output, _ = segments_attention(
        None, zeros, zeros, values, None, segments=batch.segments, prefix=batch.prefix)
    return (output[0, :, 0] > 0).tolist()


def flat_row() -> str:
    row = row_of_pairs()
    parts = [text(LEFT, 22, "A micro-batch is one flat row: two pairs, each prompt once", more=BOLD)]
    for place, role in enumerate(row.roles):
        parts.append(box(LEFT + CELL * place + 1, TOP, CELL - 2, 24, ROLES[role], 0.35))
    lines = {"token": row.words, "position": row.batch.positions.tolist(), "predicts": predictions(row)}
    for number, (name, values) in enumerate(lines.items()):
        y = TOP + 17 + 21 * number
        parts.append(small(LEFT - 8, y, name, "end"))
        for place, value in enumerate(values):
            parts.append(small(LEFT + CELL * (place + 0.5), y, str(value), "middle"))
    top = TOP + 80
    for number, sees in enumerate(visible(row.batch)):
        y = top + LINE * number
        parts.append(small(LEFT - 8, y + 14, row.words[number], "end"))
        for place, role in enumerate(row.roles):
            opacity = 0.6 if sees[place] else 0.06
            parts.append(box(LEFT + CELL * place + 1, y + 1, CELL - 2, LINE - 2, ROLES[role], opacity))
    y = top + LINE * len(row.words) + 22
    for number, (role, color) in enumerate(ROLES.items()):
        x = LEFT + 110 * number
        parts += [box(x, y - 10, 14, 12, color, 0.6), small(x + 20, y, role)]
    parts.append(small(LEFT + 340, y, "a row of the mask: what this token attends to"))
    return picture("Two pairs as one flat row, and its attention mask", y + 14, parts)


# ---- update.svg --------------------------------------------------------------------------------------

def first_update() -> list[Example]:
    """The examples of the first update of example/tiny-dpo.yml."""
    config = load_config([str(ROOT / "example" / "tiny-dpo.yml")]).common
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config.model)
    dataset = build_dataset(str(ROOT / config.data), "pairs", tokenizer, config.max_length)
    return [dataset.examples[row] for row in Plan(config, len(dataset.examples)).rows(1)]


def stages(examples: list[Example]) -> list[tuple[str, str, str]]:
    """(what there is, a note, the line of dpo.py) of each stage of an update on these pairs."""
    batch = collate(examples)
    pairs = len(examples)
    responses = 2 * pairs
    longest = 0
    for example in examples:
        longest = max(longest, example.part([0]).size(), example.part([1]).size())
    padded = f"padded: {responses} rows x {longest} tokens = {responses * longest:,}"
    return [
        (f"{pairs} pairs, {responses} responses", padded, "for step in engine.steps():"),
        (f"a flat row of {len(batch.tokens):,} tokens", "no padding; a prompt once for both responses",
         "for batch in step:"),
        (f"log-probs of the {len(batch.target):,} trained tokens", "logits for these only, a chunk at a time",
         "logps = per_response(policy(batch))"),
        (f"{responses} sums: policy and reference", "the reference's were computed before the first update",
         "reference_logps = per_response(reference(batch))"),
        (f"{pairs} losses", "-log sigmoid(beta * (chosen - rejected))", "losses, metrics = forward(batch)"),
        ("backward", f"divided by the {pairs} pairs of the whole update",
         "(losses.sum() / step.num_examples).backward()"),
        ("clip the gradient", "stops here if it is not finite", "engine.clip_gradients()"),
        ("AdamW", "and the next update", "optimizer.step()"),
    ]


def update() -> str:
    source = (ROOT / "algorithms" / "dpo.py").read_text(encoding="utf-8")
    parts = [text(20, 22, "One update of DPO: the first of example/tiny-dpo.yml", more=BOLD)]
    y = 40
    for title, note, code in stages(first_update()):
        if code not in source:
            raise UserError(f"algorithms/dpo.py has no line {code!r}; "
                            "fix: correct it in docs/pictures/build.py")
        if y > 40:
            parts.append(rule(218, y - 8, 218, y, 0.9))
        parts.append(box(20, y, 396, 38, COLORS[0], 0.14))
        parts += [text(32, y + 16, title), small(32, y + 31, note), text(434, y + 23, code, more=CODE)]
        y += 46
    return picture("One update of DPO", y, parts)


# ---- speed.svg ---------------------------------------------------------------------------------------

def beside_trl() -> dict[str, tuple[float, float]]:
    """{algorithm: (speed, memory)} beside TRL's fastest setting: of each algorithm the first row in the
    tables of docs/speed.md that has these two ratios."""
    page = (HERE.parent / "speed.md").read_text(encoding="utf-8")
    found = {}
    for line in page.partition("\n## On one GPU")[0].splitlines():
        ratios = re.findall(r"\| ([\d.]+)x(?= \|)", line)
        if len(ratios) == 2:
            name = line.split("|")[1].strip()
            if name.startswith("TRL"):      # GRPO's table
                name = "grpo"
            found.setdefault(name, (float(ratios[0]), float(ratios[1])))
    return found


def bars(ratios: list[float], left: int, width: float, title: str, color: str) -> list[str]:
    """A bar for each of the ratios below each other; `width`: of the ratio 1, which a line marks."""
    parts = [small(left, 44, title)]
    for number, ratio in enumerate(ratios):
        y = 54 + 24 * number
        parts.append(box(left, y, width * ratio, 16, color, 0.7))
        parts.append(small(left + width * ratio + 6, y + 12, f"{ratio:.2f}x"))
    bottom = 62 + 24 * len(ratios)
    parts.append(rule(left + width, 50, left + width, bottom, 0.9))
    parts.append(small(left + width, bottom + 14, "TRL", "middle"))
    return parts


def speed() -> str:
    rows = beside_trl()
    speeds = [ratios[0] for ratios in rows.values()]
    memory = [ratios[1] for ratios in rows.values()]
    parts = [text(20, 22, "Beside TRL 1.16 at its fastest exact setting, on two CPU cores", more=BOLD)]
    for number, name in enumerate(rows):
        parts.append(small(132, 66 + 24 * number, name, "end"))
    parts += bars(speeds, 140, 88, "pairs per second: more is faster", COLORS[0])
    parts += bars(memory, 500, 200, "peak memory: less is leaner", COLORS[1])
    y = 96 + 24 * len(rows)
    parts.append(small(20, y, "SmolLM2: 135M parameters; the others: 226M, with Qwen2.5's vocabulary"))
    return picture("Pairs per second and peak memory beside TRL", y + 10, parts)


# ---- all of them -------------------------------------------------------------------------------------

def main(arguments: list[str]) -> None:
    for name, draw in (("flat-row", flat_row), ("update", update), ("speed", speed)):
        write_or_check(HERE / f"{name}.svg", draw(), "--check" in arguments, "docs/pictures/build.py")


if __name__ == "__main__":
    run_program(main)
