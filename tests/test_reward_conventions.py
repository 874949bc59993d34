"""Reward functions as they are written for TRL: async def, completion_ids, arguments that only TRL passes,
message lists; the time limit's key. And `stop`: lists, newlines and commas, from a file and from the command
line."""
import json
import textwrap
import time

import pytest
import yaml
from helpers import byte_tokenizer, prompt_rows, tiny_model, train_here, write_config, write_jsonl

import evaluate
import sample as sampling_program
from data.errors import RunError, UserError
from data.pack import Example
from engine.config import load_config
from engine.options import Sampling, stop_strings
from model.sampler import Stops
from rewards.functions import check_arguments, load_reward, score, score_all

COLUMNS = {"answer": ["1", "22"], "completion_ids": [[1, 2, 3], [4]]}
KEYS = dict(max_completion_length=6, num_generations=2, batch_size=2, lr=1e-3, max_length=64, max_steps=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conventions")
    data = write_jsonl(folder / "prompts.jsonl", prompt_rows(4))
    return {"model": tiny_model(folder / "model"), "data": data}


@pytest.fixture
def load(tmp_path):
    """load(code, names...) -> the rewards of that file."""
    def load(code, *names):
        file = tmp_path / f"mine_{abs(hash(code)) % 10 ** 9}.py"
        file.write_text(textwrap.dedent(code))
        return load_reward(",".join(f"{file}:{name}" for name in names or ("reward",)))
    return load


@pytest.fixture
def run(files, tmp_path):
    def run(*words, **values):
        keys = dict(algorithm="grpo", model=files["model"], data=files["data"], output=tmp_path / "run")
        config = tmp_path / "run.yml"
        config.write_text(yaml.safe_dump({key: str(value) if key != "stop" else value
                                          for key, value in (keys | KEYS | values).items()}))
        train_here(config, *words)
        return tmp_path / "run"
    return run


def values_of(rewards, timeout=60.0):
    return score_all(rewards, ["p", "q"], ["one", "three"], COLUMNS, timeout)


def refused(kind, function, *arguments):
    with pytest.raises(kind) as caught:
        function(*arguments)
    message = str(caught.value)
    assert type(caught.value) is kind and "\n" not in message and "; fix: " in message
    return message


def examples(**columns):
    return [Example([1], [], "x.jsonl:1", {"prompt": "p", "columns": columns})]


# ---- async def ----

MEET = """
    import asyncio, time

    started = []

    async def meet(name, completions):
        started.append(name)
        while len(started) < 2:                        # for ever, if they were awaited one after the other
            await asyncio.sleep(0.001)
        return [float(len(completion)) for completion in completions]

    async def one(prompts, completions, **columns):
        return await meet("one", completions)

    def between(prompts, completions, **columns):
        return [0, None]

    async def other(prompts, completions, answer, **columns):
        return [-value for value in await meet("other", completions)]

    class Judge:
        async def __call__(self, completions, **columns):
            return [1.0 for _ in completions]

    judge = Judge()

    async def fails(completions, **columns):
        await asyncio.sleep(0)
        return [1 / (len(completion) - 5) for completion in completions]

    async def hangs(completions, **columns):
        await asyncio.sleep(99)

    async def blocks(completions, **columns):
        time.sleep(99)

    async def swallows(completions, **columns):
        try:
            await asyncio.sleep(99)
        except BaseException:
            return [0.0 for _ in completions]

    lock = []

    async def swallows_while_it_blocks(completions, **columns):
        try:
            time.sleep(99)
        except BaseException:
            return [0.0 for _ in completions]

    async def of_one_loop(completions, **columns):
        lock.append(asyncio.get_running_loop())
        return [float(lock[0] is lock[-1])] * len(completions)
"""


def test_async_functions_are_awaited_together(load):
    assert values_of(load(MEET, "one", "between", "other")) == [[3.0, 5.0], [0.0, None], [-3.0, -5.0]]
    assert values_of(load(MEET, "judge")) == [[1.0, 1.0]]
    for _ in range(2):                             # a client opened in the first call serves the second one
        assert values_of(load(MEET, "of_one_loop")) == [[1.0, 1.0]]


def test_an_async_function_that_fails(load, recwarn):
    message = refused(RunError, values_of, load(MEET, "judge", "fails"))
    assert message.startswith("reward fails raised ZeroDivisionError")
    assert "prompt 'q', completion 'three'" in message
    slow = ["judge", "hangs"], ["judge", "blocks"], ["judge", "swallows"], ["swallows_while_it_blocks"]
    for names in slow:
        started, name = time.monotonic(), names[-1]
        message = refused(RunError, values_of, load(MEET, *names), 0.1)
        assert message.startswith(f"reward {name} took longer than 0.1 s for 2 completions, ")
        assert message.endswith("; fix: make it faster, or raise reward_timeout")
        assert time.monotonic() - started < 5
    assert values_of(load(MEET, "judge")) == [[1.0, 1.0]]
    sync = "def reward(**columns):\n    raise ValueError\n" + textwrap.dedent(MEET)
    assert "reward reward raised ValueError" in refused(RunError, values_of, load(sync, "judge", "reward"))
    import gc
    gc.collect()
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


# ---- what a function gets ----

def test_completion_ids(load):
    code = """
        def named(completion_ids, **columns):
            return [sum(ids) for ids in completion_ids]

        def unnamed(prompts, completions, **columns):
            return [len(ids) for ids in columns["completion_ids"]]
    """
    assert values_of(load(code, "named", "unnamed")) == [[6.0, 4.0], [3.0, 1.0]]


def test_a_run_passes_the_tokens(run, tmp_path):
    (tmp_path / "tokens.py").write_text(textwrap.dedent("""
        def reward(completions, completion_ids, **columns):
            with open("seen.txt", "w") as file:
                print(repr((completions, completion_ids)), file=file)
            return [float(sum(ids) % 7) for ids in completion_ids]
    """))
    import os
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        run(reward=f"{tmp_path}/tokens.py:reward")
    finally:
        os.chdir(here)
    texts, tokens = eval((tmp_path / "seen.txt").read_text())
    tokenizer = byte_tokenizer()
    assert len(texts) == 4 and {len(ids) for ids in tokens} <= set(range(1, 7))
    assert {type(token) for ids in tokens for token in ids} == {int}
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens] == texts


ARGUMENTS = """
    def fine(prompts, completions, answer, completion_ids, level=3, **columns):
        return [1.0 for _ in completions]

    def state(completions, trainer_state, **columns):
        return [1.0 for _ in completions]

    def logs(completions, log_extra=None, log_metric=None, **columns):
        return [1.0 for _ in completions]

    def verl(solution_str, *, ground_truth, **columns):
        return [1.0]

    def by_place(completions, answer, /, **columns):
        return [1.0 for _ in completions]
"""


def test_arguments_that_nobody_passes(load):
    rows = examples(answer="1") + examples(level=2)
    check_arguments(load(ARGUMENTS, "fine"), rows)
    message = refused(UserError, check_arguments, load(ARGUMENTS, "fine", "state", "logs", "verl"), rows)
    assert message.startswith("reward state takes trainer_state and logs takes log_extra, log_metric and "
                              "verl takes ground_truth, solution_str, but gets prompts, completions, "
                              "completion_ids, answer, level;")
    check_arguments(load(ARGUMENTS, "state"), examples(trainer_state=1))      # a column of that name
    # a column of some rows only is None where a batch has none of them
    level, = load("def reward(completions, level, **columns):\n    return level")
    assert score(level, ["p"], ["c"], {}) == [None]


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_arguments_are_looked_at_before_a_model_is_loaded(words, run, tmp_path, monkeypatch):
    monkeypatch.setattr("model.build.load_lm", None)
    (tmp_path / "arguments.py").write_text(textwrap.dedent(ARGUMENTS))
    message = refused(UserError, lambda: run(*words, reward=f"{tmp_path}/arguments.py:verl"))
    assert "reward verl takes ground_truth, solution_str, but gets prompts, completions, " in message
    assert not (tmp_path / "run").exists()


def test_arguments_without_a_name(load):
    assert "by_place in " in refused(UserError, load, ARGUMENTS, "by_place")


@pytest.mark.parametrize("code", [
    "completion[0]['content']", "completion[-1].get('content')", "completion.content"])
def test_completions_are_strings(code, load):
    body = f"def reward(completions, **columns):\n    return [len({code}) for completion in completions]\n"
    message = refused(RunError, values_of, load(body))
    assert "; fix: a completion is a string here, of a conversation too: write completion where" in message
    another = load("def reward(**columns):\n    return [1 + 'a']")
    assert "is a string here" not in refused(RunError, values_of, another)


# ---- reward_timeout ----

SLOW = "import time\ndef reward(completions, **columns):\n    time.sleep(9)\n"


def test_the_time_limit_is_a_key(run, files, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    reward = f"{tmp_path}/slow.py:reward"
    message = refused(RunError, lambda: run(reward=reward, reward_timeout=0.2))
    assert "took longer than 0.2 s for 4 completions" in message
    assert message.endswith("or raise reward_timeout")
    words = [files["model"], f"data={files['data']}", f"reward={reward}", "reward_timeout=0.2", "limit=2"]
    words.append("max_length=64")
    for main, more in ((evaluate.main, []), (sampling_program.main, ["n=2"])):
        message = refused(RunError, main, [*words, *more, f"output={tmp_path / main.__module__}"])
        assert "reward took longer than 0.2 s" in message and "raise reward_timeout" in message
    write_config(tmp_path / "a.yml", algorithm="grpo", model="m", data="d", reward="gsm8k")
    assert load_config([str(tmp_path / "a.yml")]).config.reward_timeout == 60
    for value in ("0", "-1", "x"):
        assert "reward_timeout (command line)" in refused(
            UserError, load_config, [str(tmp_path / "a.yml"), f"reward_timeout={value}"])


def test_a_run_goes_on_with_another_time_limit(run, tmp_path):
    """The error says to raise it, and the same run continues."""
    (tmp_path / "once.py").write_text(textwrap.dedent("""
        import time
        calls = []
        def reward(completions, **columns):
            calls.append(0)
            time.sleep(9 if len(calls) == 2 else 0)
            return [sum(map(ord, completion)) % 97 for completion in completions]
    """))
    keys = dict(reward=f"{tmp_path}/once.py:reward", max_steps=2, save_every=1)
    refused(RunError, lambda: run(**keys, reward_timeout=0.2))
    done = run(**keys, reward_timeout=5)
    assert "resumed from" in (done / "events.log").read_text() and (done / "final").exists()


# ---- stop ----

STOPS = {      # what stands in a file: the strings that it means
    "stop: </answer>": ["</answer>"],
    "stop: </answer>, </s>": ["</answer>", "</s>"],
    'stop: "\\n\\n"': ["\n\n"],
    'stop: "\\nQuestion:, Q: "': ["\nQuestion:", "Q:"],
    "stop: \\n\\n": ["\n\n"],
    'stop: ["\\n\\n", "Question:"]': ["\n\n", "Question:"],
    "stop:\n- a, b\n- ' c '\n- '\\n'": ["a, b", " c ", "\\n"],
    "stop: [END]": ["END"],
    'stop: "[END]"': ["[END]"],
    "stop: ['null']": ["null"],
    "stop: null": [], "stop: []": [], "": [], "stop: ' '": [],
    "prompt_template: r1_zero": ["</answer>"],
    "prompt_template: r1_zero\nstop: null": [],
    "prompt_template: r1_zero\nstop: END": ["END"],
}
WORDS = {      # the same on a command line
    "stop=</answer>, </s>": ["</answer>", "</s>"], "stop=\\n\\n": ["\n\n"], "stop=\n\n": ["\n\n"],
    'stop=["\\n\\n","Q:"]': ["\n\n", "Q:"], "stop=['a, b']": ["a, b"], "stop=[END]": ["[END]"],
    "stop=[a, b]": ["[a", "b]"], "stop=null": [], "stop=[]": ["[]"], "stop=\\tA": ["\tA"]}


@pytest.fixture
def config(tmp_path):
    def config(text="", *words):
        file = tmp_path / "stop.yml"
        file.write_text(f"algorithm: grpo\nmodel: m\ndata: d\nreward: gsm8k\n{text}\n")
        return load_config([str(file), *words])
    return config


@pytest.mark.parametrize("text", STOPS)
def test_stop_in_a_file(text, config, tmp_path):
    run_config = config(text)
    assert stop_strings(run_config.config.stop) == STOPS[text]
    from engine.config import as_yaml, describe
    # as a run keeps it
    (tmp_path / "config.yaml").write_text(as_yaml(run_config.common, run_config.config))
    assert load_config([str(tmp_path / "config.yaml")]).config.stop == run_config.config.stop
    assert all("\n" not in line for line in describe(run_config))


@pytest.mark.parametrize("word", WORDS)
def test_stop_on_the_command_line(word, config):
    assert stop_strings(config("", word).config.stop) == WORDS[word]


@pytest.mark.parametrize("text, says", [
    ("stop: ','", "stop.yml:5) is ',', which holds no string"),
    ('stop: ["a", ""]', "a list of texts that are not empty"),
    ("stop: [[a]]", "nested value of 'stop'"), ("stop: {a: b}", "nested value of 'stop'"),
    ("lr: [1, 2]", "nested value of 'lr'"), ("max_steps: [3]", "nested value of 'max_steps'"),
    ("learning_rate: [1]", "write lr")])
def test_lists_where_none_may_be(text, says, config):
    assert says in refused(UserError, config, text)


def test_an_algorithm_that_is_a_list(tmp_path):
    (tmp_path / "x.yml").write_text("algorithm: [grpo]\nmodel: m\ndata: d\n")
    assert "nested value of 'algorithm'" in refused(UserError, load_config, [str(tmp_path / "x.yml")])


def test_a_config_of_ones_own_must_not_lose_the_rule():
    class Forgetful(Sampling):
        def __post_init__(self):
            pass
    assert "super().__post_init__()" in refused(UserError, stop_strings, Forgetful("gsm8k").stop)


def test_where_a_completion_ends():
    tokenizer = byte_tokenizer()
    cases = [("\n\n", "a\n", False), ("\n\n", "a\n\n", True), ("\n\n", "a\n b\n", False),
             ("a, b", "a", False), ("a, b", "a, b", True)]
    for stop, text, ends in cases:
        assert Stops(tokenizer, [stop])(tokenizer(text).input_ids) is ends


def test_a_run_its_evaluation_and_its_start_agree(run, files, tmp_path):
    """evaluate.py takes the run's own stops, a list as a list."""
    done = run(reward="gsm8k", stop=["\n\n", "a, b"])
    assert "a completion ends at '\\n\\n' or 'a, b', and at a stop token" in (done / "events.log").read_text()
    assert yaml.safe_load((done / "config.yaml").read_text())["stop"] == ["\n\n", "a, b"]
    words = [str(done), f"data={files['data']}", "reward=gsm8k", "max_length=64", "limit=2"]
    words.append("max_completion_length=6")
    cases = [([], ["\n\n", "a, b"]), (["stop=\\nQ, R"], "\\nQ, R"), (['stop=["\\n"]'], ["\n"]),
             (["stop=null"], None)]
    for number, (more, expected) in enumerate(cases):
        output = tmp_path / f"out-{number}"
        evaluate.main([*words, *more, f"output={output}"])
        settings, = output.glob("*settings.json")
        assert json.loads(settings.read_text())["stop"] == expected
