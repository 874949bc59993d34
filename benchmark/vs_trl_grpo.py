"""GRPO beside TRL, in one go: `python benchmark/vs_trl.py grpo --model DIR --data hh.jsonl.gz`.

Both sides sample groups of answers to the same prompts from the same model and make one update of each
rollout (paper form, no reference). Timed on both sides: all of sampling, scoring and updates; and of these
the sampling alone. The answers of a model of yours end where it ends them. Those of a random model (without
--model) run to --length tokens; with --stop-share, each token ends one with about this probability, so that
lengths vary.

What is drawn differs, so the sides cannot agree number by number. Instead our side also makes the first
update from TRL's own completions, untimed; the run fails (exit 1) unless prompts are equal and the gradient
norms agree to 1e-4.
"""
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmark import shared  # noqa: E402

BYTE_VOCABULARY = 260      # bytes and the special tokens


def stops_of(job: dict) -> list[int]:
    """Every n-th id of the vocabulary, so that a random model ends a text with probability 1 / n at each
    token."""
    if not job["stop_share"]:
        return []
    every = round(1 / job["stop_share"])
    return list(range(0, job["shape"]["vocab_size"], every))


def prepare(job: dict) -> None:
    """Write the model, and the prompts of the first HH rows that differ, rendered by the chat template, as
    plain strings."""
    from data.formats import parse

    tokenizer = shared.write_model(job, stops_of(job) or None)
    wanted = job["prompts"] * job["rollouts"]
    prompts = []
    for where, row in shared.hh_rows(job["data"], 4 * wanted):
        text = parse(row, where, "pairs")
        if isinstance(text, str):      # a reason to drop it
            continue
        prompt = tokenizer.apply_chat_template(text.prompt, tokenize=False, add_generation_prompt=True)
        if prompt not in prompts:
            prompts.append(prompt)
        if len(prompts) == wanted:
            break
    shared.write_rows(job["ours_rows"], [{"prompt": prompt} for prompt in prompts])


def reward(prompts, completions, **columns):
    """Something cheap that tells completions apart: how often they hold an e."""
    scores = []
    for completion in completions:
        scores.append(completion.count("e") / max(1, len(completion)))
    return scores


# ---- the two sides -----------------------------------------------------------------------------------

class Timer:
    """A function that samples, with the seconds of its calls and what they returned."""

    def __init__(self, function):
        self.function = function
        self.seconds = 0.0
        self.results = []

    def __call__(self, *arguments, **keywords):
        started = time.perf_counter()
        found = self.function(*arguments, **keywords)
        self.seconds += time.perf_counter() - started
        self.results.append(found)
        return found


def replay(groups: list):
    """A function in place of our sampler, that gives these completions: per prompt a list of token ids."""
    import numpy as np

    from model.sampler import Completion

    left = iter(groups)

    def sample(policy, tokenizer, prompts, *_):
        found = []
        for _ in prompts:
            group = []
            for ids in next(left):
                tokens = np.array(ids, np.int32)
                logps = np.zeros(len(ids), np.float32)
                group.append(Completion(tokens, logps, True))
            found.append(group)
        return found

    return sample


def train_ours(job: dict) -> dict:
    """Our side; with job["replay"] from TRL's completions."""
    from engine import importance, rollouts
    from model.sampler import Stops

    stops = set(stops_of(job))
    ends = Stops.__call__      # where the tokenizer and the model say so
    if not job["source"]:
        ends = lambda self, tokens: int(tokens[-1]) in stops  # noqa: E731
    timer = Timer(importance.sample)
    old_logps = rollouts.Rollouts.old_logps
    if job.get("replay"):
        timer = Timer(replay(job["replay"]))
        # the sampler's log-probs are not known, so they cannot be compared
        old_logps = lambda self, batch, logps: logps.detach()  # noqa: E731
    keys = {
        "data": job["ours_rows"],
        "batch_size": job["prompts"],
        "num_generations": job["group"],
        "max_completion_length": job["length"],
        "beta": 0,
        "reward": f"{__file__}:reward",
        "precision": "fp32",
    }
    with (
        patch.object(Stops, "__call__", ends),
        patch.object(importance, "sample", timer),
        patch.object(rollouts.Rollouts, "old_logps", old_logps),
    ):
        grpo, config, engine, started = shared.our_engine(job, keys)
        grpo.train(engine, config)
        result = shared.measured(started, job.get("gpu"))
    tokens = 0
    for groups in timer.results:
        for group in groups:
            tokens += sum(len(completion.tokens) for completion in group)
    return result | {
        "sampling": timer.seconds,
        "tokens": tokens,
        "prompts": [example.prompt.tolist() for example in engine.train_set],
        "grad_norm": shared.our_metrics(engine)[0]["grad_norm"],
    }


def train_trl(job: dict) -> dict:
    """TRL's own trainer with job["per_device"] completions per forward of the update."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    size = job["group"]
    if not (job["stop_share"] or job["source"]):
        # it always ends an answer at its own eos; a random model draws this one once in 150,000 tokens
        tokenizer.eos_token = "<|endoftext|>"
    arguments = GRPOConfig(
        **shared.trl_arguments(job),
        gradient_accumulation_steps=job["prompts"] * size // job["per_device"],
        num_generations=size,
        max_completion_length=job["length"],
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        shuffle_dataset=False)
    policy = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    rows = shared.read_jsonl(job["ours_rows"])
    started = time.perf_counter()
    trainer = GRPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer)
    timer = Timer(trainer._generate_single_turn)
    trainer._generate_single_turn = timer
    trainer.train()
    result = shared.measured(started, job.get("gpu"))
    tokens = 0
    for completions, *_ in timer.results:
        tokens += sum(len(ids) for ids in completions)
    first = [torch.as_tensor(ids).tolist() for ids in timer.results[0][0]]
    groups = [first[i:i + size] for i in range(0, len(first), size)]
    return result | {
        "sampling": timer.seconds,
        "tokens": tokens,
        "completions": groups,
        "prompts": [tokenizer(row["prompt"]).input_ids for row in rows],
        "grad_norm": shared.trl_metrics(trainer)[0]["grad_norm"],
    }


CHILDREN = {"prepare": prepare, "ours": train_ours, "trl": train_trl}


# ---- running and reporting ---------------------------------------------------------------------------

def compare(job: dict) -> bool:
    """Run everything and print the report; whether the sides agree."""
    batch = job["prompts"] * job["group"]
    variants = {}
    # fewer per forward also means fewer that TRL samples together: leaner and slower
    for rows in (batch, max(1, batch // 4)):
        variants[f"TRL, {rows} per forward"] = {"per_device": rows}
    shared.child(__file__, "prepare", job)
    runs = {"ours": []}
    for _ in range(job["repeats"]):
        for name, changes in variants.items():
            run(runs, "ours", "ours", job)
            run(runs, name, "trl", job | changes)
    median = shared.medians(runs, ["seconds", "sampling", "tokens", "peak"])
    for values in median.values():
        values["update"] = values["seconds"] - values["sampling"]
    print_header(job)
    print_table(runs, median, batch * job["rollouts"])
    print_ratios(median, variants)
    reference = next(iter(variants))
    return agree(job, runs[reference][0])


def run(runs: dict, name: str, role: str, job: dict) -> None:
    """Add the result of one more run to runs[name]."""
    result = shared.child(__file__, role, job)
    runs.setdefault(name, []).append(result)
    shared.say(
        f"{name}: {result['seconds']:.1f} s, sampling {result['sampling']:.1f} s, "
        f"{result['tokens']} tokens, {result['peak']:.2f} GB")


def print_header(job: dict) -> None:
    lengths = "the model ends them" if job["source"] else "no stop token"
    if job["stop_share"]:
        lengths = f"each token ends a text with probability {job['stop_share']:g}"
    overrides = " ".join(job["overrides"]) or "defaults"
    print(
        f"\ngrpo: {job['rollouts']} rollouts of {job['prompts']} prompts x {job['group']} completions "
        f"of up to {job['length']} tokens ({lengths}), {job['threads']} threads")
    print(f"model: {shared.model_line(job)}")
    print(f"both sides: fp32, lr {job['lr']:g}, temperature 1, beta 0, paper form; ours: {overrides}\n")


def print_table(runs: dict, median: dict, samples: int) -> None:
    title = "median of the runs"
    print(f"{title:<28} runs  seconds  sampling   update  samples/s  tokens/s sampled  peak GB")
    for name, values in median.items():
        seconds = values["seconds"]
        tokens_per_second = values["tokens"] / values["sampling"]
        print(
            f"{name:<28} {len(runs[name]):>4} {seconds:>8.1f} {values['sampling']:>9.1f} "
            f"{values['update']:>8.1f} {samples / seconds:>10.3f} {tokens_per_second:>17.1f} "
            f"{values['peak']:>8.2f}")


def print_ratios(median: dict, variants: dict) -> None:
    ours = median["ours"]
    fastest = shared.least(median, variants, "seconds")
    leanest = shared.least(median, variants, "peak")
    theirs = median[fastest]
    print()
    for phase, label in (("seconds", "end to end"), ("sampling", "sampling"), ("update", "update")):
        # per sampled token: where lengths vary, the sides draw different ones
        our_rate = ours["tokens"] / ours[phase]
        their_rate = theirs["tokens"] / theirs[phase]
        print(f"{label:<11} {our_rate / their_rate:.2f}x   of the fastest: {fastest}")
    memory = ours["peak"] / median[leanest]["peak"]
    print(f"{'memory':<11} {memory:.2f}x   of the leanest: {leanest}\n")


def agree(job: dict, theirs: dict) -> bool:
    """Whether our first update from TRL's completions has TRL's gradient norm, with the same prompts."""
    overrides = [*job["overrides"], "max_steps=1"]
    changes = {"replay": theirs["completions"], "overrides": overrides}
    ours = shared.child(__file__, "ours", job | changes)
    if not theirs["grad_norm"]:
        sys.exit("error: all rewards of TRL's first rollout are equal, so there is no gradient to compare; "
                 "fix: raise --group or --length")
    error = abs(ours["grad_norm"] - theirs["grad_norm"]) / theirs["grad_norm"]
    is_equal = ours["prompts"] == theirs["prompts"]
    print(
        f"the first update from TRL's completions: gradient norm {ours['grad_norm']:.7g}, "
        f"TRL's {theirs['grad_norm']:.7g}, error {error / shared.TOLERANCE:.3f} x the tolerance "
        f"{shared.TOLERANCE:g}; prompts equal: {'yes' if is_equal else 'NO'}")
    return is_equal and error <= shared.TOLERANCE


def main() -> None:
    parser = shared.new_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=2, help="per rollout")
    parser.add_argument("--group", type=int, default=8, help="completions per prompt")
    parser.add_argument("--length", type=int, default=128, help="tokens of a completion at most")
    parser.add_argument("--rollouts", type=int, default=2)
    parser.add_argument("--stop-share", type=float, default=0.0)
    shared.add_options(parser, repeats=1)
    args = parser.parse_intermixed_args()
    own = {"algorithm": "grpo"}
    if args.model and args.stop_share:
        parser.error("--stop-share is for random weights; --model ends its answers itself")
    if not args.tokenizer:
        # a random model with Qwen's vocabulary would hardly ever sample a byte: all texts would be empty
        own["vocab_size"] = BYTE_VOCABULARY
    shared.run_comparison(args, compare, own)


if __name__ == "__main__":
    shared.start(CHILDREN, main)
