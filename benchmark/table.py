"""What every algorithm does to a model: a table in markdown, from one command.

    python benchmark/table.py [--recipe smollm2] [--model DIR] [--data DIR] [ROW ...] [key=value ...]

Every row runs `train.py example/<recipe>-<algorithm>.yml` with every seed, `--jobs` at a time with one thread
each, and measures the final model. `--model` is another start model; `--data` another directory with files of
the same names as those in example/<recipe>/ (sft.jsonl, preference.jsonl, prompts.jsonl, eval-prompts.jsonl,
...), or one file of pairs, with `--eval-data` a file of held-out pairs: then the rows that need problems are
left out. key=value goes to every training (such as max_length=512 for long pairs). Columns, as means over the
seeds with 95 % intervals (Student's t):

    seconds     of the training, with loading and, for rm and online runs, their own evaluations; without an
                interval, since they depend on what else the machine does
    strict      share of the held-out problems that are solved by an answer that ended by itself, as the
                recipe's reward named "strict" says, else its first one; sampled at temperature 1, and greedy
    lenient     share of them whose answer's last number is right; sampled, and greedy
    tokens      of a sampled answer
    pairs       share of the held-out pairs whose chosen answer gained more log-prob over the start model than
                the rejected one; for rm, whose chosen answer scores higher
    KL          to the start model, in nats per answer, over the sampled answers
    text loss   nats per token on benchmark/ordinary_text.txt: a rise above the start model's is forgetting
    reward      of online runs: what they maximise, on the held-out problems

A finished part is kept in --output, so that an interrupted table goes on, and rows can be added later; the
weights are removed once they are measured. Delete the directory after any change. It also gets table.md and
table.json.
"""
import argparse
import concurrent.futures
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark import shared  # noqa: E402

MEASURE = str(ROOT / "benchmark" / "measure.py")
PREFERENCE = "preference.jsonl"
OFFLINE = ("sft", "dft", "dpo", "rpo", "ipo", "apo", "kto", "orpo", "simpo", "cpo", "rm")
ONLINE = ("grpo", "gdpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_pp", "ppo")
PROMPTING = ("prompt_template", "stop")      # keys of a recipe that say how its problems are asked
WEIGHTED = ("dpo", "orpo")      # rows with several weights of the loss
# the embedded model learns its task in a few updates: so that the differences show before all are at the top
SLOW = {"tiny": ["lr=1e-4", "batch_size=16", "eval_every=1000", "max_steps=16"]}
UNCLIPPED = ["epsilon=1000", "epsilon_high=1000"]
COLUMNS = {      # name in a measurement -> (title, factor to the title's unit)
    "seconds": ("seconds", 1),
    "strict": ("strict %", 100),
    "lenient": ("lenient %", 100),
    "greedy strict": ("greedy strict %", 100),
    "greedy lenient": ("greedy lenient %", 100),
    "tokens": ("tokens", 1),
    "pairs": ("pairs %", 100),
    "KL": ("KL", 1),
    "text loss": ("text loss", 1),
    "reward": ("reward", 1),
}
PROJECT = ("algorithms", "data", "engine", "model", "rewards")
ADVANTAGES = "rollout.advantages = group_advantages(rollout.rewards)"
NO_BASELINE = (ADVANTAGES, "rollout.advantages = rollout.rewards")
DIGITS = {"seconds": 0, "text loss": 3, "reward": 2}      # else 1
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}      # Student's t by the number of seeds


# ---- rows --------------------------------------------------------------------------------------------

class Row(NamedTuple):
    """A run: the YAML's algorithm, and what differs from it. The data are a file of the data's directory, or
    None for those that the YAML names."""
    algorithm: str | None = None      # None: the start model
    overrides: tuple = ()
    data: str | None = None
    selects: str | None = None        # "best" or "random": sft on this one of k answers of the start model
    needs: tuple = ()                 # (key, row): this key names the run of that row
    edit: tuple | None = None         # a line of the algorithm's file, and what stands in its place


def rows_of(args: argparse.Namespace) -> dict[str, Row]:
    """{name: Row}; those that need problems are left out where the data are one file of pairs."""
    rows = {"base": Row()}
    for algorithm in OFFLINE:
        rows[algorithm] = Row(algorithm)
        if algorithm == "sft" and not is_file(args.data):
            rows["sft, on the chosen answers"] = Row("sft", as_long_as_dpo(args), data=PREFERENCE)
        if algorithm in WEIGHTED:
            own = float(recipe_of(args, algorithm).get("beta", "nan"))
            for weight in args.weights:
                if weight != own:
                    rows[f"{algorithm}, beta {weight:g}"] = Row(algorithm, (f"beta={weight:g}",))
    if is_file(args.data):
        return rows
    for selected in ("best", "random"):
        rows[f"sft, {selected} of {args.k}"] = Row("sft", selects=selected)
    for algorithm in ONLINE:
        rows[algorithm] = Row(algorithm)
    rows["ppo, reward model"] = Row("ppo", ("reward_weights=null",), needs=("reward", "rm"))
    rows["distill, from sft"] = Row("distill", needs=("teacher", "sft"))
    return rows


def ablations_of(args: argparse.Namespace) -> dict[str, Row]:
    """{name: Row} of the ablations of grpo: what studies of it on GSM8K switch on and off."""
    slow = SLOW.get(args.recipe, [])
    updates = int(recipe_of(args, "grpo")["max_steps"])
    for word in slow:
        key, _, value = word.partition("=")
        if key == "max_steps":
            updates = int(value)
    repeated = [*slow, f"max_steps={4 * updates}", "num_iterations=4"]
    return {
        "grpo, ablated": Row("grpo", tuple(slow)),
        "no baseline": Row("grpo", tuple(slow), edit=NO_BASELINE),
        "std off, over a constant": Row("dr_grpo", tuple(slow)),
        "4 updates per rollout": Row("grpo", tuple(repeated)),
        "4 updates, no clipping": Row("grpo", (*repeated, *UNCLIPPED)),
    }


def as_long_as_dpo(args: argparse.Namespace) -> tuple:
    """What lets sft see about as many tokens of one response of each pair as dpo sees of both."""
    own = recipe_of(args, "dpo")
    words = [f"epochs={2 * int(own.get('epochs', 1))}", f"batch_size={own['batch_size']}"]
    if "max_steps" in own:      # it wins over epochs
        words.append(f"max_steps={2 * int(own['max_steps'])}")
    return tuple(words)


def is_file(data: str | None) -> bool:
    return data is not None and os.path.isfile(data)


def recipe_of(args: argparse.Namespace, algorithm: str) -> dict:
    """The keys of example/<recipe>-<algorithm>.yml, as texts."""
    path = ROOT / "example" / f"{args.recipe}-{algorithm}.yml"
    if not path.exists():
        sys.exit(f"error: {path} is not there; fix: give another --recipe")
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


# ---- train -------------------------------------------------------------------------------------------

class Failed(Exception):
    """A program of a row ended with an error, which is shown."""


class Table:
    """The parts of a table, in the directory `output`: a measurement per row and seed."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.rows = rows_of(args)
        if not is_file(args.data):
            self.rows |= ablations_of(args)
        self.needed = {kind.needs[1] for kind in self.rows.values() if kind.needs}
        self.output = Path(args.output or f"runs/table-{args.recipe}")
        self.base = args.model or recipe_of(args, "dpo")["model"]
        self.locks = defaultdict(threading.Lock)      # two rows may need the same part

    def path(self, row: str, seed: int) -> Path:
        name = row.replace(", ", "-").replace(" ", "_")
        return self.output / f"{name}-{seed}"

    def part(self, row: str, seed: int) -> Path:
        """Its numbers; not `with_suffix`, which would take the 5 of "beta 0.5" away."""
        return Path(f"{self.path(row, seed)}.json")

    def stored(self, row: str, seed: int) -> dict | None:
        """The numbers of a row with a seed, if they are there."""
        path = self.part(row, seed)
        return json.loads(path.read_text()) if path.exists() else None

    def run(self, row: str, seed: int) -> dict | None:
        """Train and measure one row with one seed, unless that is done; None where it fails."""
        with self.locks[row, seed]:
            numbers = self.stored(row, seed)
            if numbers is not None:
                return numbers
            try:
                numbers = self.train_and_measure(row, seed)
            except Failed as error:
                shared.say(f"{error}\nerror: {row}, seed {seed} failed, see above")
                return None
            shared.store(self.part(row, seed), numbers)
        shared.say(f"{row}, seed {seed}: {in_words(numbers)}")
        return numbers

    def train_and_measure(self, row: str, seed: int) -> dict:
        folder = self.path(row, seed)
        numbers = {}
        model = self.base
        if self.rows[row].algorithm:
            numbers = self.train(row, seed)
            model = str(folder / "final")
        if self.rows[row].algorithm == "rm":      # it writes no text
            numbers["pairs"] = last_evaluation(folder)["accuracy"]
        else:
            numbers |= json.loads(self.call([MEASURE, "measure", json.dumps(self.job(model, seed))]))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        if row not in self.needed:
            shutil.rmtree(folder / "final", ignore_errors=True)
        return numbers

    def train(self, row: str, seed: int) -> dict:
        """Train a row, or go on with it; its seconds, unless it was interrupted, and for an online run the
        reward on the held-out problems."""
        folder = self.path(row, seed)
        kind = self.rows[row]
        words = [f"output={folder}", f"seed={seed}", f"model={self.base}"]
        words += [*self.data_words(kind, seed), *kind.overrides]
        if kind.needs:
            key, other = kind.needs
            words.append(f"{key}={self.trained(other, seed)}")
        was_there = folder.exists()
        started = time.perf_counter()
        config = f"example/{self.args.recipe}-{kind.algorithm}.yml"
        program = self.edited(row, seed) if kind.edit else "train.py"
        self.call([program, config, *words, *self.args.overrides])
        numbers = {}
        if not was_there:
            numbers["seconds"] = time.perf_counter() - started
        evaluation = last_evaluation(folder)
        if "reward" in evaluation:
            numbers["reward"] = evaluation["reward"]
        return numbers

    def trained(self, row: str, seed: int) -> Path:
        """The run of a row that another row needs, trained again where only its numbers are left."""
        if self.run(row, seed) is None:
            raise Failed(f"the model of {row} is missing")
        folder = self.path(row, seed)
        with self.locks[row, seed]:
            if not (folder / "final").exists():
                shutil.rmtree(folder, ignore_errors=True)
                self.train(row, seed)
        return folder

    def edited(self, row: str, seed: int) -> str:
        """train.py in a copy of the project in which the line of the row is another."""
        kind = self.rows[row]
        copy = self.path(row, seed).with_name(f"edited-{seed}")
        for name in PROJECT:
            shutil.copytree(ROOT / name, copy / name, dirs_exist_ok=True)
        shutil.copy(ROOT / "train.py", copy)
        file = copy / "algorithms" / f"{kind.algorithm}.py"
        old, new = kind.edit
        source = file.read_text(encoding="utf-8")
        assert source.count(old) == 1, f"{file} has this line {source.count(old)} times: {old}"
        file.write_text(source.replace(old, new), encoding="utf-8")
        return str(copy / "train.py")

    def data_words(self, kind: Row, seed: int) -> list[str]:
        """The words of the command line that name the data, where they are not those of the YAML."""
        own = recipe_of(self.args, kind.algorithm)
        if is_file(self.args.data):
            held_out = self.args.eval_data if kind.algorithm == "rm" else "null"
            return [f"data={self.args.data}", f"eval_data={held_out}"]
        words = [f"data={self.file(own['data'])}", f"eval_data={self.file(own['eval_data'])}"]
        if kind.algorithm in OFFLINE and kind.algorithm != "rm":
            words[1] = "eval_data=null"      # it is measured afterwards
        if kind.data:
            words.append(f"data={self.file(kind.data)}")
        if kind.selects:
            words.append(f"data={self.selection(seed) / f'{kind.selects}.jsonl'}")
        return words

    def file(self, name: str) -> str:
        """A file of the recipe's data, or the one of this name in --data."""
        folder = self.args.data or f"example/{self.args.recipe}"
        return str(Path(folder) / Path(name).name)

    def selection(self, seed: int) -> Path:
        """A directory with best.jsonl and random.jsonl: for the same problems the best of k answers of the
        start model, and a random one."""
        folder = self.output / f"samples-{seed}"
        with self.locks["samples", seed]:
            if not (folder / "random.jsonl").exists():
                own = recipe_of(self.args, "grpo")
                words = [f"data={self.file(own['data'])}", f"n={self.args.k}", f"seed={seed}"]
                for key in ("reward", "reward_weights", "max_completion_length", *PROMPTING):
                    if key in own:
                        words.append(f"{key}={own[key]}")
                self.call(["sample.py", self.base, f"output={folder}", *words])
                self.call([MEASURE, "select", json.dumps({"folder": str(folder), "seed": seed})])
        return folder

    def job(self, model: str, seed: int) -> dict:
        """What the measurement of a model needs."""
        job = {"model": model, "start": self.base, "seed": seed, "limit": self.args.problems}
        job["of_start"] = str(self.output / "start-pairs.json")
        if is_file(self.args.data):
            return job | {"pairs": self.args.eval_data, "sampling": None}
        own = recipe_of(self.args, "grpo")
        sampling = {"data": self.file("eval-prompts.jsonl"), "reward": own["reward"]}
        sampling["max_completion_length"] = self.args.length or int(own["max_completion_length"])
        for key in PROMPTING:
            if key in own:
                sampling[key] = own[key]
        return job | {"pairs": self.file(f"eval-{PREFERENCE}"), "sampling": sampling}

    def call(self, command: list[str]) -> str:
        """The last line that a Python script prints, run with one thread."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        words = [sys.executable, *command]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise Failed(done.stderr)
        return done.stdout.splitlines()[-1] if done.stdout else ""


def last_evaluation(folder: Path) -> dict:
    """The last metrics of a run on its held-out rows; {} where it has none."""
    found = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["split"] == "eval":
            found = row
    return found


# ---- print -------------------------------------------------------------------------------------------

def in_words(numbers: dict) -> str:
    shown = []
    for name, (title, factor) in COLUMNS.items():
        if name in numbers:
            shown.append(f"{title} {numbers[name] * factor:.{DIGITS.get(name, 1)}f}")
    return "  ".join(shown)


def cell(name: str, values: list[float]) -> str:
    """The mean over the seeds and half its 95 % interval."""
    if not values:
        return "-"
    digits = DIGITS.get(name, 1)
    values = [value * COLUMNS[name][1] for value in values]
    mean = statistics.mean(values)
    if name == "seconds" or len(values) == 1:
        return f"{mean:.{digits}f}"
    spread = statistics.stdev(values) / len(values) ** 0.5 * T95[len(values)]
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def as_markdown(results: dict) -> str:
    """The table of {row: the numbers of every seed}, without columns that no row has."""
    known = set()
    for measured in results.values():
        known.update(*measured)
    shown = [name for name in COLUMNS if name in known]
    titles = [COLUMNS[name][0] for name in shown]
    lines = [f"| | {' | '.join(titles)} |", "|---|" + "---:|" * len(shown)]
    for row, measured in results.items():
        cells = []
        for name in shown:
            values = [numbers[name] for numbers in measured if name in numbers]
            cells.append(cell(name, values))
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def print_table(table: Table, rows: list[str]) -> None:
    """Print what is stored of these rows, and write it to table.md and table.json."""
    results = {}
    for row in rows:
        found = [table.stored(row, seed) for seed in table.args.seeds]
        results[row] = [numbers for numbers in found if numbers is not None]
    text = as_markdown(results)
    print(text, end="")
    (table.output / "table.md").write_text(text)
    shared.store(table.output / "table.json", {"settings": settings_of(table.args), "rows": results})


# ---- the command line --------------------------------------------------------------------------------

def settings_of(args: argparse.Namespace) -> dict:
    """What every part of a table depends on."""
    names = ("recipe", "model", "data", "eval_data", "problems", "length", "k", "overrides")
    return {name: getattr(args, name) for name in names}


def check_settings(table: Table) -> None:
    """An error where the directory holds the parts of another table."""
    used = settings_of(table.args)
    path = table.output / "settings.json"
    if path.exists() and json.loads(path.read_text()) != used:
        sys.exit(f"error: {table.output} holds a table with other settings; fix: give another --output")
    table.output.mkdir(parents=True, exist_ok=True)
    shared.store(path, used)


def read_args(argv: list[str]) -> argparse.Namespace:
    parser = shared.new_parser(__doc__)
    parser.add_argument("words", nargs="*", metavar="ROW | key=value", help="default: all but the ablations")
    parser.add_argument("--recipe", default="smollm2", help="the YAMLs: example/RECIPE-*.yml")
    parser.add_argument("--model", help="start model; default: the recipe's")
    parser.add_argument("--data", help="directory of the data, or a file of pairs; default: the recipe's")
    parser.add_argument("--eval-data", help="file of held-out pairs, where --data is a file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--weights", type=float, nargs="+", default=[0.1, 0.5, 2.0],
                        help="beta of the rows of dpo and orpo, beside the recipe's")
    parser.add_argument("--problems", type=int, help="held-out problems; default: all")
    parser.add_argument("--length", type=int, help="tokens of a measured answer; default: the recipe's limit")
    parser.add_argument("--k", type=int, default=8, help="answers from which the best is selected")
    parser.add_argument("--ablations", action="store_true", help="the rows of the ablations of grpo")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--output", help="directory of the parts; default: runs/table-RECIPE")
    parser.add_argument("--show", action="store_true", help="run nothing: print what is there")
    args = parser.parse_intermixed_args(argv)
    if len(args.seeds) > max(T95):
        parser.error(f"--seeds takes 1 to {max(T95)} seeds")
    if args.data and not os.path.exists(args.data):
        parser.error(f"--data: {args.data} is not there")
    if is_file(args.data) != bool(args.eval_data):
        parser.error("--eval-data belongs to a --data that is a file")
    for name in ("model", "data", "eval_data", "output"):
        path = getattr(args, name)
        if path and (name == "output" or os.path.exists(path)):      # else a model of the hub
            setattr(args, name, os.path.abspath(path))
    args.overrides = [word for word in args.words if "=" in word]
    args.names = [word for word in args.words if "=" not in word]
    return args


def main(argv: list[str]) -> None:
    args = read_args(argv)
    os.chdir(ROOT)      # the paths in the recipes start here
    table = Table(args)
    unknown = set(args.names) - set(table.rows)
    if unknown:
        sys.exit(f"error: no such row: {', '.join(unknown)}; fix: take some of {'; '.join(table.rows)}")
    rows = args.names or list(ablations_of(args) if args.ablations else rows_of(args))
    check_settings(table)
    futures = []
    if not args.show:
        with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
            for row in rows:
                futures += [pool.submit(table.run, row, seed) for seed in args.seeds]
    print_table(table, rows)
    if any(future.result() is None for future in futures):
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
