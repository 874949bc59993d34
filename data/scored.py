"""Hub datasets whose responses have scores -> prompt + chosen + rejected, or for sft prompt + the best
response.

SHP (stanfordnlp/SHP):  the better response has at least twice the score of the other (the ratio filter of its
    authors).
SE (HuggingFaceH4/stack-exchange-preferences): every two answers with different scores; HTML becomes text. It
    has one split: its test questions are the 1 % with a certain hash, so that they stay the same in every
    slice and under every seed.

At most 5 pairs per prompt, by a choice that depends on the seed and the prompt only. The readers yield
(where, row), or (where, reason) for what is left out; the dataset counts the reasons. Each pair has a place
of its own: of several of one question, `where` is "pair 2 of owner/name:split:123".
"""
import functools
import hashlib
import itertools
import random
import re
from html.parser import HTMLParser
from itertools import combinations

from data.errors import UserError

PAIRS_PER_PROMPT = 5
CAPPED = f"more than {PAIRS_PER_PROMPT} pairs of one prompt"


def shp_rows(dataset, label, kind, chat, seed):
    left_out = _left_out_of_shp(dataset, label, kind, seed)
    for number, row in enumerate(dataset, 1):
        first_wins = row["labels"] == 1
        if kind == "responses":
            first_wins = row["score_A"] >= row["score_B"]
        chosen, rejected = row["human_ref_A"], row["human_ref_B"]
        if not first_wins:
            chosen, rejected = rejected, chosen
        found = left_out.get(number) or _row(row["history"], chosen, rejected, kind, chat)
        yield f"{label}:{number}", found


def _left_out_of_shp(dataset, label, kind, seed):
    """{a row's number, from 1: why it is left out}."""
    left_out = {}
    by_prompt = {}      # a prompt's digest -> [(a row's number, its higher score)]
    for number, row in enumerate(dataset, 1):
        try:
            low, high = sorted([row["score_A"], row["score_B"]])
            is_fine = row["labels"] in (0, 1)
            prompt = hashlib.sha256(row["history"].encode()).digest()
        except (KeyError, TypeError, AttributeError):
            is_fine = False
        if not is_fine:
            raise UserError("not a row of SHP (history, human_ref_A, human_ref_B, labels 0 or 1, score_A, "
                            f"score_B) in {label}:{number}; fix: use the dataset as it is published")
        if kind != "responses" and low <= 0:
            left_out[number] = "a score of 0 or less"
        elif kind != "responses" and high < 2 * low:
            left_out[number] = "scores closer than a factor of 2"
        else:
            by_prompt.setdefault(prompt, []).append((number, high))
    for prompt, rows in by_prompt.items():
        numbers = [number for number, _ in rows]
        if kind == "responses":
            best, _ = max(rows, key=lambda row: row[1])        # the first of the best
            kept, reason = {best}, "another response to this prompt has a higher score"
        else:
            kept, reason = _capped(numbers, seed, prompt), CAPPED
        for number in numbers:
            if number not in kept:
                left_out[number] = reason
    return left_out


def se_rows(dataset, label, kind, chat, seed, test):
    for number, row in enumerate(dataset, 1):
        where = f"{label}:{number}"
        _check_se(row, where)
        question, answers = row["question"], row["answers"]
        digest = hashlib.sha256(question.encode()).digest()
        if (int.from_bytes(digest[:4], "big") % 100 == 0) != test:
            continue
        scores = [answer["pm_score"] for answer in answers]
        if len(answers) < (1 if kind == "responses" else 2):
            yield where, "too few answers"
            continue
        if kind == "responses":
            best = scores.index(max(scores))
            pairs = kept = [(best, best)]
        else:
            pairs = _ranked_pairs(scores)
            unequal = [(i, j) for i, j in pairs if scores[i] != scores[j]]
            kept = _capped(unequal, seed, digest)
        prompt = html_to_text(question)
        text_of = functools.cache(lambda i, answers=answers: html_to_text(answers[i]["text"]))
        for number, (i, j) in enumerate(pairs, 1):
            place = f"pair {number} of {where}" if len(pairs) > 1 else where
            if (i, j) not in kept:
                yield place, "answers with equal scores" if scores[i] == scores[j] else CAPPED
            elif prompt and text_of(i) and text_of(j):
                yield place, _row(prompt, text_of(i), text_of(j), kind, chat)
            else:
                yield place, "no text in the HTML"


def _check_se(row, where):
    answers = row.get("answers")
    is_fine = isinstance(row.get("question"), str) and isinstance(answers, list)
    for answer in answers if is_fine else []:
        is_fine = is_fine and isinstance(answer, dict) and answer.keys() >= {"text", "pm_score"}
    if not is_fine:
        raise UserError("not a row of stack-exchange-preferences (question, answers with text and pm_score) "
                        f"in {where}; fix: use the dataset as it is published")


def _ranked_pairs(scores):
    """Every two answers' numbers, that of the higher score first."""
    pairs = []
    for i, j in combinations(range(len(scores)), 2):
        pairs.append((i, j) if scores[i] > scores[j] else (j, i))
    return pairs


def _capped(items, seed, prompt):
    """At most PAIRS_PER_PROMPT of `items`, as a set."""
    if len(items) > PAIRS_PER_PROMPT:
        items = random.Random(f"{seed} {prompt.hex()}").sample(items, PAIRS_PER_PROMPT)
    return set(items)


def _row(prompt, chosen, rejected, kind, chat):
    """In the form that `data.formats` reads: a user's message, or text in HH's style for models without a
    chat template."""
    if chat:
        prompt = [{"role": "user", "content": prompt}]
    else:
        prompt = f"\n\nHuman: {prompt}\n\nAssistant:"
        chosen, rejected = " " + chosen, " " + rejected
    if kind == "responses":
        return {"prompt": prompt, "response": chosen}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---- HTML ----

BLOCKS = {"p", "div", "blockquote", "ul", "ol", "li", "pre", "table", "tr", "hr",
          "h1", "h2", "h3", "h4", "h5", "h6"}


def html_to_text(html):
    """The text that a reader sees: paragraphs apart by an empty line, list items with a mark, <pre> as
    <code>...</code>."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.end_block()
    return "".join(itertools.chain(*reader.blocks)).strip()


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks = []      # (separator, text)
        self.line = ""        # the text of the current block
        self.mark = ""        # a list item's, until its text comes
        self.lists = []       # for each list around: the next item's number, None without numbers
        self.after_item = False
        self.pre = False

    def handle_starttag(self, tag, attributes):
        if tag == "br":
            self.line += "\n"
        elif tag in ("td", "th"):
            self.line += " "
        if tag not in BLOCKS:
            return
        self.end_block()
        self.pre = self.pre or tag == "pre"
        if tag in ("ul", "ol"):
            self.after_item = self.after_item and bool(self.lists)
            self.lists.append(1 if tag == "ol" else None)
        if tag == "li":
            indent = "  " * (len(self.lists) - 1)
            number = self.lists[-1] if self.lists else None
            if number is None:
                self.mark = f"{indent}- "
            else:
                self.mark = f"{indent}{number}. "
                self.lists[-1] += 1

    def handle_endtag(self, tag):
        if tag in BLOCKS:
            self.end_block()
        if tag == "pre":
            self.pre = False
        if tag in ("ul", "ol") and self.lists:
            self.lists.pop()

    def handle_data(self, text):
        self.line += text if self.pre else re.sub(r"\s+", " ", text)

    def end_block(self):
        text = self.line
        self.line = ""
        if not self.pre:
            text = re.sub(" +", " ", text)
            text = re.sub(r" *\n *", "\n", text).strip()
        elif text.strip():
            text = f"<code>{text}</code>"
        if text.strip():
            separator = "\n" if self.mark and self.after_item else "\n\n"
            self.blocks.append((separator, self.mark + text))
            self.after_item = bool(self.mark)
            self.mark = ""
