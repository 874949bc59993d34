r"""What the verifiers read: notations, signs, gold answers and rows, against tables written by hand and
against numbers that the test writes out itself."""
import random
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from graded_pairs import PAIRS

from data.errors import UserError
from data.formats import parse
from data.pack import Example
from rewards import math_process
from rewards.functions import check_gold, load_reward
from rewards.guard import TimedOut, guarded
from rewards.verifiers import golds_of, gsm8k, math_answer, r1_zero_details

ROOT = Path(__file__).parent.parent


def r1(answer, gold):
    return r1_zero_details(f"So.</think> <answer>{answer}</answer>", gold)["answer"]


def last(completion, gold):
    return gsm8k(["q"], [completion], answer=[gold]) == [1.0]


def maths(completion, gold):
    return math_answer(["q"], [completion], answer=[gold]) == [1.0]


def examples(*rows, kind="prompts"):
    parsed = [parse(row, f"rows.jsonl:{i}", kind) for i, row in enumerate(rows, 1)]
    return [Example(np.array([1]), [], text.where, text.extras) for text in parsed]


def prompts(*answers):
    return examples(*[{"question": "How many?", "answer": answer} for answer in answers])


# ---- r1_zero ----

def graded(verdict):
    """(missed, wrongly paid) of the graded pairs."""
    missed, paid = [], []
    for kind, gold, answer, is_right in PAIRS:
        is_paid = verdict(answer, gold)
        if is_paid != is_right:
            (paid if is_paid else missed).append((kind, gold, answer))
    return missed, paid


def test_the_graded_pairs():
    assert len(set(PAIRS)) == len(PAIRS) == 120
    missed, paid = graded(r1)
    print("missed:", missed)
    assert not paid
    assert len(missed) <= 15, missed


def written(value, choose):
    """The Fraction in one of the notations that an answer may have."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    whole, rest = divmod(size, 1)
    if size.denominator == 1:
        grouped = f"{whole:,}"
        forms = [str(whole), grouped, grouped.replace(",", "{,}"), grouped.replace(",", " "), f"{whole}.00"]
    else:
        top, bottom = size.numerator, size.denominator
        forms = [f"{top}/{bottom}", f"\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{top}}}{{{bottom}}}"]
        if top < 10 and bottom < 10:
            forms.append(f"\\frac{top}{bottom}")
        if whole:
            forms += [f"{whole} {rest}", f"{whole}\\frac{{{rest.numerator}}}{{{rest.denominator}}}"]
    number = choose([sign, sign.replace("-", "−"), sign.replace("-", "－"), sign and "- "]) + choose(forms)
    number = choose([number, number.translate({ord("0") + i: chr(0xFF10 + i) for i in range(10)})])
    number += choose(["", "", "%", "\\%", "°", "^\\circ", "^{\\circ}", " cm", "\\text{ cm}^2",
                      " \\mathrm{kg}", "元", " people", " kilometers", " hours", " 厘米"])
    forms = ["{}", "${}$", "\\({}\\)", "\\[{}\\]", "**{}**", "\\boxed{{{}}}", "x = {}", "{}.", "{}。"]
    around = choose(forms)
    return around.format(number)


def test_numbers_in_any_notation():
    choose = random.Random(1).choice
    numbers = [Fraction(n, d) for n in (-25, -7, -1, 2, 9, 18, 1234, 5678901) for d in (1, 2, 3, 7)]
    for _ in range(3000):
        value, other = choose(numbers), choose(numbers)
        answer = written(value, choose)
        assert r1(answer, str(value)), answer
        assert r1(answer, str(other)) == (value == other), (answer, other)


@pytest.mark.parametrize("answer, gold", [
    ("[3,7]", "(3,7)"), ("3,7", "(3,7)"), ("(4,250)", "4250"), ("[42]", "42"), ("6 1", "61"),
    ("4 2/3", "42/3"), ("4\\frac{2}{3}", "42/3"), ("7 9/3", "79/3"), ("\\frac{1}{2}3", "1/23"),
    ("\\frac{x+1}{2}", "x+1/2"), ("\\frac{1}{2x}", "1/2x"), ("12\\text{ thousand}", "12"),
    ("12 \\text{ or more}", "12"), ("\\text{non }12", "12"), ("12\\text{ or 13}", "12"), ("3x = 12", "12"),
    ("12k", "12"), ("12亿", "12"), ("3 feet 2 inches", "32"), ("\\Delta", "\\delta"), ("12!", "12"),
    ("12 \\text{ apples short}", "12"), ("{12", "12"), ("12,5", "125"), ("1 2345", "12345"), ("", ""),
    ("\\boxed", "")])
def test_r1_zero_takes_nothing_away(answer, gold):
    assert not r1(answer, gold) and not r1(gold, answer)


def test_a_space_before_the_braces():
    assert r1("so \\boxed {18}", "18") and not r1("\\boxed {18", "18")
    assert golds_of({"answer": "\\boxed\n{\\frac{1}{2}}"}) == ["\\frac{1}{2}"]


# ---- gsm8k ----

@pytest.mark.parametrize("text, number", [
    ("因此余额为-12", -12), ("ответ-12", -12), ("合計は−12円", -12), ("it drops to －１２", -12),
    ("so y = - 12", -12),
    ("#### - 12", -12), ("- 12", -12), ("是 - 12", -12), ("the change is -$12", -12), ("it is $-12$", -12),
    ("20 - 12", 12), ("20-12", 12), ("20−12", 12), ("pages 8-12", 12), ("n-12", 12), ("(8)-12", 12),
    ("x^{2}-12", 12), ("$8$-$12$", 12), ("30%-12", 12), ("They have:\n- 12", 12), ("Ann - 12", 12),
    ("Аня - 12", 12), ("1{,}250", 1250), ("1\\,250", 1250), ("1,\\!250", 1250), ("1\u00a0250", 1250),
    ("2×125=250，250元", 250), ("6×2=12。12个苹果", 12),
    ("步骤2：12", 12), ("１，２５０", 1250),
    ("１２。", 12), ("12 1", 1), ("1 250", 250), ("12 cm^2", 12), ("y = 12x^2", 12), ("9/12", .75),
    ("\\frac{9}{12}", .75), ("2 9/12", 2.75), ("costs 1.2e1", 12)])
def test_the_last_number(text, number):
    others = {12, -12, 1250, 250, 1, .75, 2.75, 2} - {number}
    assert last(text, str(number))
    assert not any(last(text, str(other)) for other in others)


@pytest.mark.parametrize("text", [
    "it is 12/0", "10^12", "at 8:12", "10^{12}", "\\frac{1}{0}", "v1.8.12", "0x12"])
def test_no_plain_number_at_the_end(text):
    assert not any(last(text, gold) for gold in ("0", "1", "8", "10", "12", "-12"))


ONE_NUMBER = [
    "12", " 1,250 ", "-3.5", "$7", "-$7", "€7.50", "45%", "45\\%", "6 cups", "6 dollars", "60 km/h", "7 cm^2",
    "x = 9", "(9)", "\\boxed{9}", "So \\boxed{9} in 4 steps.", "It is.\n#### 9", "−9", "９", "9元", "2e3",
    ".5",
    "11,\\!250", "1{,}250", "$9$", 9, -2.5, 1e22, ["3", 4]]
NOT_ONE = [
    "5/8", "\\frac{5}{8}", "\\boxed{\\frac{5}{8}}", "1 5/8", "[2,9)", "(3,250)", "x^3+8", "10^8", "\\sqrt{8}",
    "8:45", "2024-11-08", "7-8", "7, 8", "7 or 8", "7 8", "8 million", "8 dozen", "8万", "1 hour 8 minutes",
    "about 8", "eight", "", "####", "8!", "٨", "½", "9" * 50, ["3", "4/5"], "We get 8."]


def test_a_gold_answer_of_gsm8k_is_exactly_one_number():
    rewards = load_reward("gsm8k")
    check_gold(rewards, prompts(*ONE_NUMBER))
    error = "gsm8k cannot verify the gold answers of 1 of 2 rows, in rows.jsonl:2 "
    for gold in NOT_ONE:
        with pytest.raises(UserError, match=error):
            check_gold(rewards, prompts("12", gold))


# ---- gold answers and rows ----

def test_the_gold_answers_of_published_rows():
    solution = "We add: $4+5$, not $\\boxed{1}$. Thus $\\boxed{\\frac{9}{\\sqrt{2}}}$."
    numina = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "So \\boxed{7}."}]
    verl = {"ground_truth": "34", "style": "rule"}
    rows = [                                             # of MATH, MATH-500, AIME (two), Numina, OpenR1, verl
        ({"problem": "q", "level": "Level 2", "solution": solution}, ["\\frac{9}{\\sqrt{2}}"]),
        ({"problem": "q", "solution": "long", "answer": "9", "unique_id": "x"}, ["9"]),
        ({"ID": "2024-I-1", "Problem": "q", "Solution": "long", "Answer": 204}, ["204"]),
        ({"id": 60, "problem": "q", "solution": "long", "answer": "204", "year": "2024"}, ["204"]),
        ({"source": "olym", "problem": "q", "solution": "So \\boxed{7}.", "messages": numina}, ["7"]),
        ({"problem": "q", "solution": "long \\boxed{8}", "answer": "v_0", "generations": ["a"]}, ["v_0"]),
        ({"prompt": [{"role": "user", "content": "q"}], "reward_model": verl}, ["34"])]
    for row, golds in rows:
        text = parse(row, "rows.jsonl:1", "prompts")
        question = text.prompt if isinstance(text.prompt, str) else text.prompt[-1]["content"]
        assert question == "q" and golds_of(text.extras["columns"]) == golds, row
    assert golds_of({"solution": "\\boxed{\\frac{a}{b"}) == ["\\boxed{\\frac{a}{b"]      # does not close
    assert golds_of({"answer": "\\boxed{1}\n#### 2"}) == ["2"]


# ---- math ----

@pytest.fixture
def package():
    return pytest.importorskip("math_verify")


@pytest.mark.parametrize("completion, gold, is_right", [
    ("so \\boxed{1} and then $\\boxed{\\frac{6}{8}}$.", "3/4", True),
    ("\\boxed{\\sqrt{12}}", "2\\sqrt{3}", True), ("\\boxed{x^2+2x+1}", "(x+1)^2", True),
    ("\\boxed{\\{2, 1\\}}", "\\{1,2\\}", True), ("\\boxed{(1,2)}", "\\{1,2\\}", False),
    ("\\boxed{[1,2]}", "(1,2)", False), ("\\boxed{[1,\\infty)}", "[1,\\infty)", True),
    ("\\boxed{Navin}", "\\text{Navin}", True), ("\\boxed{(C)}", "C", True),
    ("\\boxed{\\text{17 or }18}", "18", False), ("\\boxed{18", "18", False),
    ("\\boxed{12\\text{ dozen}}", "12", False),
    ("\\boxed{12 \\text{ cm}^2}", "12", True), ("\\boxed{€12}", "12", True),
    ("\\boxed{2\\frac{1}{2}}", "5/2", True), ("\\boxed{50\\%}", "0.5", True),
    ("\\boxed{1{,}250}", "1250", True), ("\\boxed{−１２}", "-12", True), ("Steps.\nAnswer: $13$", "13", True),
    ("**Answer:** 13.", "13", True), ("Final Answer:\n\\frac{3}{4}", "0.75", True),
    ("Answer: 12\nAnswer: 13 apples", "13", True), ("Answer: 2\\sqrt{3}", "2", False),
    ("答案：$-13$", "-13", True), ("Answer: 13\n\\boxed{14}", "13", False),
    ("The answer is $\\frac{3}{4}$.", "0.75", True), ("<think>\\boxed{5}</think> It is 7.", "7", True),
    ("<think>\\boxed{5}</think> It is 7.", "5", False),
    ("5 it is</think>\n\n<answer> 7 </answer>", "7", True), ("<think> Perhaps \\boxed{7}", "7", False),
    ("所以答案是18。", "18", True), ("答案是18", "18", True),
    ("因此，她一共有18个苹果。", "18", True), ("因此总共18元。", "18", True),
    ("因此总共18元。", "8", False), ("因此余额为-12元。", "-12", True),
    ("6×3=18。18个苹果", "18", True), ("一共2×60=120，120元", "120", True),
    ("答えは18です。", "18", True),
    ("一共18亿元。", "18", False), ("答案：1，250", "1250", True), ("答案：3：4", "3:4", True),
    ("\\boxed {18}", "18", True),
    ("<think> It is 7</think>", "7", False), ("", "7", False), ("word " * 400 + "\nIt is 7.", "7", True)])
def test_math(package, completion, gold, is_right):
    assert maths(completion, gold) == is_right


def test_math_on_the_graded_pairs(package):
    missed, paid = graded(lambda answer, gold: maths(f"\\boxed{{{answer}}}", gold))
    assert len(missed) <= 10, missed
    assert [pair[2] for pair in paid] == ["2x = 18"]      # math-verify takes the right side of an equation


def test_the_gold_answers_of_math(package):
    rewards = load_reward("math")
    check_gold(rewards, prompts("\\frac{3}{4}", "[2,5)", "x^2+1", "\\begin{pmatrix}1\\\\2\\end{pmatrix}",
    "p - q", 7, ["2", "3"]))
    error = "math cannot verify .* 1 of 2 rows, in rows.jsonl:2 .*; fix: correct"
    for gold in ("\\frac{3}{", "", "}{", "x" * 500):
        with pytest.raises(UserError, match=error):
            check_gold(rewards, prompts("7", gold))


def test_math_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    load_reward.cache_clear()
    error = "^math in reward needs the package math-verify; fix: pip install math-verify$"
    with pytest.raises(UserError, match=error):
        load_reward("math")
    load_reward.cache_clear()


BOMBS = ["9^{9^{9^{9}}}", "\\sqrt{7^{8^{9^{9}}}}", "(((7!)!)!)!",
"(" * 150, "x^" * 150, "\\sum_{i=1}^{10^{9}} i^{7}"]


def test_answers_that_take_for_ever(package, monkeypatch):
    """They score 0, and the answers behind them are scored; an outer timer goes on."""
    monkeypatch.setattr(math_process, "SECONDS", 0.2)
    monkeypatch.setattr(math_process, "HASTY", 0.05)
    monkeypatch.setattr(math_process, "TOGETHER", 1.0)
    completions = []
    for bomb in BOMBS:
        completions += [f"\\boxed{{{bomb}}}", "\\boxed{\\frac{36}{2}}", f"Answer: {bomb}"]
    signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        started = time.monotonic()
        found = math_answer([""] * len(completions), completions, answer=["18"] * len(completions))
        assert time.monotonic() - started < 20
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 400
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert found == [0.0, 1.0, 0.0] * len(BOMBS)


def test_a_call_that_is_stopped_leaves_no_verdict_behind(package):
    bombs = ["\\boxed{9^{9^{9^{9}}}}"]
    with pytest.raises(TimedOut), guarded(0.3, "reward math"):
        math_answer([""], bombs, answer=["18"])
    assert maths("\\boxed{\\frac{36}{2}}", "18") and not maths("\\boxed{\\frac{36}{2}}", "19")


def test_the_process_ends_with_ours(package):
    program = ("from rewards import math_process, verifiers\n"
               "assert verifiers.math_answer([''], ['\\\\boxed{\\\\frac{4}{2}}'], answer=['2']) == [1.0]\n"
               "print(math_process._process.pid)\n")
    command = [sys.executable, "-c", program]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    process = Path(f"/proc/{made.stdout.strip()}")
    deadline = time.monotonic() + 10
    while process.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not process.exists() and not made.stderr


def test_math_takes_no_false_equation():
    pytest.importorskip("math_verify")
    assert not maths("\\boxed{17 = 18}", "18")
    assert maths("\\boxed{x = 18}", "18") and maths("\\boxed{18 = 18}", "18")


@pytest.mark.parametrize("completion, gold", [
    ("Answer:\n\n$$\n18\n$$", "18"), ("Answer:\n\\[\n18\n\\]\n\nIt follows from 9 and 2.", "18"),
    ("**Final Answer:**\n\\[\n\\frac{3}{4}\n\\]", "3/4"), ("Answer:\r\n\\[\r\n18\r\n\\]", "18"),
    ("48/2=24\n48+24=72\n#### 72", "72"), ("48/2=24\n48+24=72\n\n72", "72"), ("#### 72", "72"),
    ("\\frac{48}{2}=24\n\\[\n48+24=72\n\\]\n\\[\n72\n\\]", "72")])
def test_math_finds_an_answer_on_lines_of_its_own(completion, gold):
    pytest.importorskip("math_verify")
    assert maths(completion, gold) and not maths(completion, "24")


@pytest.mark.parametrize("completion", [
    "Answer:\n$$\n17\n$$\n$$\n18\n$$", "Answer:\n$$\n17\n18\n$$", "Answer:\n\\[\n17\n\\] or \\[\n18\n\\]",
    "Answer:\n\\[\n17, 18\n\\]", "17\n18", "17\n\n18", "9*2=18\n17\n18", "9*2=18\n17, 18", "#### 17 18",
    "#### 17\n#### 18", "$$\n17\n$$\n\n$$\n18\n$$"])
def test_math_pays_neither_of_two_candidates(completion):
    pytest.importorskip("math_verify")
    for gold in ("17", "18"):
        assert not maths(completion, gold), gold


@pytest.mark.parametrize("text", ["\\[", "$$", "$$\n", "\\[\n1", "\\]\n\\[", "\\[1\\]\n", "####\n", "1=1\n"])
def test_math_finds_its_answer_in_linear_time(monkeypatch, text):
    monkeypatch.setattr("rewards.math_process.rewards", lambda answers, golds: [0.0])
    started = time.process_time()
    for before in ("", "Answer: "):
        maths(before + text * (1_000_000 // len(text)), "18")
    assert time.process_time() - started < 4
