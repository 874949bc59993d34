"""Curves as SVG, drawn without a library: a page with them needs no network."""
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 340, 180
LEFT, RIGHT, TOP, BOTTOM = 62, 8, 8, 22      # margins, in which the numbers of the axes stand
MOST_POINTS = 300                            # of a curve; more are averaged in groups


class Curve(NamedTuple):
    """(step, value) pairs in order of the steps. `band`: (step, lowest, highest) over several runs.
    `is_dotted`: its points are shown, as of evaluations, which are few."""
    label: str
    color: str                                # a class of the page's style: c0, c1, ...
    points: list[tuple[float, float]]
    band: list[tuple[float, float, float]] = []
    is_dotted: bool = False


def chart(title: str, curves: list[Curve]) -> str:
    """One picture with the title and all curves."""
    steps, values = [], []
    for curve in curves:
        for step, value in curve.points:
            steps.append(step)
            values.append(value)
        for _, low, high in curve.band:
            values += [low, high]
    first, last = min(steps), max(steps)
    low, high = widened(min(values), max(values))

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for value in (low, (low + high) / 2, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value)}" y2="{y(value)}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:.3g}</text>')
    ends = [(first, "start"), (last, "end")] if last > first else [(first, "middle")]
    for step, anchor in ends:
        parts.append(f'<text x="{x(step)}" y="{HEIGHT - 6}" text-anchor="{anchor}">{step:g}</text>')
    for curve in curves:
        parts += drawn(curve, x, y)
    return "".join([*parts, "</svg>"])


def drawn(curve: Curve, x, y) -> list[str]:
    """The elements of one curve; `x` and `y` place a step and a value in the picture."""
    parts = []
    if curve.band:
        above = [f"{x(step)},{y(high)}" for step, _, high in curve.band]
        below = [f"{x(step)},{y(low)}" for step, low, _ in reversed(curve.band)]
        parts.append(f'<polygon class="band {curve.color}" points="{" ".join(above + below)}"/>')
    points = thinned(curve.points)
    places = " ".join(f"{x(step)},{y(value)}" for step, value in points)
    last_step, last_value = curve.points[-1]
    tip = f"<title>{escape(curve.label)}: {number(last_value)} at step {last_step:g}</title>"
    kind = " held-out" if curve.is_dotted else ""
    parts.append(f'<polyline class="{curve.color}{kind}" points="{places}">{tip}</polyline>')
    if curve.is_dotted or len(points) == 1:
        for step, value in points:
            tip = f"<title>{escape(curve.label)}: {number(value)} at step {step:g}</title>"
            parts.append(f'<circle class="{curve.color}" cx="{x(step)}" cy="{y(value)}" r="3">{tip}</circle>')
    return parts


def widened(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis: never the same."""
    if high > low:
        return low, high
    margin = abs(low) / 10 or 1.0
    return low - margin, high + margin


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of neighbours; the last point stays."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    found = []
    for start in range(0, len(points) - 1, size):
        group = points[start:min(start + size, len(points) - 1)]
        steps, values = zip(*group)
        found.append((sum(steps) / len(group), sum(values) / len(group)))
    return [*found, points[-1]]


def number(value: float) -> str:
    """Four significant digits; very large and small numbers with an exponent."""
    return f"{value:.4g}"
