"""What every algorithm does to the embedded model: the README's table, from one command.

    python benchmark/tiny_table.py [--ablations] [--seeds 0 1 2] [--jobs 2] [ROW ...]

Runs `train.py example/tiny-<algorithm>.yml` for every row below and seed, `--jobs` at a time with one thread each, and prints
means over the seeds with 95 % intervals (Student's t). Finished runs are kept in runs/tiny-table/, so that an interrupted table
goes on where it stopped: delete that directory after any change. Columns:

    accuracy    right and in format on the 500 held-out problems, sampled at temperature 1, and greedy; format: the share in format, sampled
    pairs       share of the held-out pairs whose chosen answer gained more log-prob over the start model than the rejected one
    KL          to the start model, in nats per answer, over the sampled answers
    reward      of online runs: what they maximise, on the held-out problems; with the verifier that is the sampled accuracy
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
ROWS = {    # name -> the YAML's algorithm and what differs from it
    "base": None,
    "sft": ("sft", []),
    "sft, on the chosen answers": ("sft", ["data=example/tiny/preference.jsonl", "epochs=2"]),      # the control: as many tokens as pairs
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
    **{name: (name, []) for name in ("grpo", "dapo", "dr_grpo", "gspo", "cispo", "rloo", "reinforce_pp", "ppo")},
    "ppo, reward model": ("ppo", ["reward={rm}"]),
}
SLOW = ["lr=1e-4", "batch_size=16", "eval_every=1000", "max_steps=16"]      # so that the differences show before all of them are at the top
ABLATIONS = {    # of grpo: what studies of it on GSM8K switch on and off
    "grpo, slow": ("grpo", SLOW),
    "no baseline": ("grpo", [*SLOW, "baseline=false"]),
    "std off": ("grpo", [*SLOW, "scale_rewards=none"]),
    "std off, over a constant": ("dr_grpo", SLOW),
    "4 updates per rollout": ("grpo", [*SLOW, "max_steps=64", "num_iterations=4"]),
    "4 updates, no clipping": ("grpo", [*SLOW, "max_steps=64", "num_iterations=4", "epsilon=1000", "epsilon_high=1000"]),
}
ALL = ROWS | ABLATIONS
LOCKS = defaultdict(threading.Lock)                      # of a row and seed: two rows may need the same reward model
COLUMNS = {"seconds": 1, "sampled": 100, "greedy": 100, "format": 100, "pairs": 100, "KL": 1, "reward": 1}    # and the factor to its unit
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}                   # Student's t by the number of seeds


def folder_of(row: str, seed: int) -> Path:
    return FOLDER / f"{row.replace(', ', '-').replace(' ', '')}-{seed}"


def run(row: str, seed: int) -> dict:
    """Train and measure one row with one seed; the numbers of an earlier call are read again."""
    with LOCKS[row, seed]:
        return train_and_measure(row, seed)


def train_and_measure(row: str, seed: int) -> dict:
    folder = folder_of(row, seed)
    stored = FOLDER / f"{folder.name}.json"
    if stored.exists():
        return json.loads(stored.read_text())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    numbers, model = {}, BASE
    if ALL[row]:
        algorithm, overrides = ALL[row]
        if "reward={rm}" in overrides:
            run("rm", seed)
            overrides = [f"reward={folder_of('rm', seed).relative_to(ROOT)}"]
        shutil.rmtree(folder, ignore_errors=True)                # trained, but interrupted while it was measured
        start, model = time.time(), folder / "final"
        command = ["train.py", f"example/tiny-{algorithm}.yml", f"output={folder.relative_to(ROOT)}", f"seed={seed}", *overrides]
        done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{done.stderr}\nerror: {row} failed, see above")
        numbers = {"seconds": time.time() - start}
        evaluations = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines() if '"split": "eval"' in line]
        if "reward" in evaluations[-1]:
            numbers["reward"] = evaluations[-1]["reward"]
    measured = subprocess.run([sys.executable, __file__, "--measure", str(model), str(seed)], cwd=ROOT, env=environment,
                              capture_output=True, text=True, check=True)
    numbers |= json.loads(measured.stdout.splitlines()[-1])
    FOLDER.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps(numbers))
    print(f"{row}, seed {seed}: " + "  ".join(f"{name} {numbers[name] * unit:.1f}" for name, unit in COLUMNS.items() if name in numbers),
          file=sys.stderr, flush=True)
    return numbers


def measure_model(path: str, seed: int) -> dict:
    """The numbers of one model; of a reward model only the share of held-out pairs that it orders right."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path[:0] = [str(ROOT), str(ROOT / "example" / "tiny")]
    import measure

    from data.dataset import build_dataset
    from data.pack import Example, Response
    from data.tokenise import Tokeniser
    from model.load import load_lm
    from model.policy import Policy

    if (Path(path) / "value_head.safetensors").exists():
        rows = [json.loads(line) for line in (Path(path).parent / "metrics.jsonl").read_text().splitlines()]
        return {"pairs": [row for row in rows if row["split"] == "eval"][-1]["accuracy"]}
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokeniser, problems = Tokeniser(tokenizer), measure.read_rows(500)
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    prompts = [row["prompt"] for row in problems]
    sampled = measure.generate(lm, tokenizer, prompts, sample=True, seed=seed)
    greedy = measure.generate(lm, tokenizer, prompts, sample=False)

    def share(check, responses):
        return sum(map(check, responses, (row["answer"] for row in problems))) / len(problems)

    policy, start = (Policy(load_lm(str(name)).eval()) for name in (path, BASE))

    @torch.no_grad()
    def gains(examples):
        """Per response: its log-prob under the model minus that under the start model."""
        parts = []
        for i in range(0, len(examples), 50):
            batch = policy.collate(examples[i:i + 50])
            parts.append(batch.sum(policy(batch) - start(batch)))
        return torch.cat(parts)

    answers = [Example(torch.tensor(tokeniser.prompt_ids(prompt), dtype=torch.int32).numpy(),
                       [Response.all_trained(tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id])], "")
               for prompt, text in zip(prompts, sampled)]
    if path == BASE:
        return {"sampled": share(measure.is_right, sampled), "greedy": share(measure.is_right, greedy),
                "format": share(lambda text, _: measure.is_in_format(text), sampled)}
    chosen, rejected = gains(build_dataset(ROOT / "example/tiny/eval-preference.jsonl", "pairs", tokenizer, 512).examples).view(-1, 2).T
    return {"sampled": share(measure.is_right, sampled), "greedy": share(measure.is_right, greedy),
            "format": share(lambda text, _: measure.is_in_format(text), sampled),
            "pairs": float((chosen > rejected).float().mean()), "KL": float(gains(answers).mean())}


def cell(name: str, numbers: list) -> str:
    """Mean and half the 95 % interval; of seconds, which depend on what else the machine does, the mean alone."""
    if not numbers:
        return "-"
    numbers = [number * COLUMNS[name] for number in numbers]
    if name == "seconds" or len(numbers) == 1:
        return f"{statistics.mean(numbers):.{0 if name == 'seconds' else 1}f}"
    spread = statistics.stdev(numbers) / len(numbers) ** 0.5 * T95[len(numbers)]
    return f"{statistics.mean(numbers):.1f} ± {spread:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of: {'; '.join(ALL)} (default: all but the ablations)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ablations", action="store_true", help="the rows of the ablations of grpo")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_intermixed_args()
    if len(args.seeds) > max(T95):
        parser.error(f"--seeds takes 1 to {max(T95)} seeds")
    if unknown := set(args.rows) - set(ALL):
        parser.error(f"no such row: {', '.join(unknown)}")
    rows = args.rows or list(ABLATIONS if args.ablations else ROWS)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = {row: [pool.submit(run, row, seed) for seed in args.seeds] for row in rows}
        results = {row: [future.result() for future in futures] for row, futures in results.items()}
    print(f"| | {' | '.join(name + ' %' * (unit == 100) for name, unit in COLUMNS.items())} |\n|---|" + "---:|" * len(COLUMNS))
    for row, numbers in results.items():
        print(f"| {row} | {' | '.join(cell(name, [n[name] for n in numbers if name in n]) for name in COLUMNS)} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure_model(sys.argv[2], int(sys.argv[3]))))
    else:
        main()
