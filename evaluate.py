"""Score a model: `python evaluate.py MODEL data=gsm8k reward=r1_zero`, or with data of pairs and no reward how often it prefers
the chosen response.

MODEL is a run (its final model, else its newest whole checkpoint), a model directory (an adapter too) or a hub name. Results go
line by line to <data>_eval_results.jsonl in `output` and their averages to <data>_eval_summary.json. The same command continues
an interrupted evaluation; its numbers are those of an undisturbed one.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the program without a traceback; `run_program` handles it afterwards
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import math
import os
from dataclasses import dataclass, replace

from data.errors import UserError, notice, printable, run_program
from data.hub import SHORT
from engine import console
from engine.checkpoint import model_path
from engine.results import (
    Results,
    Settings,
    complete,
    default_output,
    help_text,
    load_examples,
    name_of,
    read_settings,
    used_by,
    with_lengths,
    write,
)
from engine.score import load_frozen, scores
from model.load import load_tokenizer, load_tokenizer_for
from model.reward_model import is_reward_model

PAIRS_AT_ONCE = 64


@dataclass(kw_only=True)
class Config(Settings):
    reward: str | None = None       # gsm8k, r1_zero, path/to/file.py:function or the run of a reward model; several: a, b; null = pairs
    reference: str | None = None    # of pairs: a model whose log-probs are subtracted, as in dpo's implicit reward


def main(argv: list[str]) -> None:
    settings = read_settings(argv, Config, "evaluate.py")
    if settings is None:
        return print(help_text(__doc__, Config))
    name = f"{name_of(settings.data)}_eval"
    settings = replace(settings, output=settings.output or default_output("eval", settings),
                       data=f"{settings.data}:test" if settings.data in SHORT and not os.path.exists(settings.data) else settings.data)
    path = model_path(settings.model, notice)
    if settings.reward:
        if settings.reference:
            raise UserError("reference (command line) belongs to pairs, which need no reward; fix: remove one of them")
        rows, used = complete(settings, path, name, notice)
        summary = summary_of_completions(rows)
    else:
        rows, used = preferences(settings, path, name)
        summary = summary_of_pairs(rows)
    results, file = (os.path.join(settings.output, f"{name}_{what}") for what in ("results.jsonl", "summary.json"))
    write(file, json.dumps(summary | {"results_path": results, "settings": used}, indent=1, ensure_ascii=False) + "\n")
    print(printable(f"\n{settings.model} on {settings.data}"))
    for key, value in summary.items():
        interval = summary.get(f"{key}_95")
        if not key.endswith("_95"):
            around = f"   (95 %: {interval[0]:.4g} to {interval[1]:.4g})" if interval else ""
            print(f"  {key:<16} {value:.{4 if isinstance(value, float) else 12}g}{around}")
    print(printable(f"results  {results}\nsummary  {file}"))


# ---- averages ---------------------------------------------------------------------------------------------------------

def summary_of_completions(rows: list[dict]) -> dict:
    """Averages over all completions that were judged. With several per prompt the intervals count each prompt once, since its
    completions are not independent; pass@k is the share of prompts that k completions solve. `accuracy` is there where every
    answer is right (1) or wrong (0)."""
    groups = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    judged = [row["metrics"] for row in rows if row["metrics"]["reward"] is not None]
    if not judged:
        raise UserError("reward: it judged none of the completions; fix: return a number for some of them")
    prompts = len({row["id"] for row in rows if row["metrics"]["reward"] is not None})
    summary = {"num_examples": len(groups)}
    if len(rows) > len(groups):
        summary["num_samples"] = len(rows)
    if len(judged) < len(rows):
        summary["without_reward"] = len(rows) - len(judged)
    if "format_reward" in judged[0]:
        summary |= rate("format_rate", [metrics["format_reward"] for metrics in judged], prompts)
    answers = [right(metrics) for metrics in judged]
    if set(answers) <= {0.0, 1.0}:
        summary |= rate("accuracy", answers, prompts)
    rewards = [[row["metrics"]["reward"] for row in group if row["metrics"]["reward"] is not None] for group in groups.values()]
    everything = [reward for group in rewards for reward in group]
    if set(everything) <= {0.0, 1.0}:
        summary |= rate("avg_reward", everything, prompts)
    else:
        summary |= {"avg_reward": mean(everything), "avg_reward_95": around_mean([mean(group) for group in rewards if group])}
    if "accuracy" in summary and len(rows) > len(groups):
        counts = [[right(row["metrics"]) for row in group if row["metrics"]["reward"] is not None] for group in groups.values()]
        k = 1
        while whole := [answers for answers in counts if len(answers) >= k]:
            summary[f"pass@{k}"] = mean([pass_at_k(len(answers), int(sum(answers)), k) for answers in whole])
            k *= 2
    return summary | {"mean_tokens": mean([row["tokens"] for row in rows]), "finished_rate": mean([row["finished"] for row in rows])}


def summary_of_pairs(rows: list[dict]) -> dict:
    ties = sum(row["metrics"].get("tie", False) for row in rows)      # rows of earlier versions have no "tie"
    margins = [row["metrics"]["margin"] for row in rows]
    return {"num_examples": len(rows), **rate("accuracy", [row["metrics"]["accuracy"] for row in rows], len(rows)),
            "ties": ties, "avg_margin": mean(margins), "avg_margin_95": around_mean(margins)}


def right(metrics: dict) -> float:
    return metrics.get("answer_reward", metrics["reward"])


def mean(values: list) -> float:
    return sum(values) / len(values)


def rate(name: str, values: list[float], count: int) -> dict:
    """A share and its 95 % interval (Wilson's) for `count` independent observations."""
    p, z = mean(values), 1.959964
    center, half = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    low, high = ((center + sign * half) / (1 + z * z / count) for sign in (-1, 1))
    return {name: p, f"{name}_95": [max(0.0, min(low, p)), min(1.0, max(high, p))]}


def around_mean(values: list[float]) -> list[float] | None:
    """The 95 % interval of a mean; None of a single value."""
    if len(values) < 2:
        return None
    center = mean(values)
    half = 1.959964 * math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1) / len(values))
    return [center - half, center + half]


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n completions, drawn without putting back, hold one of the `right` ones."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# ---- pairs ------------------------------------------------------------------------------------------------------------

def preferences(settings: Config, path: str, name: str) -> tuple[list[dict], dict]:
    """(a row per pair with the scores of both responses, the settings they come from): a reward model's scores, else summed log-probs,
    minus the reference's where there is one."""
    tokenizer = load_tokenizer_for(settings, path, notice)
    other = settings.reference and model_path(settings.reference, notice)
    if other and is_reward_model(path):
        raise UserError(f"reference: {settings.model} is a reward model, which needs none; fix: remove reference")
    if other and load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"reference: {other} has another tokenizer than {path}; fix: pass the model that this one was trained from")
    settings = replace(with_lengths(settings, path), prompt_template=None, stop=None)
    try:
        examples, report = load_examples(settings, "pairs", path, tokenizer, notice)
    except UserError as error:
        if str(error).startswith("unknown columns"):
            raise UserError(f"no reward for {settings.data}, whose rows are no pairs; fix: add reward=r1_zero or another one") from error
        raise
    used = used_by(settings, path, report) | {"reference": other}
    results = Results(settings.output, name, used, len(examples), 1, PAIRS_AT_ONCE, notice)
    if results.left:
        models = [load_frozen(where, tokenizer, examples, notice) for where in (path, other) if where]
        tie = models[0].tolerance      # a smaller difference may be rounding, so neither side is preferred
    for first, last in results.left:
        part = examples[first:last]
        values, *minus = ([pair.tolist() for pair in scores(model, part)] for model in models)
        rows = []
        for i, example in enumerate(part):
            chosen, rejected = (value - sum(other[i][k] for other in minus) for k, value in enumerate(values[i]))
            margin = chosen - rejected
            texts = [tokenizer.decode(tokens) for tokens in (example.prompt, *(response.tokens for response in example.responses))]
            metrics = {"accuracy": float(margin > tie), "tie": abs(margin) <= tie,
                       "chosen": chosen, "rejected": rejected, "margin": margin}
            named = dict(zip(("prompt", "chosen", "rejected"), texts))
            rows.append({"id": first + i, **named, "metrics": metrics})
        results.add(rows)
    return results.rows, used


if __name__ == "__main__":
    run_program(main, console.close)
