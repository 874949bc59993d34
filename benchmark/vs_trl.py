"""This project beside TRL, in one go: `python benchmark/vs_trl.py dpo --model DIR --data hh.jsonl.gz`.

Both sides train the same model (without --model random weights: Qwen2, hidden 896, 6 layers, Qwen2.5's
vocabulary of 151,936, tied, with --tokenizer DIR) on the same pairs in the same order with the same
optimizer, each run in a fresh process, alternating.
TRL runs every setting that could be its best; after the first round only its fastest and its leanest go on,
and those are what the ratios compare with.

Timed, on both sides: from "weights in memory" to "last update done", so data preparation, the reference pass
and all updates; not imports, loading and saving. Peak memory: the process's largest resident set until then.
The run fails (exit 1) unless token ids are equal and losses, gradient norms, log-probs (relative) and rewards
(absolute up to 1) agree to 1e-4 in every update; where TRL's loss is another one (PEERS says which), all that
does not depend on it, in the first update.
"""
import importlib
import os
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import shared  # noqa: E402
from benchmark.shared import SETTINGS, TOLERANCE  # noqa: E402
from data.packing import common_prefix  # noqa: E402

HEAD = "value_head.safetensors"      # what a reward model starts from, on both sides
HEAD_WEIGHT = "v_head.summary.weight"
OURS = "ours, fp32"
OURS_BF16 = "ours, bf16 autocast"
TRL_BF16 = "TRL's fastest, bf16 autocast"


# ---- TRL's trainer for each algorithm ----------------------------------------------------------------

LOSS = ("loss", "grad_norm")
LOSSES = (*LOSS, "nll_loss")
LOGPS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
PAIRED = (*LOGPS, "rewards/accuracies")


class Peer(NamedTuple):
    """A trainer of TRL, and what of it can be compared with ours."""
    trainer: str                 # its module and its name, less "Trainer"
    responses: tuple             # the columns of its tokenised data that hold responses
    metrics: tuple               # that both sides define alike; no loss among them: its loss is not ours
    settings: dict = {}          # beyond its defaults
    reference: bool = False
    smallest: int = 1            # rows in a forward
    whole: bool = False          # its loss is ours only if all rows of an update are in one forward


PAIR = ("chosen_ids", "rejected_ids")
PAIR_INPUT = ("chosen_input_ids", "rejected_input_ids")
DPO = "trl.DPO"
CPO = "trl.experimental.cpo.CPO"
ORPO = "trl.experimental.orpo.ORPO"
SIMPO = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}
PEERS = {
    "sft": Peer("trl.SFT", ("input_ids",), LOSS),
    "dpo": Peer(DPO, PAIR, LOSS + PAIRED, reference=True),
    # its rewards and log-probs are sums, while the loss, and ours, take means
    "ipo": Peer(DPO, PAIR, LOSS, {"loss_type": ["ipo"]}, reference=True),
    "apo": Peer(DPO, PAIR, LOSS + PAIRED, {"loss_type": ["apo_zero"]}, reference=True),
    # it estimates kl from the rows of one forward, we from those of the update
    "kto": Peer(
        "trl.KTO",
        ("completion_ids",),
        (*LOSS, "kl", *LOGPS),
        reference=True,
        smallest=2,
        whole=True),
    # its likelihood term holds the prompt's tokens, too
    "orpo": Peer(ORPO, PAIR_INPUT, ("log_odds_chosen", "log_odds_ratio", *PAIRED)),
    "simpo": Peer(CPO, PAIR_INPUT, LOSS + PAIRED, SIMPO),
    # its likelihood term is a mean over the tokens of one forward, ours over those of the update
    "cpo": Peer(CPO, PAIR_INPUT, LOSSES + PAIRED, whole=True),
    "rm": Peer("trl.Reward", PAIR, (*LOSS, "accuracy", "margin", "mean_reward")),
}


# ---- the same text for both sides --------------------------------------------------------------------

def messages(transcript: str) -> list[dict]:
    """The turns of an HH transcript. It does not use our reader of transcripts: the two must agree."""
    parts = re.split(r"\n\n(Human|Assistant):", transcript)[1:]
    turns = []
    for speaker, text in zip(parts[::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        turns.append({"role": role, "content": text.strip()})
    return turns


def prepare(job: dict) -> None:
    """Write the model, and the first `pairs` usable rows in the form each side reads: HH transcripts for us,
    for TRL plain strings: the rendered prompt, and responses with their end-of-turn, so that TRL appends
    nothing. Token ids come out equal. For kto every pair gives one labelled response, the chosen and the
    rejected one in turn."""
    from data.formats import parse

    algorithm = job["algorithm"]
    tokenizer = shared.write_model(job)
    end = shared.end_of_turn(tokenizer)
    if algorithm == "rm":
        write_head(job)
    ours = []
    theirs = []
    seen = set()
    for where, row in shared.hh_rows(job["data"], 2 * job["pairs"]):
        if len(ours) == job["pairs"]:
            break
        if isinstance(parse(row, where, "pairs"), str):      # a reason to drop it
            continue
        *turns, chosen = messages(row["chosen"])
        rejected = messages(row["rejected"])[-1]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        if algorithm == "kto":
            if prompt in seen:      # TRL would take a response to the same prompt for a mismatched one
                continue
            seen.add(prompt)
            label = len(ours) % 2 == 0
            response = chosen["content"] if label else rejected["content"]
            ours.append({"prompt": turns, "response": response, "label": label})
            theirs.append({"prompt": prompt, "completion": response + end, "label": label})
            continue
        responses = {"chosen": chosen["content"] + end, "rejected": rejected["content"] + end}
        longest = max(len(tokenizer(prompt + text).input_ids) for text in responses.values())
        if longest > job["max_length"]:      # TRL would truncate what we drop
            continue
        ours.append({"chosen": row["chosen"], "rejected": row["rejected"]})
        if algorithm == "sft":
            responses = {"completion": responses["chosen"]}
        theirs.append({"prompt": prompt} | responses)
    if len(ours) < job["pairs"]:
        sys.exit(f"error: {job['data']} has {len(ours)} usable pairs, not {job['pairs']}; fix: lower --pairs")
    shared.write_rows(job["ours_rows"], ours)
    shared.write_rows(job["trl_rows"], theirs)


def write_head(job: dict) -> None:
    """Random weights of a reward head beside the model."""
    import torch
    from safetensors.torch import save_file

    size = job["shape"]["hidden_size"]
    torch.manual_seed(0)
    weight = torch.randn(1, size) / size ** 0.5
    save_file({HEAD_WEIGHT: weight}, f"{job['model']}/{HEAD}")


# ---- the two sides -----------------------------------------------------------------------------------

def train_ours(job: dict) -> dict:
    keys = {
        "data": job["ours_rows"],
        "batch_size": job["batch"],
        "precision": job["precision"],
    }
    algorithm, config, engine, started = shared.our_engine(job, keys)
    algorithm.train(engine, config)
    result = shared.measured(started, job.get("gpu"))
    if job.get("final"):
        engine.policy.lm.save_pretrained(job["final"])
    ids = []
    for example in engine.train_set:
        parts = [example.prompt.tolist()]
        for response in example.responses:
            trained = response.tokens[response.trained]
            parts.append(trained.tolist())
        ids.append(parts)
    return result | {"metrics": shared.our_metrics(engine), "ids": ids}


def train_trl(job: dict) -> dict:
    """TRL's own trainer with job["per_device"] rows per forward and, if there is a reference, its log-probs
    precomputed or not. Both sides save their model in job["final"], if there is such a key."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    peer = PEERS[job["algorithm"]]
    module, _, name = peer.trainer.rpartition(".")
    library = importlib.import_module(module)
    config_class = getattr(library, f"{name}Config")
    trainer_class = getattr(library, f"{name}Trainer")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.eos_token = shared.end_of_turn(tokenizer)      # so that TRL appends nothing
    settings = dict(peer.settings)
    if peer.reference:
        settings["precompute_ref_log_probs"] = job["precompute"]
    arguments = config_class(
        **shared.trl_arguments(job),
        **settings,
        gradient_accumulation_steps=job["batch"] // job["per_device"],
        max_length=job["max_length"],
        train_sampling_strategy="sequential")
    policy = load_for_trl(job)
    models = {"model": policy}
    if peer.reference and not job["precompute"]:
        models["ref_model"] = load_for_trl(job)      # else TRL loads it while the clock runs
    started = time.perf_counter()
    rows = Dataset.from_list(shared.read_jsonl(job["trl_rows"]))
    trainer = trainer_class(**models, args=arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    result = shared.measured(started, job.get("gpu"))
    if job.get("final"):
        trainer.save_model(job["final"])
    ids = []
    for row, text in zip(trainer.train_dataset, rows, strict=True):
        ids.append(ids_of(row, text, peer, tokenizer))
    return result | {"metrics": shared.trl_metrics(trainer), "ids": ids}


def load_for_trl(job: dict):
    """The model as TRL's trainer takes it: for rm a classifier with the written head."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    path = job["model"]
    if job["algorithm"] != "rm":
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    classifier = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32, num_labels=1)
    head = load_file(f"{path}/{HEAD}")
    classifier.score.weight.data.copy_(head[HEAD_WEIGHT])
    return classifier


def ids_of(row: dict, text: dict, peer: Peer, tokenizer) -> list:
    """[prompt, response, ...] of a row of TRL's data: its columns hold the prompt, too, unless it has its
    own."""
    if "prompt_ids" in row:
        size, prompt = 0, row["prompt_ids"]
    else:
        size = len(tokenizer(text["prompt"])["input_ids"])
        prompt = row[peer.responses[0]][:size]
    responses = [row[column][size:] for column in peer.responses]
    return [prompt, *responses]


def disagreements(job: dict, ours: dict, theirs: dict) -> list[tuple]:
    """[(update, metric, ours, TRL's, error as a multiple of the tolerance)], the error relative for losses,
    norms and log-probs, for the others absolute (relative to rewards above 1). Where TRL's loss is not ours,
    no losses, and only the first update."""
    peer = PEERS[job["algorithm"]]
    updates = len(ours["metrics"])
    assert updates == len(theirs["metrics"]), "the sides made different numbers of updates"
    names = peer.metrics
    if "loss" not in names or (peer.whole and job["per_device"] < job["batch"]):
        names = [name for name in names if name not in LOSSES]
        updates = 1
    rows = []
    for update in range(1, updates + 1):
        a = ours["metrics"][update - 1]
        b = theirs["metrics"][update - 1]
        for name in names:
            error = abs(a[name] - b[name]) / scale_of(name, b)
            rows.append((update, name, a[name], b[name], error / TOLERANCE))
    return rows


def scale_of(name: str, metrics: dict) -> float:
    """The size that the error of a metric is relative to."""
    if name in LOSSES or name.startswith("logps"):
        return abs(metrics[name])
    # without a reference, rewards are as large as log-probs
    scale = max(1, abs(metrics.get("rewards/chosen", 0)))
    return 10 * scale if name == "kl" else scale      # 1 / beta


# ---- what the arithmetic needs and what the machine gives --------------------------------------------

def needed_gflop(job: dict, ids: list) -> float:
    """GFLOP of the matrix products that the result requires: forward and backward (3 x forward) of the policy
    and the forward of the reference, for kto also both forwards of the mismatched responses; every prompt
    computed once for its responses, what the prompts of an update begin with once, and the head at trained
    tokens only."""
    passes = 4 if PEERS[job["algorithm"]].reference else 3
    needed = passes * forward_gflop(job, ids)
    if job["algorithm"] != "kto":
        return needed
    both = []
    for start in range(0, len(ids), job["batch"]):
        rows = ids[start:start + job["batch"]]
        others = rows[1:] + rows[:1]
        for row, other in zip(rows, others):
            both.append([*row, other[1]])
    return needed + 2 * (forward_gflop(job, both) - forward_gflop(job, ids))


def forward_gflop(job: dict, rows: list) -> float:
    """GFLOP of one forward of rows [prompt, response, ...]."""
    shape = job["shape"]
    size, layers = shape["hidden_size"], shape["num_hidden_layers"]
    heads = shape["num_attention_heads"]
    head_size = shape.get("head_dim", size // heads)
    kv_size = head_size * shape["num_key_value_heads"]
    attention = 2 * size * heads * head_size + 2 * size * kv_size
    layer = attention + 3 * size * shape["intermediate_size"]
    head = size * (1 if job["algorithm"] == "rm" else shape["vocab_size"])
    tokens = trained = attended = 0
    for row in rows:
        prompt, *responses = [len(part) for part in row]
        tokens += prompt + sum(responses)
        trained += sum(responses)
        # (query, key) pairs that may see each other
        attended += prompt * (prompt + 1) / 2
        for response in responses:
            attended += prompt * response + response * (response + 1) / 2
    for start in range(0, len(rows), job["batch"]):
        prompts = [np.array(row[0]) for row in rows[start:start + job["batch"]]]
        tokens -= common_prefix(prompts) * (len(prompts) - 1)
    products = 2 * layer * layers * tokens + 2 * head * trained
    return (products + 4 * heads * head_size * layers * attended) / 1e9


def measure_limit(job: dict) -> dict:
    """Matrix products of the model's shapes -> {"fp32": GFLOP/s of the fastest shape, "bf16": ...}."""
    import torch

    size = job["shape"]["hidden_size"]
    inner = job["shape"]["intermediate_size"]
    vocabulary = job["shape"]["vocab_size"]
    shapes = [(2048, size, inner), (2048, inner, size), (2048, size, size), (256, size, vocabulary)]
    limit = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates = [fastest_product(shape, dtype, "cuda" if job.get("gpu") else "cpu") for shape in shapes]
        limit[name] = max(rates)
    return limit


def fastest_product(shape: tuple, dtype, device: str) -> float:
    """GFLOP/s of the fastest of the products (m, k) x (k, n) that a second allows."""
    import torch

    m, k, n = shape
    a = torch.randn(m, k, dtype=dtype, device=device)
    b = torch.randn(n, k, dtype=dtype, device=device)
    best = 0.0
    began = time.perf_counter()
    while not best or time.perf_counter() < began + 1:      # a CPU without bf16 is slow at it
        started = time.perf_counter()
        a @ b.T
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        best = max(best, 2 * m * k * n / seconds / 1e9)
    return best


# ---- running and reporting ---------------------------------------------------------------------------

CHILDREN = {"prepare": prepare, "ours": train_ours, "trl": train_trl, "limit": measure_limit}


def compare(job: dict) -> bool:
    """Run everything and print the report; whether the sides agree."""
    trl = variants_of(job)
    shared.child(__file__, "prepare", job)
    limit = shared.child(__file__, "limit", job)
    runs = {}
    variants = list(trl)
    for _ in range(job["repeats"]):
        for name in variants:
            run(runs, OURS, "ours", job)
            run(runs, name, "trl", job | trl[name])
        median = shared.medians(runs, ["seconds", "peak"])
        fastest = shared.least(median, variants, "seconds")
        leanest = shared.least(median, variants, "peak")
        variants = [fastest] if fastest == leanest else [fastest, leanest]
    if job["bf16"]:
        fast = job | trl[fastest] | {"precision": "bf16"}
        for _ in range(job["repeats"]):
            run(runs, OURS_BF16, "ours", fast)
            run(runs, TRL_BF16, "trl", fast)
        median = shared.medians(runs, ["seconds", "peak"])
    gflop = needed_gflop(job, runs[OURS][0]["ids"])
    print_header(job, limit, gflop)
    print_table(job, runs, median, limit, gflop)
    speed = median[fastest]["seconds"] / median[OURS]["seconds"]
    memory = median[OURS]["peak"] / median[leanest]["peak"]
    print(f"\nspeed   {speed:.2f}x   of the fastest: {fastest}")
    print(f"memory  {memory:.2f}x   of the leanest: {leanest}")
    if job["bf16"]:
        speed = median[TRL_BF16]["seconds"] / median[OURS_BF16]["seconds"]
        print(f"speed   {speed:.2f}x   with bf16 on both sides")
    print()
    shown = next(iter(trl)) if PEERS[job["algorithm"]].whole else fastest
    agreed = True
    for name, changes in trl.items():
        is_shown = name == shown
        agreed &= agree(job | changes, runs[OURS][0], runs[name][0], name, is_shown)
    return agreed


def variants_of(job: dict) -> dict:
    """{name: what differs in its job} for every setting of TRL that could be its best."""
    peer = PEERS[job["algorithm"]]
    variants = {}
    for rows in (job["batch"], peer.smallest):
        if job["batch"] % rows:
            continue
        name = f"TRL, {rows} per forward"
        if not peer.reference:
            variants[name] = {"per_device": rows, "precompute": False}
            continue
        variants[f"{name}, reference in memory"] = {"per_device": rows, "precompute": False}
        variants[f"{name}, reference precomputed"] = {"per_device": rows, "precompute": True}
    return variants


def run(runs: dict, name: str, role: str, job: dict) -> None:
    """Add the result of one more run to runs[name]."""
    result = shared.child(__file__, role, job)
    runs.setdefault(name, []).append(result)
    shared.say(f"{name}: {result['seconds']:.1f} s, {result['peak']:.2f} GB")


def unit_of(job: dict) -> str:
    return "rows" if job["algorithm"] == "kto" else "pairs"


def print_header(job: dict, limit: dict, gflop: float) -> None:
    source = job["data"] or "made-up text"
    overrides = " ".join(job["overrides"]) or "defaults"
    same = SETTINGS | {"max_length": job["max_length"]}
    settings = [f"{key} {value}" for key, value in same.items()]
    print(
        f"\n{job['algorithm']}: {job['pairs']} {unit_of(job)} of {source}, {job['batch']} per update, "
        f"{job['threads']} threads")
    print(f"model: {shared.model_line(job)}")
    print(f"ours: {overrides}, prompts shared")
    print(f"both sides: lr {job['lr']:g}, {', '.join(settings)}")
    print(
        "TRL: fp32, sdpa, adamw_torch_fused, gradient checkpointing off, order of the file, no saving, "
        "no evaluation")
    print(
        f"matrix products: {limit['fp32']:.0f} GFLOP/s fp32, {limit['bf16']:.0f} GFLOP/s bf16; "
        f"needed: {gflop:.0f} GFLOP\n")


def print_table(job: dict, runs: dict, median: dict, limit: dict, gflop: float) -> None:
    title = "median of the runs"
    per_second = f"{unit_of(job)}/s"
    print(f"{title:<44} runs  seconds  {per_second:>7}  peak GB  GFLOP/s  of the limit")
    for name, values in median.items():
        seconds = values["seconds"]
        rate = gflop / seconds
        share = rate / limit["bf16" if name in (OURS_BF16, TRL_BF16) else "fp32"]
        print(
            f"{name:<44} {len(runs[name]):>4} {seconds:>8.1f} {job['pairs'] / seconds:>8.3f} "
            f"{values['peak']:>8.2f} {rate:>8.0f} {share:>13.0%}")


def agree(job: dict, ours: dict, theirs: dict, name: str, is_shown: bool) -> bool:
    """Whether token ids are equal and metrics within the tolerance; `is_shown`: print the metrics side by
    side."""
    rows = disagreements(job, ours, theirs)
    is_equal = ours["ids"] == theirs["ids"]
    if is_shown:
        print("update  metric                        ours            TRL   error / tolerance")
        for update, metric, a, b, error in rows:
            print(f"{update:>6}  {metric:<20} {a:>13.7g}  {b:>13.7g}   {error:.3f}")
    update, metric, _, _, worst = max(rows, key=lambda row: row[-1])
    print(
        f"token ids equal: {'yes' if is_equal else 'NO'}; worst error {worst:.3f} x the tolerance "
        f"{TOLERANCE:g} ({metric}, update {update})   {name}")
    return is_equal and all(row[-1] <= 1 for row in rows)      # false for a NaN


def main() -> None:
    parser = shared.new_parser(__doc__)
    parser.add_argument("algorithm", choices=list(PEERS))
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument(
        "--batch",
        type=int,
        default=4,
        help="pairs per update; for kto, responses of as many pairs")
    parser.add_argument("--bf16", action="store_true", help="also run both sides under bf16 autocast")
    shared.add_options(parser, repeats=2)
    args = parser.parse_intermixed_args()
    if args.pairs % args.batch:
        parser.error(
            "--pairs must be a multiple of --batch: TRL weighs a smaller last batch differently under "
            "accumulation")
    shared.run_comparison(args, compare, {"precision": "fp32"})


if __name__ == "__main__":
    if sys.argv[1:2] == ["grpo"]:      # two phases and other columns: a script of its own
        script = Path(__file__).with_name("vs_trl_grpo.py")
        os.execv(sys.executable, [sys.executable, str(script), *sys.argv[2:]])
    shared.start(CHILDREN, main)
