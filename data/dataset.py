"""Data files and hub datasets -> `Dataset`: token examples and a report of what was read, used and dropped,
and why."""
import hashlib
import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.errors import UserError
from data.extras import drop_uncommon, said_of, share_out
from data.files import SUFFIXES, find_file, read_rows, sha256
from data.formats import Text, parse, read_template, without_template
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
    examples used: {"50", "90", "99" (percentiles), "max"}; labelled examples also have desirable
    and undesirable. Several sources have the sums of these, a list of sha256, and `sources`: their reports.
    `notices`: sentences on how the source was read that are no counts.
    """
    examples: list[Example]
    report: dict
    notices: list[str] = field(default_factory=list)


def build_dataset(source, kind, tokenizer, max_length, train_on="assistant", truncate="none", hh="messages",
                  base=None, columns=None, seed=0, template=None, system=False):
    """Read, parse and tokenise `source`: a local file's path or a hub name such as "Anthropic/hh-rlhf:test".

    `kind`: "responses" (sft), "pairs", or "labelled" (kto): one response and extras["label"] per example; a
    pair gives two, the chosen response (True) and then the rejected one (False). Pairs with a margin column
    have extras["margin"], a float; other columns of numbers: see `data.extras`. Or "prompts": no responses,
    extras["prompt"] (the prompt as text or messages) and extras["columns"] (the row's columns by name), and
    `max_length` is the prompt's; `template` and `system`: see `parse`. `max_length`, `train_on`, `truncate`:
    see `Tokeniser.encode`; `hh`: see `parse` (without a chat template HH transcripts stay text). `base`: the
    YAML's folder, for the error about a missing file. `columns`: {our name: the file's name}; `seed`: for the
    choice among the pairs where a prompt of shp or se has too many. Raises UserError for anything wrong with
    the file or a row, when no row can be used, or when more than 1 % of the rows have an empty response.
    """
    columns = columns or {}
    path = find_file(source, base) if _is_local(source, base) else None
    hh = hh if tokenizer.chat_template or template else "text"
    if path:
        rows = read_rows(path)
    else:
        hub_kind = "responses" if kind == "prompts" else kind
        rows = hub_rows(str(source), hub_kind, hh == "messages", seed)
    chat = bool(tokenizer.chat_template) and not template
    tokeniser = Tokeniser(tokenizer)
    found = _Found(str(source), kind, train_on)
    while chunk := list(itertools.islice(rows, CHUNK)):
        texts = []
        for where, row in chunk:
            text = row
            if not isinstance(row, str):
                row = rename(row, columns, where) if columns else row
                text = parse(row, where, kind, hh, template, chat, system)
            found.read += 1
            if isinstance(text, str):
                found.drop(text, where)
                continue
            if chat and (sentence := without_template(text, columns)):
                found.notices[f"warning: {source}: {sentence}"] = None
            found.add_text(text)
            texts.append(text)
        results = tokeniser.encode(texts, max_length, train_on, truncate)
        for text, examples in zip(texts, results):
            if isinstance(examples, str):
                found.drop(examples, text.where)
            else:
                found.add_examples(text, examples, tokeniser.holds_control_tokens(text))
    if kind == "responses":
        found.drop_undesirable()
    found.check()
    found.keep_common_extras()
    return Dataset(found.examples, _report(found, path, tokeniser), list(found.notices))


@dataclass
class _Found:
    """What was read of a source so far."""
    source: str
    kind: str
    train_on: str
    examples: list = field(default_factory=list)
    read: int = 0                                            # rows
    cut_rows: int = 0
    dropped: Counter = field(default_factory=Counter)        # reason -> rows
    first_dropped: dict = field(default_factory=dict)        # reason -> where
    shapes: Counter = field(default_factory=Counter)
    control: list = field(default_factory=list)      # `where` of the rows in which a turn that is not trained
                                                     # holds a special token
    first: Text | None = None                        # the first row that was not dropped,
    labelled: Text | None = None                     # ... with a label's column,
    other_label: Text | None = None                  # ... where that is no label
    notices: dict = field(default_factory=dict)      # sentence -> None: a set in the order in which they came

    def drop(self, reason, where):
        self.dropped[reason] += 1
        self.first_dropped.setdefault(reason, where)

    def add_text(self, text):
        """Count a row that can be used. UserError where it does not fit the rows before or `train_on`."""
        self.first = self.first or text
        self.shapes[text.shape] += 1
        if text.label:
            self.labelled = self.labelled or text
            if "label" not in text.extras:
                self.other_label = self.other_label or text
        if self.train_on == "all":
            _check_flags(text)
        has_margin = "margin" in text.extras
        if has_margin != ("margin" in self.first.extras):
            article = "a" if has_margin else "no"
            raise UserError(f"{text.where} has {article} margin, unlike {self.first.where}; "
                            "fix: give every row of the file a margin, or none, or rename the column")

    def add_examples(self, text, examples, has_control_tokens):
        self.cut_rows += text.raw and len(examples) > 1
        if has_control_tokens:
            self.control.append(text.where)
        if self.kind == "labelled" and len(text.responses) == 2:
            examples = _labelled_sides(examples)
        else:
            for example in examples:
                example.extras |= text.extras
        share_out(text, examples)
        self.examples += examples

    def drop_undesirable(self):
        """Take off all labels, and leave out the rows with label false, unless the labels mean something
        else."""
        kept, undesirable = [], {}
        for example in self.examples:
            if example.extras.pop("label", True) or self.other_label:
                kept.append(example)
            else:
                undesirable[example.where] = None
        self.examples = kept
        self.control = [where for where in self.control if where not in undesirable]
        for where in undesirable:
            self.drop(f"{self.labelled.label} is false or 0 (undesirable)", where)
        if self.other_label:
            name, where = self.other_label.label, self.other_label.where
            sentence = (f"{self.source}: the column {name!r} is ignored, since it holds other values than "
                        f"true and false, 0 and 1 (first: {where})")
            self.notices[sentence] = None

    def check(self):
        """UserError where no row can be used, or too many responses are empty."""
        if not self.examples:
            reasons = []
            for reason, count in self.dropped.most_common():
                reasons.append(f"{count} {reason} (first: {self.first_dropped[reason]})")
            way = " or raise max_length" if "longer than max_length" in self.dropped else ""
            raise UserError(f"none of the {self.read} rows of {self.source} can be used: "
                            f"{', '.join(reasons)}; fix: correct the rows{way}")
        empty = self.dropped["empty response"]
        if empty > 0.01 * self.read:
            raise UserError(f"{empty} of {self.read} rows of {self.source} have an empty response "
                            f"(first: {self.first_dropped['empty response']}); "
                            "fix: delete these rows or correct how the file was made")

    def keep_common_extras(self):
        names, sentences = drop_uncommon(self.examples, self.source)
        if names:
            self.notices[said_of(names, self.source)] = None
        self.notices |= dict.fromkeys(sentences)


def _report(found, path, tokeniser):
    shapes = [f"{count:,} rows read as {shape}" for shape, count in found.shapes.most_common()]
    report = {
        "source": found.source,
        "sha256": sha256(path) if path else None,
        "read": found.read,
        "shape": ", ".join(shapes),
        "dropped": dict(found.dropped),
        "first_dropped": found.first_dropped,
        "cut_rows": found.cut_rows,
        "split_rows": tokeniser.split,
        "continued": len(tokeniser.continued),
        "first_continued": _first(tokeniser.continued),
        "stop_inside": None,
        "first_stop_inside": None,
        "control_tokens": len(found.control),
        "first_control_tokens": _first(found.control),
        "duplicates": _duplicates(found.examples),
    }
    if found.train_on == "assistant":
        inside = _stop_inside(found.examples, stop_ids(tokeniser.tokenizer))
        report["stop_inside"] = len(inside)
        report["first_stop_inside"] = _first(inside)
    return report | _measures(found.examples)


def _first(items):
    return items[0] if items else None


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
            raise UserError(f"max_completion_length is {max_completion_length}, which leaves no room for a "
                            "prompt in "
                            f"max_length {config.max_length}; fix: raise max_length")

    def build(data):
        sources = [{"path": data}] if isinstance(data, str) else data
        parts = [build_dataset(source_name(source), kind, tokenizer, max_length,
                               train_on, config.truncate, config.hh,
                               columns=source.get("columns"), seed=config.seed, template=template,
                               system=bool(config.system_prompt)) for source in sources]
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
    held_out = evaluation.examples if evaluation else []
    reports = {"train": train.report, "eval": evaluation.report if evaluation else None}
    return train.examples, held_out, reports


def combine(parts, weights, seed):
    """One Dataset of several, one after the other, each with its weight; a row's examples stay together."""
    examples, all_examples, reports = [], [], []
    for i, (part, weight) in enumerate(zip(parts, weights)):
        groups = itertools.groupby(part.examples, key=lambda example: example.where)
        rows = [list(group) for _, group in groups]
        chosen = _weighted(rows, weight, (seed, i))
        examples += chosen
        all_examples += part.examples
        reports.append(part.report | {"weight": weight} | _measures(chosen))
    source = " + ".join(report["source"] for report in reports)
    _, sentences = drop_uncommon(examples, source)
    return Dataset(examples, _combined(reports, source, all_examples) | _measures(examples), sentences)


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
    """`groups` (lists of examples, one per row) `weight` times: for its whole part all of them, for the rest
    a random choice."""
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
    train, evaluation = [], []
    for i, example in enumerate(dataset.examples):
        side = evaluation if i in chosen else train
        side.append(example)
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


def _labelled_sides(pairs):
    """Each pair as two labelled examples."""
    examples = []
    for pair in pairs:
        for response, label in zip(pair.responses, (True, False)):
            examples.append(Example(pair.prompt, [response], pair.where, {"label": label}))
    return examples


def _check_flags(text):
    """UserError where a turn is marked as not trained."""
    if isinstance(text.prompt, str):
        return
    for turn in itertools.chain(*text.responses):
        if turn.get("train") is False:
            raise UserError(f"a turn is marked as not trained in {text.where}, but train_on is all; "
                            "fix: remove train_on, or leave such rows out")


def _is_local(source, base):
    """A file, or clearly meant as one: not of a hub name's form, with a data file's suffix, or in a directory
    that is here."""
    name, path = str(source), Path(source)
    if name.lower().endswith(SUFFIXES) or path.exists():
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
    """`where` of every response in which a trained token follows a stop token: the model learns to write on
    after it."""
    found = []
    for example in examples:
        for response in example.responses:
            before_trained = response.tokens[:-1][response.trained[1:]]
            if not set(stops).isdisjoint(before_trained.tolist()):
                found.append(example.where)
    return found


def _measures(examples):
    """The part of the report that depends on the examples used only."""
    measures = {"used": len(examples)}
    labels = [example.extras["label"] for example in examples if "label" in example.extras]
    if labels:
        measures["desirable"] = sum(labels)
        measures["undesirable"] = len(labels) - sum(labels)
    prompts, responses, totals = [], [], []
    for example in examples:
        lengths = [len(response.tokens) for response in example.responses]
        prompts.append(len(example.prompt))
        responses += lengths
        totals.append(len(example.prompt) + max(lengths, default=0))
    measures["prompt_length"] = _percentiles(prompts)
    measures["response_length"] = _percentiles(responses or [0])      # prompts have none
    measures["total"] = _percentiles(totals)
    return measures


def _percentiles(values):
    p50, p90, p99, top = np.percentile(values, [50, 90, 99, 100])
    return {"50": int(p50), "90": int(p90), "99": int(p99), "max": int(top)}
