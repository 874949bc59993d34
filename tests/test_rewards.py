"""Verifiers against cases written by hand, hostile model text under a time bound, and what a user's function may get wrong."""
import math
import signal
import threading
import time

import numpy as np
import pytest
import torch

from data.errors import RunError, UserError
from data.pack import Example
from rewards.functions import Reward, check_gold, load_reward, score
from rewards.verifiers import golds_of, gsm8k, r1_zero, r1_zero_details

RIGHT = [("18", " 18 "), ("18", "18"), ("18", "$18"), ("18", "18.0"), ("18", "18.00"), ("1000", "1,000"), ("1,000", "1000"),
         ("18", "\\boxed{18}"), ("18", "so \\boxed{3} and \\boxed{18} it is"), ("1/2", "0.5"), ("0.5", "1/2"), ("1/2", "\\frac{1}{2}"),
         ("18", "\\boxed 18"),
         ("18", "x = 18"), ("18", "18."), ("18", "18%"), ("18", "\\$18"), ("18", "18 apples"), ("18", "18 minutes"), ("18", "18 km"),
         ("18", "18 kg"), ("18", "18mph"), ("18", "18 percent"), ("18", "18 \\text{eggs}"), ("18", "\\text{18}"), ("42", "(42)"),
         ("42", "\\fbox{42}"), ("1234", "$1,234.00"), ("3.5", "3.50"), ("-5", "-5"), ("5", "+5"), ("0.5", ".5"), ("18 feet", "18"),
         ("Tuesday", "tuesday"), (18, "18"), (18.0, "18"), (["17", "18"], "18"), ("16 + 2 = 18\n#### 18", "18"),
         ("18", "17 </answer> </think> <answer> 18")]      # of two answers the last one counts
WRONG = [("18", "18 dollars"), ("18", "18 eggs"), ("18", "36/2"), ("36/2", "18"), ("18", "2*9"), ("18", "The answer is 18"),
         ("18", "\\boxed{18"), ("18", "\\boxed{18} \\boxed{"), ("18", ""), ("18", " "), ("18", "-18"),
         ("18", "1,8"),
         ("18", "18 18"), ("18", "18</answer> trailing"), ("18", "__import__('os')"), ("", ""), ("0", "1/0"), ("2/4", "1/2"),
         ("18", "18.0000000001"), (["17", "18"], "19"), ("1", "١"), ("18", "0x12"), ("1", "1" + "0" * 99), ("18", "18e0"), ("18", "nan")]
WITHOUT_FORMAT = ["think</think><answer>18</answer>", "think </think> <answer> 18", "think <answer> 18 </answer>", "18", "",
                  "think </THINK> <ANSWER> 18 </ANSWER>", "think </think>, <answer> 18 </answer>"]


@pytest.mark.parametrize("gold, answer", RIGHT)
def test_r1_zero_right(gold, answer):
    details = r1_zero_details(f" I think.</think> <answer>{answer}</answer>", gold)
    assert details == {"format": True, "answer": True, "reward": 1.0} and type(details["reward"]) is float


@pytest.mark.parametrize("gold, answer", WRONG)
def test_r1_zero_wrong(gold, answer):
    assert r1_zero_details(f" I think.</think> <answer>{answer}</answer>", gold) == {"format": True, "answer": False, "reward": 0.0}


@pytest.mark.parametrize("completion", WITHOUT_FORMAT)
def test_r1_zero_without_the_format(completion):
    assert r1_zero_details(completion, "18") == {"format": False, "answer": False, "reward": 0.0}


@pytest.mark.parametrize("between", [" ", "\n", "\n\n", "   ", " \t\n "])
def test_white_space_between_the_tags(between):
    assert r1_zero_details(f"a</think>{between}<answer> 18 </answer>", "18")["reward"] == 1.0


def test_r1_zero_as_a_reward():
    good = "<think>91-59=41-9=32</think> <answer>32</answer>"          # what the embedded model writes
    assert r1_zero(["q"] * 3, [good, good, "32"], answer=["32", "31", "32"], prompt=["q"] * 3) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("completion, gold, reward", [
    ("so 3 + 4 = 7", "7", 1), ("The answer is 1,450,000.", "1450000", 1), ("#### 18", "9 * 2 = 18\n#### 18", 1), ("18 of 20", "18", 0),
    ("it costs $18.50", "18.5", 1), ("it is -5", "-5", 1), ("it is -$5", "-5", 1), ("10-5", "5", 1), ("(3)-5", "5", 1), ("$.50", "0.5", 1),
    ("1, 2,3", "3", 1), ("no number", "3", 0), ("", "3", 0), ("18.", "18.0", 1), ("it is 5-", "5", 1), ("9" * 50, "9" * 50, 0),
    ("7", ["6", "7"], 1), ("7", 7, 1), ("7", "seven", 0), ("seven", "seven", 0), ("1,0000", "10000", 0),
    ("<think>91-59=41-9=32</think> <answer>32</answer>", "32", 1)])
def test_gsm8k(completion, gold, reward):
    assert gsm8k(["q"], [completion], answer=[gold]) == [float(reward)]


def test_gold_columns():
    assert golds_of({"answer": None, "ground_truth": "3", "solution": "4"}) == ["3"]
    assert golds_of({"answer": "work\n#### 1,000\nmore", "solution": "4"}) == ["1,000"]
    assert golds_of({"question": "?"}) == []
    for verifier in (gsm8k, r1_zero):
        assert verifier([""] * 2, ["</think> <answer>3</answer>", "</think> <answer>4</answer>"],
                        ground_truth=["3", None], solution=[None, "4"]) == [1.0, 1.0]
        with pytest.raises(UserError, match="columns found: level, answer; fix"):
            verifier([""] * 2, ["3", "3"], level=[1, 2], answer=["3", None])


BIG = 1_000_000
HOSTILE = {"digits": "1" * BIG, "numbers": "1 " * (BIG // 2), "signs": "-" * BIG, "groups": "1" + ",000" * (BIG // 4) + "0",
           "points": "1." * (BIG // 2), "answers": "</think> <answer>" * (BIG // 17) + "</answer>", "closings": "</answer>" * (BIG // 9),
           "thoughts": "</think> " * (BIG // 9), "space": "</think>" + " " * BIG, "boxes": "\\boxed{" * (BIG // 7), "braces": "{" * BIG,
           "texts": "\\text{" * (BIG // 6), "fractions": "\\frac{" * (BIG // 6), "minutes": "minutes " * (BIG // 8), "nul": "\0" * BIG,
           "equations": "x=" * (BIG // 2), "power": "9**9**9**9", "exponent": "1e999999999", "slashes": "1/" * (BIG // 2)}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_takes_linear_time_and_scores_0(text):
    started = time.process_time()
    forms = [text, f"</think> <answer>{text}</answer>", f"</think> <answer>\\boxed{{{text}}}</answer>", f"</think> <answer>{text}"]
    for completion in forms:
        assert gsm8k([""], [completion], answer=["18"]) == r1_zero([""], [completion], answer=["18"]) == [0.0]
    assert time.process_time() - started < 4      # eight verdicts, of a fraction of a second each


# ---- gold answers ----

def prompts(*answers):
    return [Example(np.array([1]), [], f"x.jsonl:{i}", {"prompt": "q", "columns": {"question": "q", "answer": answer}})
            for i, answer in enumerate(answers, 1)]


def test_check_gold():
    both = load_reward("gsm8k,r1_zero")
    check_gold(both, prompts("a\n#### 18", "1,000", "-3.5", "$5", ["6", "7"], 8))
    check_gold([Reward("mine", 1.0, len)], prompts("whatever"))
    check_gold([Reward("run", 1.0, None, "runs/rm")], prompts("whatever"))
    with pytest.raises(UserError, match=r"gsm8k cannot verify .* 2 of 3 rows, in x.jsonl:2 \('five'\), x.jsonl:3 \(''\); fix: correct"):
        check_gold(both, prompts("5", "five", "####"))
    with pytest.raises(UserError, match=r"r1_zero cannot .* 7 of 7 rows, in x.jsonl:1 .*x.jsonl:5 [^:]*, \.\.\.; fix"):
        check_gold(both[1:], prompts(*["18 </answer> eggs"] * 7))
    with pytest.raises(UserError, match="no gold answer in x.jsonl:1, columns found: question, answer; fix"):
        check_gold(both, prompts(None))


# ---- which rewards ----

def file_of(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def refused(*arguments, error=UserError, function=load_reward):
    with pytest.raises(error) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value) and "; fix: " in str(caught.value) and type(caught.value) is error
    return str(caught.value)


def test_load_reward(tmp_path):
    path = file_of(tmp_path, "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
                             "def short(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n")
    (tmp_path / "rm").mkdir()
    rewards = load_reward(f"r1_zero, {path}:short,{tmp_path / 'rm'}/", "1, 0.5,-2")
    assert [(reward.name, reward.weight) for reward in rewards] == [("r1_zero", 1.0), ("short", 0.5), ("rm", -2.0)]
    assert rewards[0].function is r1_zero and rewards[2].function is None and rewards[2].path == f"{tmp_path / 'rm'}/"
    assert score(rewards[1], ["q", "q"], ["abc", ""], {"answer": ["1", "2"]}) == [-3.0, 0.0]
    assert [reward.weight for reward in load_reward("gsm8k,r1_zero")] == [1.0, 1.0]


def test_load_reward_refuses(tmp_path):
    assert "write gsm8k" in refused("gsm8") and "'gsm8'" in refused("gsm8")
    assert "write path.py:function" in refused("")
    assert "write mine.py:function" in refused("mine.py")
    assert "runs/none" in refused("runs/none")
    assert "x.py in reward (a.yml:3) does not exist" in refused("x.py:f", None, "reward (a.yml:3)")
    assert "two rewards named 'gsm8k'" in refused("gsm8k,gsm8k")
    for weights in ("1", "1,2,3", "1,x", "1,nan", "1,", "inf,1"):
        assert "reward_weights" in refused("gsm8k,r1_zero", weights)
    path = file_of(tmp_path, "limit = 3\ndef reward(prompts, completions, **columns): return []\n"
                             "def bare(prompts, completions): return []\n")
    assert "no function 'rewards'" in refused(f"{path}:rewards") and "write reward" in refused(f"{path}:rewards")
    assert "no function 'limit'" in refused(f"{path}:limit")
    assert "def bare(prompts, completions, **columns)" in refused(f"{path}:bare")
    for text in ("def reward(:", "1 / 0", "import no_such_module_here", "raise ValueError('two\\nlines')"):
        assert "cannot be loaded (" in refused(file_of(tmp_path, text, "bad.py") + ":reward")


# ---- calling them ----

PROMPTS, COMPLETIONS = ["first\nprompt", [{"role": "user", "content": "second"}]], ["one", "two\x1b[31m" + "!" * 1000]


def called(function, timeout=60.0, columns=None):
    return score(Reward("mine", 1.0, function), PROMPTS, COMPLETIONS, columns or {}, timeout)


def failed(function, timeout=60.0):
    message = refused(function, timeout, error=RunError, function=called)
    assert message.startswith("reward mine ") and message.isprintable() and len(message) < 500
    return message


@pytest.mark.parametrize("values, expected", [
    ([1, 0.5], [1.0, 0.5]), ([True, None], [1.0, None]), ((np.float32(0.5), np.int64(3)), [0.5, 3.0]), (np.array([1.0, 2.0]), [1.0, 2.0]),
    (torch.tensor([1.0, -1.0]), [1.0, -1.0]), ([torch.tensor(2), 0], [2.0, 0.0])])
def test_score(values, expected):
    found = called(lambda prompts, completions, **columns: values)
    assert found == expected and all(value is None or type(value) is float for value in found)


def test_score_hands_over_what_it_has():
    def function(prompts, completions, answer, **columns):
        assert (prompts, completions, answer, columns) == (PROMPTS, COMPLETIONS, ["1", None], {"prompt": ["a", "b"]})
        completions.clear()
        return [1, 2]

    columns = {"answer": ["1", None], "prompt": ["a", "b"], "prompts": [0, 0], "completions": [0, 0]}      # the last two are taken
    assert called(function, columns=columns) == [1.0, 2.0] and len(COMPLETIONS) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", b"1", [1], {}, object(), 1j, 10**400, torch.tensor([1.0, 2.0]),
                                   np.zeros((9, 9))])
def test_values_that_are_no_rewards(value):
    message = failed(lambda prompts, completions, **columns: [1.0, value])
    assert "prompt 'second'" in message and "completion 'two\\x1b[31m!!!" in message and "one finite number, or None" in message


@pytest.mark.parametrize("values", [[], [1.0], [1.0] * 3])
def test_wrong_length(values):
    message = failed(lambda prompts, completions, **columns: values)
    assert f"returned {len(values)} values for 2 completions" in message and "prompt 'first\\nprompt'" in message


@pytest.mark.parametrize("value", [None, 1.0, "ab", {0: 1.0, 1: 1.0}])
def test_not_a_list(value):
    assert "TypeError" in failed(lambda prompts, completions, **columns: value)


def test_an_exception_names_the_sample_that_fails():
    def function(prompts, completions, **columns):
        return [1 / (len(completion) < 9) for completion in completions]

    assert "raised ZeroDivisionError: " in failed(function) and "prompt 'second', completion 'two" in failed(function)
    assert "raised SystemExit: 3, prompt 'first" in failed(lambda prompts, completions, **columns: exit(3))

    def no_gold(prompts, completions, **columns):
        raise UserError("no gold; fix: add it")

    assert refused(no_gold, function=called) == "no gold; fix: add it"


# ---- the time limit ----

def forever(prompts, completions, **columns):
    while True:
        try:
            time.sleep(9)
        except Exception:  # noqa: BLE001
            pass


def stubborn(prompts, completions, **columns):
    try:
        forever(prompts, completions)
    except BaseException:  # noqa: BLE001
        forever(prompts, completions)


@pytest.mark.parametrize("function", [forever, stubborn])
def test_a_reward_that_hangs(function):
    started = time.monotonic()
    assert "took longer than 0.1 s for 2 completions, prompt 'first" in failed(function, 0.1)
    assert time.monotonic() - started < 3 and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_outer_timer_goes_on():
    fired = []
    before = signal.signal(signal.SIGALRM, lambda *_: fired.append(time.monotonic()))
    try:
        started = time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        failed(forever, 0.1)
        assert not fired and called(lambda prompts, completions, **columns: [1, 1]) == [1.0, 1.0]
        while not fired and time.monotonic() < started + 5:
            time.sleep(0.01)
        assert fired and 0.45 < fired[0] - started < 1.5
        signal.setitimer(signal.ITIMER_REAL, 0.2)                                 # shorter than ours
        called(lambda prompts, completions, **columns: time.sleep(0.01) or [1, 1])
        time.sleep(0.4)
        assert len(fired) == 2
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_have_no_limit():
    found = []
    thread = threading.Thread(target=lambda: found.append(called(lambda prompts, completions, **columns: [1, 2], 0.1)))
    thread.start()
    thread.join()
    assert found == [[1.0, 2.0]]


def test_streams_that_a_reward_replaces(tmp_path, capfd):
    """Ours go on, whatever becomes of the reward's, and two files of one name are two modules that pickle
    finds."""
    import pickle
    body = ("import io, sys\n"
            "sys.stdout = io.TextIOWrapper(sys.stdout.buffer, encoding='utf-8')\n"
            "sys.stderr = io.TextIOWrapper(sys.stderr.buffer, encoding='utf-8')\n"
            "def judge(prompts, completions, **columns):\n    return [1.0] * len(completions)\n")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "twice.py").write_text(body)
    functions = [load_reward(f"{tmp_path}/{name}/twice.py:judge")[0].function for name in ("one", "two")]
    assert functions[0] is not functions[1]
    assert all(pickle.loads(pickle.dumps(each)) is each for each in functions)
    import gc
    import sys
    gc.collect()
    print("still there")
    print("here, too", file=sys.stderr)
    sys.stdout.flush()
