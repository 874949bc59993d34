"""What the benchmarks beside TRL share: the model, the text, our engine, fresh processes, options, medians.

The model is a directory of the user's (`--model`), or a random one of the shape below.

torch and the project are imported in functions that only child processes call: a child's peak memory starts
at its parent's size, so the parent stays small.
"""
import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "hidden_size": 896,
    "num_hidden_layers": 6,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
MAX_LENGTH = 2048      # no HH pair is longer
TOLERANCE = 1e-4
SETTINGS = {
    "schedule": "constant",
    "warmup": 0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "shuffle": False,
    "epochs": 1,
    "seed": 0,
}


# ---- the same model and the same text for both sides -------------------------------------------------

def made_up_text(rng: random.Random, low: int, high: int) -> str:
    """`low` to `high` words of random letters."""
    words = []
    for _ in range(rng.randint(low, high)):
        letters = rng.choices("etaoinshrdlu", k=rng.randint(2, 7))
        words.append("".join(letters))
    return " ".join(words)


def made_up_pair(rng: random.Random) -> dict:
    """One row in the form of HH-RLHF, with its spread of lengths when a byte is a token."""
    prompt = ""
    for _ in range(rng.randint(0, 2)):
        question = made_up_text(rng, 2, 20)
        answer = made_up_text(rng, 2, 20)
        prompt += f"\n\nHuman: {question}\n\nAssistant: {answer}"
    prompt += f"\n\nHuman: {made_up_text(rng, 2, 20)}\n\nAssistant:"
    chosen = made_up_text(rng, 2, 24)
    rejected = made_up_text(rng, 2, 24)
    return {"chosen": f"{prompt} {chosen}", "rejected": f"{prompt} {rejected}"}


def hh_rows(path: str | None, count: int):
    """Yield (where, row) of an HH-RLHF file; without one, `count` made-up pairs."""
    from data.files import read_rows

    if path:
        yield from read_rows(path)
        return
    rng = random.Random(0)
    for number in range(1, count + 1):
        yield f"made-up:{number}", made_up_pair(rng)


def write_rows(path: str, rows) -> None:
    """A .jsonl file of these rows."""
    lines = [json.dumps(row) + "\n" for row in rows]
    Path(path).write_text("".join(lines))


def read_jsonl(path: str) -> list[dict]:
    lines = Path(path).read_text().splitlines()
    return [json.loads(line) for line in lines]


def shape_of(directory: str) -> dict:
    """The keys of SHAPE, head_dim and max_position_embeddings, from the configuration of a model; an error
    names the key of SHAPE that it lacks."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        sys.exit(f"error: {path} is not there; fix: give --model a directory with a model")
    config = json.loads(path.read_text())
    config = config.get("text_config", config)
    shape = {}
    for key in SHAPE:
        value = config.get(key)
        if key == "num_key_value_heads":      # none: a key and a value for each query
            value = value or config.get("num_attention_heads")
        if not value:
            sys.exit(f"error: {path} has no {key}, which the arithmetic needs; fix: take another model")
        shape[key] = value
    size = shape["hidden_size"] // shape["num_attention_heads"]
    shape["head_dim"] = config.get("head_dim") or size
    shape["max_position_embeddings"] = config.get("max_position_embeddings") or MAX_LENGTH
    return shape


def write_model(job: dict, stops: list | None = None):
    """The tokenizer, after it and the model are in job["model"]: links to the files of job["source"], or
    without one random weights. `stops`: ids at which TRL ends a text besides the tokenizer's eos, for a
    random model."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from tests.helpers import byte_tokenizer

    if job["source"]:
        link_files(job["source"], job["model"])
        return AutoTokenizer.from_pretrained(job["model"])
    if job["tokenizer"]:
        tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    else:
        tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(Qwen2Config(**job["shape"], tie_word_embeddings=True))
    lm.generation_config.eos_token_id = stops
    lm.save_pretrained(job["model"])
    tokenizer.save_pretrained(job["model"])
    return tokenizer


def link_files(source: str, directory: str) -> None:
    """A directory with links to the files of another one, beside which more can be written."""
    os.makedirs(directory, exist_ok=True)
    for file in Path(source).resolve().iterdir():
        link = Path(directory) / file.name
        if file.is_file() and not link.exists():
            os.symlink(file, link)


def end_of_turn(tokenizer) -> str:
    """The special token that ends a response in the tokenizer's chat template."""
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    if not tokenizer.chat_template:
        sys.exit("error: the tokenizer has no chat template; fix: take an instruction-tuned model")
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    after = text[text.rindex("2") + 1:]
    for token in tokenizer(after, add_special_tokens=False).input_ids:
        if token in tokenizer.all_special_ids:
            return tokenizer.convert_ids_to_tokens(token)
    sys.exit("error: the chat template ends a response with no special token; fix: take another model")


# ---- both sides, each timed from "weights in memory" to "last update done" ---------------------------

def our_engine(job: dict, keys: dict):
    """(algorithm, its Config, engine, when the clock started): what train.py builds, with the weights loaded
    before the clock starts. `keys`: the configuration, beside what all benchmarks share."""
    from engine.build import build
    from engine.config import load_config
    from engine.fingerprint import fingerprints
    from engine.logs import Run
    from model.build import build_policy
    from model.load import load_tokenizer

    work = Path(job["work"])
    config_file = work / "benchmark.yml"
    config_file.write_text(json.dumps({"algorithm": job["algorithm"]}))      # JSON is YAML
    own = {
        "model": job["model"],
        "output": str(work / "run"),
        "lr": job["lr"],
        "max_length": job["max_length"],
        "save_every": "null",
        "share_prompt": "true",      # not auto: a fallback would be an error here
    }
    keys = SETTINGS | keys | own
    words = [f"{key}={value}" for key, value in keys.items()]
    run_config = load_config([str(config_file), *words, *job["overrides"]])
    common = run_config.common
    policy = build_policy(common.model, load_tokenizer(common.model), common)
    # hashing the model's files belongs to loading them; `build` finds the hashes computed
    fingerprints({"model": common.model})
    started = time.perf_counter()
    run = Run(common.output)
    algorithm, config, engine = build(run_config, run, policy=policy)
    return algorithm, config, engine, started


def our_metrics(engine) -> list[dict]:
    """The metrics of our run, an update each."""
    return [json.loads(line) for line in engine.run.rows("metrics.jsonl")]


def trl_arguments(job: dict) -> dict:
    """What every Config of TRL is given here."""
    return {
        "output_dir": job["work"],
        "learning_rate": job["lr"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "num_train_epochs": 1,
        "seed": 0,
        "per_device_train_batch_size": job["per_device"],
        "optim": "adamw_torch_fused",
        "gradient_checkpointing": False,
        "bf16": job.get("precision") == "bf16",
        "use_cpu": not job.get("gpu"),
        "dataloader_pin_memory": bool(job.get("gpu")),
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
    }


def trl_metrics(trainer) -> list[dict]:
    """The metrics of TRL's run, an update each."""
    return [row for row in trainer.state.log_history if "loss" in row]


def measured(started: float, gpu: bool = False) -> dict:
    """Seconds since `started`, and in GB the largest memory that tensors had on the GPU, else this process's
    largest resident set (Linux counts it in KiB)."""
    import torch

    if gpu:
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - started, "peak": peak / 1e9}


# ---- fresh processes ---------------------------------------------------------------------------------

def start(children: dict, main: Callable) -> None:
    """Run `main`; in a process that `child` started, the one of `children` that it named."""
    if sys.argv[1:2] != ["--child"]:
        return main()
    role, job = sys.argv[2:]
    result = children[role](json.loads(job))
    print(json.dumps(result))


def child(script: str, role: str, job: dict):
    """The result of one of the script's children, run in a fresh process with job["threads"] threads."""
    threads = str(job["threads"])
    environment = os.environ | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    if not job.get("gpu"):
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory(dir=job["work"]) as work:
        words = [role, json.dumps(job | {"work": work})]
        command = [sys.executable, script, "--child", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: the {role} side failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def store(path: Path, value) -> None:
    """Write a JSON file in one step: it is whole, or not there."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value))
    os.replace(temporary, path)


def say(text: str) -> None:
    """A line about progress: stdout is for the report."""
    print(text, file=sys.stderr, flush=True)


# ---- options and medians -----------------------------------------------------------------------------

def new_parser(text: str) -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=layout)


def add_options(parser: argparse.ArgumentParser, repeats: int | None) -> None:
    """The options that all comparisons have (`repeats`: its default, None = no such option); last, since
    `overrides` takes the words that are left."""
    parser.add_argument(
        "--model",
        help="directory of a model, with its tokenizer; without it, random weights of Qwen2's form")
    parser.add_argument("--data", help="HH-RLHF file; without it, text is made up")
    parser.add_argument(
        "--tokenizer",
        help="directory or hub name of Qwen2.5's tokenizer; without it, bytes are tokens")
    parser.add_argument("--lr", type=float, default=1e-5)
    if repeats:
        parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="both sides train on one GPU")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument(
        "overrides",
        nargs="*",
        help="key=value for our side, such as micro_batch_tokens=1024")


def run_comparison(args: argparse.Namespace, compare: Callable, own: dict) -> None:
    """Exit with 0 if `compare(job)` finds that both sides agree, else with 1. `own`: more of the job;
    a "vocab_size" in it replaces that of SHAPE."""
    runs = ROOT / "runs"
    runs.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=runs, prefix="vs-trl-") as work:
        agreed = compare(job_of(args, own, work))
    sys.exit(0 if agreed else 1)


def job_of(args: argparse.Namespace, own: dict, work: str) -> dict:
    """What both sides are told: the options, `own`, the model's shape, and the paths in the directory
    `work`."""
    shape = SHAPE | {
        "num_hidden_layers": args.layers,
        "vocab_size": own.get("vocab_size", SHAPE["vocab_size"]),
    }
    if args.model:
        shape = shape_of(args.model)
    return vars(args) | own | {
        "shape": shape,
        "max_length": min(MAX_LENGTH, shape.get("max_position_embeddings", MAX_LENGTH)),
        "source": args.model,
        "work": work,
        "model": f"{work}/model",
        "ours_rows": f"{work}/ours.jsonl",
        "trl_rows": f"{work}/trl.jsonl",
    }


def model_line(job: dict) -> str:
    """The model, in a few words."""
    shape = job["shape"]
    name = job["source"] or "random weights"
    return f"{name}: {shape['num_hidden_layers']} layers x {shape['hidden_size']}"


def medians(runs: dict, keys: list[str]) -> dict:
    """{name: {key: median over the results of this name}}, from {name: results}."""
    found = {}
    for name, results in runs.items():
        found[name] = {}
        for key in keys:
            values = [result[key] for result in results]
            found[name][key] = statistics.median(values)
    return found


def least(median: dict, names, key: str) -> str:
    """The one of these names with the smallest median."""
    return min(names, key=lambda name: median[name][key])
