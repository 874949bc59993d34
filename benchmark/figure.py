"""A figure of held-out reward (or with --split train, of the reward of the training answers) over updates, as
SVG:

    python benchmark/figure.py grpo=runs/table/grpo-0,runs/table/grpo-1 ppo=runs/ppo > curves.svg

Each word is LABEL=RUN,RUN,...: the runs of one line, which differ in their seed. The line is their mean at
every update at which all of them were evaluated, the band reaches from the lowest to the highest. Runs are
read from their metrics.jsonl. Colours are chosen to be readable on a light and on a dark page.
"""
import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH = 760
HEIGHT = 380
LEFT = 64
RIGHT = 180      # for the legend
TOP = 44
BOTTOM = 52
GREY = "#7d8590"      # about as far from white as from GitHub's dark page
COLORS = ("#3b82f6", "#e0762f", "#2fa36b", "#c0569f", "#8a7bd8", "#b0892f", "#3aa5b8", "#d2556b")
FONT = "font-family='system-ui, sans-serif' font-size='13'"


class Line(NamedTuple):
    """Mean, lowest and highest value of the runs at each update."""
    label: str
    updates: list[int]
    means: list[float]
    lows: list[float]
    highs: list[float]


class Frame(NamedTuple):
    """Which updates and values the figure reaches to; the values begin at `low`."""
    updates: int
    low: float
    high: float

    def x(self, update: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * update / self.updates

    def y(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


# ---- the numbers -------------------------------------------------------------------------------------

def read_run(directory: str, metric: str, split: str) -> dict[int, float]:
    """{update: the metric} of a run; `split`: eval, on the held-out rows, or train."""
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        sys.exit(f"error: {path} is not there; fix: name runs, as LABEL=RUN,RUN")
    found = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(text)
        if row["split"] == split and metric in row:
            found[row["step"]] = row[metric]
    if not found:
        sys.exit(f"error: {path} has no {metric} of the split {split}; fix: train with eval_data, or give "
                 "--metric or --split")
    return found


def read_line(word: str, metric: str, split: str) -> Line:
    """The line of LABEL=RUN,RUN,..."""
    label, _, runs = word.partition("=")
    curves = [read_run(run, metric, split) for run in runs.split(",")]
    common = set(curves[0]).intersection(*curves)
    if not common:
        sys.exit(f"error: the runs of {label} have no evaluated update in common; fix: draw them apart")
    line = Line(label, sorted(common), [], [], [])
    for update in line.updates:
        values = [curve[update] for curve in curves]
        line.means.append(statistics.mean(values))
        line.lows.append(min(values))
        line.highs.append(max(values))
    return line


def frame_of(lines: list[Line]) -> Frame:
    """Shares are shown from 0 to 1, other numbers from the lowest to the highest tick."""
    last = 0
    lows = []
    highs = []
    for line in lines:
        last = max(last, line.updates[-1])
        lows += line.lows
        highs += line.highs
    low = min(lows)
    high = max(highs)
    if 0 <= low and high <= 1:
        return Frame(max(1, last), 0.0, 1.0)
    step = tick_step(high - low)
    return Frame(max(1, last), math.floor(low / step) * step, math.ceil(high / step) * step)


def tick_step(span: float) -> float:
    """1, 2 or 5 times a power of ten, so that `span` holds four to ten of it."""
    span = span or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    for factor in (1, 2, 5):
        if span / (factor * power) <= 10:
            return factor * power
    return 10 * power


def ticks(low: float, high: float, step: float) -> list[float]:
    values = []
    for number in range(round((high - low) / step) + 1):
        values.append(low + step * number)
    return values


# ---- the drawing -------------------------------------------------------------------------------------

def text(x: float, y: float, words: str, anchor: str = "start", more: str = "") -> str:
    place = f"x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}'"
    return f"<text {place} fill='{GREY}' {FONT} {more}>{escape(words)}</text>"


def rule(x1: float, y1: float, x2: float, y2: float, opacity: float) -> str:
    place = f"x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    return f"<line {place} stroke='{GREY}' stroke-opacity='{opacity}'/>"


def points(frame: Frame, updates: list[int], values: list[float]) -> str:
    """The corners of a line, as SVG writes them."""
    corners = []
    for update, value in zip(updates, values):
        corners.append(f"{frame.x(update):.1f},{frame.y(value):.1f}")
    return " ".join(corners)


def axes(frame: Frame, names: tuple) -> list[str]:
    """The grid, its numbers, and (title, name of the updates, name of the values)."""
    title, x_name, y_name = names
    right = WIDTH - RIGHT
    parts = [text(LEFT, 22, title, more="font-weight='600'")]
    is_share = (frame.low, frame.high) == (0.0, 1.0)
    step = 0.25 if is_share else tick_step(frame.high - frame.low)
    for value in ticks(frame.low, frame.high, step):
        y = frame.y(value)
        shown = f"{value:.0%}" if is_share else f"{value:.4g}"
        parts.append(rule(LEFT, y, right, y, 0.25))
        parts.append(text(LEFT - 8, y + 4, shown, "end"))
    step = max(1, round(tick_step(frame.updates)))
    for update in range(0, frame.updates + 1, step):
        parts.append(text(frame.x(update), HEIGHT - BOTTOM + 20, str(update), "middle"))
    parts.append(text((LEFT + right) / 2, HEIGHT - 10, x_name, "middle"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(text(16, middle, y_name, "middle", f"transform='rotate(-90 16 {middle:.1f})'"))
    return parts


def curve(frame: Frame, line: Line, color: str) -> list[str]:
    """The band and the mean of a line."""
    there = points(frame, line.updates, line.highs)
    back = points(frame, line.updates[::-1], line.lows[::-1])
    middle = points(frame, line.updates, line.means)
    parts = [
        f"<polygon points='{there} {back}' fill='{color}' fill-opacity='0.18'/>",
        f"<polyline points='{middle}' fill='none' stroke='{color}' stroke-width='2'/>",
    ]
    for update, value in zip(line.updates, line.means):
        x = frame.x(update)
        y = frame.y(value)
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='2.5' fill='{color}'/>")
    return parts


def legend(lines: list[Line]) -> list[str]:
    """The labels, in the order in which the lines end, the highest first."""
    parts = []
    order = sorted(range(len(lines)), key=lambda number: -lines[number].means[-1])
    for place, number in enumerate(order):
        x = WIDTH - RIGHT + 18
        y = TOP + 10 + 20 * place
        color = COLORS[number % len(COLORS)]
        parts.append(f"<rect x='{x}' y='{y - 6}' width='16' height='4' fill='{color}'/>")
        parts.append(text(x + 24, y, lines[number].label))
    return parts


def draw(lines: list[Line], names: tuple) -> str:
    """The SVG of these lines; `names`: (title, name of the updates, name of the values)."""
    frame = frame_of(lines)
    size = f"viewBox='0 0 {WIDTH} {HEIGHT}' width='{WIDTH}' height='{HEIGHT}'"
    parts = [f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'>"]
    parts.append(f"<title>{escape(names[0])}</title>")
    parts += axes(frame, names)
    for number, line in enumerate(lines):
        parts += curve(frame, line, COLORS[number % len(COLORS)])
    parts += legend(lines)
    return "\n".join([*parts, "</svg>\n"])


def main(argv: list[str]) -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("lines", nargs="+", metavar="LABEL=RUN,RUN")
    parser.add_argument("--metric", default="reward", help="a key of metrics.jsonl")
    parser.add_argument("--split", default="eval", choices=("eval", "train"))
    parser.add_argument("--title", default="Held-out reward")
    parser.add_argument("--x-name", default="updates")
    parser.add_argument("--y-name", default="reward")
    args = parser.parse_args(argv)
    lines = [read_line(word, args.metric, args.split) for word in args.lines]
    print(draw(lines, (args.title, args.x_name, args.y_name)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
