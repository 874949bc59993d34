"""Columns of numbers that are none of the known ones, such as a weight -> extras of the examples, for
`batch.extra(name)`.

    weight: 0.5               one number for the row: every response has it          -> (S,)
    weight: [0.5, 2]          a pair: one number for chosen and one for rejected     -> (S,)
    chosen_score: 4           a pair, together with
    rejected_score: 1         this one: the same as score: [4, 1]                    -> (S,)
    weight: [1, 0, 2, ...]    a row with one response: one for each trained token    -> (N,)

true and false are 1 and 0. In CSV, where all is text, a text that spells a number is one.
"""
import math
from numbers import Number

import torch

from data.errors import UserError

LARGEST = 3.4e38      # float32 holds no larger number
NOT_READ = "unused"   # how the name of a column starts that is left alone, after `columns: {unused: name}`


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


def share_out(text, examples):
    """Put the numbers of a row (a `Text`) into the extras of its examples, as float32 tensors. UserError for
    a list of another length."""
    for name, value in text.numbers.items():
        if not isinstance(value, list):
            shares = [[value] * len(example.responses) for example in examples]
        elif text.of_pair and len(value) == 2:
            shares = _per_side(value, examples)
        else:
            shares = _per_token(name, value, examples, text)
        for example, share in zip(examples, shares):
            example.extras[name] = torch.tensor(share)


def _per_side(value, examples):
    """Both numbers for a pair; for labelled examples one each; the chosen one where only that is trained."""
    if len(examples) == 1:
        count = len(examples[0].responses)
        return [value[:count]]
    return [[number] for number in value]


def _per_token(name, value, examples, text):
    """One number for each trained token of a row with one response; its turns may be several examples."""
    responses = len(text.responses)
    counts = [example.num_trained for example in examples]
    if responses > 1 or len(value) != sum(counts):
        wanted = f"{responses} responses" if responses > 1 else f"{sum(counts)} trained tokens"
        raise UserError(f"the column {name!r} has {len(value)} numbers for {wanted} in {text.where}; "
                        f"fix: write as many, or one number, or rename it (columns: {{{NOT_READ}: {name}}})")
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
