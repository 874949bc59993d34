"""How long GRPO takes to bring a model to 90 % on held-out problems: `python benchmark/time_to_90.py`.

Runs `train.py example/smollm2-grpo.yml` with every other key=value of the command line, and stops it after
the first evaluation whose reward reaches --target. What is printed, in seconds:

    total       from the start of the process to the end of that evaluation: imports, loading, sampling,
                updates and all evaluations
    training    the same without the evaluations
    loading     the phase until the first evaluation: imports, data, model, checks
    sampling, scoring, update, saving, evaluation: the phases of the run, which add up to the total

The evaluation is the run's own: one answer to every held-out problem, sampled at the run's temperature,
always with the same random numbers. An evaluation more often finds the moment more exactly, and more chances
to pass by luck. The run stays in --output (or --output-2, -3, ... where that is taken), for `figure.py`.
"""
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from functools import wraps
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark import shared  # noqa: E402

PHASES = ("loading", "sampling", "scoring", "update", "saving", "evaluation")
COLUMNS = ("commit", "total", "training", "updates", "held out", *PHASES, "threads", "machine")


# ---- the run: in a process of its own ----------------------------------------------------------------

class Reached(Exception):
    """The target is reached: the run ends here."""


class Clock:
    """Seconds by phase. Calls inside an evaluation belong to it; what is in no other phase is `update`."""

    def __init__(self, started: float):
        self.since = started
        self.phase = "loading"
        self.seconds = defaultdict(float)

    def enter(self, phase: str) -> None:
        now = time.time()
        self.seconds[self.phase] += now - self.since
        self.phase = phase
        self.since = now

    def timed(self, function, phase: str):
        """`function`, whose time counts as `phase`."""
        @wraps(function)
        def call(*arguments, **keywords):
            if self.phase == "evaluation":
                return function(*arguments, **keywords)
            self.enter(phase)
            try:
                return function(*arguments, **keywords)
            finally:
                self.enter("update")
        return call


def train(job: dict) -> dict:
    """Run train.py until the target is reached; the seconds and the evaluations, as [update, reward]."""
    import train as program
    from engine import importance, rollouts
    from engine.rollout_record import RolloutRecord
    from engine.saver import Saver

    clock = Clock(job["started"])
    evaluations = []
    problems = []
    timed_evaluation = clock.timed(RolloutRecord.evaluate, "evaluation")

    def evaluate(record, update):
        timed_evaluation(record, update)
        row = last_row(record.engine.run)
        if row is None or row["split"] != "eval" or row["step"] != update:
            return      # none was due
        evaluations.append([update, row["reward"]])
        problems.append(len(record.engine.eval_set))
        shared.say(f"update {update}: {row['reward']:.1%}")
        if row["reward"] >= job["target"]:
            raise Reached

    with (
        patch.object(RolloutRecord, "evaluate", evaluate),
        patch.object(importance, "sample", clock.timed(importance.sample, "sampling")),
        patch.object(rollouts.Rollouts, "score", clock.timed(rollouts.Rollouts.score, "scoring")),
        patch.object(Saver, "save", clock.timed(Saver.save, "saving")),
    ):
        try:
            program.main(job["words"])
            is_reached = False
        except Reached:
            is_reached = True
    clock.enter("end")
    return {
        "reached": is_reached,
        "evaluations": evaluations,
        "problems": problems[-1],
        "seconds": dict(clock.seconds),
    }


def last_row(run) -> dict | None:
    """The last row of the run's metrics."""
    row = None
    for line in run.rows("metrics.jsonl"):
        row = json.loads(line)
    return row


# ---- the report --------------------------------------------------------------------------------------

def run_until(args) -> dict:
    """The result of a run in a fresh process."""
    words = [args.recipe, f"output={free_name(args.output)}", *args.overrides]
    threads = str(args.threads)
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    job = {"words": words, "target": args.target, "started": time.time()}
    command = [sys.executable, __file__, "--child", "train", json.dumps(job)]
    done = subprocess.run(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("error: the run failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def free_name(output: str) -> str:
    """`output`, or with the first number that is not taken: a run that went on would be timed wrongly."""
    path = ROOT / output
    number = 1
    while path.exists():
        number += 1
        path = ROOT / f"{output}-{number}"
    return str(path)


def commit() -> str:
    """The commit of this project, with + where files differ from it."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def processor() -> str:
    """The name of the CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def line_of(result: dict, threads: int) -> str:
    """The run as a row of a table in markdown."""
    seconds = result["seconds"]
    total = sum(seconds.values())
    update, reward = result["evaluations"][-1]
    cells = [commit(), f"{total:.0f}", f"{total - seconds.get('evaluation', 0):.0f}", str(update)]
    cells.append(f"{reward:.1%} of {result['problems']}")
    for phase in PHASES:
        cells.append(f"{seconds.get(phase, 0):.1f}")
    return f"| {' | '.join([*cells, str(threads), processor()])} |"


def main() -> None:
    parser = shared.new_parser(__doc__)
    parser.add_argument("--recipe", default="example/smollm2-grpo.yml")
    parser.add_argument("--target", type=float, default=0.9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", default="runs/time-to-90", help="directory of the run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args()
    load = os.getloadavg()[0]
    if load > 0.5:
        shared.say(f"warning: the load of this machine is {load:.1f}: seconds count on a quiet one only")
    result = run_until(args)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    print(line_of(result, args.threads))
    curve = [f"{update}: {reward:.1%}" for update, reward in result["evaluations"]]
    print(f"\nheld-out reward by update: {', '.join(curve)}")
    if not result["reached"]:
        sys.exit(f"error: {args.target:.0%} was not reached; fix: raise max_steps")


if __name__ == "__main__":
    shared.start({"train": train}, main)
