"""What a run made of its model, on one page: `report.html` in its directory, and pages that compare runs.

The page has no scripts and asks no server: curves are SVG, everything else is text.
"""
import itertools
import json
import os
import statistics
from html import escape
from typing import NamedTuple

from data.errors import printable
from engine.chart import Curve, chart, number
from engine.intervals import wilson
from engine.yaml_file import read_config

REPORT = "report.html"                         # in a run's directory
PAGE = os.path.join(os.path.dirname(__file__), "report.css")
COLORS = 8                                     # of the style's classes c0, c1, ...
HIDDEN = ("step", "split", "epoch")
NO_METRICS = (*HIDDEN, "lr", "grad_norm", "tokens_per_second")      # what a row says of its update alone
PLACES = ("output", "resume")      # keys that say where a run lies, not what it is
FIRST = ("loss", "reward", "rewards/", "accuracy", "kl", "entropy", "completions/", "grad_norm", "lr")
RATES = ("accuracy", "accuracies")             # the last part of the name of a share of the held-out rows
SAMPLES = 8                                    # completions of a run that are shown


class RunFiles(NamedTuple):
    """What a run's directory holds."""
    directory: str
    config: dict[str, str]
    started: dict               # run.json
    train: list[dict]           # rows of metrics.jsonl
    held_out: list[dict]
    samples: list[dict]
    events: list[str]

    @property
    def name(self) -> str:
        return os.path.basename(os.path.normpath(self.directory))

    def values(self, split: str, metric: str) -> list[tuple[float, float]]:
        """(step, value) of a metric, without steps at which it was not finite."""
        rows = self.train if split == "train" else self.held_out
        found = []
        for row in rows:
            if row.get(metric) is not None:
                found.append((row["step"], row[metric]))
        return found

    def numbers(self, metric: str) -> list[float]:
        """The values of a metric in the order of the updates."""
        return [value for _, value in self.values("train", metric)]

    def data(self, split: str) -> dict:
        """What run.json says of the rows of a split; {} where there are none."""
        return (self.started.get("data") or {}).get(split) or {}


# ---- read --------------------------------------------------------------------------------------------

def read_run(directory: str) -> RunFiles | None:
    """The files of the run in a directory; None if it is none."""
    config = read_config(directory)
    if config is None or "algorithm" not in config:
        return None
    started = read_started(directory)
    rows = read_rows(os.path.join(directory, "metrics.jsonl"))
    for key, value in config.items():
        if not isinstance(value, str):               # such as a list of files
            config[key] = json.dumps(value, ensure_ascii=False)
    splits = {"train": [], "eval": []}
    for row in rows:
        splits.setdefault(row.get("split"), []).append(row)
    samples = read_rows(os.path.join(directory, "samples.jsonl"))
    events = read_lines(os.path.join(directory, "events.log"))
    return RunFiles(directory, config, started, splits["train"], splits["eval"], samples, events)


def read_started(directory: str) -> dict:
    """What the run.json in a directory says; {} where the file is lost or damaged."""
    try:
        with open(os.path.join(directory, "run.json"), encoding="utf-8") as file:
            started = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return started if isinstance(started, dict) else {}


def read_lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
            return file.read().split("\n")      # not splitlines: a text may hold other ends of lines
    except OSError:
        return []


def read_rows(path: str) -> list[dict]:
    """The rows of a file of a run; a line that is none, the half of a killed process, is left out."""
    rows = []
    for line in read_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


# ---- compare -----------------------------------------------------------------------------------------

def differing(runs: list[RunFiles]) -> list[str]:
    """The keys of the configurations that have more than one value."""
    keys = {}
    for run in runs:
        keys |= run.config
    found = []
    for key in keys:
        values = {run.config.get(key) for run in runs}
        if len(values) > 1 and key not in PLACES:
            found.append(key)
    return found


def groups_of(runs: list[RunFiles]) -> list[list[RunFiles]]:
    """Runs that differ in their seed only are together."""
    groups = {}
    for run in runs:
        kept = run.config | dict.fromkeys((*PLACES, "seed"))
        groups.setdefault(json.dumps(kept, sort_keys=True), []).append(run)
    return list(groups.values())


def label_of(group: list[RunFiles]) -> str:
    """The name of a line in the pictures."""
    if len(group) == 1:
        return group[0].name
    seeds = ", ".join(run.config.get("seed", "?") for run in group)
    return f"{group[0].name} (mean of seeds {seeds})"


def metrics_of(runs: list[RunFiles]) -> list[str]:
    """The names of all metrics, the most important first."""
    names = {}
    for run in runs:
        for row in run.train + run.held_out:
            names |= dict.fromkeys(row)
    for name in HIDDEN:
        names.pop(name, None)

    def rank(name):
        for i, start in enumerate(FIRST):
            if name.startswith(start):
                return i
        return len(FIRST)

    return sorted(names, key=rank)


def with_interval(run: RunFiles, name: str, value: float) -> str:
    """A value of held-out rows; a share of them with its 95 % interval."""
    count = run.data("eval").get("used", 0)
    if name.rpartition("/")[2] in RATES and count and 0 <= value <= 1:
        low, high = wilson(value, count)
        return f"{number(value)} ({low:.3f} to {high:.3f})"
    return number(value)


# ---- what to look at ---------------------------------------------------------------------------------

def warnings_of(run: RunFiles) -> list[str]:
    """Sentences about what a reader of the curves could miss."""
    found = []
    for line in run.events:
        _, mark, text = line.partition(" warning: ")
        if mark:
            found.append(text)
    norms = run.numbers("grad_norm")
    if norms and not any(norms):
        found.append("The gradient is 0 in every update, so nothing was learned: look at the rewards.")
    if mean_at_end(run, "frac_reward_zero_std") > 0.5:
        found.append("At the end more than half of the groups have equal rewards and give no gradient: the "
                     "problems are too easy, or too hard.")
    share = mean_at_end(run, "completions/clipped_ratio")
    if share > 0.3:
        found.append(f"At the end {share:.0%} of the completions are truncated: raise max_completion_length.")
    held_out = run.values("eval", "loss")
    if len(held_out) > 2:
        step, least = min(held_out, key=lambda point: point[1])
        if held_out[-1][1] > least + 0.05 * abs(least):
            found.append(f"The held-out loss was lowest at step {step} ({number(least)}) and is "
                         f"{number(held_out[-1][1])} at the end: fewer updates may be better.")
    kl = run.numbers("kl")
    if len(kl) > 20:
        middle = statistics.median(kl[len(kl) // 4:len(kl) // 2])
        if mean_at_end(run, "kl") > max(1.0, 5 * middle):
            found.append("The KL to the reference grew more than fivefold in the second half: the policy "
                         "runs away from it; raise beta, or lower lr.")
    return found


def mean_at_end(run: RunFiles, name: str) -> float:
    """The mean of a metric over the last tenth of the updates; 0 where it is not there."""
    values = run.numbers(name)
    last = values[-max(1, len(values) // 10):]
    return sum(last) / len(last) if last else 0.0


# ---- the page ----------------------------------------------------------------------------------------

def page(runs: list[RunFiles]) -> str:
    """The whole page as HTML."""
    title = " · ".join(run.name for run in runs)
    groups = groups_of(runs)
    parts = [f"<h1>{escape(title)}</h1>", facts(runs)]
    parts += [section("Worth a look", list_of_warnings(runs))]
    parts += [section("What differs", table_of(["key", *names(runs)], differences(runs)))]
    parts += [section("Held-out rows, first and last evaluation", held_out_table(runs))]
    parts += [section("Curves", legend(groups) + curves(groups))]
    parts += [section("Samples", samples(runs))]
    parts += [section("Data", table_of(["", *names(runs)], data_rows(runs), "texts"))]
    parts += [section("Do it again", again(runs))]
    with open(PAGE, encoding="utf-8") as file:
        style = file.read()
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{style}</style></head>\n<body>{''.join(parts)}</body></html>\n")


def names(runs: list[RunFiles]) -> list[str]:
    return [run.name for run in runs]


def section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def table_of(head: list[str], rows: list[list[str]], kind: str = "numbers") -> str:
    """A table; "" without rows. `kind`: a class of the style, which says whether cells may be broken."""
    if not rows:
        return ""
    cells = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = [f"<tr>{cells}</tr>"]
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(text)}</td>" for text in rest)
        lines.append(f"<tr><th>{escape(first)}</th>{cells}</tr>")
    return f'<div class="wide"><table class="{kind}">{"".join(lines)}</table></div>'


def facts(runs: list[RunFiles]) -> str:
    """A sentence about each run."""
    lines = []
    for run in runs:
        updates = f"{run.train[-1]['step']} updates" if run.train else "no updates"
        config = run.config
        text = f"{config['algorithm']} of {config.get('model')} on {config.get('data')}, {updates}"
        machine = run.started.get("machine") or {}
        place = machine.get("gpu") or f"{machine.get('cores', '?')} CPU cores"
        count = run.started.get("world_size", 1)
        processes = "" if count == 1 else f", {count} processes"
        lines.append(f"<p><b>{escape(run.name)}</b>: {escape(text)}, {escape(place)}{processes}</p>")
    return "".join(lines)


def list_of_warnings(runs: list[RunFiles]) -> str:
    lines = []
    for run in runs:
        for text in warnings_of(run):
            lines.append(f"<li><b>{escape(run.name)}</b>: {escape(text)}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def differences(runs: list[RunFiles]) -> list[list[str]]:
    rows = []
    for key in differing(runs):
        values = [run.config.get(key, "-") for run in runs]
        rows.append([key, *values])
    return rows


def held_out_table(runs: list[RunFiles]) -> str:
    return table_of(["metric", "run", "first", "last", "change"], held_out_cells(runs))


def held_out_cells(runs: list[RunFiles]) -> list[list[str]]:
    """A row for every metric and run, the runs below each other."""
    rows = []
    for name in metrics_of(runs):
        for run in runs:
            points = run.values("eval", name)
            if points:
                (first, before), (last, after) = points[0], points[-1]
                cells = [f"{with_interval(run, name, before)} at step {first}",
                         f"{with_interval(run, name, after)} at step {last}"]
                rows.append([name, run.name, *cells, f"{after - before:+.4g}"])
    return rows


def legend(groups: list[list[RunFiles]]) -> str:
    labels = []
    for i, group in enumerate(groups):
        labels.append(f'<span class="c{i % COLORS}">{escape(label_of(group))}</span>')
    text = "Lines are updates, points evaluations on held-out rows."
    if len(groups) < sum(map(len, groups)):
        text += " A band holds the lowest and the highest seed."
    return f'<p class="legend">{"".join(labels)}</p><p>{text}</p>'


def curves(groups: list[list[RunFiles]]) -> str:
    """A picture for every metric that is not the same number everywhere; the others as a line of text."""
    figures, constant = [], []
    for metric in metrics_of(list(itertools.chain(*groups))):
        drawn, values = [], set()
        for i, group in enumerate(groups):
            for split in ("train", "eval"):
                curve = curve_of(group, split, metric, f"c{i % COLORS}")
                if curve:
                    drawn.append(curve)
                    values |= {value for _, value in curve.points}
        if len(values) == 1:
            constant.append(f"{metric} {number(values.pop())}")
        elif drawn:
            picture = chart(metric, drawn)
            figures.append(f"<figure><figcaption>{escape(metric)}</figcaption>{picture}</figure>")
    text = f"<p>Constant: {escape('; '.join(constant))}.</p>" if constant else ""
    return f'<div class="charts">{"".join(figures)}</div>{text}'


def curve_of(group: list[RunFiles], split: str, metric: str, color: str) -> Curve | None:
    """The mean over the runs of a group, with the band of their lowest and highest values."""
    by_step = {}
    for run in group:
        for step, value in run.values(split, metric):
            by_step.setdefault(step, []).append(value)
    if not by_step:
        return None
    points, band = [], []
    for step, values in sorted(by_step.items()):
        points.append((step, sum(values) / len(values)))
        band.append((step, min(values), max(values)))
    return Curve(label_of(group), color, points, band if len(group) > 1 else [], split == "eval")


def samples(runs: list[RunFiles]) -> str:
    """The last completions of every run, with their rewards."""
    columns = []
    for run in runs:
        if not run.samples:
            continue
        step = run.samples[-1]["step"]
        last = [row for row in run.samples if row["step"] == step]
        lines = [f"<h3>{escape(run.name)}, step {step}</h3>"]
        prompt = None
        for row in last[:SAMPLES]:
            if row.get("prompt") != prompt:
                prompt = row.get("prompt")
                lines.append(f'<pre class="prompt">{shown(prompt)}</pre>')
            reward = "" if row.get("reward") is None else f"<b>{number(row['reward'])}</b> "
            lines.append(f"<pre>{reward}{shown(row.get('completion'))}</pre>")
        columns.append(f"<div>{''.join(lines)}</div>")
    return f'<div class="samples">{"".join(columns)}</div>' if columns else ""


def shown(text) -> str:
    """A text of a model, in which anything may stand."""
    return escape(printable(str(text)))


def data_rows(runs: list[RunFiles]) -> list[list[str]]:
    rows = []
    for split, title in (("train", "training rows"), ("eval", "held-out rows")):
        cells = []
        for run in runs:
            cells.append(data_cell(run.data(split)) if run.data(split) else "-")
        if set(cells) != {"-"}:
            rows.append([title, *cells])
    return rows


def data_cell(report: dict) -> str:
    parts = [str(report.get("source")), f"{report.get('read')} read, {report.get('used')} used"]
    for reason, count in (report.get("dropped") or {}).items():
        parts.append(f"{count} dropped: {reason}")
    median = (report.get("total") or {}).get("50")
    if median:
        parts.append(f"half of them up to {median} tokens")
    return "; ".join(parts)


def again(runs: list[RunFiles]) -> str:
    """The command of every run, its versions, and its whole configuration."""
    parts = []
    for run in runs:
        versions = ", ".join(map(" ".join, (run.started.get("versions") or {}).items()))
        config = "\n".join(map(": ".join, run.config.items()))
        parts.append(f"<pre>{escape(run.started.get('command', ''))}</pre><p>{escape(versions)}</p>"
                     f"<details><summary>config.yaml of {escape(run.name)}</summary>"
                     f"<pre>{escape(config)}</pre></details>")
    return "".join(parts)


def write_report(directory: str) -> str | None:
    """Write report.html into a run's directory; its path, or None where nothing was logged or the disk
    refuses: a report never stops a run."""
    run = read_run(directory)
    if run is None or not run.train:
        return None
    path = os.path.join(directory, REPORT)
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(page([run]))
    except OSError:
        return None
    return path


# ---- the same numbers as text ------------------------------------------------------------------------

def as_markdown(runs: list[RunFiles]) -> str:
    """What differs, and the held-out rows, as tables in markdown."""
    lines = []
    lines += markdown_table(["key", *names(runs)], differences(runs))
    lines += markdown_table(["held-out", "run", "first", "last", "change"], held_out_cells(runs))
    for run in runs:
        for text in warnings_of(run):
            lines.append(f"- {run.name}: {text}")
    return "\n".join(lines) + "\n"


def markdown_table(head: list[str], rows: list[list[str]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
