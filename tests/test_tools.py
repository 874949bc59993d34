"""What stands around training: --dry-run, --help, chat.py."""
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import robust_helpers as child
from helpers import (
    ROOT,
    byte_tokenizer,
    config_of,
    pair_rows,
    prompt_rows,
    run_train,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat import main
from data.errors import UserError
from engine.console import clock


def test_dry_run_shows_everything_and_writes_nothing(tmp_path, capsys):
    rows = pair_rows(9) + [{"prompt": "p", "chosen": "same", "rejected": "same"}]
    model = tiny_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    config = write_config(tmp_path / "c.yml", algorithm="dpo", model=model, data=data, max_length=256,
                          batch_size=4, epochs=2)
    train_here(config, "--dry-run", f"output={tmp_path / 'run'}", "lr=2e-5")
    assert not (tmp_path / "run").exists()
    shown = " ".join(capsys.readouterr().out.split())
    texts = [
        "lr = 2.0e-05 (command line)",
        f"batch_size = 4 ({config}:",
        "beta = 0.1 (default)",
        "10 rows read, 9 examples used",
        "dropped 1: chosen equals rejected",
        "median",
        "[[it is 0 <|im_end|>]]",
        "[[no no no no no 0<|im_end|>]]",
        "9 examples / batch_size 4 = 3 updates per epoch, 6 updates in all",
        "optimizer (AdamW",
        "total",
        "a checkpoint, on the disk",
    ]
    for text in texts:
        assert text in shown, text


def test_dry_run_counts_memory_by_parameters(tmp_path):
    """Against Qwen2's parameters counted by hand: embedding, untied head, and per layer q k v (with biases)
    o, the MLP and two norms."""
    from engine.config import Common
    from engine.dry_run import forecast
    from engine.options import Options
    from model.load import empty_lm
    config = config_of(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, head_dim=128)
    config.save_pretrained(tmp_path)
    attention = 1024 * 1024 + 1024 + 2 * (1024 * 256 + 256) + 1024 * 1024
    layer = attention + 3 * 1024 * 4096 + 2 * 1024
    parameters = 2 * 259 * 1024 + 2 * layer + 1024
    common = Common(algorithm="sft", model=str(tmp_path), data="")
    lines = forecast(common, Options(), empty_lm(config, str(tmp_path)), tokens=100)
    weights, gradients, optimizer, *_, total, checkpoint = (float(line.split()[-2]) for line in lines)
    assert abs(weights - 4e-9 * parameters) < 0.006 and gradients == weights
    assert abs(optimizer - 8e-9 * parameters) < 0.006
    assert 4 * weights < total < 4 * weights + 0.1 and abs(checkpoint - 12e-9 * parameters) < 0.006


def test_dry_run_counts_memory_for_several_devices(tmp_path):
    """A share of weights, gradients and moments; head and embedding whole; each of two copies on half of the
    devices."""
    from engine.config import Common
    from engine.forecast import forecast
    from engine.options import Options
    from model.load import empty_lm
    config = config_of(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, head_dim=128,
                       vocab_size=50000)
    config.save_pretrained(tmp_path)
    attention = 1024 * 1024 + 1024 + 2 * (1024 * 256 + 256) + 1024 * 1024
    layer = attention + 3 * 1024 * 4096 + 2 * 1024
    head = embedding = 50000 * 1024
    parameters = head + embedding + 2 * layer + 1024
    for replicate, world in ((1, 4), (2, 8)):
        common = Common(algorithm="sft", model=str(tmp_path), data="", replicate=replicate)
        lines = forecast(common, Options(), empty_lm(config, str(tmp_path)), tokens=100, world=world)
        sizes = [float(line.split()[-2]) for line in lines]
        weights, gradients, optimizer, whole, *_, checkpoint = sizes
        assert abs(weights - 4e-9 * parameters / 4) < 0.006 and gradients == weights
        assert abs(optimizer - 8e-9 * parameters / 4) < 0.006 and abs(checkpoint - 12e-9 * parameters) < 0.006
        assert abs(whole - 8e-9 * (head + embedding)) < 0.006
    with pytest.raises(UserError, match="replicate is 2, which does not divide the number of processes, 3"):
        forecast(common, Options(), empty_lm(config, str(tmp_path)), tokens=100, world=3)


def test_help_names_every_key():
    asked = [(["--help"], ["micro_batch_tokens", "resume"]), (["algorithm=dpo", "--help"], ["beta"])]
    for words, keys in asked:
        done = run_train(words)
        assert done.returncode == 0
        for key in keys:
            assert f"{key}:" in done.stdout


def test_dry_run_says_how_long_a_run_like_another_one_takes(tmp_path, capsys):
    """9 pairs are counted by hand; the run that tells has 7 s for 50 tokens written into its run.json, or for
    two rollouts."""
    model = tiny_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(9))
    keys = {"model": model, "max_length": 256, "batch_size": 4, "save_every": None, "quiet": True}
    config = write_config(tmp_path / "c.yml", algorithm="dpo", data=data, share_prompt="false", **keys)
    train_here(config, "max_steps=2", f"output={tmp_path / 'runs' / 'a'}")
    started = tmp_path / "runs" / "a" / "run.json"
    written = json.loads(started.read_text())
    assert written["pace"]["updates"] == 2 and 0 < written["pace"]["seconds"] < 600
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = 0
    for row in pair_rows(9):
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        for response in (row["chosen"], row["rejected"]):
            tokens += len(tokenizer(f"{prompt}{response[0]['content']}<|im_end|>").input_ids)

    def shown(*words, **changes):
        started.write_text(json.dumps(written | changes))
        train_here(*words, "--dry-run", f"output={tmp_path / 'runs' / 'b'}")
        return re.findall(r"about (.*), at the pace of (.*),", capsys.readouterr().out)

    pace = {"updates": 2, "tokens": 50, "seconds": 7.0}
    seconds = int(7 * 200 * tokens / 50)
    told = [(clock(seconds), str(tmp_path / "runs" / "a"))]
    assert shown(config, "epochs=200", "beta=0.7", "lr=1", pace=pace) == told
    machine = written["machine"] | {"cores": 1000}
    for words, changes in ((["lora_r=2"], {}), ([], {"machine": machine}), ([], {"world_size": 2})):
        assert shown(config, *words, pace=pace, **changes) == []
    for damaged in (None, 3, {}, {"updates": 1, "tokens": "x", "seconds": 2}, pace | {"tokens": 0}):
        assert shown(config, pace=damaged) == []


def test_dry_run_says_how_long_an_online_run_like_another_one_takes(tmp_path, capsys):
    """By its updates, if these have as many completions."""
    model = tiny_model(tmp_path / "model")
    data = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(4))
    config = write_config(tmp_path / "c.yml", algorithm="grpo", model=model, data=data, max_length=64,
                          batch_size=2, reward="gsm8k", num_generations=2, max_completion_length=4)
    directory = tmp_path / "runs" / "a"
    train_here(config, "max_steps=1", f"output={directory}")
    started = directory / "run.json"
    written = json.loads(started.read_text()) | {"pace": {"updates": 2, "tokens": 9, "seconds": 5000.0}}
    started.write_text(json.dumps(written))
    capsys.readouterr()
    for words, told in ((["max_steps=12"], ["8:20:00"]), (["num_generations=4"], []), (["batch_size=4"], [])):
        train_here(config, *words, "--dry-run", f"output={tmp_path / 'runs' / 'b'}")
        assert re.findall(r"about (.*), at the pace", capsys.readouterr().out) == told


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_ends_early_gets_no_traceback(unbuffered):
    """As `python train.py --help | head` does; the code is that of a program which SIGPIPE ends."""
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "train.py", "--help"]
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=writing, stderr=subprocess.PIPE)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def chat(*arguments, text):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "chat.py", *arguments]
    return subprocess.run(command, cwd=ROOT, input=text, env=environment, capture_output=True, text=True)


def test_chat_through_a_pipe_gives_the_right_answer():
    """The embedded base is right on 99 % of held-out problems when decoded greedily; two turns, the second
    one a new conversation."""
    questions = ["Tom has 23 pens and buys 8 more. How many now?", "",
                 "小明有23个苹果，又买8个，一共几个？", ""]
    done = chat("example/tiny/model", "--temperature", "0", text="\n".join(questions))
    assert done.returncode == 0, done.stderr
    for answer in done.stdout.splitlines():
        assert answer.endswith("<answer>31</answer>")      # and nothing after the stop token
    assert len(done.stdout.splitlines()) == 2


@pytest.fixture
def chat_here(monkeypatch, capsys):
    """Greedy answers to the lines of `text`, from a call in this process."""
    def chat_here(*models, text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        main([*map(str, models), "--temperature", "0", "--max-new-tokens", "12"])
        return capsys.readouterr().out
    return chat_here


def test_chat_with_two_models_side_by_side(tmp_path, chat_here):
    """Each answers under its name what it answers alone, in a conversation of its own: a second turn depends
    on its first answer."""
    one = tiny_model(tmp_path / "one")
    two = tiny_model(tmp_path / "two", seed=1)
    text = "Hello\nAgain\n\nHello\n"
    shown = chat_here(one, two, text=text)
    parts = re.split(rf"\[({one}|{two})\] ", shown)[1:]
    assert parts[::2] == [one, two] * 3
    by_one, by_two = parts[1::4], parts[3::4]
    assert by_one[0] == by_one[2] != by_one[1]
    assert "".join(by_one) == chat_here(one, text=text) != "".join(by_two) == chat_here(two, text=text)


def test_chat_with_an_adapter(tmp_path, chat_here):
    """It answers as the same model with the adapter merged into its weights."""
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "base"))
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
                               task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    byte_tokenizer().save_pretrained(tmp_path / "merged")
    answers = [chat_here(tmp_path / name, text="Hello\n") for name in ("adapter", "merged", "base")]
    assert answers[0] == answers[1] != answers[2]


def test_chat_with_what_is_not_a_model(tmp_path):
    process = child.start(tmp_path, "chat.py", [str(tmp_path)])
    process.join(100)
    said = (tmp_path / child.ERR).read_text()
    assert process.exitcode == 2 and said.startswith("error: ") and said.count("\n") == 1
