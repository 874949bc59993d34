"""Hub datasets whose responses have scores -> prompt + chosen + rejected, or for sft prompt + the best response.

SHP (stanfordnlp/SHP):  the better response has at least twice the score of the other (the ratio filter of its authors).
SE (HuggingFaceH4/stack-exchange-preferences): every two answers with different scores; HTML becomes text. It has one split: its
    test questions are the 1 % with a certain hash, so that they stay the same in every slice and under every seed.

At most 5 pairs per prompt, by a choice that depends on the seed and the prompt only. The readers yield (where, row), or
(where, reason) for what is left out; the dataset counts the reasons.
"""
import hashlib
import random
import re
from html.parser import HTMLParser
from itertools import combinations

from data.errors import UserError

PAIRS_PER_PROMPT = 5
CAPPED = f"more than {PAIRS_PER_PROMPT} pairs of one prompt"


def shp_rows(dataset, label, kind, chat, seed):
    left_out, groups = {}, {}  # row number -> reason; prompt -> [(row number, its higher score)]
    for number, row in enumerate(dataset, 1):
        try:
            low, high = sorted([row["score_A"], row["score_B"]])
            fine = row["labels"] in (0, 1)
            prompt = hashlib.sha256(row["history"].encode()).digest()
        except (KeyError, TypeError, AttributeError):
            fine = False
        if not fine:
            raise UserError(f"not a row of SHP (history, human_ref_A, human_ref_B, labels 0 or 1, score_A, score_B) in {label}:{number}; "
                            "fix: use the dataset as it is published")
        if kind != "responses" and low <= 0:
            left_out[number] = "a score of 0 or less"
        elif kind != "responses" and high < 2 * low:
            left_out[number] = "scores closer than a factor of 2"
        else:
            groups.setdefault(prompt, []).append((number, high))
    for prompt, rows in groups.items():
        if kind == "responses":
            kept = {max(rows, key=lambda pair: pair[1])[0]}        # the first of the best
        else:
            kept = _capped([number for number, _ in rows], seed, prompt)
        reason = "another response to this prompt has a higher score" if kind == "responses" else CAPPED
        left_out |= {number: reason for number, _ in rows if number not in kept}
    for number, row in enumerate(dataset, 1):
        replies = [row["human_ref_A"], row["human_ref_B"]]
        first_wins = row["score_A"] >= row["score_B"] if kind == "responses" else row["labels"] == 1
        chosen, rejected = replies if first_wins else replies[::-1]
        yield f"{label}:{number}", left_out.get(number) or _row(row["history"], chosen, rejected, kind, chat)


def se_rows(dataset, label, kind, chat, seed, test):
    for number, row in enumerate(dataset, 1):
        where, question = f"{label}:{number}", row.get("question")
        answers = row.get("answers")
        if not isinstance(question, str) or not isinstance(answers, list) or not all(
                isinstance(answer, dict) and {"text", "pm_score"} <= answer.keys() for answer in answers):
            raise UserError(f"not a row of stack-exchange-preferences (question, answers with text and pm_score) in {where}; "
                            "fix: use the dataset as it is published")
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
            pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(answers)), 2)]
            kept = _capped([(i, j) for i, j in pairs if scores[i] != scores[j]], seed, digest)
        prompt, texts = html_to_text(question), {}
        for i, j in pairs:
            if (i, j) not in kept:
                yield where, "answers with equal scores" if scores[i] == scores[j] else CAPPED
                continue
            for k in (i, j):
                texts[k] = texts[k] if k in texts else html_to_text(answers[k]["text"])
            if prompt and texts[i] and texts[j]:
                yield where, _row(prompt, texts[i], texts[j], kind, chat)
            else:
                yield where, "no text in the HTML"


def _capped(items, seed, prompt):
    """At most PAIRS_PER_PROMPT of `items`, as a set."""
    if len(items) > PAIRS_PER_PROMPT:
        items = random.Random(f"{seed} {prompt.hex()}").sample(items, PAIRS_PER_PROMPT)
    return set(items)


def _row(prompt, chosen, rejected, kind, chat):
    """In the form that `data.formats` reads: a user's message, or text in HH's style for models without a chat template."""
    prompt = [{"role": "user", "content": prompt}] if chat else f"\n\nHuman: {prompt}\n\nAssistant:"
    chosen, rejected = (chosen, rejected) if chat else (" " + chosen, " " + rejected)
    return {"prompt": prompt, "response": chosen} if kind == "responses" else {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# ---- HTML ----

BLOCKS = {"p", "div", "blockquote", "ul", "ol", "li", "pre", "table", "tr", "hr", *(f"h{i}" for i in range(1, 7))}


def html_to_text(html):
    """The text that a reader sees: paragraphs apart by an empty line, list items with a mark, <pre> as <code>...</code>."""
    reader = _Reader()
    reader.feed(html)
    reader.close()
    reader.end_block()
    return "".join(separator + text for separator, text in reader.blocks).strip()


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.blocks = []      # (separator, text)
        self.line = ""        # of the block that is being read
        self.mark = ""        # of a list item, until its text comes
        self.lists = []       # of the lists around: the next item's number, None without numbers
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
            number = self.lists[-1] if self.lists else None
            self.mark = "  " * (len(self.lists) - 1) + ("- " if number is None else f"{number}. ")
            if number is not None:
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
        text, self.line = self.line, ""
        if self.pre:
            text = f"<code>{text}</code>" if text.strip() else ""
        else:
            text = re.sub(r" *\n *", "\n", re.sub(" +", " ", text)).strip()
        if text:
            self.blocks.append(("\n" if self.mark and self.after_item else "\n\n", self.mark + text))
            self.mark, self.after_item = "", bool(self.mark)
