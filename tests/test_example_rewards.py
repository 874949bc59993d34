"""The rewards in example/rewards/: a judge, unit tests, a lexicon, a format, reasoning-gym's scorers."""
import importlib.util
import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import (
    ONLINE,
    ROOT,
    messages,
    metrics,
    prompt_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)

from data.errors import RunError
from rewards.functions import load_reward, score

FOLDER = ROOT / "example" / "rewards"


def graded(name, completions, prompts=None, timeout=60.0, **columns):
    reward, = load_reward(f"{FOLDER}/{name}.py:{name}")
    prompts = prompts or ["q"] * len(completions)
    return score(reward, prompts, completions, columns, timeout)


# ---- a judge

class Judge(BaseHTTPRequestHandler):
    """Answers with the number of words; some completions get another answer, or failures first."""
    protocol_version = "HTTP/1.1"
    requests, failures = [], {}

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        answer = text.partition("Answer:\n")[2].partition("\n\nConsider")[0]
        key = self.headers.get("Authorization")
        Judge.requests.append((self.path, key, body["model"], text, time.monotonic()))
        left = Judge.failures.get(answer, [])
        status = left.pop(0) if left else 200
        content = f"Grade: 1 would be low. Fine.\nGrade: {len(answer.split())}"
        if answer == "mute":
            content = "No idea."
        answer = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Nothing on the console."""


class Server(ThreadingHTTPServer):
    request_queue_size = 64      # a connection that finds no place is made again, and the request sent twice


@pytest.fixture
def judge(monkeypatch):
    """The module of the judge, which asks a server here and does not pause for long."""
    server = Server(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Judge.requests, Judge.failures = [], {}
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
    monkeypatch.setenv("JUDGE_MODEL", "wise")
    module, = {reward.function.__globals__["__name__"]: reward.function.__globals__
               for reward in load_reward(f"{FOLDER}/judge.py:judge")}.values()
    monkeypatch.setitem(module, "FIRST_PAUSE", 0.05)
    monkeypatch.setitem(module, "sent", itertools.count())
    yield module
    server.shutdown()
    server.server_close()


def test_a_judge_grades_every_completion(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    prompts = ["Say {braces}", messages("first", "turn", "second"), "c", "d"]
    completions = ["one two three", "w " * 30, "mute", ""]
    assert graded("judge", completions, prompts) == [0.3, 1.0, None, 0.0]
    paths, keys, names, texts, _ = zip(*Judge.requests)
    assert set(paths) == {"/v1/chat/completions"}
    assert set(keys) == {"Bearer secret"} and set(names) == {"wise"}
    assert any("Question:\nSay {braces}\n" in text for text in texts)
    assert any("user: first\n\nassistant: turn\n\nuser: second" in text for text in texts)


def test_what_may_pass_is_asked_again(judge):
    Judge.failures = {"busy": [429, 503], "down": [500] * 10, "wrong key": [401] * 2}
    assert graded("judge", ["busy", "fine words"]) == [0.1, 0.2]
    times = [request[4] for request in Judge.requests if "Answer:\nbusy" in request[3]]
    assert len(times) == 3 and times[1] - times[0] >= 0.05 and times[2] - times[1] >= 0.1
    with pytest.raises(RunError, match="500"):      # the run asks once more, to tell which completion fails
        graded("judge", ["down"])
    assert sum("Answer:\ndown" in request[3] for request in Judge.requests) == 2 * 5
    with pytest.raises(RunError, match="401"):
        graded("judge", ["wrong key"])
    assert sum("Answer:\nwrong key" in request[3] for request in Judge.requests) == 2


def test_a_judge_has_a_limit_and_needs_settings(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_CALLS", "3")
    with pytest.raises(RunError, match="3 requests were sent to the judge; fix: raise JUDGE_CALLS"):
        graded("judge", list("abcde"))
    assert len(Judge.requests) <= 3
    monkeypatch.setenv("JUDGE_URL", "")
    monkeypatch.setitem(judge, "sent", itertools.count())
    with pytest.raises(RunError, match="JUDGE_URL is not set"):
        graded("judge", ["a"])


def test_training_with_a_judge(judge, tmp_path):
    """Its mean is logged, and every completion was graded."""
    data = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(4))
    keys = ONLINE["grpo"] | dict(algorithm="grpo", model=tiny_model(tmp_path / "model"), data=data)
    keys |= dict(max_length=200, output=tmp_path / "run", max_steps=2)
    keys |= dict(batch_size=2, num_iterations=1, num_generations=4)
    train_here(write_config(tmp_path / "config.yml", **keys | {"reward": f"{FOLDER}/judge.py:judge"}))
    assert len(Judge.requests) == 2 * 4      # the two updates are made from one rollout
    assert all(0 <= row["reward"] <= 1 for row in metrics(tmp_path / "run"))


# ---- unit tests

ADD = "def add(a, b):\n    return a + b"
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 5", "assert add('a', 'b') == 'ab'"]


def test_the_share_of_tests_that_pass():
    last_block = f"Here:\n```python\nx = 1\n```\nBetter:\n```python\n{ADD}\n```"
    wrong = "```py\ndef add(a, b): return 3\n```"
    completions = [last_block, ADD, "def add(:", "no code", wrong, ADD]
    expected = [2 / 3, 2 / 3, 0.0, 0.0, 1 / 3, None]
    assert graded("unit_tests", completions, tests=[TESTS] * 5 + [None]) == pytest.approx(expected)


@pytest.mark.parametrize("completion", [
    f"Install:\n```bash\npip install x\n```\nThen:\n```python\n{ADD}\n```",
    f"```Python\n{ADD}\n```",
    f"```python3\n{ADD}\n```",
    f"```\n{ADD}\n```\nIt prints:\n```text\n3\n```",
    f"```python\r\n{ADD}\r\n```\r\n",
    f"The code: ```py \n{ADD}```",
    f"Use ```add``` here.\n```python\n{ADD}\n```",
    "1. The code:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
])
def test_the_code_of_a_completion(completion):
    assert graded("unit_tests", [completion], tests=[TESTS]) == pytest.approx([2 / 3])


@pytest.mark.parametrize("code", [
    "while True: pass",
    "x = bytearray(2 ** 31)",
    "open('file', 'wb').write(b'0' * 2 ** 22)\ndef add(a, b): return a + b",
    "import os\nos._exit(0)",
    "print('0' * 32, 3)",
    "while True: print('x' * 4096)",
    "import subprocess\nsubprocess.Popen(['sleep', '60'])\nwhile True: pass",
    "raise SystemExit",
])
def test_code_that_misbehaves_scores_nothing(code, monkeypatch):
    reward, = load_reward(f"{FOLDER}/unit_tests.py:unit_tests")
    monkeypatch.setitem(reward.function.__globals__, "SECONDS", 2)
    started = time.monotonic()
    assert graded("unit_tests", [code], tests=[TESTS]) == [0.0]
    assert time.monotonic() - started < 30


def test_code_sees_no_variables_of_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    monkeypatch.chdir(tmp_path)
    code = "import os\nvalues = (os.environ.get('JUDGE_KEY'), os.listdir())\nopen('left', 'w').write('x')"
    assert graded("unit_tests", [code], tests=[["assert values == (None, [])"]]) == [1.0]
    assert list(tmp_path.iterdir()) == []


# ---- a format

def test_the_format_alone():
    """Also of a completion that opens <think> itself, and with a wrong answer."""
    right = ["so 5. </think> <answer> 5 </answer>", "<think>2+3=6</think> <answer>6</answer>\n"]
    wrong = ["5", "<answer>5</answer>", "</think><answer>5</answer>", "</think> <answer>5</answer> or 6", "",
             "</think> <answer>4</answer> </think> <answer>5</answer>", "</think> <answer>5",
             "</think> so <answer>5</answer>"]
    assert graded("in_format", right + wrong) == [1.0] * len(right) + [0.0] * len(wrong)


# ---- a lexicon

def test_the_weights_of_a_lexicon(monkeypatch, tmp_path):
    (tmp_path / "words.txt").write_text("thanks\n\nplease 0.5\nStupid -2\ndon't 4\n", encoding="utf-8")
    monkeypatch.setenv("LEXICON", str(tmp_path / "words.txt"))
    completions = ["Thanks, please!", "you STUPID thing", "", "I don't", "nothing here"]
    assert graded("lexicon", completions) == pytest.approx([0.75, -2 / 3, 0.0, 2.0, 0.0])
    (tmp_path / "other.txt").write_text("good\nbad minus\n")
    monkeypatch.setenv("LEXICON", str(tmp_path / "other.txt"))
    with pytest.raises(RunError, match=r"other.txt:2 has no number after bad"):
        graded("lexicon", ["x"])
    monkeypatch.delenv("LEXICON")
    with pytest.raises(RunError, match="LEXICON is not set"):
        graded("lexicon", ["x"])


# ---- reasoning-gym

@pytest.mark.skipif(not importlib.util.find_spec("reasoning_gym"), reason="needs reasoning-gym")
def test_reasoning_gyms_own_scores():
    import reasoning_gym
    rows = list(reasoning_gym.create_dataset("chain_sum", size=3, seed=1))
    right = [row["answer"] for row in rows]
    completions = [right[0], f"So <answer> {right[1]} </answer> it is", "nothing"]
    columns = {"answer": right, "metadata": [row["metadata"] for row in rows]}
    scores = graded("reasoning", completions, **columns)
    assert scores[:2] == [1.0, 1.0] and scores[2] < 0.1
    assert graded("reasoning", ["1"], answer=["1"], metadata=[None]) == [None]
