"""What many rows cost: tokenise made-up pairs, read them again as a later run does, find their reference.

    python benchmark/data_scale.py [--rows 20000 200000] [--model example/smollm2/model]

Every line of the output is measured in fresh processes, with the tokenizer of --model:

    first start     seconds until the tokens of all rows lie on the disk, and rows per second
    bytes / token   on the disk, without the text; a token of a pair counts once in its prompt
    second start    seconds of a later process until it has the rows: it checks every byte (sha256), maps them
    reference       seconds until it knows that the table holds every response's log-probs, which are made up
    bytes / row     private memory of that process, from before it opened the data until it has both
    update          milliseconds to lay out the 32 pairs of an update and to look up their log-probs
"""
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmark import shared  # noqa: E402

WORDS = {"prompt": 65, "chosen": 23, "rejected": 23}      # about 160 tokens with the template
UPDATES = 20
PART = 1_000_000                # responses in a part of the reference's table


def write_pairs(path: Path, rows: int) -> None:
    text = (ROOT / "benchmark" / "ordinary_text.txt").read_text(encoding="utf-8")
    vocabulary = text.split()
    rng = random.Random(0)
    with open(path, "w") as file:
        for number in range(rows):
            said = {side: " ".join(rng.choices(vocabulary, k=count)) for side, count in WORDS.items()}
            row = {"prompt": [{"role": "user", "content": f"{number} {said['prompt']}"}]}
            for side in ("chosen", "rejected"):
                row[side] = [{"role": "assistant", "content": said[side]}]
            file.write(json.dumps(row) + "\n")


# ---- in a fresh process ------------------------------------------------------------------------------

def inputs_of(job: dict) -> tuple:
    """What `read_data` takes: the configuration of a run on these rows, and the tokenizer."""
    from algorithms.dpo import Config
    from engine.config import Common
    from model.load import load_tokenizer
    common = Common(algorithm="dpo", model=job["model"], data=job["data"], max_length=1024)
    return common, Config(), "pairs", load_tokenizer(job["model"]), shared.say, job["runs"]


def first_start(job: dict) -> dict:
    from engine.prepared import STORE, read_data
    from engine.reference import write_part
    inputs = inputs_of(job)
    started = time.perf_counter()
    train_set = read_data(*inputs).train_set
    numbers = {"first start": time.perf_counter() - started, "tokens": int(train_set.sizes().sum())}
    files = [path for path in Path(job["runs"], STORE).rglob("*") if path.is_file()]
    numbers["disk"] = sum(path.stat().st_size for path in files)

    import torch
    all_lengths, all_keys = train_set.lengths()[:, 1:].ravel(), train_set.all_keys().ravel()
    for start in range(0, len(all_keys), PART):      # a reference pass writes parts, too
        part = slice(start, start + PART)
        lengths = all_lengths[part].tolist()
        logps = torch.zeros(sum(lengths)).split(lengths)
        keys = [key.ljust(16, b"\0") for key in all_keys[part].tolist()]
        write_part(job["table"], keys, list(logps))
    return numbers


def second_start(job: dict) -> dict:
    import numpy as np

    from data.pack import collate
    from engine.plan import Plan
    from engine.prepared import read_data
    from engine.reference import Reference, lacking, read_table, whole_parts
    inputs = inputs_of(job)
    memory = private_bytes()
    started = time.perf_counter()
    train_set = read_data(*inputs).train_set
    plan = Plan(inputs[0], len(train_set))
    plan.rows(1)
    numbers = {"second start": time.perf_counter() - started}

    started = time.perf_counter()
    table = read_table(whole_parts(job["table"], shared.say))
    (missing,), _, _ = lacking([train_set], table)
    assert len(missing) == 0
    numbers["reference"] = time.perf_counter() - started

    reference = Reference(table)
    seconds = []
    for update in range(1, UPDATES + 1):
        started = time.perf_counter()
        batch = collate([train_set[row] for row in plan.rows(update)])
        reference(batch)
        seconds.append(time.perf_counter() - started)
    numbers["update"] = float(np.median(seconds))
    numbers["memory"] = private_bytes() - memory
    return numbers


def private_bytes() -> int:
    """What this process alone holds in memory; mapped files are shared, and not counted."""
    total = 0
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty"):
            total += 1024 * int(line.split()[1])
    return total


# ---- the command line --------------------------------------------------------------------------------

def measure(rows: int, model: str, folder: str) -> dict:
    """The numbers of one size, in one dict."""
    job = {"model": model, "data": os.path.join(folder, "pairs.jsonl"), "runs": folder}
    job |= {"table": os.path.join(folder, "table"), "threads": 1, "work": folder}
    write_pairs(Path(job["data"]), rows)
    numbers = {"rows": rows}
    for role in ("first", "second"):
        numbers |= shared.child(__file__, role, job)
    return numbers


def as_line(numbers: dict) -> str:
    rows, seconds = numbers["rows"], numbers["first start"]
    return (f"| {rows:,} | {seconds:.1f} | {rows / seconds:,.0f} | {numbers['tokens'] / rows:.0f} | "
            f"{numbers['disk'] / numbers['tokens']:.2f} | {numbers['second start']:.2f} | "
            f"{numbers['reference']:.2f} | {numbers['memory'] / rows:.0f} | {1000 * numbers['update']:.1f} |")


def main() -> None:
    parser = shared.new_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20000, 200000])
    parser.add_argument("--model", default="example/smollm2/model", help="a directory with a tokenizer")
    args = parser.parse_args()
    print("| rows | first start, s | rows / s | tokens / row | bytes / token | second start, s | "
          "reference, s | bytes / row | update, ms |\n|" + "---:|" * 9, flush=True)
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            print(as_line(measure(rows, args.model, folder)), flush=True)


if __name__ == "__main__":
    shared.start({"first": first_start, "second": second_start}, main)
