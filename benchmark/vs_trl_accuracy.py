"""What DPO learns from the same pairs here and with TRL: held-out accuracy before and after, beside seconds
and memory.

    python benchmark/vs_trl_accuracy.py --model DIR --data hh-rlhf-harmless.jsonl.gz

The first --pairs usable rows are trained on; the --held-out ones after them, without those whose prompt was
trained on, are what both final models and the start model are measured on, by one program. TRL runs in the
setting that `vs_trl.py` finds the fastest: one pair per forward on a CPU, all pairs of an update on a GPU
(--gpu); the reference's log-probs precomputed, or with --in-memory the reference beside the policy. Seconds
and memory are counted as there. Prints a table in markdown.

Every part (each training, each measurement) is kept in --output, so that an interrupted comparison goes on.
"""
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import shared, vs_trl  # noqa: E402

BETA = 0.1      # the default of both sides
SETTINGS = (
    "source", "shape", "tokenizer", "data", "pairs", "held_out", "batch", "lr", "threads", "gpu",
    "precompute", "overrides")
SIDES = {"ours": "ours", "trl": "TRL"}
AT_ONCE = 64      # pairs measured between two progress lines


# ---- children ----------------------------------------------------------------------------------------

def prepare(job: dict) -> dict:
    """Write the model, the training rows in the form of each side, and the held-out ones in ours."""
    trained = job["pairs"]
    vs_trl.prepare(job | {"pairs": trained + job["held_out"]})
    ours = shared.read_jsonl(job["ours_rows"])
    theirs = shared.read_jsonl(job["trl_rows"])
    seen = {row["prompt"] for row in theirs[:trained]}
    held_out = []
    for row, rendered in zip(ours[trained:], theirs[trained:]):
        if rendered["prompt"] not in seen:
            held_out.append(row)
    shared.write_rows(job["ours_rows"], ours[:trained])
    shared.write_rows(job["trl_rows"], theirs[:trained])
    shared.write_rows(job["held_out_rows"], held_out)
    return {"held_out": len(held_out)}


def measure(job: dict) -> list:
    """[chosen, rejected]: the summed log-probs that job["measured"] gives to each held-out pair."""
    from data.dataset import build_dataset
    from engine.evaluation import load_frozen, response_scores
    from model.load import load_tokenizer

    tokenizer = load_tokenizer(job["model"])
    examples = build_dataset(job["held_out_rows"], "pairs", tokenizer, job["max_length"]).examples
    model = load_frozen(job["measured"], tokenizer, examples, shared.say)
    found = []
    for start in range(0, len(examples), AT_ONCE):
        for pair in response_scores(model, examples[start:start + AT_ONCE]):
            found.append(pair.tolist())
    return found


CHILDREN = {"prepare": prepare, "ours": vs_trl.train_ours, "trl": vs_trl.train_trl, "measure": measure}


# ---- parts that are kept -----------------------------------------------------------------------------

def part(job: dict, name: str, role: str, **changes):
    """The result of a child: of an earlier call, if there was one."""
    stored = Path(job["work"]) / f"{name}.json"
    if not stored.exists():
        shared.say(f"{name} ...")
        result = shared.child(__file__, role, job | changes)
        shared.store(stored, result)
    return json.loads(stored.read_text())


def check_settings(job: dict) -> None:
    """An error where the directory holds the parts of another comparison."""
    used = {name: job[name] for name in SETTINGS}
    stored = Path(job["work"]) / "settings.json"
    if stored.exists() and json.loads(stored.read_text()) != used:
        sys.exit(f"error: {job['work']} holds a comparison with other settings; fix: give another --output")
    shared.store(stored, used)


# ---- the report --------------------------------------------------------------------------------------

def numbers_of(scores: list, start: list) -> dict:
    """Held-out numbers of a model from its log-probs and those of the start model."""
    preferred = []
    rewarded = []
    losses = []
    for (chosen, rejected), (start_chosen, start_rejected) in zip(scores, start, strict=True):
        margin = chosen - rejected - (start_chosen - start_rejected)
        preferred.append(float(chosen > rejected))
        rewarded.append(float(margin > 0))
        losses.append(math.log1p(math.exp(-BETA * margin)))
    return {"log-prob": preferred, "implicit reward": rewarded, "loss": sum(losses) / len(losses)}


def percent(values: list[float]) -> str:
    """The share and its 95 % interval."""
    from evaluate import rate

    found = rate("share", values, len(values))
    low, high = found["share_95"]
    return f"{found['share']:.1%} ({low:.1%} to {high:.1%})"


def print_report(job: dict, results: dict, scores: dict) -> None:
    start = numbers_of(scores["start"], scores["start"])
    count = len(scores["start"])
    print(
        f"\ndpo: {job['pairs']} pairs of {Path(job['data'] or 'made-up text').name}, {job['batch']} per "
        f"update, lr {job['lr']:g}, beta {BETA:g}, {count} pairs held out, {job['threads']} threads; "
        f"model: {shared.model_line(job)}\n")
    print("| | seconds | pairs/s | peak GB | loss | accuracy, implicit reward | accuracy, log-prob |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print(f"| before | - | - | - | {start['loss']:.4f} | - | {percent(start['log-prob'])} |")
    for side, name in SIDES.items():
        result = results[side]
        numbers = numbers_of(scores[side], scores["start"])
        seconds = result["seconds"]
        print(
            f"| {name} | {seconds:.0f} | {job['pairs'] / seconds:.3f} | {result['peak']:.2f} "
            f"| {numbers['loss']:.4f} | {percent(numbers['implicit reward'])} "
            f"| {percent(numbers['log-prob'])} |")
    ours, theirs = results["ours"], results["trl"]
    print(
        f"\nspeed {theirs['seconds'] / ours['seconds']:.2f}x, memory {ours['peak'] / theirs['peak']:.2f}x; "
        f"loss, largest relative difference: {difference(ours, theirs, 4):.1e} in the first 4 updates, "
        f"{difference(ours, theirs, None):.1e} in all {len(ours['metrics'])}")


def difference(ours: dict, theirs: dict, updates: int | None) -> float:
    """The largest relative difference of the losses in the first `updates` updates."""
    found = []
    for a, b in zip(ours["metrics"][:updates], theirs["metrics"][:updates]):
        found.append(abs(a["loss"] - b["loss"]) / abs(b["loss"]))
    return max(found)


def compare(job: dict) -> bool:
    """Run what is missing and print the report; whether the sides agree in the first updates."""
    check_settings(job)
    part(job, "prepare", "prepare")
    results = {}
    scores = {"start": part(job, "measure-start", "measure", measured=job["model"])}
    for side in SIDES:
        final = f"{job['work']}/{side}"
        results[side] = part(job, side, side, final=final)
        scores[side] = part(job, f"measure-{side}", "measure", measured=final)
    print_report(job, results, scores)
    ours, theirs = results["ours"], results["trl"]
    is_equal = ours["ids"] == theirs["ids"]
    print(f"token ids equal: {'yes' if is_equal else 'NO'}")
    return is_equal and difference(ours, theirs, 4) <= shared.TOLERANCE


def main() -> None:
    parser = shared.new_parser(__doc__)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="pairs per update")
    parser.add_argument("--output", default="runs/vs-trl-accuracy", help="directory of the parts")
    parser.add_argument("--in-memory", action="store_true", help="TRL keeps the reference in memory")
    shared.add_options(parser, repeats=None)
    args = parser.parse_intermixed_args()
    if args.pairs % args.batch:
        parser.error("--pairs must be a multiple of --batch")
    own = {"algorithm": "dpo", "precision": "fp32", "precompute": not args.in_memory}
    own["per_device"] = args.batch if args.gpu else 1
    work = Path(args.output).resolve()
    work.mkdir(parents=True, exist_ok=True)
    job = shared.job_of(args, own | {"held_out_rows": f"{work}/held-out.jsonl"}, str(work))
    sys.exit(0 if compare(job) else 1)


if __name__ == "__main__":
    shared.start(CHILDREN, main)
