"""Rejection sampling:
`python sample.py MODEL data=example/tiny/prompts.jsonl n=8 reward=r1_zero min_reward=1`.

Samples n completions per prompt, scores them and writes into `output`:
    sft.jsonl          the best one of each prompt
                       python train.py example/tiny-sft.yml model=MODEL data=OUTPUT/sft.jsonl
    preference.jsonl   the best and the worst one of each prompt
                       python train.py example/tiny-dpo.yml model=MODEL data=OUTPUT/preference.jsonl
    samples_results.jsonl   all completions with their rewards
    summary.json            how many were kept, and why not more
Only completions that ended by themselves are kept. The same command continues an interrupted run; with
another min_reward it samples nothing again.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the program without a traceback; `run_program` handles it afterwards
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
from dataclasses import dataclass, replace

from data.errors import RunError, UserError, notice, printable, run_program
from engine import console
from engine.checkpoint import model_path
from engine.logs import write_whole
from engine.results import (
    Settings,
    as_lines,
    as_text,
    complete,
    default_output,
    help_text,
    number,
    read_settings,
)


@dataclass(kw_only=True)
class Config(Settings):
    reward: str                        # gsm8k, r1_zero, path/to/file.py:function or the run of a reward
    #                                    model; several: a, b
    n: int = 8                         # completions per prompt
    min_reward: float | None = None    # keep a best completion only with this reward or more: 1 = right
    #                                    answers; null = keep all


def main(argv: list[str]) -> None:
    settings = read_settings(argv, Config, "sample.py")
    if settings is None:
        return print(help_text(__doc__, Config))
    if settings.n < 2:
        raise UserError("n (command line) is 1, which leaves no choice; fix: give 2 or more, such as n=8")
    output = settings.output or default_output("sample", settings)
    settings = replace(settings, output=output)
    rows, used = complete(settings, model_path(settings.model, notice), "samples", notice)
    best, pairs, counts = select(rows, settings.min_reward)
    used["min_reward"] = settings.min_reward
    files = {
        os.path.join(output, "sft.jsonl"): as_lines(best),
        os.path.join(output, "preference.jsonl"): as_lines(pairs),
        os.path.join(output, "summary.json"): as_text(counts | {"settings": used}),
    }
    for path, text in files.items():
        write_whole(path, text)
    print(printable(f"\n{settings.model} on {settings.data}"))
    for name, count in counts.items():
        print(f"  {name:<32} {number(count)}")
    if not best:
        raise RunError(f"no completion is kept in {output}; fix: raise n, or lower min_reward")
    print(printable("\n".join(files)))


def select(rows: list[dict], min_reward: float | None) -> tuple[list[dict], list[dict], dict]:
    """(rows of the SFT file, rows of the preference file, counts). Among equally good completions the first
    one is the best, among equally bad ones the first one is the worst."""
    groups = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    rewards = [reward_of(row) for row in rows]
    counts = {
        "prompts": len(groups),
        "completions": len(rows),
        "not finished": 0,
        "empty": 0,
        "without reward": rewards.count(None),
        "prompts without a choice": 0,
        "prompts below min_reward": 0,
        "prompts with equal rewards": 0,
    }
    best = []
    pairs = []
    for group in groups.values():
        candidates = usable(group, counts)
        if not candidates:
            counts["prompts without a choice"] += 1
            continue
        good = max(candidates, key=reward_of)
        bad = min(candidates, key=reward_of)
        if min_reward is not None and reward_of(good) < min_reward:
            counts["prompts below min_reward"] += 1
            continue
        best.append(sft_row(good))
        if reward_of(good) == reward_of(bad):
            counts["prompts with equal rewards"] += 1
        else:
            pairs.append(preference_row(good, bad))
    counts["kept in sft.jsonl"] = len(best)
    counts["kept in preference.jsonl"] = len(pairs)
    known = [reward for reward in rewards if reward is not None]
    if known:
        counts["mean reward"] = sum(known) / len(known)
    if best:
        counts["mean reward of sft.jsonl"] = sum(row["reward"] for row in best) / len(best)
    return best, pairs, counts


def usable(group: list[dict], counts: dict) -> list[dict]:
    """The completions that ended by themselves, are not empty and have a reward; the others are counted."""
    found = []
    for row in group:
        if not row["finished"]:
            counts["not finished"] += 1
        elif not row["generation"].strip():
            counts["empty"] += 1
        elif reward_of(row) is not None:
            found.append(row)
    return found


def reward_of(row: dict) -> float | None:
    return row["metrics"]["reward"]


def sft_row(row: dict) -> dict:
    """As messages where the prompt is a conversation, else as strings. Only what was sampled is the
    completion: it may go on where the prompt's last turn ends."""
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "response": row["generation"], "reward": reward_of(row)}
    return asked(row) | {"completion": [turn(row)], "reward": reward_of(row)}


def preference_row(good: dict, bad: dict) -> dict:
    chosen = good["generation"]
    rejected = bad["generation"]
    if not isinstance(good["prompt"], str):
        chosen = [turn(good)]
        rejected = [turn(bad)]
    rewards = [reward_of(good), reward_of(bad)]
    return asked(good) | {"chosen": chosen, "rejected": rejected, "rewards": rewards}


def asked(row: dict) -> dict:
    """The columns that make the prompt of a completion."""
    return {name: row[name] for name in ("prompt", "tools") if name in row}


def turn(row: dict) -> dict:
    return {"role": "assistant", "content": row["generation"]}


if __name__ == "__main__":
    run_program(main, console.close)
