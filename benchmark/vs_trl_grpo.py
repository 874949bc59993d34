"""GRPO beside TRL, in one go: `python benchmark/vs_trl.py grpo --data hh.jsonl.gz --tokenizer DIR`.

Both sides sample groups of answers to the same prompts from the same random-weight model and make one update of each rollout
(paper form, no reference). Timed on both sides: all of sampling, scoring and updates; and of these the sampling alone. Every
answer runs to --length tokens; with --stop-share, each token ends an answer with about this probability, so that lengths vary.

What is drawn differs, so the sides cannot agree number by number. Instead our side also makes the first update from TRL's
own completions, untimed; the run fails (exit 1) unless prompts are equal and the gradient norms agree to 1e-4.
"""
import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import vs_trl
from vs_trl import ROOT, SHAPE, TOLERANCE, child, measured


def stops_of(job: dict) -> list[int]:
    """Every n-th id of the vocabulary, so that a random model ends a text with probability 1 / n at each token."""
    return list(range(0, job["shape"]["vocab_size"], round(1 / job["stop_share"]))) if job["stop_share"] else []


def prepare(job: dict) -> None:
    """Write the model, and the prompts of the first HH rows that differ, rendered by the chat template, as plain strings."""
    from data.files import read_rows
    from data.formats import parse

    tokenizer = vs_trl.write_model(job, stops_of(job) or None)
    wanted, prompts = job["prompts"] * job["rollouts"], {}
    for where, row in read_rows(job["data"]) if job["data"] else vs_trl.synthetic_pairs(4 * wanted):
        text = parse(row, where, "pairs")
        if not isinstance(text, str):
            prompts[tokenizer.apply_chat_template(text.prompt, tokenize=False, add_generation_prompt=True)] = None
        if len(prompts) == wanted:
            break
    Path(job["rows"]).write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))


def reward(prompts, completions, **columns):
    """Something cheap that tells completions apart: how often they hold an e."""
    return [completion.count("e") / max(1, len(completion)) for completion in completions]


def train_ours(job: dict) -> dict:
    """Our side; with job["replay"] from TRL's completions."""
    from engine import rollouts
    from model.sampler import Completion, Stops

    seconds, tokens, sample, ids = [], [], rollouts.sample, set(stops_of(job))
    Stops.__call__ = lambda self, tokens: int(tokens[-1]) in ids

    def timed(*arguments):
        started = time.perf_counter()
        found = sample(*arguments)
        seconds.append(time.perf_counter() - started)
        tokens.append(sum(len(completion.tokens) for group in found for completion in group))
        return found

    def replayed(policy, tokenizer, prompts, *_):
        import numpy as np
        groups = iter(job["replay"])
        return [[Completion(np.array(ids, np.int32), np.zeros(len(ids), np.float32), True) for ids in next(groups)] for _ in prompts]

    rollouts.sample = replayed if job.get("replay") else timed
    if job.get("replay"):
        rollouts.Rollouts.old_logps = lambda self, batch, logps: logps.detach()
    grpo, config, engine, started = vs_trl.our_engine(job, {
        "data": job["rows"], "batch_size": job["prompts"], "num_generations": job["group"], "max_completion_length": job["length"],
        "beta": 0, "reward": f"{__file__}:reward", "precision": "fp32"})
    grpo.train(engine, config)
    return measured(started) | {"sampling": sum(seconds), "tokens": sum(tokens), "prompts": [e.prompt.tolist() for e in engine.train_set],
                                "grad_norm": json.loads(engine.run.rows("metrics.jsonl")[0])["grad_norm"]}


def train_trl(job: dict) -> dict:
    """TRL's own trainer with job["per_device"] completions per forward of the update."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer, batch = AutoTokenizer.from_pretrained(job["model"]), job["prompts"] * job["group"]
    if not job["stop_share"]:
        # it always ends an answer at its own eos; a random model draws this one once in 150,000 tokens
        tokenizer.eos_token = "<|endoftext|>"
    arguments = GRPOConfig(
        output_dir=job["work"], learning_rate=job["lr"], lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, num_train_epochs=1, seed=0, per_device_train_batch_size=job["per_device"],
        gradient_accumulation_steps=batch // job["per_device"], num_generations=job["group"], max_completion_length=job["length"],
        temperature=1.0, beta=0.0, loss_type="grpo", shuffle_dataset=False, optim="adamw_torch_fused", gradient_checkpointing=False,
        bf16=False, use_cpu=True, dataloader_pin_memory=False, logging_steps=1, disable_tqdm=True, save_strategy="no",
        eval_strategy="no", report_to="none")
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = [json.loads(line) for line in Path(job["rows"]).read_text().splitlines()]
    seconds, completions = [], []
    started = time.perf_counter()
    trainer = GRPOTrainer(model=policy, reward_funcs=reward, args=arguments, train_dataset=Dataset.from_list(rows),
                          processing_class=tokenizer)
    generate = trainer._generate_single_turn

    def timed(*arguments, **keywords):
        began = time.perf_counter()
        found = generate(*arguments, **keywords)
        seconds.append(time.perf_counter() - began)
        completions.append(found[0])
        return found

    trainer._generate_single_turn = timed
    trainer.train()
    first = [list(map(int, ids)) for ids in completions[0]]
    return measured(started) | {
        "sampling": sum(seconds), "tokens": sum(len(ids) for part in completions for ids in part),
        "completions": [first[i:i + job["group"]] for i in range(0, len(first), job["group"])],
        "prompts": [tokenizer(row["prompt"]).input_ids for row in rows],
        "grad_norm": [row for row in trainer.state.log_history if "loss" in row][0]["grad_norm"]}


vs_trl.CHILDREN |= {"grpo-prepare": prepare, "grpo-ours": train_ours, "grpo-trl": train_trl}


def compare(job: dict) -> bool:
    """Run everything and print the report; whether the sides agree."""
    batch = job["prompts"] * job["group"]
    # fewer per forward also means fewer that TRL samples together: leaner and slower
    variants = {f"TRL, {n} per forward": {"per_device": n} for n in dict.fromkeys([batch, max(1, batch // 4)])}
    runs = {}

    def run(name, role, changes):
        runs.setdefault(name, []).append(child(role, job | changes))
        result = runs[name][-1]
        print(f"{name}: {result['seconds']:.1f} s, sampling {result['sampling']:.1f} s, {result['tokens']} tokens, {result['peak']:.2f} GB",
              file=sys.stderr, flush=True)

    child("grpo-prepare", job)
    for _ in range(job["repeats"]):
        for name, changes in variants.items():
            run("ours", "grpo-ours", {})
            run(name, "grpo-trl", changes)
    median = {name: {key: statistics.median(result[key] for result in results) for key in ("seconds", "sampling", "tokens", "peak")}
              for name, results in runs.items()}
    total = batch * job["rollouts"]
    lengths = f"each token ends a text with probability {job['stop_share']:g}" if job["stop_share"] else "no stop token"
    print(f"\ngrpo: {job['rollouts']} rollouts of {job['prompts']} prompts x {job['group']} completions of up to {job['length']} tokens "
          f"({lengths}), {job['threads']} threads, {job['shape']['num_hidden_layers']} layers x {job['shape']['hidden_size']}\n"
          f"both sides: fp32, lr {job['lr']:g}, temperature 1, beta 0, paper form; ours: {' '.join(job['overrides']) or 'defaults'}\n\n"
          f"{'median of the runs':<28} runs  seconds  sampling   update  samples/s  tokens/s sampled  peak GB")
    for name, values in median.items():
        update = values["seconds"] - values["sampling"]
        print(f"{name:<28} {len(runs[name]):>4} {values['seconds']:>8.1f} {values['sampling']:>9.1f} {update:>8.1f} "
              f"{total / values['seconds']:>10.3f} {values['tokens'] / values['sampling']:>17.1f} {values['peak']:>8.2f}")

    def rate(name, phase):                # per sampled token where lengths vary: the sides draw different ones
        seconds = {"all": median[name]["seconds"], "sampling": median[name]["sampling"],
                   "update": median[name]["seconds"] - median[name]["sampling"]}[phase]
        return median[name]["tokens"] / seconds

    fastest, leanest = (min(variants, key=lambda name: median[name][key]) for key in ("seconds", "peak"))
    print()
    for phase, label in (("all", "end to end"), ("sampling", "sampling"), ("update", "update")):
        print(f"{label:<11} {rate('ours', phase) / rate(fastest, phase):.2f}x   of the fastest: {fastest}")
    print(f"{'memory':<11} {median['ours']['peak'] / median[leanest]['peak']:.2f}x   of the leanest: {leanest}\n")
    theirs = runs[next(iter(variants))][0]
    replay = child("grpo-ours", job | {"replay": theirs["completions"], "overrides": [*job["overrides"], "max_steps=1"]})
    error = abs(replay["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"]
    equal = replay["prompts"] == theirs["prompts"]
    print(f"the first update from TRL's completions: gradient norm {replay['grad_norm']:.7g}, TRL's {theirs['grad_norm']:.7g}, "
          f"error {error / TOLERANCE:.3f} x the tolerance {TOLERANCE:g}; prompts equal: {'yes' if equal else 'NO'}")
    return equal and error <= TOLERANCE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="HH-RLHF file, for its prompts; without it, prompts are made up")
    parser.add_argument("--tokenizer", help="directory or hub name of Qwen2.5's tokenizer; without it, bytes are tokens")
    parser.add_argument("--prompts", type=int, default=2, help="per rollout")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens of a completion at most")
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--stop-share", type=float, default=0.0)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("overrides", nargs="*", help="key=value for our side")
    args = parser.parse_intermixed_args()
    (ROOT / "runs").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "runs", prefix="vs-trl-") as work:
        job = vars(args) | {"shape": SHAPE | {"num_hidden_layers": args.layers}, "work": work, "model": f"{work}/model",
                            "rows": f"{work}/prompts.jsonl", "algorithm": "grpo"}
        sys.exit(0 if compare(job) else 1)
