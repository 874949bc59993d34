"""A data file or hub dataset -> `Dataset`: token examples and a report of what was read, used and dropped, and why."""
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.files import SUFFIXES, find_file, read_rows, sha256
from data.formats import parse
from data.hub import HUB_NAME, hub_rows
from data.pack import Example
from data.tokenise import Tokeniser, stop_ids

CHUNK = 1000  # rows tokenised in one call


@dataclass
class Dataset:
    """Examples in the order of their rows. `report` keys:

    source; sha256 (of a local file, else None); read (rows); used (examples); dropped {reason: rows};
    first_dropped {reason: where}; cut_rows (raw texts cut into pieces); stop_inside (responses with a stop token before their
    end, None with train_on="all"); prompt_length, response_length and total (prompt + longest response), in tokens of the
    examples used: {"50", "90", "99" (percentiles), "max"}.
    """
    examples: list[Example]
    report: dict


def build_dataset(source, kind, tokenizer, max_length, train_on="assistant", truncate="none", hh="messages", base=None):
    """Read, parse and tokenise `source`: a local file's path or a hub name such as "Anthropic/hh-rlhf:test".

    `kind`: "responses" (sft) or "pairs". `max_length`, `train_on`, `truncate`: see `Tokeniser.encode`; `hh`: see `parse`
    (without a chat template HH transcripts stay text). `base`: the YAML's folder, for the error about a missing file.
    Raises UserError for anything wrong with the file or a row, when no row can be used, or when more than 1 % of the rows
    have an empty response.
    """
    path = find_file(source, base) if _is_local(source, base) else None
    rows = read_rows(path) if path else hub_rows(str(source))
    tokeniser = Tokeniser(tokenizer)
    hh = hh if tokenizer.chat_template else "text"
    examples, read, cut_rows, dropped, first_dropped = [], 0, 0, Counter(), {}

    def drop(reason, where):
        dropped[reason] += 1
        first_dropped.setdefault(reason, where)

    while chunk := list(itertools.islice(rows, CHUNK)):
        read += len(chunk)
        texts = []
        for where, row in chunk:
            text = parse(row, where, kind, hh)
            if isinstance(text, str):
                drop(text, where)
            else:
                texts.append(text)
        for text, result in zip(texts, tokeniser.encode(texts, max_length, train_on, truncate)):
            if isinstance(result, str):
                drop(result, text.where)
            else:
                examples += result
                cut_rows += len(result) > 1

    if not examples:
        reasons = ", ".join(f"{count} {reason} (first: {first_dropped[reason]})" for reason, count in dropped.most_common())
        raise UserError(f"none of the {read} rows of {source} can be used: {reasons}; fix: correct the rows"
                        + (" or raise max_length" if "longer than max_length" in dropped else ""))
    empty = dropped["empty response"]
    if empty > 0.01 * read:
        raise UserError(f"{empty} of {read} rows of {source} have an empty response (first: {first_dropped['empty response']}); "
                        "fix: delete these rows or correct how the file was made")
    report = {"source": str(source), "sha256": sha256(path) if path else None, "read": read, "used": len(examples),
              "dropped": dict(dropped), "first_dropped": first_dropped, "cut_rows": cut_rows,
              "stop_inside": _stop_inside(examples, stop_ids(tokenizer)) if train_on == "assistant" else None}
    return Dataset(examples, report | _lengths(examples))


def load_datasets(config, algorithm_config, kind, tokenizer, notice):
    """The training and evaluation examples that a configuration names, and their reports: (list, list, {"train", "eval"}).

    `notice(text)` is told once of everything dropped, cut or doubtful."""
    def build(source):
        return build_dataset(source, kind, tokenizer, config.max_length, getattr(algorithm_config, "train_on", "assistant"),
                             config.truncate, config.hh)

    train, evaluation = build(config.data), None
    if config.eval_data is not None:
        evaluation = build(config.eval_data)
    elif config.eval_fraction > 0:
        train, evaluation = split_off(train, config.eval_fraction, config.seed)
    for dataset in filter(None, (train, evaluation)):
        report = dataset.report
        for reason, count in report["dropped"].items():
            share = count / report["read"]
            notice(f"{'warning: ' if share > 0.05 else ''}{report['source']}: {count} of {report['read']} rows dropped ({share:.1%}): "
                   f"{reason} (first: {report['first_dropped'][reason]})")
        if report["cut_rows"]:
            notice(f"{report['source']}: {report['cut_rows']} texts cut into pieces of max_length tokens")
        if report["stop_inside"]:
            notice(f"warning: {report['source']}: {report['stop_inside']} responses hold a stop token before their end")
    if evaluation is not None and (count := overlap(train, evaluation)):
        notice(f"warning: {count} of {len(evaluation.examples)} evaluation rows are training rows too")
    reports = {"train": train.report, "eval": evaluation.report if evaluation else None}
    return train.examples, evaluation.examples if evaluation else [], reports


def overlap(train, evaluation):
    """How many examples of the Dataset `evaluation` occur in the Dataset `train`, prompt and responses alike, token by token."""
    seen = {_key(example) for example in train.examples}
    return sum(_key(example) in seen for example in evaluation.examples)


def split_off(dataset, fraction, seed):
    """(train, evaluation): a random `fraction` of the examples, at least one, is for evaluation; both keep the file's order."""
    count = max(1, round(fraction * len(dataset.examples)))
    if count >= len(dataset.examples):
        raise UserError(f"eval_fraction {fraction} of {len(dataset.examples)} examples leaves none to train on; "
                        "fix: lower eval_fraction or give eval_data")
    chosen = set(np.random.default_rng(seed).permutation(len(dataset.examples))[:count].tolist())

    def part(examples, **report):
        return Dataset(examples, dataset.report | {"used": len(examples)} | _lengths(examples) | report)

    return (part([example for i, example in enumerate(dataset.examples) if i not in chosen]),
            part([example for i, example in enumerate(dataset.examples) if i in chosen],      # what was dropped is told of once
                 dropped={}, first_dropped={}, cut_rows=0, stop_inside=0))


def _is_local(source, base):
    """A file, or clearly meant as one: not of a hub name's form, with a data file's suffix, or in a directory that is here."""
    return (not HUB_NAME.fullmatch(str(source)) or str(source).lower().endswith(SUFFIXES) or Path(source).exists()
            or Path(source).parent.is_dir() or (base is not None and (Path(base) / source).exists()))


def _key(example):
    parts = [example.prompt, *(response.tokens for response in example.responses)]
    digest = hashlib.sha256(np.array([len(part) for part in parts], dtype=np.int64).tobytes())  # lengths keep the parts apart
    for part in parts:
        digest.update(part.tobytes())
    return digest.digest()


def _stop_inside(examples, stops):
    """Responses with a stop token that a trained token follows: the model learns to write on after it."""
    return sum(any((response.trained[1:] & (response.tokens[:-1] == stop)).any() for stop in stops)
               for example in examples for response in example.responses)


def _lengths(examples):
    prompts = [len(example.prompt) for example in examples]
    longest = [max(len(response.tokens) for response in example.responses) for example in examples]
    responses = [len(response.tokens) for example in examples for response in example.responses]
    lengths = {"prompt_length": prompts, "response_length": responses, "total": np.add(prompts, longest)}
    return {name: {"50": int(p50), "90": int(p90), "99": int(p99), "max": int(top)}
            for name, values in lengths.items() for p50, p90, p99, top in [np.percentile(values, [50, 90, 99, 100])]}
