"""The verifiers gsm8k and r1_zero: each compares a completion with the row's gold answer.

What a model writes is hostile input. It is never evaluated; every search below takes time linear in its length; and what is read as
a number is short before any arithmetic begins.
"""
import re
from fractions import Fraction

from data.errors import UserError, printable

GOLD = ("answer", "ground_truth", "solution")      # columns with the gold answer; the first one that a row has
DIGITS = 40                                        # longer numbers are no answers
ANSWER = 100                                       # characters; the same
LAST = re.compile(r"(?:(?<![\w)])-\$?)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+")
NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?|\.[0-9]+)")
FRACTION = re.compile(r"([+-]?[0-9]+)/([0-9]+)")
UNITS = re.compile(r"(?<![a-z])(?:degree|mm|cm|km|kg|kmh|mph|meter|mile|second|minute|hour|day|week|month|year|foot|feet|inch|yard"
                   r"|percent|apple)(?:es|s)?(?![a-z])")


# ---- the two verifiers ----

def gsm8k(prompts, completions, **columns):
    """1.0 where the last number of the completion is the gold answer's, else 0.0."""
    return [float(any(_same_last_number(completion, gold) for gold in golds))
            for completion, golds in zip(completions, _all_golds(columns, len(completions)))]


def _same_last_number(completion, gold):
    numbers = [_last_number(text) for text in (completion, gold)]
    return None not in numbers and numbers[0] == numbers[1]


def _last_number(text):
    found = None
    for match in LAST.finditer(text):
        found = match
    text = found[0].replace(",", "").replace("$", "") if found else ""
    return Fraction(text) if 0 < len(text) <= DIGITS else None


def r1_zero(prompts, completions, **columns):
    """1.0 where format and answer are right, else 0.0: `... </think> <answer> 18 </answer>`. A right format alone earns nothing."""
    return [r1_zero_details(completion, golds)["reward"]
            for completion, golds in zip(completions, _all_golds(columns, len(completions)))]


def r1_zero_details(completion, gold):
    """{"format": bool, "answer": bool, "reward": float} of one completion; `gold`: text, a number, or a list of which any will do.

    format: `</think>`, white space, `<answer>`, and somewhere `</answer>`; the prompt has opened <think>. answer: what follows the
    last `<answer>`, or its last \\boxed{}, is the gold number: 1,000 = 1000.00, $18 = 18% = x = 18 = 18 minutes = 18, 0.5 = 1/2; but
    no other words, and 36/2 is not 18. An answer that is no number must be the gold text. False without the format.
    """
    text = re.sub(r"</think>\s+<answer>", "</think> <answer>", completion)
    if "</think> <answer>" not in text or "</answer>" not in text:
        return {"format": False, "answer": False, "reward": 0.0}
    answer = text.rpartition("<answer>")[2].replace("</answer>", "")
    if "\\boxed" in answer:
        answer = _last_boxed(answer)
    right = answer is not None and any(_same_answer(answer, text) for text in gold_texts(gold))
    return {"format": True, "answer": right, "reward": float(right)}


def _last_boxed(text):
    """What is inside the last \\boxed{...}, or None if its braces do not close."""
    inside = text.rpartition("\\boxed")[2]
    depth = 0
    for i, character in enumerate(inside[:ANSWER + 2]):
        depth += (character == "{") - (character == "}")
        if not depth:
            return inside[1:i] if i else None
    return None


def _same_answer(answer, gold):
    answer, gold = _plain(answer), _plain(gold)
    left, right = _value(answer), _value(gold)
    if left is None or right is None:
        return answer == gold != ""
    if "/" in answer and "/" in gold:
        return answer == gold
    if "/" in answer or "/" in gold:                 # an integer must be written as one
        return left == right and left.denominator > 1
    return left == right


def _plain(text):
    """An answer without what may stand around its number; "" if it is too long to be one."""
    text = text.strip()
    if len(text) > ANSWER:
        return ""
    if match := re.fullmatch(r"\\(?:text|fbox)\{([^{}]*)\}", text):
        text = match[1]
    text = re.sub(r"\\text\{[^{}]*\}|\\?[$%]", "", text)
    text = re.sub(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text)
    text = "".join(UNITS.sub("", text).lower().split())
    name, _, value = text.partition("=")
    if value and "=" not in value and len(name) <= 2:
        text = value
    if text[:1] in ("(", "[") and text[-1] in (")", "]"):
        text = text[1:-1]
    return text.removesuffix(".")


def _value(text):
    """The Fraction that a plain answer is, or None."""
    if NUMBER.fullmatch(text):
        return Fraction(text.replace(",", ""))
    match = FRACTION.fullmatch(text)
    return Fraction(int(match[1]), int(match[2])) if match and int(match[2]) else None


# ---- gold answers ----

def gold_texts(gold):
    """A gold answer, or a list of them, as texts: what follows #### where it is there, else all of it."""
    texts = map(str, gold if isinstance(gold, list) else [] if gold is None else [gold])
    return [(re.search(r"####\s*(.*)", text) or ["", text])[1].strip() for text in texts]


def golds_of(row):
    """The gold answers (list of str) of a row, {column: value}; [] if it has none."""
    return gold_texts(next((row[name] for name in GOLD if row.get(name) is not None), None))


def _all_golds(columns, count):
    golds = [golds_of({name: columns[name][i] for name in GOLD if name in columns}) for i in range(count)]
    if not all(golds):
        raise no_gold(columns, f"row {golds.index([])} of a batch")
    return golds


def no_gold(columns, where):
    found = printable(", ".join(columns), keep="") or "none"
    return UserError(f"no gold answer in {where}, columns found: {found}; "
                     f"fix: give every row a column {', '.join(GOLD[:-1])} or {GOLD[-1]}, or use another reward")
