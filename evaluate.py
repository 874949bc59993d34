"""Score a model: `python evaluate.py MODEL data=gsm8k reward=r1_zero`, or with pairs as data and no reward
how often it prefers the chosen response: by its implicit reward, which is its log-prob minus a reference's,
or without a reference by its log-prob alone.

MODEL is a run (its final model, else its newest whole checkpoint), a model directory (an adapter too) or a
hub name; with pairs also a reward model: a run of rm, or any sequence classifier with one label. With
`dump=alpaca data=tatsu-lab/alpaca_eval` the answers are also written in the form that AlpacaEval judges;
that takes no reward. Results go line by line to <data>_eval_results.jsonl in `output` and their averages to
<data>_eval_summary.json. The same command continues an interrupted evaluation; its numbers are those of an
undisturbed one.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports ends the program without a traceback; `run_program` handles it afterwards
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import os
from dataclasses import dataclass, replace
from typing import Literal

from data.dataset import is_local
from data.errors import UserError, notice, printable, run_program
from data.hub import SHORT
from engine import console
from engine.cast import cast
from engine.checkpoint import model_path
from engine.evaluation import conversation_scores, conversations_of, load_frozen, response_scores
from engine.intervals import Z, wilson
from engine.logs import write_whole
from engine.results import (
    Results,
    Settings,
    as_text,
    complete,
    default_output,
    help_text,
    load_examples,
    name_of,
    number,
    read_settings,
    training_config,
    used_by,
    uses_reference,
    with_lengths,
    with_system_prompt,
)
from model.load import check_path, load_tokenizer, load_tokenizer_for
from model.off_the_shelf import Classifier, is_classifier
from model.reward_model import is_reward_model

PAIRS_AT_ONCE = 64


@dataclass(kw_only=True)
class Config(Settings):
    reward: str | None = None       # gsm8k, r1_zero, path/to/file.py:function or the run of a reward model;
    #                                 several: a, b; null = evaluate pairs
    reference: str | None = "auto"  # pairs only: a model whose log-probs are subtracted, as in dpo's
    #                                 implicit reward; null = none, so the log-probs alone; auto = the one of
    #                                 a run whose algorithm has a reference (its start model, if not another)
    dump: Literal["alpaca"] | None = None      # alpaca = the answers also as <data>_alpaca.json, a list of
    #                                 instruction, output, generator and dataset


def main(argv: list[str]) -> None:
    settings = read_settings(argv, Config, "evaluate.py")
    if settings is None:
        return print(help_text(__doc__, Config))
    output = settings.output or default_output("eval", settings)
    name = f"{name_of(settings.data)}_eval"
    if settings.data in SHORT and not os.path.exists(settings.data):
        settings = replace(settings, data=f"{settings.data}:test")
    elif ":" not in settings.data and not is_local(settings.data):
        notice(f"{settings.data}: the split train is scored, since the name says none; "
               f"data={settings.data}:test would score the split test")
    settings = replace(settings, output=output)
    path = model_path(settings.model, notice)
    if (settings.reward or settings.dump) and settings.reference not in (None, "auto"):
        raise UserError("reference (command line) is only used with pair data (without reward); "
                        "fix: remove one of them")
    if settings.reward or settings.dump:
        rows, used = complete(settings, path, name, notice)
        summary = summary_of_completions(rows) if settings.reward else summary_of_texts(rows)
    else:
        rows, used = preferences(settings, path, name)
        summary = summary_of_pairs(rows, measure_of(path, used["reference"]))
    results_path = os.path.join(output, f"{name}_results.jsonl")
    summary_path = os.path.join(output, f"{name}_summary.json")
    write_whole(summary_path, as_text(summary | {"results_path": results_path, "settings": used}))
    print(printable(f"\n{settings.model} on {settings.data}"))
    for key, value in summary.items():
        if not key.endswith("_95"):
            print(f"  {key:<16} {number(value)}{interval(summary.get(f'{key}_95'))}")
    print(printable(f"results  {results_path}\nsummary  {summary_path}"))
    if settings.dump:
        dump_path = os.path.join(output, f"{name_of(settings.data)}_{settings.dump}.json")
        write_whole(dump_path, as_text(alpaca_rows(rows, settings.model, settings.data)))
        print(printable(f"{settings.dump:<8} {dump_path}"))


def interval(ends: list[float] | None) -> str:
    if ends is None:
        return ""
    low, high = ends
    return f"   (95 %: {low:.4g} to {high:.4g})"


# ---- averages --------------------------------------------------------------------------------------------

def summary_of_completions(rows: list[dict]) -> dict:
    """Averages over all completions with a reward. With several completions per prompt the intervals count
    each prompt once, since its completions are not independent; pass@k is the share of prompts that k
    completions solve. `accuracy` is included if every answer is right (1) or wrong (0)."""
    groups = {}
    scored = []
    for row in rows:
        group = groups.setdefault(row["id"], [])
        if row["metrics"]["reward"] is not None:
            group.append(row["metrics"])
            scored.append(row["metrics"])
    if not scored:
        raise UserError("reward: it returned None for every completion; "
                        "fix: return a number for some of them")
    has_several = len(rows) > len(groups)
    summary = {"num_examples": len(groups)}
    if has_several:
        summary["num_samples"] = len(rows)
    if len(scored) < len(rows):
        summary["without_reward"] = len(rows) - len(scored)
    groups = [group for group in groups.values() if group]
    if "format_reward" in scored[0]:
        summary |= rate("format_rate", column(scored, "format_reward"), len(groups))
    answers = list(map(answer_reward, scored))
    is_binary = set(answers) <= {0.0, 1.0}
    if is_binary:
        summary |= rate("accuracy", answers, len(groups))
    summary |= average_reward(column(scored, "reward"), groups)
    if is_binary and has_several:
        summary |= pass_rates(groups)
    return summary | summary_of_texts(rows)


def summary_of_texts(rows: list[dict]) -> dict:
    """What needs no reward."""
    return {"mean_tokens": mean(column(rows, "tokens")), "finished_rate": mean(column(rows, "finished"))}


def average_reward(rewards: list[float], groups: list[list[dict]]) -> dict:
    """The mean of `rewards`, which are those of all groups, and its interval."""
    if set(rewards) <= {0.0, 1.0}:
        return rate("avg_reward", rewards, len(groups))
    means = [mean(column(group, "reward")) for group in groups]
    return {"avg_reward": mean(rewards), "avg_reward_95": around_mean(means)}


def pass_rates(groups: list[list[dict]]) -> dict:
    """pass@1, pass@2, pass@4 ... over the prompts with at least that many completions."""
    rates = {}
    k = 1
    while True:
        solved = []
        for group in groups:
            if len(group) >= k:
                right = sum(map(answer_reward, group))
                solved.append(pass_at_k(len(group), int(right), k))
        if not solved:
            return rates
        rates[f"pass@{k}"] = mean(solved)
        k *= 2


def summary_of_pairs(rows: list[dict], measure: str) -> dict:
    """`measure`: what makes a response the preferred one."""
    metrics = column(rows, "metrics")
    margins = column(metrics, "margin")
    ties = sum(row.get("tie", False) for row in metrics)      # rows of earlier versions have no "tie"
    summary = {"num_examples": len(rows), "preferred_by": measure}
    summary |= rate("accuracy", column(metrics, "accuracy"), len(rows))
    return summary | {"ties": ties, "avg_margin": mean(margins), "avg_margin_95": around_mean(margins)}


def column(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def answer_reward(metrics: dict) -> float:
    return metrics.get("answer_reward", metrics["reward"])


def mean(values: list) -> float:
    return sum(values) / len(values)


def rate(name: str, values: list[float], count: int) -> dict:
    """A share and its 95 % interval (Wilson's) for `count` independent observations."""
    p = mean(values)
    return {name: p, f"{name}_95": list(wilson(p, count))}


def around_mean(values: list[float]) -> list[float] | None:
    """The 95 % interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    center = mean(values)
    variance = sum((value - center) ** 2 for value in values) / (len(values) - 1)
    half = Z * math.sqrt(variance / len(values))
    return [center - half, center + half]


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of n completions, drawn without replacement, include one of the `right` ones."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# ---- AlpacaEval ------------------------------------------------------------------------------------------

def alpaca_rows(rows: list[dict], generator: str, data: str) -> list[dict]:
    """The first completion of every prompt as AlpacaEval's model outputs. The instruction is the last user's
    turn, where the prompt is a conversation."""
    found = []
    for row in rows:
        if row["sample"] == 0:
            instruction = row["prompt"]
            if not isinstance(instruction, str):
                said = [turn["content"] for turn in instruction if turn["role"] == "user"]
                instruction = said[-1] if said else ""
            found.append({"instruction": instruction, "output": row["generation"], "generator": generator,
                          "dataset": row.get("dataset") or name_of(data)})
    return found


# ---- pairs -----------------------------------------------------------------------------------------------

def preferences(settings: Config, path: str, name: str) -> tuple[list[dict], dict]:
    """(a row per pair with the scores of both responses, the settings they come from): a reward model's
    scores, else summed log-probs, minus the reference's where there is one."""
    tokenizer = load_tokenizer_for(settings, path, notice)
    if settings.reference == "auto":
        settings = replace(settings, reference=trained_reference(settings.model))
    reference_path = None
    if settings.reference:
        reference_path = model_path(settings.reference, notice)
        check_path(reference_path, "reference")
        check_reference(settings.model, path, reference_path, tokenizer)
    settings = with_lengths(with_system_prompt(settings), path)
    settings = replace(settings, prompt_template=None, stop=None)
    examples, report = load_pairs(settings, path, tokenizer)
    used = used_by(settings, path, report) | {"reference": reference_path}
    results = Results(settings.output, name, used, len(examples), 1, PAIRS_AT_ONCE, notice)
    if results.left:
        scores_of, tolerance = pair_scorer(settings, path, reference_path, tokenizer, examples)
    for first, last in results.left:
        rows = []
        scores = scores_of(first, last)
        for i, (example, pair) in enumerate(zip(examples[first:last], scores), start=first):
            row = pair_row(example, pair.tolist(), tolerance, tokenizer)
            rows.append({"id": i, **row})
        results.add(rows)
    return results.rows, used


def pair_scorer(settings: Config, path: str, reference_path: str | None, tokenizer, examples: list):
    """(A function that gives the scores (2,) of each pair from the first to before the last, how far apart
    two computations of a score may be)."""
    if is_classifier(path):
        classifier = Classifier(path)
        classifier.tokenizer = tokenizer      # with the chat template that the settings ask for
        conversations = conversations_of(settings.data, examples, settings.seed, settings.columns)

        def classified(first, last):
            return conversation_scores(classifier, conversations[first:last])

        return classified, classifier.tolerance
    model = load_frozen(path, tokenizer, examples, notice, reference_path)
    reference = reference_path and load_frozen(reference_path, tokenizer, examples, notice, path)

    def computed(first, last):
        part = examples[first:last]
        scores = response_scores(model, part)
        return map(difference, scores, response_scores(reference, part)) if reference else scores

    return computed, model.tolerance


def trained_reference(model: str) -> str | None:
    """The reference that the run `model` was trained against; None where it had none, or is not a run."""
    trained = training_config(model)
    if "reference" not in trained or not uses_reference(trained):
        return None
    reference = cast(trained["reference"], str | None)
    if reference in (None, "cache"):      # both mean the start model
        reference = trained["model"]
    notice(f"reference: {reference}, the run's own; reference=PATH is another, reference=null is none")
    return reference


def measure_of(path: str, reference: str | None) -> str:
    """What the responses of a pair are compared by."""
    if is_reward_model(path) or is_classifier(path):
        return "the reward model's score"
    if reference:
        return f"implicit reward (log-prob minus that of {reference})"
    return "log-prob (no reference)"


def check_reference(model: str, path: str, reference: str, tokenizer) -> None:
    if is_reward_model(path) or is_classifier(path):
        raise UserError(f"reference: {model} is a reward model, which needs none; fix: remove reference")
    if load_tokenizer(reference).get_vocab() != tokenizer.get_vocab():
        raise UserError(f"reference: {reference} has another tokenizer than {path}; "
                        "fix: pass the model that this one was trained from")


def load_pairs(settings: Config, path: str, tokenizer):
    """The examples and their report; UserError that asks for a reward where the rows are not pairs."""
    try:
        return load_examples(settings, "pairs", path, tokenizer, notice)
    except UserError as error:
        if str(error).startswith("unknown columns"):
            raise UserError(f"no reward for {settings.data}, whose rows are not pairs; "
                            "fix: add reward=r1_zero or another one") from error
        raise


def difference(scores, reference_scores):
    """In fp64, in which it is exact."""
    return scores.double() - reference_scores.double()


def pair_row(example, scores: list[float], tolerance: float, tokenizer) -> dict:
    """The texts and scores of a pair. It is a tie if the margin may be due to rounding, and then neither side
    is preferred."""
    chosen, rejected = scores
    margin = chosen - rejected
    good, bad = example.responses
    return {
        "prompt": tokenizer.decode(example.prompt),
        "chosen": tokenizer.decode(good.tokens),
        "rejected": tokenizer.decode(bad.tokens),
        "metrics": {
            "accuracy": float(margin > tolerance),
            "tie": abs(margin) <= tolerance,
            "chosen": chosen,
            "rejected": rejected,
            "margin": margin,
        },
    }


if __name__ == "__main__":
    run_program(main, console.close)
