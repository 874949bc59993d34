"""Rejection sampling: `python sample.py MODEL data=example/tiny/prompts.jsonl n=8 reward=r1_zero min_reward=1`.

Draws n completions per prompt, scores them and writes into `output`:
    sft.jsonl          the best of each prompt           python train.py example/tiny-sft.yml model=MODEL data=OUTPUT/sft.jsonl
    preference.jsonl   the best and the worst of each    python train.py example/tiny-dpo.yml model=MODEL data=OUTPUT/preference.jsonl
    samples_results.jsonl, summary.json                  all completions with their rewards; how many were kept, and why not more
Only completions that ended by themselves are kept. The same command continues an interrupted run; another min_reward draws
nothing again.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the program without a traceback; `run_program` handles it afterwards
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import os
from dataclasses import dataclass, replace

from data.errors import RunError, UserError, notice, printable, run_program
from engine import console
from engine.checkpoint import model_path
from engine.results import Settings, complete, default_output, help_text, read_settings, write


@dataclass(kw_only=True)
class Config(Settings):
    reward: str                        # gsm8k, r1_zero, path/to/file.py:function or the run of a reward model; several: a, b
    n: int = 8                         # completions per prompt
    min_reward: float | None = None    # the best one counts only with this reward or more: 1 = a right answer; null = whatever it is


def main(argv: list[str]) -> None:
    settings = read_settings(argv, Config, "sample.py")
    if settings is None:
        return print(help_text(__doc__, Config))
    if settings.n < 2:
        raise UserError("n (command line) is 1, which leaves no choice; fix: give 2 or more, such as n=8")
    settings = replace(settings, output=settings.output or default_output("sample", settings))
    rows, used = complete(settings, model_path(settings.model, notice), "samples", notice)
    best, pairs, counts = select(rows, settings.min_reward)
    for name, kept in {"sft.jsonl": best, "preference.jsonl": pairs}.items():
        write(os.path.join(settings.output, name), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    write(os.path.join(settings.output, "summary.json"), json.dumps(
        counts | {"settings": used | {"min_reward": settings.min_reward}}, indent=1, ensure_ascii=False) + "\n")
    print(printable(f"\n{settings.model} on {settings.data}"))
    for name, count in counts.items():
        print(f"  {name:<32} {count:.{4 if isinstance(count, float) else 12}g}")
    if not best:
        raise RunError(f"no completion is kept in {settings.output}; fix: raise n, or lower min_reward")
    names = ("sft.jsonl", "preference.jsonl", "summary.json")
    written = [os.path.join(settings.output, name) for name in names]
    print(printable("\n".join(written)))


def select(rows: list[dict], min_reward: float | None) -> tuple[list[dict], list[dict], dict]:
    """(rows of the SFT file, rows of the preference file, counts). Of equally good completions the first one is the best, of equally
    bad ones the first one the worst."""
    groups = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    best, pairs, rewards = [], [], [row["metrics"]["reward"] for row in rows]
    counts = {"prompts": len(groups), "completions": len(rows), "not finished": 0, "empty": 0, "without reward": rewards.count(None),
              "prompts without a choice": 0, "prompts below min_reward": 0, "prompts with equal rewards": 0}
    for group in groups.values():
        usable = [row for row in group if row["finished"] and row["generation"].strip() and row["metrics"]["reward"] is not None]
        counts["not finished"] += sum(not row["finished"] for row in group)
        counts["empty"] += sum(row["finished"] and not row["generation"].strip() for row in group)
        if not usable:
            counts["prompts without a choice"] += 1
            continue
        good, bad = max(usable, key=reward_of), min(usable, key=reward_of)
        if min_reward is not None and reward_of(good) < min_reward:
            counts["prompts below min_reward"] += 1
            continue
        best.append(sft_row(good))
        if reward_of(good) == reward_of(bad):
            counts["prompts with equal rewards"] += 1
        else:
            pairs.append(preference_row(good, bad))
    judged = [reward for reward in rewards if reward is not None]
    counts |= {"kept in sft.jsonl": len(best), "kept in preference.jsonl": len(pairs)}
    for name, values in {"mean reward": judged, "mean reward of sft.jsonl": [row["reward"] for row in best]}.items():
        if values:
            counts[name] = sum(values) / len(values)
    return best, pairs, counts


def reward_of(row: dict) -> float:
    return row["metrics"]["reward"]


def sft_row(row: dict) -> dict:
    """As messages where the prompt is a conversation, else as strings."""
    if isinstance(row["prompt"], str):
        return {"prompt": row["prompt"], "response": row["generation"], "reward": reward_of(row)}
    return {"messages": [*row["prompt"], turn(row)], "reward": reward_of(row)}


def preference_row(good: dict, bad: dict) -> dict:
    plain = isinstance(good["prompt"], str)
    chosen, rejected = (row["generation"] if plain else [turn(row)] for row in (good, bad))
    return {"prompt": good["prompt"], "chosen": chosen, "rejected": rejected, "rewards": [reward_of(good), reward_of(bad)]}


def turn(row: dict) -> dict:
    return {"role": "assistant", "content": row["generation"]}


if __name__ == "__main__":
    run_program(main, console.close)
