"""The rows of one source -> token examples, in chunks, which several processes share where there are many."""
import concurrent.futures
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import NamedTuple

from data.errors import RunError, UserError
from data.extras import Lists, said_of, share_out, without_uncommon
from data.formats import Text, parse, without_template
from data.pack import Example
from data.sources import rename
from data.store import Examples
from data.tokenise import Tokeniser

CHUNK = 1000          # rows tokenised in one call
ALONE = 20            # chunks after which other processes help: to start them takes seconds
MOST_HELPERS = 16
helper: Tokeniser | None = None      # in a process that helps


class Reading(NamedTuple):
    """How rows are read; see `build_dataset`."""
    source: str
    kind: str
    max_length: int
    train_on: str
    truncate: str
    hh: str
    columns: dict
    template: str | None
    chat: bool      # whether there is a chat template
    system: bool
    longest_prompt: int | None = None      # in tokens


def read_chunks(rows: Iterator, reading: Reading, tokenizer) -> Iterator["Found"]:
    """What is found in each chunk of the (where, row) in `rows`, in order."""
    alone = Tokeniser(tokenizer)
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    for chunk in itertools.islice(chunks, ALONE):
        yield read_chunk(chunk, reading, alone)
    count = num_helpers()
    if count > 1:
        yield from with_helpers(chunks, reading, tokenizer, count)
        return
    for chunk in chunks:
        yield read_chunk(chunk, reading, alone)


def num_helpers() -> int:
    """One per core, but for those of other ranks; each takes about 300 MB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(MOST_HELPERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def with_helpers(chunks: Iterator[list], reading: Reading, tokenizer, count: int) -> Iterator["Found"]:
    """The same by `count` processes, with at most two chunks for each in memory."""
    first = next(chunks, None)
    if first is None:
        return
    context = multiprocessing.get_context("spawn")      # a forked copy of threads that hold locks would hang
    with concurrent.futures.ProcessPoolExecutor(count, context, start_helper, (tokenizer,)) as pool:
        waiting = deque()
        try:
            for chunk in itertools.chain([first], chunks):
                waiting.append(pool.submit(help_with, chunk, reading))
                if len(waiting) > 2 * count:
                    yield pickle.loads(waiting.popleft().result())
            while waiting:
                yield pickle.loads(waiting.popleft().result())
        except BrokenProcessPool as error:
            raise RunError("a process that tokenises the data was ended from outside, perhaps for its "
                           "memory; fix: free memory and run the same command again") from error
        finally:
            pool.shutdown(cancel_futures=True)


def start_helper(tokenizer) -> None:
    global helper
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # at Ctrl-C the main process ends the others
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"      # the processes share the cores already
    helper = Tokeniser(tokenizer)


def end_with_parent() -> None:
    """End this process when the one that started it was killed."""
    multiprocessing.parent_process().join()
    os._exit(1)


def help_with(chunk: list, reading: Reading) -> bytes:
    """What is found, pickled here: torch would send each tensor as an open file, and a process may have a
    thousand of these."""
    return pickle.dumps(read_chunk(chunk, reading, helper))


def read_chunk(chunk: list, reading: Reading, tokeniser: Tokeniser) -> "Found":
    """What is found in some (where, row); a row may be the reason (str) to drop it."""
    found = Found(reading.source, reading.kind, reading.train_on)
    tokeniser.split, tokeniser.continued = 0, []
    texts = []
    for where, row in chunk:
        text = row
        if not isinstance(row, str):
            row = rename(row, reading.columns, where) if reading.columns else row
            text = parse(row, where, reading.kind, reading.hh, reading.template, reading.chat, reading.system)
        found.read += 1
        if isinstance(text, str):
            found.drop(text, where)
            continue
        if reading.chat and (sentence := without_template(text, reading.columns)):
            found.notices[f"warning: {reading.source}: {sentence}"] = None
        found.add_text(text)
        texts.append(text)
    results = tokeniser.encode(texts, reading.max_length, reading.train_on, reading.truncate)
    for text, examples in zip(texts, results):
        if reading.longest_prompt and has_longer_prompt(examples, reading.longest_prompt):
            examples = "prompt that leaves no room for max_completion_length"
        if isinstance(examples, str):
            found.drop(examples, text.where)
        else:
            found.add_examples(text, examples, tokeniser.holds_control_tokens(text))
    found.split_rows, found.continued = tokeniser.split, tokeniser.continued
    found.close_chunk()
    return found


def has_longer_prompt(examples: list | str, most: int) -> bool:
    """Whether the prompt of one of a row's examples has more than `most` tokens."""
    lengths = [len(example.prompt) for example in examples] if isinstance(examples, list) else []
    return max(lengths, default=0) > most


@dataclass
class Found:
    """What was read of a source so far, or of some of its rows."""
    source: str
    kind: str
    train_on: str
    chunk: list = field(default_factory=list)                # the examples of the rows in work
    chunks: list = field(default_factory=list)               # of those before, as `Examples`
    examples: Examples | None = None                         # all of them
    read: int = 0                                            # rows
    cut_rows: int = 0
    split_rows: int = 0                                      # conversations that became several examples
    continued: list = field(default_factory=list)    # `where` of responses tokenised apart from their prompts
    dropped: Counter = field(default_factory=Counter)        # reason -> rows
    first_dropped: dict = field(default_factory=dict)        # reason -> where
    shapes: Counter = field(default_factory=Counter)
    control: list = field(default_factory=list)      # `where` of the rows in which a turn that is not trained
                                                     # holds a special token
    first: Text | None = None                        # the first row that was not dropped,
    labelled: Text | None = None                     # ... with a label's column,
    other_label: Text | None = None                  # ... where that is no label
    lists: Lists = field(default_factory=Lists)      # of numbers
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
        self.check_margin(text)

    def check_margin(self, text):
        """UserError where only one of this row and the first one has a margin."""
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
        share_out(text, examples, self.lists)
        self.chunk += examples

    def close_chunk(self):
        """Keep the examples of the rows in work in their flat form."""
        if self.chunk:
            self.chunks.append(Examples.of(self.chunk))
        self.chunk = []

    def add(self, later):
        """Add what was found in the rows after these."""
        if self.first and later.first:
            self.check_margin(later.first)
        for name in ("first", "labelled", "other_label"):
            setattr(self, name, getattr(self, name) or getattr(later, name))
        for name in ("read", "cut_rows", "split_rows"):
            setattr(self, name, getattr(self, name) + getattr(later, name))
        for name in ("continued", "control", "chunks"):      # in place: a sum would copy all rows before
            getattr(self, name).extend(getattr(later, name))
        self.lists.add(later.lists)
        self.dropped.update(later.dropped)
        self.shapes.update(later.shapes)
        for reason, where in later.first_dropped.items():
            self.first_dropped.setdefault(reason, where)
        self.notices |= later.notices

    def join_chunks(self):
        self.examples = Examples.joined(self.chunks)
        self.chunks = []

    def drop_undesirable(self):
        """Take off all labels, and leave out the rows with label false, unless the labels mean something
        else."""
        kept, undesirable = [], {}
        for i, example in enumerate(self.examples):
            if example.extras.get("label", True) or self.other_label:
                kept.append(i)
            else:
                undesirable[example.where] = None
        self.examples = self.examples.take(kept).without(["label"])
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
        if not (self.chunks or self.examples):
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
        ignored = self.lists.ignored(self.source)
        examples = self.examples.without(ignored)
        self.examples, names, sentences = without_uncommon(examples, self.source)
        if names:
            self.notices[said_of(names, self.source)] = None
        self.notices |= dict.fromkeys([*sentences, *ignored.values()])


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


