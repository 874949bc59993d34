"""What stands around training: --dry-run, --help, chat.py."""
import io
import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import robust_helpers as child
import torch
from helpers import (
    ROOT,
    byte_tokenizer,
    config_of,
    pair_rows,
    prompt_rows,
    random_lm,
    run_train,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from chat import main
from data.errors import UserError
from data.pack import Example, Response
from engine.config import Common
from engine.console import clock
from engine.forecast import activation_bytes, forecast
from engine.options import Options
from model import lora
from model.build import checkpoint_layers, patch_gated_mlps
from model.load import empty_lm
from model.policy import Policy


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


def on_a_gpu(monkeypatch):
    """Let the forecast be that for an H100."""
    properties = SimpleNamespace(total_memory=85e9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr("engine.forecast.this_device", lambda: torch.device("cuda"))


def sizes_in(lines):
    """{the first word of a line of the forecast: its GB}"""
    sizes = {}
    for line in lines:
        first, *_, size, _ = line.split()
        sizes[first] = float(size)
    return sizes


def saved_bytes(policy, length):
    """The bytes that autograd saves in a forward over one row of so many tokens."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor
    prompt, response = np.arange(length) % 256, np.arange(9)
    example = Example(prompt, [Response.all_trained(response)], "here:1")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy(policy.collate([example]))
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("precision, lora_r, base", [
    ("fp32", 0, torch.float32), ("bf16", 0, torch.float32), ("bf16", 4, torch.float32),
    ("bf16", 4, torch.bfloat16)])
def test_the_forecast_is_what_layers_keep(precision, lora_r, base, recomputed, monkeypatch):
    """To 5 %, per token and layer: two layers more, and 200 tokens more. Adapters have a base in bf16 on a
    GPU only."""
    common = Common("sft", "", "", precision=precision, lora_r=lora_r, gradient_checkpointing=recomputed)
    if base == torch.bfloat16:
        on_a_gpu(monkeypatch)
    wide = dict(hidden_size=128, intermediate_size=512, num_attention_heads=8, head_dim=16)
    kept, counted = [], []
    for layers in (2, 4):
        settings = config_of(**wide, num_hidden_layers=layers)
        counted.append(activation_bytes(common, settings, 200, precision == "bf16", lora_r > 0))
        lm = random_lm(settings).to(base)
        if lora_r:
            lora.attach(lm, lora.new_settings(common, lm))
        patch_gated_mlps(lm)
        if recomputed:
            checkpoint_layers(lm, "")
        policy = Policy(lm, precision)
        kept.append(saved_bytes(policy, 300) - saved_bytes(policy, 100))
    assert counted[1] - counted[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


def test_the_forecast_of_layers_that_are_recomputed():
    """A token of two of them in bf16: both inputs in fp32, all of one layer, and what is behind the last."""
    settings = config_of(hidden_size=128, intermediate_size=512, num_attention_heads=8, head_dim=16)
    common = Common("sft", "", "", precision="bf16", gradient_checkpointing=True)
    layer = 32 * 128 + 4 * 32 + 4 * 512
    assert activation_bytes(common, settings, 1, True, False) == 2 * 4 * 128 + layer + 16 * 128


HALF = dict(hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            intermediate_size=4864, vocab_size=151936, tie_word_embeddings=True)
LARGER = HALF | dict(hidden_size=1536, num_hidden_layers=28, num_attention_heads=12, intermediate_size=8960)
SEVEN = dict(hidden_size=3584, num_hidden_layers=2, num_attention_heads=28, num_key_value_heads=4,
             intermediate_size=18944, vocab_size=152064, tie_word_embeddings=False)


@pytest.mark.parametrize("shape, tokens, is_compiled, peak", [
    (HALF, 8192, False, 17.6), (HALF, 32768, False, 45.7), (SEVEN, 8192, False, 26.4),
    (LARGER, 8192, False, 42.0), (LARGER, 16384, False, 61.2),
    (HALF, 8192, True, 15.3), (HALF, 32768, True, 34.9), (SEVEN, 8192, True, 26.0),
    (SEVEN, 16384, True, 28.7), (SEVEN | {"num_hidden_layers": 6}, 16384, True, 49.7),
    (LARGER, 8192, True, 36.9), (LARGER, 16384, True, 50.5), (LARGER, 24576, True, 64.2),
    (LARGER, 28672, True, 71.2)])
def test_the_forecast_is_what_an_h100_measured(shape, tokens, is_compiled, peak, monkeypatch):
    """To 5 %: peak GB of dpo with varlen, one micro-batch per update, at commit b614694 or later. With
    several micro-batches the gradients of the first are there while the next one is computed."""
    on_a_gpu(monkeypatch)
    common = Common("dpo", "/nonexistent", "", precision="bf16", compile="true" if is_compiled else "false")
    totals = []
    for in_one in (True, False):
        lm = empty_lm(Qwen2Config(**shape), "")
        sizes = sizes_in(forecast(common, Options(), lm, tokens, in_one=in_one))
        totals.append(sizes["total"])
    assert totals[0] == pytest.approx(peak, rel=0.05)
    assert totals[1] - totals[0] == pytest.approx(sizes["gradients,"], abs=0.02)


@pytest.mark.parametrize("micro_batch_tokens, epochs, in_one", [
    (8192, 2, True), (128, 2, False), (340, 1, True), (340, 2, False)])
def test_the_forecast_is_told_of_updates_and_micro_batches(
        micro_batch_tokens, epochs, in_one, tmp_path, monkeypatch):
    """The updates of the first epoch have at most 323 tokens, the four largest pairs 357."""
    told = []

    def stand_in(common, config, lm, tokens, online, world, updates, in_one):
        told.append((updates, in_one))
        return []
    monkeypatch.setattr("engine.dry_run.forecast", stand_in)
    data = write_jsonl(tmp_path / "pairs.jsonl", pair_rows(9))
    keys = dict(model=tiny_model(tmp_path / "model"), data=data, max_length=128, batch_size=4, epochs=epochs)
    config = write_config(tmp_path / "c.yml", algorithm="dpo", micro_batch_tokens=micro_batch_tokens, **keys)
    train_here(config, "--dry-run")
    assert told == [(3 * epochs, in_one)]


def test_the_forecast_of_a_critic(monkeypatch):
    """Its trunk keeps as much of a micro-batch as the policy's."""
    class WithCritic(Options):
        def uses_critic(self):
            return True

    found = []
    for config in (Options(), WithCritic()):
        lm = empty_lm(Qwen2Config(**HALF), "")
        found.append(sizes_in(forecast(Common("ppo", "", "", precision="bf16"), config, lm, 8192)))
    for part in ("bf16", "one"):
        assert found[1][part] == pytest.approx(2 * found[0][part], abs=0.02)


@pytest.mark.parametrize("values, updates, is_compiled", [
    ({}, 200, True), ({}, 199, False), ({"deterministic": True}, 200, False),
    ({"attn_implementation": "segments"}, 200, False), ({"compile": "false"}, 200, False),
    ({"compile": "true"}, 1, True)])
def test_the_forecast_of_compiled_layers(values, updates, is_compiled, monkeypatch):
    """Of two processes' layers only those that will be compiled keep bf16 copies of their weights, without
    the head; those of one process always do."""
    on_a_gpu(monkeypatch)
    common = Common("sft", "", "", **values)
    copies = 2e-9 * 2 * (2 * 3584 * (3584 + 512) + 3 * 3584 * 18944)      # two layers, biases left out
    for world in (1, 2):
        lm = empty_lm(Qwen2Config(**SEVEN), "")
        lines = forecast(common, Options(), lm, 100, world=world, updates=updates)
        has_copies = world == 1 or is_compiled
        assert sizes_in(lines).get("bf16") == (pytest.approx(copies, abs=0.01) if has_copies else None)
        assert not any("keep less" in line for line in lines)
    adapted = Common("sft", "", "", lora_r=4, **values)
    lines = forecast(adapted, Options(), empty_lm(Qwen2Config(**SEVEN), ""), 100, updates=updates)
    assert any("compiled layers keep less" in line for line in lines) == is_compiled


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
