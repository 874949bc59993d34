"""Data files and hub datasets -> `Dataset`: token examples and a report of what was read, used and dropped,
and why."""
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.extras import without_uncommon
from data.files import SUFFIXES
from data.formats import read_template
from data.hub import HUB_NAME, SHORT_NAME, hub_rows
from data.local import is_local_set, local_data
from data.reading import Found, Reading, read_chunks
from data.sources import source_name
from data.store import Examples
from data.tokenise import stop_ids


@dataclass
class Dataset:
    """Examples in the order of their rows. `report` keys:

    source; sha256 (of local files, else None); shape (how the columns were understood); read (rows); used
    (examples); dropped {reason: rows}; first_dropped {reason: where}; cut_rows (raw texts cut into pieces);
    split_rows (conversations that became several examples); continued (responses tokenised apart from their
    prompt) and first_continued (where); stop_inside (responses with a stop token before their end, None with
    train_on="all") and first_stop_inside (where); control_tokens (rows in which a turn that is not trained
    holds a special token) and first_control_tokens (where); duplicates (repetitions of an earlier example);
    prompt_length, response_length (0 of prompts) and total (prompt + longest response), in tokens of the
    examples used: {"50", "90", "99" (percentiles), "max"}; labelled examples also have desirable
    and undesirable. Several sources have the sums of these, a list of sha256, and `sources`: their reports.
    `notices`: sentences on how the source was read that are no counts.
    """
    examples: Examples
    report: dict
    notices: list[str] = field(default_factory=list)


def build_dataset(source, kind, tokenizer, max_length, train_on="assistant", truncate="none", hh="messages",
                  base=None, columns=None, seed=0, template=None, system=False, longest_prompt=None):
    """Read, parse and tokenise `source`: local data (see `data.local`) or a hub name such as
    "Anthropic/hh-rlhf:test".

    `kind`: "responses" (sft), "pairs", or "labelled" (kto): one response and extras["label"] per example; a
    pair gives two, the chosen response (True) and then the rejected one (False). Pairs with a margin column
    have extras["margin"], a float; other columns of numbers: see `data.extras`. Or "prompts": no responses,
    extras["prompt"] (the prompt as text or messages) and extras["columns"] (the row's columns by name), and
    `max_length` is the prompt's; `template` and `system`: see `parse`. `max_length`, `train_on`, `truncate`:
    see `Tokeniser.encode`; `hh`: see `parse` (without a chat template HH transcripts stay text). `base`: the
    YAML's folder, for the error about a missing file. `columns`: {our name: the file's name}; `seed`: for the
    choice among the pairs where a prompt of shp or se has too many. `longest_prompt`: the tokens that a
    prompt may have, so that a completion has room behind it. Raises UserError for anything wrong with
    the file or a row, when no row can be used, or when more than 1 % of the rows have an empty response.
    """
    columns = columns or {}
    local = local_data(str(source), base) if is_local(source, base) else None
    counts = Counter()
    hh = hh if tokenizer.chat_template or template else "text"
    if local:
        rows = local.rows(counts)
    else:
        rows = hub_rows(str(source), "responses" if kind == "prompts" else kind, hh == "messages", seed)
    chat = bool(tokenizer.chat_template) and not template
    reading = Reading(str(source), kind, max_length, train_on, truncate, hh, columns, template, chat, system,
                      longest_prompt)
    found = Found(str(source), kind, train_on)
    for part in read_chunks(rows, reading, tokenizer):
        found.add(part)
    found.check()
    found.join_chunks()
    if kind == "responses" and found.labelled:
        found.drop_undesirable()
        found.check()
    found.keep_common_extras()
    notices = local.notices(counts) if local else []
    return Dataset(found.examples, _report(found, local, tokenizer), notices + list(found.notices))


def _report(found, local, tokenizer):
    shapes = [f"{count:,} rows read as {shape}" for shape, count in found.shapes.most_common()]
    report = {
        "source": found.source,
        "sha256": local.digest() if local else None,
        "read": found.read,
        "shape": ", ".join(shapes),
        "dropped": dict(found.dropped),
        "first_dropped": found.first_dropped,
        "cut_rows": found.cut_rows,
        "split_rows": found.split_rows,
        "continued": len(found.continued),
        "first_continued": _first(found.continued),
        "stop_inside": None,
        "first_stop_inside": None,
        "control_tokens": len(found.control),
        "first_control_tokens": _first(found.control),
        "duplicates": _duplicates(found.examples),
    }
    if found.train_on == "assistant":
        inside = _stop_inside(found.examples, stop_ids(tokenizer))
        report["stop_inside"] = len(inside)
        report["first_stop_inside"] = _first(inside)
    return report | _measures(found.examples)


def _first(items):
    return items[0] if items else None


def load_datasets(config, kind, tokenizer, notice,
                  train_on="assistant", prompt_template=None, max_completion_length=0):
    """The training and evaluation examples that a configuration names, and their reports:
    (Examples, Examples, {"train", "eval"}). Prompts are put into the `prompt_template`, if there is one, and
    leave room for `max_completion_length` tokens.

    `notice(text)` is told once how each source was understood and of everything dropped, cut or doubtful.
    Raises UserError as `build_dataset` does, and when labelled training examples all have the same label."""
    template = read_template(prompt_template) if prompt_template else None
    if template and config.system_prompt:
        raise UserError("system_prompt beside prompt_template, which has no place for it; "
                        "fix: remove one of them, or write the system prompt into the prompt_template's file")
    max_length, longest_prompt = config.max_length, None
    if kind in ("prompts", "responses") and max_completion_length:
        room = max_length - max_completion_length
        if room < 1:
            raise UserError(f"max_completion_length is {max_completion_length}, which leaves no room for a "
                            "prompt in "
                            f"max_length {config.max_length}; fix: raise max_length")
        if kind == "prompts":
            max_length = room
        else:
            longest_prompt = room

    def build(data):
        sources = [{"path": data}] if isinstance(data, str) else data
        parts = [build_dataset(
            source_name(source), kind, tokenizer, max_length, train_on, config.truncate, config.hh,
            columns=source.get("columns", config.columns), seed=config.seed, template=template,
            system=bool(config.system_prompt), longest_prompt=longest_prompt) for source in sources]
        for part in parts:
            _tell(part, notice)
        dataset = parts[0]
        if not isinstance(data, str):
            weights = [source.get("weight", 1.0) for source in sources]
            dataset = combine(parts, weights, config.seed)
            for line in dataset.notices:
                notice(line)
        if count := dataset.report["duplicates"]:
            alike = "" if kind == "prompts" else ", prompt and responses alike"
            notice(f"{dataset.report['source']}: {count} examples occur more than once{alike}; they are kept")
        return dataset

    train = build(config.data)
    evaluation = None
    if config.eval_data is not None:
        evaluation = build(config.eval_data)
    elif config.eval_fraction > 0:
        train, evaluation = split_off(train, config.eval_fraction, config.seed)
    for name, other in ("desirable", "undesirable"), ("undesirable", "desirable"):
        if train.report.get(other) == 0:
            raise UserError(f"only {name} labels in {train.report['source']}; "
                            "fix: add rows with the other label (true = desirable)")
    if evaluation is not None and any(counts := overlap(train, evaluation)):
        notice(f"warning: {counts[0]} of {len(evaluation.examples)} evaluation rows are training rows too; "
               f"{counts[1]} have the prompt of one")
    held_out = evaluation.examples if evaluation else train.examples.take([])
    reports = {"train": train.report, "eval": evaluation.report if evaluation else None}
    return train.examples, held_out, reports


def combine(parts, weights, seed):
    """One Dataset of several, one after the other, each with its weight; a row's examples stay together."""
    chosen, reports = [], []
    for i, (part, weight) in enumerate(zip(parts, weights)):
        rows = _rows_of(part.examples)
        examples = part.examples.take(_weighted(rows, weight, (seed, i)))
        chosen.append(examples)
        reports.append(part.report | {"weight": weight} | _measures(examples))
    source = " + ".join(report["source"] for report in reports)
    examples, _, sentences = without_uncommon(Examples.joined(chosen), source)
    every = Examples.joined([part.examples for part in parts])
    return Dataset(examples, _combined(reports, source, every) | _measures(examples), sentences)


def _rows_of(examples):
    """The numbers of the examples of each row."""
    rows = []
    where = None
    for i, example in enumerate(examples):
        if example.where != where:
            rows.append([])
            where = example.where
        rows[-1].append(i)
    return rows


def _combined(reports, source, examples):
    """The sums of the reports on several sources, and what they have in all `examples`."""
    combined = {"source": source, "dropped": Counter(), "first_dropped": {}, "sources": reports}
    for key in "read", "cut_rows", "split_rows", "continued", "control_tokens":
        combined[key] = sum(report[key] for report in reports)
    for report in reports:
        combined["dropped"].update(report["dropped"])
        combined["first_dropped"] = report["first_dropped"] | combined["first_dropped"]
    combined["dropped"] = dict(combined["dropped"])
    inside = [report["stop_inside"] for report in reports]
    combined["stop_inside"] = None if None in inside else sum(inside)
    for key in "first_stop_inside", "first_control_tokens", "first_continued":
        firsts = [report[key] for report in reports]
        combined[key] = _first(list(filter(None, firsts)))
    combined["sha256"] = [report["sha256"] for report in reports]
    combined["shape"] = "; ".join(report["shape"] for report in reports)
    combined["duplicates"] = _duplicates(examples)
    return combined


def _weighted(groups, weight, seed):
    """`groups` (lists of the numbers of examples, one per row) `weight` times: for its whole part all of
    them, for the rest a random choice."""
    count = round(weight % 1 * len(groups))
    if weight < 1:
        count = max(1, count)
    chosen = np.random.default_rng(seed).permutation(len(groups))[:count].tolist()
    repeated = groups * int(weight)
    for i in sorted(chosen):
        repeated.append(groups[i])
    return list(itertools.chain(*repeated))


def overlap(train, evaluation):
    """(rows, prompts): how many examples of the Dataset `evaluation` occur in the Dataset `train`, prompt and
    responses alike, token by token; and how many have the prompt of a training example."""
    rows = set(map(_key, train.examples))
    prompts = set(map(_prompt_key, train.examples))
    same_rows = same_prompts = 0
    for example in evaluation.examples:
        same_rows += _key(example) in rows
        same_prompts += _prompt_key(example) in prompts
    return same_rows, same_prompts


def split_off(dataset, fraction, seed):
    """(train, evaluation): about a random `fraction` of the examples is for evaluation, at least one prompt;
    all examples with the same prompt are on the same side, and all turns of a conversation. Both keep the
    order."""
    total = len(dataset.examples)
    by_prompt = {}                         # prompt -> its examples' numbers
    key, row = None, None
    for i, example in enumerate(dataset.examples):
        is_piece = len(example.prompt) == 1                # a piece of raw text
        if is_piece or example.where != row:
            key, row = _prompt_key(example), example.where
        by_prompt.setdefault(key, []).append(i)
    groups = list(by_prompt.values())
    wanted = max(1, round(fraction * total))
    chosen = set()
    for i in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if not chosen or len(chosen) + len(groups[i]) <= wanted:
            chosen.update(groups[i])
    if len(chosen) == total:
        raise UserError(f"eval_fraction {fraction} of {total} examples leaves none to train on (different "
                        f"prompts: {len(groups)}); fix: lower eval_fraction or give eval_data")
    sides = [], []
    for i in range(total):
        sides[i in chosen].append(i)
    train, evaluation = map(dataset.examples.take, sides)
    train_report = dataset.report | _measures(train)
    eval_report = dataset.report | _measures(evaluation) | NOTHING_NEW
    return Dataset(train, train_report), Dataset(evaluation, eval_report)


NOTHING_NEW = {      # in the report on the evaluation part: the training part's report tells of these
    "dropped": {},
    "first_dropped": {},
    "cut_rows": 0,
    "split_rows": 0,
    "continued": 0,
    "first_continued": None,
    "duplicates": 0,
    "stop_inside": 0,
    "first_stop_inside": None,
    "control_tokens": 0,
    "first_control_tokens": None,
}


def _tell(dataset, notice):
    report = dataset.report
    source = report["source"]
    notice(f"{source}: {report['shape']}")
    for reason, count in report["dropped"].items():
        share = count / report["read"]
        warning = "warning: " if share > 0.05 else ""
        notice(f"{warning}{source}: {count} of {report['read']} rows dropped ({share:.1%}): "
               f"{reason} (first: {report['first_dropped'][reason]})")
    if report["cut_rows"]:
        notice(f"{source}: {report['cut_rows']} texts cut into pieces of max_length tokens")
    if report["split_rows"]:
        notice(f"{source}: {report['split_rows']} conversations became an example per turn: "
               "the chat template renders earlier turns otherwise than the last one")
    if report["continued"]:
        notice(f"{source}: {report['continued']} responses are tokenised apart from their prompts, because a "
               f"token would span the end of the prompt (first: {report['first_continued']})")
    for line in doubts(report):
        notice(f"warning: {source}: {line}")
    for line in dataset.notices:
        notice(line)


def doubts(report):
    """Sentences about special tokens that were found within the texts of rows; [] if there are none."""
    lines = []
    if report["stop_inside"]:
        lines.append(f"{report['stop_inside']} responses hold a stop token before their end "
                     f"(first: {report['first_stop_inside']})")
    if report["control_tokens"]:
        first = report["first_control_tokens"]
        lines.append(f"{report['control_tokens']} rows spell out a special token in a turn that is not "
                     f"trained, and generation will read it as that token, too (first: {first})")
    return lines


def is_local(source, base=None):
    """A file, or clearly meant as one: not of a hub name's form, with a data file's suffix, or in a directory
    that is here."""
    name, path = str(source), Path(source)
    if name.lower().endswith(SUFFIXES) or is_local_set(name):
        return True
    if SHORT_NAME.match(name):
        return False
    if not HUB_NAME.fullmatch(name) or path.parent.is_dir():
        return True
    return base is not None and (Path(base) / source).exists()


def _key(example):
    parts = [example.prompt]
    for response in example.responses:
        parts.append(response.tokens)
    lengths = np.array(list(map(len, parts)), dtype=np.int64)      # they keep the parts apart
    digest = hashlib.sha256(lengths.tobytes())
    for part in parts:
        digest.update(part.tobytes())
    return digest.digest()


def _prompt_key(example):
    """Raw text (and train_on: all) has but one token in the place of a prompt: there it is the whole
    example."""
    return example.prompt.tobytes() if len(example.prompt) > 1 else _key(example)


def _duplicates(examples):
    return len(examples) - len(set(map(_key, examples)))


def _stop_inside(examples, stops):
    """`where` of every response in which a trained token follows a trained stop token: the model learns to
    write on after it. One that is not trained is the template's, such as <|assistant|> in Phi-3's."""
    found = []
    for example in examples:
        for response in example.responses:
            before_trained = response.tokens[:-1][response.trained[:-1] & response.trained[1:]]
            if not set(stops).isdisjoint(before_trained.tolist()):
                found.append(example.where)
    return found


def _measures(examples):
    """The part of the report that depends on the examples used only."""
    measures = {"used": len(examples)}
    labels = [extras["label"] for extras in examples.all_extras() if "label" in extras]
    if labels:
        measures["desirable"] = sum(labels)
        measures["undesirable"] = len(labels) - sum(labels)
    lengths = examples.lengths()
    prompts, responses = lengths[:, 0], lengths[:, 1:]
    measures["prompt_length"] = _percentiles(prompts)
    measures["response_length"] = _percentiles(responses if responses.size else [0])      # prompts have none
    measures["total"] = _percentiles(prompts + responses.max(axis=1, initial=0))
    return measures


def _percentiles(values):
    p50, p90, p99, top = np.percentile(values, [50, 90, 99, 100])
    return {"50": int(p50), "90": int(p90), "99": int(p99), "max": int(top)}
