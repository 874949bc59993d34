"""Draw the pictures of README.md from the code and from the tables of docs/speed.md, as SVG:

    python docs/pictures/build.py            # writes them
    python docs/pictures/build.py --check    # writes nothing; an error names a picture that differs

flat-row.svg    two pairs as `data.pack.collate` lays them out; the mask is what `segments_attention` attends to
update.svg      the first update of example/tiny-dpo.yml: counts of its rows beside the lines of algorithms/dpo.py
speed.svg       pairs per second and peak memory beside TRL, from the tables of docs/speed.md
"""
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from benchmark.figure import COLORS, GREY, rule, text  # noqa: E402
from data.dataset import build_dataset  # noqa: E402
from data.errors import UserError, run_program  # noqa: E402
from data.pack import Example, Response, collate  # noqa: E402
from engine.config import load_config  # noqa: E402
from engine.plan import Plan  # noqa: E402
from model.attention import segments_attention  # noqa: E402

WIDTH = 760
PROMPT, CHOSEN, REJECTED = GREY, COLORS[0], COLORS[1]
SMALL = "style='font-size:11px'"
BOLD = "font-weight='600'"
CODE = "style='font-family:ui-monospace,monospace;font-size:11px'"


def picture(title: str, height: float, parts: list[str]) -> str:
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height:.0f}' width='{WIDTH}'"
    return "\n".join([f"{head} height='{height:.0f}' role='img'>", f"<title>{title}</title>", *parts, "</svg>\n"])


def box(x: float, y: float, width: float, height: float, color: str, opacity: float) -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' width='{width:.1f}' height='{height:.1f}' rx='3'"
    return f"<rect {place} fill='{color}' fill-opacity='{opacity}'/>"


# ---- flat-row.svg ----------------------------------------------------------------------------------------

PAIRS = [      # prompt, chosen, rejected
    ("2 + 2 =", "4 </s>", "5 </s>"),
    ("Ice is ?", "cold </s>", "a hot drink </s>"),
]
LEFT, CELL, TOP = 70, 40, 52


def flat_row() -> str:
    words, colors, examples = [], [], []
    for texts in PAIRS:
        parts = []
        for spoken, color in zip(texts, (PROMPT, CHOSEN, REJECTED)):
            new = spoken.split()
            parts.append(list(range(len(words), len(words) + len(new))))
            words += new
            colors += [color] * len(new)
        prompt, *responses = parts
        trained = [Response.all_trained(response) for response in responses]
        examples.append(Example(prompt, trained, "picture"))
    batch = collate(examples)
    predicted = [[] for _ in words]
    for source, target in zip(batch.source.tolist(), batch.target.tolist()):
        predicted[source].append(words[target])
    parts = [text(LEFT, 22, "A micro-batch is one flat row: two pairs, each prompt once", more=BOLD)]
    labels = [(words, 13, "token"), (batch.positions.tolist(), 35, "position"),
              ([" / ".join(names) for names in predicted], 55, "predicts")]
    for _, y, name in labels:
        parts.append(text(LEFT - 8, TOP + y, name, "end", SMALL))
    for place, color in enumerate(colors):
        x = LEFT + CELL * place
        parts.append(box(x + 1, TOP - 4, CELL - 2, 24, color, 0.35))
        for values, y, _ in labels:
            parts.append(text(x + CELL / 2, TOP + y, str(values[place]), "middle", SMALL))
    top = TOP + 76
    size = CELL / 2
    for row, seen in enumerate(visible(batch)):
        parts.append(text(LEFT - 8, top + size * row + 14, words[row], "end", SMALL))
        for column, sees in enumerate(seen):
            opacity = 0.6 if sees else 0.06
            parts.append(box(LEFT + CELL * column + 1, top + size * row + 1, CELL - 2, size - 2,
                             colors[column], opacity))
    bottom = top + size * len(words) + 22
    for place, (name, color) in enumerate([("prompt", PROMPT), ("chosen", CHOSEN), ("rejected", REJECTED)]):
        parts.append(box(LEFT + 110 * place, bottom - 10, 14, 12, color, 0.6))
        parts.append(text(LEFT + 110 * place + 20, bottom, name, more=SMALL))
    parts.append(text(LEFT + 340, bottom, "a row of the mask: what this token attends to", more=SMALL))
    return picture("Two pairs as one flat row, and its attention mask", bottom + 14, parts)


def visible(batch) -> list[list[bool]]:
    """(T, T): which keys each query attends to: with equal scores and one-hot values, the output is the row of
    the mask."""
    length = len(batch.tokens)
    zeros = torch.zeros(1, 1, length, length)
    values = torch.eye(length)[None, None]
    output, _ = segments_attention(None, zeros, zeros, values, None, segments=batch.segments)
    return (output[0, :, 0] > 0).tolist()


# ---- update.svg ------------------------------------------------------------------------------------------

def update() -> str:
    config = load_config([str(ROOT / "example" / "tiny-dpo.yml")]).common
    tokenizer = AutoTokenizer.from_pretrained(ROOT / config.model)
    dataset = build_dataset(str(ROOT / config.data), "pairs", tokenizer, config.max_length)
    rows = Plan(config, len(dataset.examples)).rows(1)
    examples = [dataset.examples[row] for row in rows]
    batch = collate(examples)
    responses, laid_out, trained = len(batch.lengths), len(batch.tokens), len(batch.target)
    alone = [example.part([i]).size() for example in examples for i in (0, 1)]
    steps = [
        (f"{len(examples)} pairs, {responses} responses", f"padded: {responses} rows x {max(alone)} tokens = "
         f"{responses * max(alone):,}", "for step in engine.steps():"),
        (f"a flat row of {laid_out:,} tokens", "no padding; a prompt once for both responses",
         "for batch in step:"),
        (f"log-probs of the {trained:,} trained tokens", "logits for these only, a chunk at a time",
         "logps = per_response(policy(batch))"),
        (f"{responses} sums: policy and reference", "the reference's were computed before the first update",
         "reference_logps = per_response(reference(batch))"),
        (f"{len(examples)} losses", "-log sigmoid(beta * (chosen - rejected))", "losses, metrics = forward(batch)"),
        ("backward", f"divided by the {len(examples)} pairs of the whole update",
         "(losses.sum() / step.num_examples).backward()"),
        ("clip the gradient", "stops here if it is not finite", "engine.clip_gradients()"),
        ("AdamW", "and the next update", "optimizer.step()"),
    ]
    source = (ROOT / "algorithms" / "dpo.py").read_text(encoding="utf-8")
    parts = [text(20, 22, "One update of DPO: the first of example/tiny-dpo.yml", more=BOLD)]
    for place, (title, note, code) in enumerate(steps):
        if code not in source:
            raise UserError(f"algorithms/dpo.py has no line {code!r}; fix: correct it in docs/pictures/build.py")
        y = 40 + 46 * place
        parts.append(box(20, y, 396, 38, COLORS[0], 0.14))
        parts.append(text(32, y + 16, title))
        parts.append(text(32, y + 31, note, more=SMALL))
        parts.append(text(434, y + 23, code, more=CODE))
        if place:
            parts.append(rule(218, y - 8, 218, y, 0.9))
    return picture("One update of DPO", 40 + 46 * len(steps) + 4, parts)


# ---- speed.svg -------------------------------------------------------------------------------------------

def fastest() -> list[tuple[str, float, float]]:
    """(algorithm, speed, memory) beside TRL's fastest setting: of each algorithm the first row in the tables of
    docs/speed.md that has these two ratios."""
    found = {}
    page = (HERE.parent / "speed.md").read_text(encoding="utf-8")
    for line in page.partition("\n## On one GPU")[0].splitlines():
        ratios = re.findall(r"\| ([\d.]+)x(?= \|)", line)
        if len(ratios) == 2:
            name = line.split("|")[1].strip()
            name = "grpo" if name.startswith("TRL") else name
            found.setdefault(name, (float(ratios[0]), float(ratios[1])))
    return [(name, *ratios) for name, ratios in found.items()]


def speed() -> str:
    rows = fastest()
    parts = [text(20, 22, "Beside TRL 1.16 at its fastest exact setting, on two CPU cores", more=BOLD)]
    panels = [("pairs per second: more is faster", 140, 280, 3.2, 1), ("peak memory: less is leaner", 500, 200, 1.0, 2)]
    bottom = 62 + 24 * len(rows)
    for title, left, width, most, column in panels:
        parts.append(text(left, 44, title, more=SMALL))
        for place, row in enumerate(rows):
            y = 54 + 24 * place
            length = width * row[column] / most
            parts.append(box(left, y, length, 16, COLORS[column - 1], 0.7))
            parts.append(text(left + length + 6, y + 12, f"{row[column]:.2f}x", more=SMALL))
        equal = left + width / most
        parts.append(rule(equal, 50, equal, bottom, 0.9))
        parts.append(text(equal, bottom + 14, "TRL", "middle", SMALL))
    for place, row in enumerate(rows):
        parts.append(text(132, 66 + 24 * place, row[0], "end", SMALL))
    parts.append(text(20, bottom + 34, "SmolLM2: 135M parameters; the others: 226M, with Qwen2.5's vocabulary", more=SMALL))
    return picture("Pairs per second and peak memory beside TRL", bottom + 44, parts)


# ---- all of them -----------------------------------------------------------------------------------------

def main(arguments: list[str]) -> None:
    for draw in (flat_row, update, speed):
        path = HERE / f"{draw.__name__.replace('_', '-')}.svg"
        drawn = draw()
        if "--check" not in arguments:
            path.write_text(drawn, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != drawn:
            raise UserError(f"docs/pictures/{path.name} is not what the code says; "
                            "fix: python docs/pictures/build.py")


if __name__ == "__main__":
    run_program(main)
