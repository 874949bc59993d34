"""Kill train.py, evaluate.py and sample.py; the same command must then end as if nothing had happened. Not
part of the suite.

    python tests/kills.py random --count 200
        SIGKILL, SIGINT, SIGTERM at random moments of whole runs
    python tests/kills.py operations --kinds dpo,grpo,rm
        SIGKILL before every file operation of a run

A run ends well if the same command returns 0, everything that was on the disk before is still there, and all
results are bit for bit those of an undisturbed run. It exits with 1 if anything was lost or is different;
`--json FILE` keeps every kill.
"""
import argparse
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import file_operations
import helpers
import robust_helpers as child

LIMIT = 120                                   # seconds after which a run hangs
SIGNALS = ("SIGKILL", "SIGINT", "SIGTERM")
FAULTS = ("lost", "different", "hang", "traceback", "exit code", "left behind", "orphan")
# 0: the run was in its last update
CODES = {
    signal.SIGKILL: {-9},
    signal.SIGINT: {130, 0},
    signal.SIGTERM: {143, 0},
}
PHASES = ("loading", "reference", "rollout", "updates", "rows", "saving", "finished")


class Kind(NamedTuple):
    """A command whose runs are disturbed: `python script words...` in a fresh directory."""
    name: str
    script: str
    words: list[str]
    rows: int = 0               # for a script that writes rows: how many there are in the end,
    batch: int = 1              # and how many are written at a time
    per_rollout: int = 0        # for an online algorithm: its updates per rollout
    reference: bool = False     # whether a pass over the reference comes before the updates


class Fault(NamedTuple):
    """What went wrong after a kill: one of FAULTS, and the words for it."""
    kind: str
    text: str


# ---- what is run -----------------------------------------------------------------------------------------

OFFLINE = {
    "sft": ("sft", {}),
    "dpo": ("dpo", {}),
    "kto": ("kto", {}),
    "rm": ("rm", {}),
    "lora": ("sft", {"lora_r": 4, "lora_dropout": 0.1}),
    "merge": ("dpo", {"lora_r": 4, "merge": "true"}),
}
# ppo_critic: the critic starts as the reward model
ONLINE = {"grpo": "grpo", "ppo": "ppo", "ppo_critic": "ppo", "dapo": "dapo"}
EVALUATE = ("evaluate", "evaluate_pairs")
KINDS = (*OFFLINE, *ONLINE, *EVALUATE, "sample")


def make_kinds(folder: Path, names: list[str], save_every: int) -> list[Kind]:
    """The commands called `names`, with models and data in `folder`."""
    model = helpers.tiny_model(folder / "model")
    kinds = []
    for name in names:
        if name in OFFLINE or name in ONLINE:
            kinds.append(make_training(folder, model, name, save_every))
        else:
            kinds.append(make_evaluation(folder, model, name))
    return kinds


def make_training(folder: Path, model: str, name: str, save_every: int) -> Kind:
    values = {"save_every": save_every}
    if name in OFFLINE:
        algorithm, own_values = OFFLINE[name]
        values |= own_values
        if algorithm != "rm":
            values["sample_every"] = 3
    else:
        algorithm = ONLINE[name]
        values |= {"max_steps": 10, "sample_every": 3}
    if name == "ppo_critic":
        critic = training(folder, model, "critic", "rm", {"save_every": save_every})
        values["reward"] = finished_run(folder, critic)
    return training(folder, model, name, algorithm, values)


def training(folder: Path, model: str, name: str, algorithm: str, values: dict) -> Kind:
    rows = helpers.ROWS[algorithm]
    is_online = algorithm in helpers.ONLINE
    config = {
        "algorithm": algorithm,
        "model": model,
        "data": helpers.write_jsonl(folder / f"{rows.__name__}.jsonl", rows(10)),
        "eval_data": helpers.write_jsonl(folder / f"{rows.__name__}-eval.jsonl", rows(4, 50)),
        "output": "run",
        **child.BASE,
        **helpers.ONLINE.get(algorithm, {}),
        **values,
    }
    path = helpers.write_config(folder / f"{name}.yml", **config)
    if is_online:
        return Kind(name, "train.py", [path], per_rollout=4)
    return Kind(name, "train.py", [path], reference=algorithm in ("dpo", "kto"))


def finished_run(folder: Path, kind: Kind) -> str:
    """A run of a kind that another kind starts from."""
    directory = folder / kind.name
    directory.mkdir()
    end = wait(start(kind, directory), directory)
    assert end.code == 0, end.err
    return str(directory / "run")


def make_evaluation(folder: Path, model: str, name: str) -> Kind:
    if name == "evaluate_pairs":
        pairs = helpers.write_jsonl(folder / "many-pairs.jsonl", helpers.pair_rows(300))
        other = helpers.tiny_model(folder / "other", seed=1)
        words = [model, f"data={pairs}", f"reference={other}", "output=out"]
        return Kind(name, "evaluate.py", words, rows=300, batch=64)
    prompts = helpers.write_jsonl(folder / "many-prompts.jsonl", helpers.prompt_rows(24))
    words = [model, f"data={prompts}", f"reward={helpers.REWARDS}:varied", "max_completion_length=30",
             "rollout_batch_size=8", "output=out"]
    if name == "evaluate":
        return Kind(name, "evaluate.py", [*words, "n=2"], rows=48, batch=8)
    return Kind(name, "sample.py", [*words, "n=4"], rows=96, batch=8)


# ---- a process -------------------------------------------------------------------------------------------

class Cold:
    """A process started by the shell's command, with the interface of multiprocessing's."""

    def __init__(self, kind: Kind, directory: Path):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, child.ROOT / kind.script, *kind.words]
        with open(directory / child.OUT, "wb") as out, open(directory / child.ERR, "wb") as err:
            self.process = subprocess.Popen(command, cwd=directory, stdout=out, stderr=err, env=environment,
                                            start_new_session=True)
        self.pid = self.process.pid

    @property
    def exitcode(self):
        return self.process.poll()

    def join(self, seconds):
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass


class Started(NamedTuple):
    process: object
    since: float                # when its script began, on time.time()'s clock


class End(NamedTuple):
    code: int | None            # None: it hung, and was killed
    err: str


def start(kind: Kind, directory: Path, cold: bool = False, patch=None, arguments=()) -> Started:
    if cold:
        return Started(Cold(kind, directory), time.time())
    process = child.start(directory, kind.script, kind.words, patch, arguments)
    while not (directory / child.ERR).exists() and process.exitcode is None:
        time.sleep(0.001)
    return Started(process, time.time())


def wait(started: Started, directory: Path) -> End:
    process = started.process
    process.join(LIMIT)
    code = process.exitcode
    if code is None:
        os.kill(process.pid, signal.SIGKILL)
        process.join(LIMIT)
    return End(code, (directory / child.ERR).read_text(errors="replace"))


def disturb(kind: Kind, directory: Path, started: Started, number: int, moment: float) -> str | None:
    """Send a signal `moment` seconds after the start; -> the phase it came in, None if the run had ended. The
    process stands still while the phase is looked up; Ctrl-C reaches its whole group, as on a terminal."""
    process = started.process
    process.join(max(0.0, moment - (time.time() - started.since)))
    if process.exitcode is not None:
        return None
    try:
        os.kill(process.pid, signal.SIGSTOP)
        found = phase(kind, directory, started.since)
        send = os.killpg if number == signal.SIGINT else os.kill
        send(process.pid, number)
        os.kill(process.pid, signal.SIGCONT)
    except ProcessLookupError:
        return None
    return found


def orphans(pid: int) -> list[str]:
    """The command lines of what a process has left in its session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = path.read_text().rpartition(")")[2]
            session = int(after_name.split()[3])
            if session == pid and int(path.parent.name) != pid:
                command = (path.parent / "cmdline").read_text()
                found.append(command.replace("\0", " "))
        except OSError:
            pass
    return found


# ---- what stands on the disk -----------------------------------------------------------------------------

def phase(kind: Kind, directory: Path, since: float = 0.0) -> str:
    """Where a process stands that started at `since`."""
    made = directory / ("run" if kind.script == "train.py" else "out")
    opened = [*made.glob("run.json"), *made.glob("*settings.json")]
    begun = [path for path in opened if path.stat().st_mtime >= since - 0.02]
    if not begun:
        return "loading"                          # the files are an earlier process's
    if leftovers(directory):
        return "saving"
    if kind.rows:
        return "rows" if complete_rows(directory) < kind.rows else "finished"
    if (made / "final").exists():
        return "finished"
    steps = 0
    for row in read_rows(made / "metrics.jsonl"):
        if row["split"] == "train":
            steps = max(steps, row["step"])
    if kind.reference and not steps and not list(directory.glob(".reference/*/table-*")):
        return "reference"
    if kind.per_rollout and steps % kind.per_rollout == 0:
        return "rollout"
    return "updates"


def leftovers(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*.tmp*"))


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a .jsonl file."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"}\n")]


def complete_rows(directory: Path) -> int:
    paths = (directory / "out").glob("*results.jsonl")
    return sum(map(len, map(read_rows, paths)))


def last_checkpoint(directory: Path) -> int:
    """The step of the newest checkpoint of a run; 0 without one."""
    numbers = [path.name[5:] for path in directory.glob("run/checkpoints/step-*")]
    steps = [int(number) for number in numbers if number.isdigit()]
    return max(steps, default=0)


def digests(folder: Path) -> dict:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes())
            found[str(path.relative_to(folder))] = digest.hexdigest()
    return found


def results(kind: Kind, directory: Path) -> dict:
    """Name -> content, or its digest, of everything that must not depend on what happened to a run."""
    found = {}
    if kind.rows:
        for name, digest in digests(directory / "out").items():
            if name.endswith((".json", ".jsonl")):
                found[f"out/{name}"] = digest
        return found
    run = directory / "run"
    step = last_checkpoint(directory)
    for name in ("final", "classifier", f"checkpoints/step-{step:06d}"):
        for file, digest in digests(run / name).items():
            found[f"run/{name}/{file}"] = digest
    for name in ("config.yaml", "samples.jsonl"):
        path = run / name
        found[f"run/{name}"] = path.read_text() if path.exists() else None
    for i, row in enumerate(read_rows(run / "metrics.jsonl"), start=1):
        for key in helpers.CLOCK:
            row.pop(key, None)
        found[f"run/metrics.jsonl:{i}"] = row
    return found


def compare(kind: Kind, directory: Path, expected: dict) -> list[Fault]:
    found = results(kind, directory)
    keys = sorted(found.keys() | expected.keys())
    differing = [key for key in keys if found.get(key) != expected.get(key)]
    faults = []
    if differing:
        text = f"{len(differing)} of {len(expected)}: {', '.join(differing[:5])}"
        faults.append(Fault("different", text))
    if left := leftovers(directory):
        faults.append(Fault("left behind", ", ".join(left)))
    return faults


# ---- one trial -------------------------------------------------------------------------------------------

def faults_of_end(end: End, pid: int, expected: set) -> list[Fault]:
    """The faults of one process: it may end with the codes `expected` only, in silence, and leaves no other
    process."""
    if end.code is None:
        return [Fault("hang", last_line(end.err))]
    faults = []
    if end.code not in expected:
        faults.append(Fault("exit code", f"{end.code}: {last_line(end.err)}"))
    if "Traceback" in end.err:
        faults.append(Fault("traceback", last_line(end.err)))
    if orphans(pid):
        time.sleep(2)                             # one that is ending is none
    if left := orphans(pid):
        faults.append(Fault("orphan", "; ".join(left)))
    return faults


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "no output"


def not_saved(kind: Kind, directory: Path, since: float, code: int) -> list[Fault]:
    """A run that says it has stopped has saved its last update."""
    begun = directory / "run" / "run.json"
    if kind.rows or code not in (130, 143):
        return []
    if not begun.exists() or begun.stat().st_mtime < since - 0.02:
        return []
    rows = read_rows(directory / "run" / "metrics.jsonl")
    last = max((row["step"] for row in rows), default=0)
    saved = last_checkpoint(directory)
    if saved >= last:
        return []
    text = f"stopped with {code} after update {last}, but the newest checkpoint is of {saved}"
    return [Fault("lost", text)]


def finish(kind: Kind, directory: Path, expected: dict, cold: bool = False) -> list[Fault]:
    """Run the command until it ends: it must do so at once, from the newest checkpoint or after the last
    whole rows, with the expected results."""
    saved = last_checkpoint(directory)
    done = complete_rows(directory)
    had_final = (directory / "run" / "final").exists()
    started = start(kind, directory, cold)
    end = wait(started, directory)
    faults = faults_of_end(end, started.process.pid, {0})
    if end.code != 0:
        return [*faults, Fault("lost", f"the same command does not end: {last_line(end.err)}")]
    if not kind.rows and not had_final:
        started_with = json.loads((directory / "run" / "run.json").read_text())
        resumed = started_with["resumed_from_step"]
        if resumed < saved:
            faults.append(Fault("lost", f"resumed from step {resumed}, a checkpoint of {saved} was there"))
    if kind.rows:
        again = re.search(r"(\d+) of (\d+) rows are done already", end.err)
        kept = 0
        if again:
            kept = int(again[1]) * kind.rows // int(again[2])
        if kept < done - done % kind.batch:
            faults.append(Fault("lost", f"{done} rows were whole, {kept} were kept"))
    return faults + compare(kind, directory, expected)


class Campaign:
    """Trials of some kinds in fresh directories of `folder`, against an undisturbed run of each; `records` is
    what came of them."""

    def __init__(self, folder: Path, kinds: list[Kind], cold: bool = False):
        self.folder = folder
        self.kinds = kinds
        self.cold = cold
        self.expected = {}
        self.seconds = {}
        self.records = []
        self.lock = threading.Lock()
        for kind in kinds:
            directory = self.fresh(f"{kind.name}-undisturbed")
            started = start(kind, directory, cold)
            end = wait(started, directory)
            assert end.code == 0 and not leftovers(directory), f"{kind.name}: {end}"
            self.seconds[kind.name] = time.time() - started.since
            self.expected[kind.name] = results(kind, directory)

    def fresh(self, name: str) -> Path:
        directory = self.folder / name
        directory.mkdir()
        return directory

    def kills(self) -> int:
        """The signals that have reached a run."""
        with self.lock:
            return sum(len(record["kills"]) for record in self.records)

    def keep(self, directory: Path, faults: list[Fault], **record) -> dict:
        """Note a trial; its directory stays if something was wrong."""
        record |= {"faults": [fault._asdict() for fault in faults]}
        if faults:
            record["directory"] = str(directory)
            what = f"{record['kind']}: {record.get('operation', '')} {record['kills']}"
            print(what, *map(str, faults), directory, sep="\n    ", flush=True)
        else:
            shutil.rmtree(directory)
        with self.lock:
            self.records.append(record)
        return record

    def random_trial(self, kind: Kind, seed: str) -> dict:
        """One to three signals, each at a random moment of the command, and then the command to its end."""
        rng = random.Random(seed)
        since = time.time()
        kills = []
        faults = []
        directory = self.fresh(f"{kind.name}-{seed}")
        for _ in range(rng.randint(1, 3)):
            number = rng.choices(list(CODES), (70, 15, 15))[0]
            moment = rng.uniform(0, self.seconds[kind.name])
            started = start(kind, directory, self.cold)
            found = disturb(kind, directory, started, number, moment)
            end = wait(started, directory)
            if number == signal.SIGKILL and end.code == 0:
                # nothing survives it: the run had ended, and was only still listed
                found = None
            # no handler yet, or none any more: the shell calls that 128 + number, too
            early = {-number} if found in ("loading", "finished") or kind.rows else set()
            allowed = CODES[number] | early if found else {0}
            faults += faults_of_end(end, started.process.pid, allowed)
            faults += not_saved(kind, directory, started.since, end.code)
            if found is None and not kills and end.code == 0:
                # the machine is quicker now than at the first run
                self.seconds[kind.name] = time.time() - started.since
            if found:
                kills.append({
                    "signal": number.name,
                    "seconds": round(moment, 3),
                    "phase": found,
                    "code": end.code,
                })
            if end.code is None or not found:
                break
        faults += finish(kind, directory, self.expected[kind.name], self.cold)
        seconds = round(time.time() - since, 2)
        return self.keep(directory, faults, kind=kind.name, seed=seed, kills=kills, seconds=seconds)

    def operations(self, kind: Kind) -> list[str]:
        """The file operations of an undisturbed run, in their order."""
        directory = self.fresh(f"{kind.name}-counted")
        log = self.folder / f"{kind.name}.operations"
        started = start(kind, directory, patch=file_operations.watch, arguments=(str(log),))
        end = wait(started, directory)
        assert end.code == 0 and not compare(kind, directory, self.expected[kind.name]), end
        shutil.rmtree(directory)
        return log.read_text().splitlines()

    def operation_trial(self, kind: Kind, number: int, operation: str, second: int | None = None) -> dict:
        """SIGKILL before the file operation `number`, with `second` also before that one of the next run, and
        then the command to its end."""
        since = time.time()
        directory = self.fresh(f"{kind.name}-operation-{number}")
        log = self.folder / f"{kind.name}-{number}.operations"
        kills = []
        faults = []
        for fatal in filter(None, (number, second)):
            started = start(kind, directory, patch=file_operations.watch, arguments=(str(log), fatal))
            end = wait(started, directory)
            allowed = {-9} if fatal == number else {-9, 0}      # the second run is shorter
            faults += faults_of_end(end, started.process.pid, allowed)
            died = log.read_text().splitlines()[-1]
            log.unlink()
            if end.code == -9:
                kills.append({
                    "signal": "SIGKILL",
                    "phase": phase(kind, directory),
                    "code": end.code,
                    "operation": f"{fatal} {died}",
                })
        faults += finish(kind, directory, self.expected[kind.name])
        seconds = round(time.time() - since, 2)
        return self.keep(directory, faults, kind=kind.name, number=number, operation=f"{number} {operation}",
                         kills=kills, seconds=seconds)


# ---- tables and the command line -------------------------------------------------------------------------

def anonymous(operation: str) -> str:
    """Without what differs between two runs and between the files of one kind."""
    operation = re.sub(r"(?<=[/-])[0-9a-f]{16}", "DIGEST", operation)
    operation = re.sub(r"step-\d+", "step-N", operation)
    return re.sub(r"tmp-[0-9a-f]+", "tmp", operation)


def print_operations(kind: Kind, operations: list[str]) -> None:
    """How many there are of each."""
    print(f"{kind.name}: {len(operations)} file operations")
    names = list(map(anonymous, operations))
    for name in dict.fromkeys(names):
        print(f"    {names.count(name):4}  first {names.index(name) + 1:4}  {name}")


def table(campaign: Campaign) -> str:
    """A row per kind: its kills, and the trials in which something was wrong."""
    columns = ["kind", "runs", "kills", *SIGNALS, *PHASES, *FAULTS, "s/kill"]
    rows = [columns, ["---"] * len(columns)]
    for kind in campaign.kinds:
        own = [record for record in campaign.records if record["kind"] == kind.name]
        rows.append(table_row(kind.name, own))
    rows.append(table_row("all", campaign.records))
    lines = [" | ".join(map(str, row)) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def table_row(name: str, records: list[dict]) -> list:
    counts = Counter()
    kills = 0
    seconds = 0.0
    for record in records:
        counts.update({fault["kind"] for fault in record["faults"]})      # each kind once per trial
        for kill in record["kills"]:
            counts.update([kill["signal"], kill["phase"]])
        kills += len(record["kills"])
        seconds += record["seconds"]
    counted = [counts[word] for word in (*SIGNALS, *PHASES, *FAULTS)]
    return [name, len(records), kills, *counted, f"{seconds / max(1, kills):.1f}"]


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("mode", choices=("random", "operations"))
    parser.add_argument("--kinds", help=f"some of {', '.join(KINDS)}, separated by commas; "
                                        "default: all, for operations dpo,grpo,rm")
    parser.add_argument("--save-every", type=int, default=2, help="updates between checkpoints (2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (1)")
    parser.add_argument("--folder", help="where the runs lie, a new directory; default: a temporary one")
    parser.add_argument("--json", help="a file for every kill and its outcome")
    parser.add_argument("--seed", type=int, default=0,
                        help="random seed for signals, moments and the second operation (0)")
    parser.add_argument("--count", type=int, default=200, help="random: signals that reached a run (200)")
    parser.add_argument("--cold", action="store_true",
                        help="random: start every process anew, imports included (6 s more for each)")
    parser.add_argument("--stride", type=int, default=1, help="operations: kill at every N-th (1)")
    parser.add_argument("--first", type=int, help="operations: only the first ones of each kind, this many")
    parser.add_argument("--twice", action="store_true",
                        help="operations: the next run is killed as well, before a random operation")
    parser.add_argument("--only", help="operations: only these numbers, separated by commas")
    options = parser.parse_args(argv)
    default = KINDS if options.mode == "random" else ("dpo", "grpo", "rm")
    options.kinds = (options.kinds or ",".join(default)).split(",")
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"unknown kinds: {', '.join(sorted(unknown))}")
    return options


def random_kills(campaign: Campaign, options, pool: ThreadPoolExecutor) -> None:
    numbers = itertools.count()

    def work(_):
        while campaign.kills() < options.count:
            with campaign.lock:
                number = next(numbers)
            kind = campaign.kinds[number % len(campaign.kinds)]
            campaign.random_trial(kind, f"{options.seed}-{number}")

    list(pool.map(work, range(options.jobs)))


def operation_kills(campaign: Campaign, options, pool: ThreadPoolExecutor) -> None:
    for kind in campaign.kinds:
        operations = campaign.operations(kind)
        print_operations(kind, operations)
        numbers = range(1, len(operations) + 1, options.stride)[:options.first]
        if options.only:
            numbers = map(int, options.only.split(","))

        def work(number, kind=kind, operations=operations):
            rng = random.Random(f"{options.seed}-{number}")
            last = len(operations) - number + 30       # and 30 to take the run up
            second = rng.randint(1, last) if options.twice else None
            campaign.operation_trial(kind, number, operations[number - 1], second)

        list(pool.map(work, numbers))


def main(argv: list[str]) -> int:
    options = parse(argv)
    since = time.time()
    child.preload("algorithms.grpo", "algorithms.ppo", "algorithms.dapo", "algorithms.kto", "algorithms.rm",
                  "model.actor_critic", "peft")
    folder = Path(options.folder or tempfile.mkdtemp(prefix="kills-")).resolve()
    folder.mkdir(exist_ok=True)
    kinds = make_kinds(folder, options.kinds, options.save_every)
    campaign = Campaign(folder, kinds, options.cold)
    undisturbed = [f"{name} {value:.1f}" for name, value in campaign.seconds.items()]
    print("seconds of an undisturbed run: " + ", ".join(undisturbed), flush=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        if options.mode == "random":
            random_kills(campaign, options, pool)
        else:
            operation_kills(campaign, options, pool)
    wrong = [record for record in campaign.records if record["faults"]]
    print(table(campaign))
    print(f"{time.time() - since:.0f} s in all; {len(wrong)} of {len(campaign.records)} runs with a fault")
    if options.json:
        report = {
            "arguments": argv,
            "seconds": round(time.time() - since, 1),
            "undisturbed": campaign.seconds,
            "faults": len(wrong),
            "records": campaign.records,
        }
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")
    if not wrong and not options.folder:
        shutil.rmtree(folder)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
