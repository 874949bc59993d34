r"""The verifiers gsm8k, r1_zero and math: each compares a completion with the row's gold answer.

What a model writes is hostile input. It is never evaluated here; every search takes time linear in its
length; what is read as a number is short before any arithmetic begins. math-verify, which does evaluate,
works in a process of its own that is stopped when its time is over (rewards/math_process.py).

How a number is written, for all of them: full-width characters are ASCII's, U+2212 is a minus, and `1{,}234`,
`1\,234` and 1 234 with a no-break or thin space are 1,234.
"""
import re
from fractions import Fraction

from data.errors import UserError, printable
from rewards import math_process

# columns with the gold answer; the first one that a row has
GOLD = ("answer", "Answer", "ground_truth", "solution", "Solution")
DIGITS = 40                   # longer numbers are no answers
ANSWER = 100                  # characters; the same
FORMULA = 400                 # characters of an answer for math-verify
PROSE = 1000                  # characters of a text in which math-verify looks for the answer

# ---- how answers are written ----

FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
ASCII = FULL_WIDTH | {0x2212: "-", 0x3002: ".", 0x3000: " ", 0xFFE5: "¥"}
MARKS = "，。："                # between two numbers of a Chinese text they end the first one
ALONE = re.compile(rf"(?<![0-9])[{MARKS}]|[{MARKS}](?![0-9])")      # they do not stand between two
PROSE_ASCII = {code: character for code, character in ASCII.items() if chr(code) not in MARKS}
UNSPACED = r"\u0e00-\u0eff\u3040-\u9fff\uac00-\ud7a3"     # letters right before which a number may stand
GROUP = re.compile(r"(?<=[0-9])(?:\{,\}|,?\\!|\\,|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
CURRENCY = "[$€£¥₹]"
GROUPED = r"[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?![0-9])"
DECIMAL = rf"(?:{GROUPED}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
POWER = r"(?:\^[23]|\^\{[23]\}|[²³])"
WORDS = ("degree|mm|cm|dm|km|kg|kmh|mph|millimeter|centimeter|kilometer|meter|mile|gram|kilogram|pound|liter"
         "|second|minute|hour|day|week|month|year|foot|feet|ft|inch|yard|people|person|percent|apple")
HAN = ("元|块|角|分|人|个|只|本|张|米|厘米|毫米|分米|千米|公里|克|千克|公斤|吨|升|毫升|度|岁"
       "|天|小时|分钟|秒|年|月|周|平方米|平方厘米|平方千米|立方米|立方厘米")
UNIT = (rf"%|(?:(?:square|cubic) )?(?:{WORDS})(?:es|s)?{POWER}?|(?:{HAN})"
        rf"|\\text\{{ ?(?P<words>[^\W\d_]+(?: [^\W\d_]+){{0,2}}) ?\}}{POWER}?")
RATIONAL = rf"(?:(?P<whole>[0-9]+) )?(?P<top>[0-9]+)/(?P<bottom>[0-9]+)|(?P<decimal>{DECIMAL})"
SIGN = rf"[+-]? ?{CURRENCY}? ?|{CURRENCY} ?[+-]"
QUANTITY = re.compile(rf"(?P<sign>{SIGN})(?:{RATIONAL})(?: ?(?P<unit>{UNIT}))?\.?", re.IGNORECASE)
# words after a number that change its value or take it back
NO_UNITS = re.compile(r"\b(?:or|and|nor|not?|k|half|dozen|hundred|thousand|[a-z]+illion|plus|minus|times|over"
                      r"|by|more|less|than|least|most|factorial|mod|base|wrong|short)s?\b|[十百千万亿]",
                      re.IGNORECASE)
AROUND = (
    r"(?s)\$\$([^$]*)\$\$",
    r"(?s)\$([^$]*)\$",
    r"(?s)\\\((.*)\\\)",
    r"(?s)\\\[(.*)\\\]",
    r"(?s)\*\*(.*)\*\*",
    r"(?s)(.*[^.])\.",
    r"(?s)\\(?:text|textbf|textrm|mathrm|mathbf|mathit|mbox|fbox)\{([^{}]*)\}",
)
SPELLINGS = (
    (r"\\(?:left|right)(?![A-Za-z])|\\!", ""),
    (r"\\[,;: ]|~", " "),
    (r"\\([$%])", r"\1"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\^ ?\\circ(?![A-Za-z])|\^ ?\{ ?\\circ ?\}|°", " degrees"),
    (r"\\(?:textrm|mathrm|mbox)\{", r"\\text{"),
    (r"\\sqrt ?([0-9A-Za-z])", r"\\sqrt{\1}"),
)
FRACTION = re.compile(r"(?P<before>[0-9] ?)?\\frac ?(?:\{(?P<top>[^{}]*)\}|(?P<one>[0-9])) ?"
                      r"(?:\{(?P<bottom>[^{}]*)\}|(?P<other>[0-9]))(?! ?[0-9])")


def _plain(text):
    """An answer in one spelling, without what may stand around it; "" if it is too long to be one."""
    text = text.strip()
    if len(text) > ANSWER:
        return ""
    text = text.translate(ASCII)
    text = GROUP.sub(",", _unwrapped(text))
    for pattern, spelling in SPELLINGS:
        text = re.sub(pattern, spelling, text)
    if match := re.fullmatch(r"\s*[A-Za-z]{1,2}\s*=([^=]*)", text):      # x = 18
        text = match[1]
    return FRACTION.sub(_with_slash, " ".join(text.split()))


def _unwrapped(text):
    r"""Without the last period, and without $ ... $, \( ... \), ** ... **, \text{...} around all of it."""
    for pattern in AROUND:
        if match := re.fullmatch(pattern, text):
            return _unwrapped(match[1].strip())
    return text


def _with_slash(match):
    r"""\frac{1}{2} as 1/2, 2\frac{1}{2} as 2 1/2, \frac{a+b}{2c} as (a+b)/(2c)."""
    top = _in_brackets(match["top"] or match["one"] or "")
    bottom = _in_brackets(match["bottom"] or match["other"] or "")
    before = match["before"].strip() + " " if match["before"] else ""
    return f"{before}{top}/{bottom}"


def _in_brackets(part):
    """A part of a fraction, in brackets unless it is a number or a letter."""
    is_plain = re.fullmatch(r" ?[+-]?[0-9]+ ?|[A-Za-z]", part)
    return part.strip() if is_plain else f"({part})"


def _quantity(plain):
    """The match of a plain answer that is one number, with its currency or unit, or None."""
    if plain[:1] == "(" and plain[-1:] == ")" and "," not in plain:
        plain = plain[1:-1]
    match = QUANTITY.fullmatch(plain)
    if not match or match["words"] and NO_UNITS.search(match["words"]):
        return None
    if match["whole"] and int(match["top"]) >= int(match["bottom"]):
        return None                                    # 1 8/2 is no mixed number
    return match


def _value(match):
    """The Fraction that the match of a quantity is, or None."""
    if match["bottom"]:
        bottom = int(match["bottom"])
        value = int(match["whole"] or 0) + Fraction(int(match["top"]), bottom) if bottom else None
    else:
        value = Fraction(_digits(match))
    return -value if value is not None and "-" in match["sign"] else value


def _digits(match):
    return match["decimal"].replace(",", "").replace(" ", "")


def last_boxed(text, longest):
    r"""What is inside the last \boxed{...}, or the number after \boxed; None if its braces do not close
    within `longest` characters."""
    inside = text.rpartition("\\boxed")[2][:longest + 2]
    if match := re.match(r"\s+([+-]?[0-9][0-9.,/]*)", inside):
        return match[1]
    inside = inside.lstrip()
    depth = 0
    for i, character in enumerate(inside):
        depth += (character == "{") - (character == "}")
        if not depth:
            return inside[1:i] if i else None
    return None


# ---- gsm8k ----

NUMBER = re.compile(                                                   # a number in a text
    r"(?P<exponent>(?<=[A-Za-z)}])\^\{?-?[0-9]+)"                      # cm^2, x^2
    r"|(?P<other>\^\{?-?[0-9]+|(?<![0-9])[0-9]{1,2}:[0-9]{2}(?![0-9])"      # after 10, and 3:30,
    r"|0[xX][0-9a-fA-F]+|[0-9]+(?:\.[0-9]+){2,})"                          # 0x12, 1.2.3
    r"|(?:(?P<whole>[0-9]+) )?(?P<top>[0-9]+)/(?P<bottom>[0-9]+)"
    r"|(?P<decimal>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
    r"(?P<power>[eE][+-]?[0-9]{1,2}(?![\w.]))?")
MINUS = re.compile(rf"-( *){CURRENCY}?\Z")
AFTER_VALUE = re.compile(r"[0-9)\]}%]\$\Z|[0-9A-Za-z_)\]}%]\Z")      # there - subtracts, or is a hyphen
BEFORE_SIGN = re.compile(rf"(?:\A|[=:(\[{{,#*$<>]|[{UNSPACED}]"
                         r"|\b(?:is|are|was|be|equals|to|of)) *\Z")   # there - 5 is a number
LOOK_BACK = 20                # characters before a number in which its sign is looked for


def gsm8k(prompts, completions, **columns):
    """1.0 where the last number of the completion is the gold answer's, else 0.0.

    Numbers: 18, 1,234.50, .5, 2.5e3, and as one number each 3/4 and 2 1/2. A time (3:30) and a power (10^6)
    are none, so 0.0 if they come last; 1 234 with an ordinary space is two, and so are 1，234 and 1。5. A
    gold answer must be exactly one plain number, perhaps with currency or unit; any other equals nothing.

    A minus is the number's sign unless a digit, a Latin letter or a closing bracket stands right before it:
    10-5, 3-5, x-5 end in 5. With a space behind it a minus subtracts (10 - 5) or is a dash (Tom - 5, a list's
    - 5), unless the text begins with it or it follows a sign such as = : ( #, a word such as is, or Chinese.
    """
    pairs = zip(completions, _all_golds(columns, len(completions)))
    return [float(_ends_in_one_of(completion, golds)) for completion, golds in pairs]


def _ends_in_one_of(completion, golds):
    number = _last_number(completion)
    return number is not None and number in map(_gold_number, golds)


def _gold_number(gold):
    """The Fraction of a gold answer that is exactly one number, else None."""
    plain = _plain(gold)
    words = re.fullmatch(r"(.*?[0-9.%]) ?((?:[^\W\d_]+[ /]?){1,3})", plain)      # any unit
    if words and not NO_UNITS.search(words[2]):
        plain = words[1]
    if re.fullmatch(r"[+-]?[0-9.]+e[+-]?[0-9]{1,2}", plain, re.IGNORECASE):
        return _last_number(plain)
    match = _quantity(plain)
    return _value(match) if match and match["decimal"] and len(plain) <= DIGITS else None


def _last_number(text):
    r"""The Fraction of the last number in a text, or None if there is none or it is no plain number."""
    text = _prose(text)
    text = GROUP.sub(",", text)
    text = re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r" \1/\2", text)
    found = None
    for match in NUMBER.finditer(text):
        if match.lastgroup != "exponent":
            found = match
    if found is None or found["other"] or len(found[0]) > DIGITS:
        return None
    if found["decimal"]:
        value = Fraction(found["decimal"].replace(",", "") + (found["power"] or ""))
    elif not int(found["bottom"]):
        return None
    else:
        value = Fraction(int(found["top"]), int(found["bottom"]))
        value += int(found["whole"] or 0) if value < 1 else 0        # in "15 36/2" they are two numbers
    return -value if _is_negative(text[:found.start()]) else value


def _prose(text):
    """A text in ASCII, but for the Chinese punctuation between two numbers: it would make them one."""
    text = ALONE.sub(lambda mark: mark[0].translate(ASCII), text)
    return text.translate(PROSE_ASCII)


def _is_negative(before):
    """Whether the text before a number ends in the number's sign."""
    minus = MINUS.search(before[-LOOK_BACK:])
    if not minus:
        return False
    before = before[-2 * LOOK_BACK:len(before) - len(minus[0])]
    return bool(BEFORE_SIGN.search(before)) if minus[1] else not AFTER_VALUE.search(before)


# ---- r1_zero ----

def r1_zero(prompts, completions, **columns):
    """1.0 where format and answer are right, else 0.0: `... </think> <answer> 18 </answer>`. A right format
    alone scores 0."""
    pairs = zip(completions, _all_golds(columns, len(completions)))
    return [r1_zero_details(completion, golds)["reward"] for completion, golds in pairs]


def r1_zero_details(completion, gold):
    r"""{"format": bool, "answer": bool, "reward": float} of one completion; `gold`: text, a number, or a list
    of which any will do.

    format: `</think>`, white space, `<answer>`, and somewhere `</answer>`; the prompt has opened <think>.
    answer: what follows the last `<answer>`, or its last \boxed{}, is the gold number: 1 000 = 1,000.0,
    $18 = 18% = x = 18 = 18 minutes = \(18\) = **18**, 0.5 = 1/2, 2\frac{1}{2} = 5/2; but no other words, 36/2
    is not 18 and 2/4 not 1/2. An answer that is no number must be the gold text: (1,2) is neither [1,2] nor
    1,2. False without the format.

    Source: the fast grader of Dr. GRPO, which takes brackets, white space and \text{...} away before it
    compares; here they are part of the answer.
    """
    text = re.sub(r"</think>\s+<answer>", "</think> <answer>", completion)
    if "</think> <answer>" not in text or "</answer>" not in text:
        return {"format": False, "answer": False, "reward": 0.0}
    answer = text.rpartition("<answer>")[2].replace("</answer>", "")
    if "\\boxed" in answer:
        answer = last_boxed(answer, ANSWER)
    is_right = False
    for text in gold_texts(gold):
        is_right = is_right or answer is not None and _same_answer(answer, text)
    return {"format": True, "answer": is_right, "reward": float(is_right)}


def _same_answer(answer, gold):
    answer, gold = _plain(answer), _plain(gold)
    left, right = _quantity(answer), _quantity(gold)
    if not left or not right:
        return _text(answer) == _text(gold) != ""
    value = _value(left)
    if value != _value(right):
        return False
    fractions = _is_fraction(left), _is_fraction(right)
    if all(fractions):
        return int(left["top"]) == int(right["top"])
    return not any(fractions) or value.denominator > 1       # an integer must be written as one


def _is_fraction(match):
    return bool(match["bottom"]) and not match["whole"]


def _text(plain):
    """The form in which a plain answer that is no number is compared."""
    text = re.sub(r" (?![0-9])|(?<![0-9]) ", "", plain)      # 1 8 stays
    if match := re.fullmatch(r"\(([A-Za-z])\)", text):       # a choice
        text = match[1]
    return text if "\\" in text else text.lower()            # \Delta is not \delta


# ---- math ----

ANSWER_IS = re.compile(r"(?:answer(?: is)?|答案(?:是|为)?)\**\s*:", re.IGNORECASE)
COUNTS = re.compile(r"\\text\{([^{}]*(?:[0-9]|dozen|hundred|thousand|illion|[十百千万亿])[^{}]*)\}")
# where math-verify needs a space to see a number; 18亿 is not 18
BEFORE_NUMBER = re.compile(rf"(?<=[{UNSPACED}{MARKS}])(?=[-+$]?[0-9][0-9.,]*(?![0-9.,]| ?[十百千万亿]))")
DISPLAY = r"\$\$[^$]*\$\$|\\\[(?:(?!\\\[)[\s\S])*?\\\]"        # a formula, perhaps on several lines
DISPLAYED = re.compile(DISPLAY)
ANSWER_LINE = re.compile(rf"(?:(?:{DISPLAY})(?:\s*(?:{DISPLAY}))*)?[^\n]*")      # or several
COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{[^{}]*\}|\\[A-Za-z]+")


def math_answer(prompts, completions, **columns):
    r"""1.0 where math-verify finds the answer of a completion equal to the gold answer, else 0.0.

    The answer stands after the last `</think>`, if there is one: in the last \boxed{}, else on the line after
    the last `Answer:`, else anywhere, as math-verify finds it. A `<think>` that does not end holds no answer.
    A text without words is one formula, or `#### 18` below other lines, or a line below equations of numbers.
    What is equal is math-verify's to say, but brackets must be the same, as in r1_zero.
    """
    answers = list(map(_answer_in, completions))
    golds = []
    for texts in _all_golds(columns, len(completions)):
        golds.append(list(map(_formula, texts)))
    return math_process.rewards(answers, golds)


def _answer_in(completion):
    """(text, whether all of it is the answer, as a formula) or None."""
    text = completion.rpartition("</think>")[2]
    if "<think>" in text:
        return None
    if "\\boxed" in text:
        inside = last_boxed(text.translate(ASCII), FORMULA)
        return (_formula(inside), True) if inside else None
    text = DISPLAYED.sub(_on_one_line, _prose(text))
    marks = list(ANSWER_IS.finditer(text))
    if marks:
        text = text[marks[-1].end():].lstrip(" \t\r\n*")
        text = ANSWER_LINE.match(text)[0].rstrip(" *\r")
    text = text.replace("<answer>", " ").replace("</answer>", " ").strip()
    if len(text) > PROSE:
        text = text[-PROSE:].partition("\n")[2] or text[-PROSE:]
    if not text:
        return None
    has_words = re.search(r"[^\W\d_]{2,}", COMMAND.sub(" ", text))
    if not has_words:
        text = _conclusion(text)
    is_sentence = has_words and re.search("[0-9]", text) or len(text) > FORMULA
    if is_sentence:
        return BEFORE_NUMBER.sub(" ", text), False
    return _formula(text), True


def _on_one_line(match):
    return " ".join(match[0].split())


def _conclusion(text):
    """The last line of a text without words, if it is the only one with #### or if those above are equations
    of numbers; else all of the text."""
    *above, last = text.splitlines()
    if last.startswith("####") and text.count("####") == 1:
        return last.lstrip("# ")
    working = filter(str.strip, above)
    return last if all(map(_is_equation, working)) else text


def _is_equation(line):
    return "=" in line and not re.search(r"[^\W\d_]", COMMAND.sub(" ", line))


def _formula(text):
    r"""An answer or a gold answer for math-verify, "" if it is too long: a number without its unit, which the
    package may not know, and without \text{} around numbers, which it would take away."""
    text = text.strip()
    if len(text) > FORMULA:
        return ""
    match = _quantity(_plain(text))
    if not match or match["unit"] == "%":
        text = _unwrapped(text.translate(ASCII))
        return COUNTS.sub(r" \1 ", text)
    number = _digits(match) if match["decimal"] else _improper(match)
    return ("-" if "-" in match["sign"] else "") + number


def _improper(match):
    top = int(match["whole"] or 0) * int(match["bottom"]) + int(match["top"])
    return f"\\frac{{{top}}}{{{int(match['bottom'])}}}"


# ---- gold answers ----

def gold_texts(gold):
    r"""A gold answer, or a list of them, as texts: what follows #### where it is there, else what is inside
    the last \boxed{}, else all of it."""
    golds = gold if isinstance(gold, list) else [] if gold is None else [gold]
    return [_gold_text(str(text)) for text in golds]


def _gold_text(text):
    if match := re.search(r"####\s*(.*)", text):
        return match[1].strip()
    if "\\boxed" in text:
        text = last_boxed(text, len(text)) or text
    return text.strip()


def golds_of(row):
    """The gold answers (list of str) of a row, {column: value}; [] if it has none."""
    for name in GOLD:
        if row.get(name) is not None:
            return gold_texts(row[name])
    return []


def _all_golds(columns, count):
    golds = []
    for i in range(count):
        row = {name: columns[name][i] for name in GOLD if name in columns}
        golds.append(golds_of(row))
    if [] in golds:
        raise no_gold(columns, f"row {golds.index([])} of a batch")
    return golds


def no_gold(columns, where):
    found = printable(", ".join(columns), keep="") or "none"
    return UserError(f"no gold answer in {where}, columns found: {found}; "
                     "fix: give every row a column answer, ground_truth or solution, or use another reward")
