"""This project beside TRL, in one go: `python benchmark/vs_trl.py dpo --data hh.jsonl.gz --tokenizer DIR`.

Both sides train the same random-weight model (Qwen2, hidden 896, 6 layers, Qwen2.5's vocabulary of 151,936, tied) on the same
pairs in the same order with the same optimizer, each run in a fresh process, alternating. TRL runs every setting that could be
its best; after the first round only its fastest and its leanest go on, and those are what the ratios compare with.

Timed, on both sides: from "weights in memory" to "last update done", so data preparation, the reference pass and all updates;
not imports, loading and saving. Peak memory: the process's largest resident set until then. The run fails (exit 1) unless
token ids are equal and losses, gradient norms, log-probs (relative) and rewards (absolute up to 1) agree to 1e-4 in every
update; where TRL's loss is another one (PEERS says which), whatever does not depend on it, in the first update.
"""
import argparse
import importlib
import json
import os
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))            # torch and the project are imported by the children only: a child's peak memory
                                         # starts at its parent's size, so the parent stays small
SHAPE = {"hidden_size": 896, "num_hidden_layers": 6, "num_attention_heads": 14, "num_key_value_heads": 2,
         "intermediate_size": 4864, "vocab_size": 151936}
END = "<|im_end|>"                       # ends a response in ChatML, the template of Qwen
MAX_LENGTH = 2048                        # no HH pair reaches it: TRL would cut what we drop
HEAD = "value_head.safetensors"          # what a reward model starts from, on both sides
TOLERANCE = 1e-4
SETTINGS = {"schedule": "constant", "warmup": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "shuffle": False,
            "epochs": 1, "seed": 0, "max_length": MAX_LENGTH}


# ---- TRL's trainer for each algorithm ----

LOSS = ("loss", "grad_norm")
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


PAIR, PAIR_INPUT = ("chosen_ids", "rejected_ids"), ("chosen_input_ids", "rejected_input_ids")
PEERS = {
    "sft": Peer("trl.SFT", ("input_ids",), LOSS),
    "dpo": Peer("trl.DPO", PAIR, LOSS + PAIRED, reference=True),
    # its rewards and log-probs are sums, while the loss, and ours, take means
    "ipo": Peer("trl.DPO", PAIR, LOSS, {"loss_type": ["ipo"]}, reference=True),
    # it estimates kl from the rows of one forward, we from those of the update
    "kto": Peer("trl.KTO", ("completion_ids",), (*LOSS, "kl", *LOGPS), reference=True, smallest=2, whole=True),
    # its likelihood term holds the prompt's tokens, too
    "orpo": Peer("trl.experimental.orpo.ORPO", PAIR_INPUT, ("log_odds_chosen", "log_odds_ratio", *PAIRED)),
    "simpo": Peer("trl.experimental.cpo.CPO", PAIR_INPUT, LOSS + PAIRED,
                  {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 1.0}),
    # its likelihood term is a mean over the tokens of one forward, ours over those of the update
    "cpo": Peer("trl.experimental.cpo.CPO", PAIR_INPUT, (*LOSS, "nll_loss", *PAIRED), whole=True),
    "rm": Peer("trl.Reward", PAIR, (*LOSS, "accuracy", "margin", "mean_reward")),
}


# ---- the same model and the same text for both sides ----

def synthetic_pairs(count: int, seed: int = 0) -> list[tuple]:
    """(where, row) as read_rows gives them, in the form of HH-RLHF, with its spread of lengths when a byte is a token; for a clone without the data."""
    rng = random.Random(seed)

    def text(low, high):
        return " ".join("".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(rng.randint(low, high)))

    rows = []
    for number in range(count):
        prompt = "".join(f"\n\nHuman: {text(2, 20)}\n\nAssistant: {text(2, 20)}" for _ in range(rng.randint(0, 2)))
        prompt += f"\n\nHuman: {text(2, 20)}\n\nAssistant:"
        rows.append((f"made-up:{number + 1}", {side: f"{prompt} {text(2, 24)}" for side in ("chosen", "rejected")}))
    return rows


def write_model(job: dict, stops: list | None = None):
    """The model with random weights and the tokenizer in job["model"]; -> the tokenizer. `stops`: ids at which TRL ends a text besides
    the tokenizer's eos."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from tests.helpers import byte_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"]) if job["tokenizer"] else byte_tokenizer()
    torch.manual_seed(0)
    lm = Qwen2ForCausalLM(Qwen2Config(**job["shape"], tie_word_embeddings=True))
    lm.generation_config.eos_token_id = stops
    lm.save_pretrained(job["model"])
    tokenizer.save_pretrained(job["model"])
    return tokenizer


def prepare(job: dict) -> None:
    """Write the model, and the first `pairs` usable rows in the form each side reads: HH transcripts for us, for TRL plain
    strings: the rendered prompt, and responses with their end-of-turn, so that TRL appends nothing. Token ids come out equal.
    For kto every pair gives one labelled response, the chosen and the rejected one in turn."""
    import torch
    from safetensors.torch import save_file

    from data.files import read_rows
    from data.formats import parse

    algorithm, size, tokenizer = job["algorithm"], job["shape"]["hidden_size"], write_model(job)
    if algorithm == "rm":
        save_file({"v_head.summary.weight": torch.randn(1, size) / size ** 0.5}, f"{job['model']}/{HEAD}")

    def messages(transcript):              # on its own, without our reader of transcripts: the two must agree
        turns = re.split(r"\n\n(Human|Assistant):", transcript)[1:]
        return [{"role": "user" if speaker == "Human" else "assistant", "content": text.strip()}
                for speaker, text in zip(turns[::2], turns[1::2])]

    rows = read_rows(job["data"]) if job["data"] else synthetic_pairs(2 * job["pairs"])
    ours, theirs, seen = [], [], set()
    for where, row in rows:
        if len(ours) == job["pairs"]:
            break
        if isinstance(parse(row, where, "pairs"), str):                                # a reason to drop it
            continue
        *turns, chosen = messages(row["chosen"])
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        responses = {"chosen": chosen["content"], "rejected": messages(row["rejected"])[-1]["content"]}
        side = "chosen" if algorithm != "kto" or len(ours) % 2 == 0 else "rejected"
        single = {"prompt": prompt, "completion": responses[side] + END}
        if algorithm == "kto" and prompt in seen:       # TRL would take a response to the same prompt for a mismatched one
            continue
        seen.add(prompt)
        if algorithm == "kto":
            ours.append({"prompt": turns, "response": responses[side], "label": side == "chosen"})
            theirs.append(single | {"label": side == "chosen"})
        else:
            ours.append({"chosen": row["chosen"], "rejected": row["rejected"]})
            theirs.append(single if algorithm == "sft" else {"prompt": prompt} | {side: text + END for side, text in responses.items()})
    if len(ours) < job["pairs"]:
        sys.exit(f"error: {job['data']} has {len(ours)} usable pairs, not {job['pairs']}; fix: lower --pairs")
    for name, lines in (("ours", ours), ("trl", theirs)):
        Path(job[f"{name}_rows"]).write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- the two sides, each timed from "weights in memory" to "last update done" ----

def our_engine(job: dict, keys: dict):
    """(algorithm, its Config, engine, when the clock started): what train.py builds, with the weights loaded before the clock starts and
    nothing saved at the end. `keys`: of the configuration, beside those that all benchmarks share."""
    from engine.build import build
    from engine.config import load_config
    from engine.logs import Run
    from model.build import build_policy
    from model.load import load_tokenizer

    config_file = Path(job["work"]) / "benchmark.yml"
    config_file.write_text(json.dumps({"algorithm": job["algorithm"]}))                # JSON is YAML
    keys = SETTINGS | keys | {"model": job["model"], "output": str(Path(job["work"]) / "run"), "lr": job["lr"], "save_every": "null",
                              "share_prompt": "true"}                # not auto: falling back would be an error here
    run_config = load_config([str(config_file), *(f"{key}={value}" for key, value in keys.items()), *job["overrides"]])
    common = run_config.common
    policy = build_policy(common.model, load_tokenizer(common.model), common)
    started = time.perf_counter()
    algorithm, config, engine = build(run_config, Run(common.output), policy=policy)
    return algorithm, config, engine, started


def train_ours(job: dict) -> dict:
    algorithm, config, engine, started = our_engine(job, {"data": job["ours_rows"], "batch_size": job["batch"],
                                                          "precision": job["precision"]})
    algorithm.train(engine, config)
    return measured(started) | {
        "metrics": [json.loads(line) for line in engine.run.rows("metrics.jsonl")],
        "ids": [[example.prompt.tolist(), *(response.tokens[response.trained].tolist() for response in example.responses)]
                for example in engine.train_set]}


def train_trl(job: dict) -> dict:
    """TRL's own trainer with job["per_device"] rows per forward and, if there is a reference, its log-probs precomputed or not."""
    import torch
    from datasets import Dataset
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    def load():
        if job["algorithm"] != "rm":
            return AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        classifier = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=torch.float32, num_labels=1)
        classifier.score.weight.data.copy_(load_file(f"{job['model']}/{HEAD}")["v_head.summary.weight"])
        return classifier

    def ids(row, text):                    # the columns hold the prompt, too, unless it has its own
        prompt = 0 if "prompt_ids" in row else len(tokenizer(text["prompt"])["input_ids"])
        return [row.get("prompt_ids", row[peer.responses[0]][:prompt]), *(row[column][prompt:] for column in peer.responses)]

    peer = PEERS[job["algorithm"]]
    module, _, name = peer.trainer.rpartition(".")
    library = importlib.import_module(module)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.eos_token = END                                                          # so that TRL appends nothing
    arguments = getattr(library, f"{name}Config")(
        output_dir=job["work"], learning_rate=job["lr"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, num_train_epochs=1, seed=0, max_length=MAX_LENGTH, train_sampling_strategy="sequential",
        per_device_train_batch_size=job["per_device"], gradient_accumulation_steps=job["batch"] // job["per_device"],
        optim="adamw_torch_fused", gradient_checkpointing=False, bf16=False, use_cpu=True, dataloader_pin_memory=False,
        logging_steps=1, disable_tqdm=True, save_strategy="no", eval_strategy="no", report_to="none", **peer.settings,
        **({"precompute_ref_log_probs": job["precompute"]} if peer.reference else {}))
    policy = load()
    reference = {"ref_model": load()} if peer.reference and not job["precompute"] else {}    # else TRL loads it inside the clock
    started = time.perf_counter()
    rows = Dataset.from_list([json.loads(line) for line in Path(job["trl_rows"]).read_text().splitlines()])
    trainer_class = getattr(library, f"{name}Trainer")
    trainer = trainer_class(model=policy, args=arguments, train_dataset=rows, processing_class=tokenizer, **reference)
    trainer.train()
    return measured(started) | {
        "metrics": [row for row in trainer.state.log_history if "loss" in row],
        "ids": [ids(row, text) for row, text in zip(trainer.train_dataset, rows, strict=True)]}


def measured(started: float) -> dict:
    """Seconds since `started`, and this process's largest resident set in GB (Linux counts it in KiB)."""
    return {"seconds": time.perf_counter() - started, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def disagreements(job: dict, ours: dict, theirs: dict) -> list[tuple]:
    """[(update, metric, ours, TRL's, error as a multiple of the tolerance)], the error relative for losses, norms and log-probs, for
    the others absolute (relative to rewards above 1). Where TRL's loss is not ours, no losses, and only the first update."""
    peer, updates = PEERS[job["algorithm"]], len(ours["metrics"])
    assert updates == len(theirs["metrics"]), "the sides made different numbers of updates"
    losses, names = (*LOSS, "nll_loss"), peer.metrics
    if "loss" not in names or (peer.whole and job["per_device"] < job["batch"]):
        names, updates = [name for name in names if name not in losses], 1
    rows = []
    for update, a, b in zip(range(1, updates + 1), ours["metrics"], theirs["metrics"]):
        size = max(1, abs(b.get("rewards/chosen", 0)))                     # without a reference, rewards are as large as log-probs
        for name in names:
            scale = abs(b[name]) if name in losses or name[:5] == "logps" else size * (10 if name == "kl" else 1)     # 1 / beta
            rows.append((update, name, a[name], b[name], abs(a[name] - b[name]) / scale / TOLERANCE))
    return rows


# ---- what the arithmetic needs and what the machine gives ----

def needed_gflop(job: dict, ids: list) -> float:
    """GFLOP of the matrix products that the result requires: forward and backward (3 x forward) of the policy and the forward of
    the reference, for kto also both forwards of the mismatched responses; every prompt computed once for its responses, and the
    head at trained tokens only."""
    shape, d = job["shape"], job["shape"]["hidden_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    weights = shape["num_hidden_layers"] * (2 * d * d + 2 * d * kv + 3 * d * shape["intermediate_size"])
    head = d * (1 if job["algorithm"] == "rm" else shape["vocab_size"])

    def forward(rows):
        tokens = sum(len(part) for row in rows for part in row)
        trained = sum(len(part) for row in rows for part in row[1:])
        # (query, key) pairs that may see each other
        attended = sum(p * (p + 1) / 2 + sum(p * r + r * (r + 1) / 2 for r in responses)
                       for p, *responses in ([len(part) for part in row] for row in rows))
        return (2 * weights * tokens + 4 * d * shape["num_hidden_layers"] * attended + 2 * head * trained) / 1e9

    needed = (4 if PEERS[job["algorithm"]].reference else 3) * forward(ids)
    if job["algorithm"] == "kto":
        updates = [ids[start:start + job["batch"]] for start in range(0, len(ids), job["batch"])]
        both = [[*row, other[1]] for rows in updates for row, other in zip(rows, rows[1:] + rows[:1])]
        needed += 2 * (forward(both) - forward(ids))
    return needed


def measure_limit(job: dict) -> dict:
    """Matrix products of the model's shapes -> {"fp32": GFLOP/s of the fastest shape, "bf16": ...}."""
    import torch

    d, inner = job["shape"]["hidden_size"], job["shape"]["intermediate_size"]
    shapes = [(2048, d, inner), (2048, inner, d), (2048, d, d), (256, d, job["shape"]["vocab_size"])]
    limit = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        rates = []
        for m, k, n in shapes:
            a, b, began = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype), time.perf_counter()
            while not rates or time.perf_counter() < began + 1:      # only the best counts; a CPU without bf16 is slow at it
                started = time.perf_counter()
                a @ b.T
                rates.append(2 * m * k * n / (time.perf_counter() - started) / 1e9)
        limit[name] = max(rates)
    return limit


# ---- running and reporting ----

CHILDREN = {"prepare": prepare, "ours": train_ours, "trl": train_trl, "limit": measure_limit}


def child(role: str, job: dict):
    """Run one of CHILDREN in a fresh process with job["threads"] threads and return its result."""
    threads = str(job["threads"])
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false",
                                "CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory(dir=job["work"]) as work:
        done = subprocess.run([sys.executable, __file__, "--child", role, json.dumps(job | {"work": work})], env=environment,
                              capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr}\nerror: the {role} side failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("algorithm", choices=list(PEERS))
    parser.add_argument("--data", help="HH-RLHF file (chosen and rejected transcripts); without it, pairs are made up")
    parser.add_argument("--tokenizer", help="directory or hub name of Qwen2.5's tokenizer; without it, bytes are tokens")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="pairs per update; for kto, responses of as many pairs")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--bf16", action="store_true", help="also run our side under bf16 autocast")
    parser.add_argument("overrides", nargs="*", help="key=value for our side, such as micro_batch_tokens=1024")
    args = parser.parse_intermixed_args()
    if args.pairs % args.batch:
        parser.error("--pairs must be a multiple of --batch: TRL weighs a smaller last batch differently under accumulation")
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs", prefix="vs-trl-") as work:
        job = vars(args) | {"shape": SHAPE | {"num_hidden_layers": args.layers}, "precision": "fp32", "work": work,
                            "model": f"{work}/model", "ours_rows": f"{work}/ours.jsonl", "trl_rows": f"{work}/trl.jsonl"}
        sys.exit(0 if compare(job) else 1)


def compare(job: dict) -> bool:
    """Run everything and print the report; whether the sides agree."""
    peer, ours = PEERS[job["algorithm"]], "ours, fp32"
    variants = trl = {
        f"TRL, {n} per forward" + (f", reference {'precomputed' if precompute else 'in memory'}" if peer.reference else ""):
        {"per_device": n, "precompute": precompute}
        for n in dict.fromkeys([job["batch"], peer.smallest]) if job["batch"] % n == 0
        for precompute in ([False, True] if peer.reference else [False])}
    runs = {}                                                                          # name -> results, in order

    def run(name, role, changes):
        runs.setdefault(name, []).append(child(role, job | changes))
        print(f"{name}: {runs[name][-1]['seconds']:.1f} s, {runs[name][-1]['peak']:.2f} GB", file=sys.stderr, flush=True)

    child("prepare", job)
    limit = child("limit", job)
    for _ in range(job["repeats"]):
        for name, changes in variants.items():
            run(ours, "ours", {})
            run(name, "trl", changes)
        if job["bf16"]:
            run("ours, bf16 autocast", "ours", {"precision": "bf16"})
        median = {name: {key: statistics.median(result[key] for result in results) for key in ("seconds", "peak")}
                  for name, results in runs.items()}
        fastest, leanest = (min(variants, key=lambda name: median[name][key]) for key in ("seconds", "peak"))
        variants = {name: trl[name] for name in dict.fromkeys([fastest, leanest])}

    shape, unit = job["shape"], "rows" if job["algorithm"] == "kto" else "pairs"
    gflop = needed_gflop(job, runs[ours][0]["ids"])
    print(f"\n{job['algorithm']}: {job['pairs']} {unit} of {job['data'] or 'made-up text'}, {job['batch']} per update, "
          f"{job['threads']} threads, {shape['num_hidden_layers']} layers x {shape['hidden_size']}\n"
          f"ours: {' '.join(job['overrides']) or 'defaults'}, prompts shared\n"
          f"both sides: lr {job['lr']:g}, {', '.join(f'{key} {value}' for key, value in SETTINGS.items())}\n"
          f"TRL: fp32, sdpa, adamw_torch_fused, gradient checkpointing off, order of the file, no saving, no evaluation\n"
          f"matrix products: {limit['fp32']:.0f} GFLOP/s fp32, {limit['bf16']:.0f} GFLOP/s bf16; needed: {gflop:.0f} GFLOP\n\n"
          f"{'median of the runs':<44} runs  seconds  {unit + '/s':>7}  peak GB  GFLOP/s  of the limit")
    for name, values in median.items():
        rate, top = gflop / values["seconds"], limit["bf16" if "bf16" in name else "fp32"]
        print(f"{name:<44} {len(runs[name]):>4} {values['seconds']:>8.1f} {job['pairs'] / values['seconds']:>8.3f} "
              f"{values['peak']:>8.2f} {rate:>8.0f} {rate / top:>13.0%}")
    print(f"\nspeed   {median[fastest]['seconds'] / median[ours]['seconds']:.2f}x   of the fastest: {fastest}\n"
          f"memory  {median[ours]['peak'] / median[leanest]['peak']:.2f}x   of the leanest: {leanest}\n")
    shown = next(iter(trl)) if peer.whole else fastest
    return all([agree(job | changes, runs[ours][0], runs[name][0], name, name == shown) for name, changes in trl.items()])


def agree(job: dict, ours: dict, theirs: dict, name: str, show: bool) -> bool:
    """Whether token ids are equal and metrics within the tolerance; `show` prints the metrics side by side."""
    rows, equal = disagreements(job, ours, theirs), ours["ids"] == theirs["ids"]
    if show:
        print("update  metric                        ours            TRL   error / tolerance")
        for update, metric, a, b, error in rows:
            print(f"{update:>6}  {metric:<20} {a:>13.7g}  {b:>13.7g}   {error:.3f}")
    worst = max(rows, key=lambda row: row[-1])
    print(f"token ids equal: {'yes' if equal else 'NO'}; worst error {worst[-1]:.3f} x the tolerance {TOLERANCE:g} "
          f"({worst[1]}, update {worst[0]})   {name}")
    return equal and all(row[-1] <= 1 for row in rows)         # not of a NaN


if __name__ == "__main__":
    sys.modules["vs_trl"] = sys.modules["__main__"]                  # whose CHILDREN the next import adds to
    import vs_trl_grpo
    if sys.argv[1:2] == ["grpo"]:                                    # two phases and other columns
        sys.argv.pop(1)
        vs_trl_grpo.main()
    elif sys.argv[1:2] == ["--child"]:
        print(json.dumps(CHILDREN[sys.argv[2]](json.loads(sys.argv[3]))))
    else:
        main()
