"""What every algorithm does to the embedded model: the README's table, from one command.

    python benchmark/tiny_table.py [--ablations] [--seeds 0 1 2] [--jobs 2] [ROW ...]

Runs `train.py example/tiny-<algorithm>.yml` for every row below and seed, `--jobs` at a time with one thread
each, and prints means over the seeds with 95 % intervals (Student's t). Finished runs are kept in
runs/tiny-table/, so that an interrupted table goes on where it stopped: delete that directory after any
change. Columns:

    accuracy    right and in format on the 500 held-out problems, sampled at temperature 1, and greedy;
                format: the share in format, sampled
    pairs       share of the held-out pairs whose chosen answer gained more log-prob over the start model than
                the rejected one
    KL          to the start model, in nats per answer, over the sampled answers
    reward      of online runs: what they maximise, on the held-out problems; with the verifier that is the
                sampled accuracy
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

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "runs" / "tiny-table"
BASE = "example/tiny/model"
PREFERENCE = "example/tiny/preference.jsonl"
ROWS = {      # name -> the YAML's algorithm and what differs from it
    "base": None,
    "sft": ("sft", []),
    # the control: as many tokens as pairs
    "sft, on the chosen answers": ("sft", [f"data={PREFERENCE}", "epochs=2"]),
    "dft": ("dft", []),
    "dpo, beta 0.1": ("dpo", ["beta=0.1"]),
    "dpo": ("dpo", []),
    "dpo, beta 2": ("dpo", ["beta=2"]),
    "ipo": ("ipo", []),
    "kto": ("kto", []),
    "orpo, beta 0.1": ("orpo", ["beta=0.1"]),
    "orpo": ("orpo", []),
    "orpo, beta 2": ("orpo", ["beta=2"]),
    "simpo": ("simpo", []),
    "cpo": ("cpo", []),
    "rm": ("rm", []),
    "grpo": ("grpo", []),
    "dapo": ("dapo", []),
    "dr_grpo": ("dr_grpo", []),
    "gspo": ("gspo", []),
    "cispo": ("cispo", []),
    "rloo": ("rloo", []),
    "reinforce_pp": ("reinforce_pp", []),
    "ppo": ("ppo", []),
    "ppo, reward model": ("ppo", ["reward={rm}"]),
}
# so that the differences show before all of them are at the top
SLOW = ["lr=1e-4", "batch_size=16", "eval_every=1000", "max_steps=16"]
REPEATED = [*SLOW, "max_steps=64", "num_iterations=4"]
ABLATIONS = {      # of grpo: what studies of it on GSM8K switch on and off
    "grpo, slow": ("grpo", SLOW),
    "std off, over a constant": ("dr_grpo", SLOW),
    "4 updates per rollout": ("grpo", REPEATED),
    "4 updates, no clipping": ("grpo", [*REPEATED, "epsilon=1000", "epsilon_high=1000"]),
}
ALL = ROWS | ABLATIONS
LOCKS = defaultdict(threading.Lock)      # by row and seed: two rows may need the same reward model
COLUMNS = {      # and the factor to its unit
    "seconds": 1,
    "sampled": 100,
    "greedy": 100,
    "format": 100,
    "pairs": 100,
    "KL": 1,
    "reward": 1,
}
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}      # Student's t by the number of seeds


# ---- train -------------------------------------------------------------------------------------------

def folder_of(row: str, seed: int) -> Path:
    name = row.replace(", ", "-").replace(" ", "")
    return FOLDER / f"{name}-{seed}"


def run(row: str, seed: int) -> dict:
    """Train and measure one row with one seed; the numbers of an earlier call are read again."""
    with LOCKS[row, seed]:
        return train_and_measure(row, seed)


def train_and_measure(row: str, seed: int) -> dict:
    folder = folder_of(row, seed)
    stored = FOLDER / f"{folder.name}.json"
    if stored.exists():
        return json.loads(stored.read_text())
    numbers = {}
    model = BASE
    if ALL[row]:
        numbers = train(row, seed)
        model = folder / "final"
    done = call([__file__, "--measure", str(model), str(seed)], row)
    numbers |= json.loads(done.splitlines()[-1])
    FOLDER.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(numbers))
    shown = []
    for name, factor in COLUMNS.items():
        if name in numbers:
            shown.append(f"{name} {numbers[name] * factor:.1f}")
    print(f"{row}, seed {seed}: {'  '.join(shown)}", file=sys.stderr, flush=True)
    return numbers


def train(row: str, seed: int) -> dict:
    """Train a row; its seconds and, for an online run, the reward on the held-out problems."""
    folder = folder_of(row, seed)
    algorithm, overrides = ALL[row]
    if "reward={rm}" in overrides:
        run("rm", seed)
        reward_model = folder_of("rm", seed).relative_to(ROOT)
        overrides = [f"reward={reward_model}"]
    shutil.rmtree(folder, ignore_errors=True)      # trained, but interrupted while it was measured
    own = [f"output={folder.relative_to(ROOT)}", f"seed={seed}"]
    started = time.time()
    call(["train.py", f"example/tiny-{algorithm}.yml", *own, *overrides], row)
    numbers = {"seconds": time.time() - started}
    evaluation = last_evaluation(folder)
    if "reward" in evaluation:
        numbers["reward"] = evaluation["reward"]
    return numbers


def call(command: list[str], row: str) -> str:
    """What a Python script prints, run with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [sys.executable, *command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: {row} failed, see above")
    return done.stdout


def last_evaluation(folder: Path) -> dict:
    """The last metrics of a run on its held-out rows."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["split"] == "eval"][-1]


# ---- measure -----------------------------------------------------------------------------------------

def measure_model(path: str, seed: int) -> dict:
    """The numbers of one model; of a reward model only the share of held-out pairs that it orders right."""
    sys.path[:0] = [str(ROOT), str(ROOT / "example" / "tiny")]
    if (Path(path) / "value_head.safetensors").exists():
        return {"pairs": last_evaluation(Path(path).parent)["accuracy"]}
    import measure
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    problems = measure.read_rows(500)
    prompts = [row["prompt"] for row in problems]
    solutions = [row["answer"] for row in problems]
    sampled = measure.generate(lm, tokenizer, prompts, sample=True, seed=seed)
    greedy = measure.generate(lm, tokenizer, prompts, sample=False)
    numbers = {
        "sampled": sum(map(measure.is_right, sampled, solutions)) / len(problems),
        "greedy": sum(map(measure.is_right, greedy, solutions)) / len(problems),
        "format": sum(map(measure.is_in_format, sampled)) / len(problems),
    }
    if path != BASE:
        numbers |= compare_with_base(path, tokenizer, prompts, sampled)
    return numbers


def compare_with_base(path: str, tokenizer, prompts: list, sampled: list[str]) -> dict:
    """The share of the held-out pairs whose chosen answer gained more log-prob over the start model than the
    rejected one, and the KL to the start model over these sampled answers."""
    import numpy as np

    from data.dataset import build_dataset
    from data.pack import Example, Response
    from data.tokenise import Tokeniser
    from model.load import load_lm
    from model.policy import Policy

    policy = Policy(load_lm(path).eval())
    start = Policy(load_lm(BASE).eval())
    tokeniser = Tokeniser(tokenizer)
    answers = []
    for prompt, text in zip(prompts, sampled):
        prompt_ids = np.array(tokeniser.prompt_ids(prompt), np.int32)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        response = Response.all_trained([*ids, tokenizer.eos_token_id])
        answers.append(Example(prompt_ids, [response], ""))
    pairs = build_dataset(ROOT / "example/tiny/eval-preference.jsonl", "pairs", tokenizer, 512).examples
    chosen, rejected = gains(policy, start, pairs).view(-1, 2).T
    return {
        "pairs": float((chosen > rejected).float().mean()),
        "KL": float(gains(policy, start, answers).mean()),
    }


def gains(policy, start, examples: list):
    """Per response: its log-prob under the policy minus that under the start model, a tensor."""
    import torch

    parts = []
    for i in range(0, len(examples), 50):
        batch = policy.collate(examples[i:i + 50])
        with torch.no_grad():
            parts.append(batch.sum(policy(batch) - start(batch)))
    return torch.cat(parts)


# ---- print -------------------------------------------------------------------------------------------

def cell(name: str, numbers: list) -> str:
    """Mean and half the 95 % interval; of seconds, which depend on what else the machine does, the mean
    alone."""
    if not numbers:
        return "-"
    numbers = [number * COLUMNS[name] for number in numbers]
    mean = statistics.mean(numbers)
    if name == "seconds":
        return f"{mean:.0f}"
    if len(numbers) == 1:
        return f"{mean:.1f}"
    spread = statistics.stdev(numbers) / len(numbers) ** 0.5 * T95[len(numbers)]
    return f"{mean:.1f} ± {spread:.1f}"


def print_table(results: dict) -> None:
    """`results`: {row: the numbers of every seed}."""
    titles = [name + " %" * (factor == 100) for name, factor in COLUMNS.items()]
    print(f"| | {' | '.join(titles)} |")
    print("|---|" + "---:|" * len(COLUMNS))
    for row, numbers in results.items():
        cells = []
        for name in COLUMNS:
            values = [seed[name] for seed in numbers if name in seed]
            cells.append(cell(name, values))
        print(f"| {row} | {' | '.join(cells)} |")


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument(
        "rows",
        nargs="*",
        metavar="ROW",
        help=f"one of: {'; '.join(ALL)} (default: all but the ablations)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablations", action="store_true", help="the rows of the ablations of grpo")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_intermixed_args()
    if len(args.seeds) > max(T95):
        parser.error(f"--seeds takes 1 to {max(T95)} seeds")
    unknown = set(args.rows) - set(ALL)
    if unknown:
        parser.error(f"no such row: {', '.join(unknown)}")
    rows = args.rows or list(ABLATIONS if args.ablations else ROWS)
    futures = {}
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        for row in rows:
            futures[row] = [pool.submit(run, row, seed) for seed in args.seeds]
    results = {}
    for row in rows:
        results[row] = [future.result() for future in futures[row]]
    print_table(results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure_model(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
