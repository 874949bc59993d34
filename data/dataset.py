"""Data files and hub datasets -> `Dataset`: token examples and a report of what was read, used and dropped,
and why."""
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.files import SUFFIXES, find_file, read_rows, sha256
from data.formats import parse, read_template, without_template
from data.hub import HUB_NAME, SHORT_NAME, hub_rows
from data.pack import Example
from data.sources import rename, source_name
from data.tokenise import Tokeniser, stop_ids

CHUNK = 1000  # rows tokenised in one call


@dataclass
class Dataset:
    """Examples in the order of their rows. `report` keys:

    source; sha256 (of a local file, else None); shape (how the columns were understood); read (rows); used
    (examples); dropped {reason: rows}; first_dropped {reason: where}; cut_rows (raw texts cut into pieces);
    split_rows (conversations that became several examples); continued (responses tokenised apart from their
    prompt) and first_continued (where); stop_inside (responses with a stop token before their end, None with
    train_on="all") and first_stop_inside (where); control_tokens (rows in which a turn that is not trained
    holds a special token) and first_control_tokens (where); duplicates (repetitions of an earlier example);
    prompt_length, response_length (0 of prompts) and total (prompt + longest response), in tokens of the
    examples used: {"50", "90", "99" (percentiles), "max"}; of labelled examples also desirable and
    undesirable. Of several sources the sums of these, a list of sha256, and `sources`: the report of each.
    `notices`: sentences on how the source was read that are no counts.
    """
    examples: list[Example]
    report: dict
    notices: list[str] = field(default_factory=list)


def build_dataset(source, kind, tokenizer, max_length, train_on="assistant", truncate="none", hh="messages", base=None,
                  columns=None, seed=0, template=None, system=False):
    """Read, parse and tokenise `source`: a local file's path or a hub name such as "Anthropic/hh-rlhf:test".

    `kind`: "responses" (sft), "pairs", or "labelled" (kto): one response and extras["label"] per example; a
    pair gives two, the chosen response (True) and then the rejected one (False). Pairs with a margin column
    have extras["margin"]. Or "prompts": no responses, extras["prompt"] (the prompt as text or messages) and
    extras["columns"] (the row's columns by name), and `max_length` is the prompt's; `template` and `system`:
    see `parse`. `max_length`, `train_on`, `truncate`: see `Tokeniser.encode`; `hh`: see `parse` (without a
    chat template HH transcripts stay text). `base`: the YAML's folder, for the error about a missing file.
    `columns`: {our name: the file's name}; `seed`: of what is left out where a prompt of shp or se has too
    many pairs. Raises UserError for anything wrong with the file or a row, when no row can be used, or when
    more than 1 % of the rows have an empty response.
    """
    path = find_file(source, base) if _is_local(source, base) else None
    hh = hh if tokenizer.chat_template or template else "text"
    rows = read_rows(path) if path else hub_rows(str(source), "responses" if kind == "prompts" else kind, hh == "messages", seed)
    chat = bool(tokenizer.chat_template) and not template
    tokeniser = Tokeniser(tokenizer)
    examples, read, cut_rows, dropped, first_dropped, shapes, first = [], 0, 0, Counter(), {}, Counter(), None
    control = []      # `where` of the rows in which a turn that is not trained holds a special token
    # the first text with a label's column, and the first where that is no label
    labelled, other_label = None, None
    notices = {}                            # sentence -> None: a set in the order in which they came

    def drop(reason, where):
        dropped[reason] += 1
        first_dropped.setdefault(reason, where)

    while chunk := list(itertools.islice(rows, CHUNK)):
        read += len(chunk)
        texts = []
        for where, row in chunk:
            text = row
            if not isinstance(row, str):
                row = rename(row, columns, where) if columns else row
                text = parse(row, where, kind, hh, template, chat, system)
            if isinstance(text, str):
                drop(text, where)
                continue
            if chat and (sentence := without_template(text, columns or {})):
                notices[f"warning: {source}: {sentence}"] = None
            if train_on == "all" and any(turn.get("train") is False for turn in _turns(text)):
                raise UserError(f"a turn is marked as not trained in {where}, but train_on is all; "
                                "fix: remove train_on, or leave such rows out")
            if text.label:
                labelled = labelled or text
                other_label = other_label or (None if "label" in text.extras else text)
            shapes[text.shape] += 1
            first = first or text
            if kind == "pairs" and text.extras.keys() != first.extras.keys():
                raise UserError(f"{where} has {'a' if text.extras else 'no'} margin, unlike {first.where}; "
                                "fix: give every row of the file a margin, or none, or rename the column")
            texts.append(text)
        for text, result in zip(texts, tokeniser.encode(texts, max_length, train_on, truncate)):
            if isinstance(result, str):
                drop(result, text.where)
            else:
                examples += _with_extras(result, text, kind)
                if tokeniser.holds_control_tokens(text):
                    control.append(text.where)
                cut_rows += text.raw and len(result) > 1

    if kind == "responses" and labelled:
        examples, undesirable = _without_undesirable(examples, ignore=other_label is not None)
        rest = set(undesirable)
        control = [where for where in control if where not in rest]
        for where in undesirable:
            drop(f"{labelled.label} is false or 0 (undesirable)", where)
        if other_label:
            sentence = (f"{source}: the column {other_label.label!r} is ignored, since it holds other values "
                        f"than true and false, 0 and 1 (first: {other_label.where})")
            notices[sentence] = None
    if not examples:
        reasons = ", ".join(f"{count} {reason} (first: {first_dropped[reason]})" for reason, count in dropped.most_common())
        raise UserError(f"none of the {read} rows of {source} can be used: {reasons}; fix: correct the rows"
                        + (" or raise max_length" if "longer than max_length" in dropped else ""))
    empty = dropped["empty response"]
    if empty > 0.01 * read:
        raise UserError(f"{empty} of {read} rows of {source} have an empty response (first: {first_dropped['empty response']}); "
                        "fix: delete these rows or correct how the file was made")
    inside = _stop_inside(examples, stop_ids(tokenizer)) if train_on == "assistant" else []
    report = {"source": str(source), "sha256": sha256(path) if path else None, "read": read,
              "shape": ", ".join(f"{count:,} rows read as {shape}" for shape, count in shapes.most_common()),
              "dropped": dict(dropped), "first_dropped": first_dropped, "cut_rows": cut_rows,
              "split_rows": tokeniser.split, "continued": len(tokeniser.continued),
              "first_continued": next(iter(tokeniser.continued), None),
              "stop_inside": len(inside) if train_on == "assistant" else None,
              "first_stop_inside": next(iter(inside), None),
              "control_tokens": len(control), "first_control_tokens": next(iter(control), None),
              "duplicates": _duplicates(examples)}
    return Dataset(examples, report | _measures(examples), list(notices))


def load_datasets(config, kind, tokenizer, notice,
                  train_on="assistant", prompt_template=None, max_completion_length=0):
    """The training and evaluation examples that a configuration names, and their reports: (list, list,
    {"train", "eval"}). Prompts are put into the `prompt_template`, if there is one, and leave room for
    `max_completion_length` tokens.

    `notice(text)` is told once how each source was understood and of everything dropped, cut or doubtful.
    Raises UserError as `build_dataset` does, and when labelled training examples all have the same label."""
    template = read_template(prompt_template) if prompt_template else None
    if template and config.system_prompt:
        raise UserError("system_prompt beside prompt_template, which has no place for it; "
                        "fix: remove one of them, or write the system prompt into the prompt_template's file")
    max_length = config.max_length
    if kind == "prompts":
        max_length -= max_completion_length
        if max_length < 1:
            raise UserError(f"max_completion_length is {max_completion_length}, which leaves no room for a prompt in "
                            f"max_length {config.max_length}; fix: raise max_length")

    def build(data):
        sources = [{"path": data}] if isinstance(data, str) else data
        parts = [build_dataset(source_name(source), kind, tokenizer, max_length,
                               train_on, config.truncate, config.hh,
                               columns=source.get("columns"), seed=config.seed, template=template,
                               system=bool(config.system_prompt)) for source in sources]
        for part in parts:
            _tell(part, notice)
        dataset = parts[0] if isinstance(data, str) else combine(parts, [source.get("weight", 1.0) for source in sources], config.seed)
        if count := dataset.report["duplicates"]:
            notice(f"{dataset.report['source']}: {count} examples occur more than once"
                   f"{'' if kind == 'prompts' else ', prompt and responses alike'}; they are kept")
        return dataset

    train, evaluation = build(config.data), None
    if config.eval_data is not None:
        evaluation = build(config.eval_data)
    elif config.eval_fraction > 0:
        train, evaluation = split_off(train, config.eval_fraction, config.seed)
    only = [name for name, other in (("desirable", "undesirable"), ("undesirable", "desirable")) if train.report.get(other) == 0]
    if only:
        raise UserError(f"only {only[0]} labels in {train.report['source']}; fix: add rows with the other label (true = desirable)")
    if evaluation is not None and any(counts := overlap(train, evaluation)):
        notice(f"warning: {counts[0]} of {len(evaluation.examples)} evaluation rows are training rows too; "
               f"{counts[1]} have the prompt of one")
    held_out = evaluation.examples if evaluation else []
    return train.examples, held_out, {"train": train.report, "eval": evaluation.report if evaluation else None}


def combine(parts, weights, seed):
    """One Dataset of several, one after the other, each with its weight; a row's examples stay together."""
    examples, reports = [], []
    for i, (part, weight) in enumerate(zip(parts, weights)):
        rows = [list(group) for _, group in itertools.groupby(part.examples, key=lambda example: example.where)]
        chosen = _weighted(rows, weight, (seed, i))
        examples += chosen
        reports.append(part.report | {"weight": weight} | _measures(chosen))
    first_dropped = {}
    for report in reversed(reports):
        first_dropped |= report["first_dropped"]
    stop_inside = [report["stop_inside"] for report in reports]
    counts = {}
    for key in ("cut_rows", "split_rows", "continued", "control_tokens"):
        counts[key] = sum(report[key] for report in reports)
    first = {}
    for key in ("first_stop_inside", "first_control_tokens", "first_continued"):
        first[key] = next((report[key] for report in reports if report[key]), None)
    return Dataset(examples, {
        "source": " + ".join(report["source"] for report in reports), "sha256": [report["sha256"] for report in reports],
        "read": sum(report["read"] for report in reports), "shape": "; ".join(report["shape"] for report in reports),
        "dropped": dict(sum((Counter(report["dropped"]) for report in reports), Counter())), "first_dropped": first_dropped,
        "stop_inside": None if None in stop_inside else sum(stop_inside),
        **counts, **first,
        "duplicates": _duplicates([example for part in parts for example in part.examples]), "sources": reports} | _measures(examples))


def _weighted(groups, weight, seed):
    """`groups` (lists of examples, one per row) `weight` times: the whole part of it in full, of the rest a
    random choice."""
    count = round(weight % 1 * len(groups))
    if weight < 1:
        count = max(1, count)
    chosen = sorted(np.random.default_rng(seed).permutation(len(groups))[:count].tolist())
    return [example for group in groups * int(weight) + [groups[i] for i in chosen] for example in group]


def overlap(train, evaluation):
    """(rows, prompts): how many examples of the Dataset `evaluation` occur in the Dataset `train`, prompt and
    responses alike, token by token; and how many have the prompt of a training example."""
    rows, prompts = {_key(example) for example in train.examples}, {_prompt_key(example) for example in train.examples}
    return (sum(_key(example) in rows for example in evaluation.examples),
            sum(_prompt_key(example) in prompts for example in evaluation.examples))


def split_off(dataset, fraction, seed):
    """(train, evaluation): about a random `fraction` of the examples is for evaluation, at least one prompt;
    all examples with the same prompt are on the same side, and all turns of a conversation. Both keep the
    order."""
    total = len(dataset.examples)
    groups = {}                            # prompt -> its examples' numbers
    key, row = None, None
    for i, example in enumerate(dataset.examples):
        is_piece = len(example.prompt) == 1                # of raw text
        if is_piece or example.where != row:
            key, row = _prompt_key(example), example.where
        groups.setdefault(key, []).append(i)
    groups, wanted, chosen = list(groups.values()), max(1, round(fraction * total)), set()
    for i in np.random.default_rng(seed).permutation(len(groups)).tolist():
        if not chosen or len(chosen) + len(groups[i]) <= wanted:
            chosen.update(groups[i])
    if len(chosen) == total:
        raise UserError(f"eval_fraction {fraction} of {total} examples leaves none to train on (different prompts: {len(groups)}); "
                        "fix: lower eval_fraction or give eval_data")

    def part(examples, **report):
        return Dataset(examples, dataset.report | _measures(examples) | report)

    return (part([example for i, example in enumerate(dataset.examples) if i not in chosen]),
            part([example for i, example in enumerate(dataset.examples) if i in chosen],      # what was dropped is told of once
                 dropped={}, first_dropped={}, cut_rows=0, split_rows=0, continued=0, first_continued=None,
                 duplicates=0,
                 stop_inside=0, first_stop_inside=None, control_tokens=0, first_control_tokens=None))


def _tell(dataset, notice):
    report = dataset.report
    source = report["source"]
    notice(f"{source}: {report['shape']}")
    for reason, count in report["dropped"].items():
        share = count / report["read"]
        notice(f"{'warning: ' if share > 0.05 else ''}{source}: {count} of {report['read']} rows dropped ({share:.1%}): "
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


def _with_extras(examples, text, kind):
    """A row's examples with its label or margin; as labelled responses a pair is two examples."""
    if kind == "labelled" and len(text.responses) == 2:
        return [Example(example.prompt, [response], example.where, {"label": label})
                for example in examples for response, label in zip(example.responses, (True, False))]
    for example in examples:
        example.extras |= text.extras
    return examples


def _turns(text):
    """The turns of a conversation's responses."""
    return [] if isinstance(text.prompt, str) else itertools.chain(*text.responses)


def _without_undesirable(examples, ignore):
    """(the examples but for those of undesirable rows, these rows). Labels are taken off. `ignore`: a label
    means something else."""
    kept, undesirable = [], []
    for example in examples:
        if example.extras.pop("label", True) or ignore:
            kept.append(example)
        elif example.where not in undesirable[-1:]:
            undesirable.append(example.where)
    return kept, undesirable


def _is_local(source, base):
    """A file, or clearly meant as one: not of a hub name's form, with a data file's suffix, or in a directory
    that is here."""
    if SHORT_NAME.match(str(source)) and not str(source).lower().endswith(SUFFIXES) and not Path(source).exists():
        return False
    return (not HUB_NAME.fullmatch(str(source)) or str(source).lower().endswith(SUFFIXES) or Path(source).exists()
            or Path(source).parent.is_dir() or (base is not None and (Path(base) / source).exists()))


def _key(example):
    parts = [example.prompt, *(response.tokens for response in example.responses)]
    digest = hashlib.sha256(np.array([len(part) for part in parts], dtype=np.int64).tobytes())  # lengths keep the parts apart
    for part in parts:
        digest.update(part.tobytes())
    return digest.digest()


def _prompt_key(example):
    """Raw text (and train_on: all) has but one token in the place of a prompt: there it is the whole
    example."""
    return example.prompt.tobytes() if len(example.prompt) > 1 else _key(example)


def _duplicates(examples):
    return len(examples) - len({_key(example) for example in examples})


def _stop_inside(examples, stops):
    """`where` of every response in which a trained token follows a stop token: the model learns to write on
    after it."""
    found = []
    for example in examples:
        for response in example.responses:
            before, next_is_trained = response.tokens[:-1], response.trained[1:]
            if any((next_is_trained & (before == stop)).any() for stop in stops):
                found.append(example.where)
    return found


def _measures(examples):
    """The report's part that depends on the examples used only."""
    labels = [example.extras["label"] for example in examples if "label" in example.extras]
    counts = {"desirable": sum(labels), "undesirable": len(labels) - sum(labels)} if labels else {}
    prompts = [len(example.prompt) for example in examples]
    longest = [max((len(response.tokens) for response in example.responses), default=0) for example in examples]
    responses = [len(response.tokens) for example in examples for response in example.responses] or [0]      # prompts have none
    lengths = {"prompt_length": prompts, "response_length": responses, "total": np.add(prompts, longest)}
    return {"used": len(examples)} | counts | {
        name: {"50": int(p50), "90": int(p90), "99": int(p99), "max": int(top)}
        for name, values in lengths.items() for p50, p90, p99, top in [np.percentile(values, [50, 90, 99, 100])]}
