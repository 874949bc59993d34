"""Columns of numbers that are none of the known ones, such as a weight -> extras of the examples, for
`batch.extra(name)`.

    weight: 0.5               one number for the row: every response has it          -> (S,)
    weight: [0.5, 2]          a pair: one number for chosen and one for rejected     -> (S,)
    chosen_score: 4           a pair, together with
    rejected_score: 1         this one: the same as score: [4, 1]                    -> (S,)
    weight: [1, 0, 2, ...]    a row with one response: one for each trained token    -> (N,)

true and false are 1 and 0. In CSV, where all is text, a text that spells a number is one. A column whose
lists fit in no row of a source means something else and is ignored; where some fit, the others are errors.
"""
import math
from collections import Counter
from dataclasses import dataclass, field
from numbers import Number

import torch

from data.errors import UserError

LARGEST = 3.4e38      # float32 holds no larger number
NOT_READ = "unused"   # how the name of a column starts that is left alone, as in `columns: {unused_x: x}`


def read_number(value, is_text_allowed):
    """A number, or true or false, as a float; NaN for all else and for what float32 cannot hold."""
    if not isinstance(value, (Number, str)) or isinstance(value, str) and not is_text_allowed:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
    return number if abs(number) <= LARGEST else math.nan


def numbers_in(row, known, is_csv, is_pair):
    """{name: float, or list of float} of the columns of a row whose values are numbers. `known`: columns
    that mean something else."""
    found = {}
    for name, value in row.items():
        if name in known or name.startswith(NOT_READ):
            continue
        values = value if isinstance(value, list) else [value]
        numbers = [read_number(part, is_csv) for part in values]
        if not numbers or any(map(math.isnan, numbers)):
            continue
        is_list = isinstance(value, list) and (is_pair or len(value) > 1)
        found[name] = numbers if is_list else numbers[0]
    return _with_sides_joined(found) if is_pair else found


def _with_sides_joined(numbers):
    """chosen_score and rejected_score become score, unless there is a column of that name."""
    joined = {}
    for name, value in numbers.items():
        stem = name.partition("_")[2]
        sides = [numbers.get(f"chosen_{stem}"), numbers.get(f"rejected_{stem}")]
        is_side = stem and name in (f"chosen_{stem}", f"rejected_{stem}")
        if is_side and stem not in numbers and set(map(type, sides)) == {float}:
            joined[stem] = sides
        else:
            joined[name] = value
    return joined


@dataclass
class Lists:
    """What is known of the lists in the columns of numbers of a source."""
    fitting: set = field(default_factory=set)            # the names of columns with a list that fits its row
    counts: Counter = field(default_factory=Counter)     # name -> lists that do not
    firsts: dict = field(default_factory=dict)           # name -> the first of them, as a sentence

    def add(self, later):
        """Add what is known of the rows after these."""
        self.fitting |= later.fitting
        self.counts.update(later.counts)
        for name, sentence in later.firsts.items():
            self.firsts.setdefault(name, sentence)

    def ignored(self, source):
        """{a column without a fitting list: a sentence}. UserError where one has fitting lists and others."""
        sentences = {}
        for name, first in self.firsts.items():
            if name in self.fitting:
                raise UserError(f"the column {name!r} has {first}, unlike other rows; "
                                f"fix: write as many, or one number, or rename it ({renamed(name)})")
            sentences[name] = (f"{source}: the column {name!r} is ignored, since its lists of numbers "
                               f"({self.counts[name]:,}) fit in no row (first: {first})")
        return sentences


def renamed(name):
    """The mapping of columns that leaves this one alone."""
    return f"columns: {{{NOT_READ}_{name}: {name}}}"


def share_out(text, examples, lists):
    """Put the numbers of a row (a `Text`) into the extras of its examples, as float32 tensors. A list of
    another length is none of them; `lists` is told of all."""
    for name, value in text.numbers.items():
        if not isinstance(value, list):
            shares = [[value] * len(example.responses) for example in examples]
        elif text.of_pair and len(value) == 2:
            lists.fitting.add(name)
            shares = _per_side(value, examples)
        elif unlike := _misfit(value, examples, text):
            lists.counts[name] += 1
            lists.firsts.setdefault(name, f"{len(value)} numbers for {unlike} in {text.where}")
            continue
        else:
            lists.fitting.add(name)
            shares = _per_token(name, value, examples, text)
        for example, share in zip(examples, shares):
            example.extras[name] = torch.tensor(share)


def _misfit(value, examples, text):
    """What a list of numbers, one for each token, would have to fit, where it does not, else ""."""
    if len(text.responses) > 1:
        return f"{len(text.responses)} responses"
    count = sum(example.num_trained for example in examples)
    return "" if len(value) == count else f"{count} trained tokens"


def _per_side(value, examples):
    """Both numbers for a pair; for labelled examples one each; the chosen one where only that is trained."""
    if len(examples) == 1:
        count = len(examples[0].responses)
        return [value[:count]]
    return [[number] for number in value]


def _per_token(name, value, examples, text):
    """One number for each trained token of a row with one response; its turns may be several examples."""
    counts = [example.num_trained for example in examples]
    if text.raw and len(examples) > 1:
        raise UserError(f"the column {name!r} has a number for each token of a text that is cut into pieces "
                        f"in {text.where}; fix: raise max_length, or write one number")
    shares, start = [], 0
    for count in counts:
        shares.append(value[start:start + count])
        start += count
    return shares


def without_uncommon(examples, source):
    """(the `Examples` without the extras that some of them lack or have in another form, the names that stay,
    a sentence for each that does not)."""
    names = {}                            # a set in the order in which they came
    for extras in examples.all_extras():
        for name, value in extras.items():
            if torch.is_tensor(value):
                names[name] = None
    kept, sentences = [], []
    for name in names:
        where = _first_other(examples, name)
        if where is None:
            kept.append(name)
            continue
        sentences.append(f"{source}: the column {name!r} is ignored, since it does not hold a number in "
                         f"every row, or numbers for the tokens in every row (first other: {where})")
        examples = examples.without([name])
    return examples, kept, sentences


def _first_other(examples, name):
    """Where the first row is that differs from those before it in the form of a number: none, one per
    response, one per trained token."""
    per_response = per_token = True
    for example in examples:
        value = example.extras.get(name)
        if value is None:
            return example.where
        per_response = per_response and len(value) == len(example.responses)
        per_token = per_token and len(value) == example.num_trained
        if not per_response and not per_token:
            return example.where
    return None


def said_of(names, source):
    """The sentence that tells which columns became extras."""
    if len(names) == 1:
        return f"{source}: the column {names[0]} is a number and reaches batch.extra"
    return f"{source}: the columns {', '.join(names)} are numbers and reach batch.extra"
