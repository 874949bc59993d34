"""chat.py at a terminal: who answers, what can be asked, how a line is typed, and how to leave."""
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import robust_helpers as child
import torch
from helpers import ROOT, byte_tokenizer, messages, refused, tiny_model, write_jsonl
from transformers import AutoModelForCausalLM

from chat import KEYS, Speaker, parser, with_dashes
from engine.greeting import form_of_questions, questions, usual_temperature
from model.load import check_name


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_with(folder, **config):
    """A directory with the config.yaml of a run."""
    values = {"algorithm": "dpo", "eval_data": "null", "columns": "null"} | config
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for key, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"{key}: {text}\n")
    (folder / "config.yaml").write_text("".join(lines))
    return str(folder)


# ---- what a run knows

def test_questions_are_held_out_prompts(here):
    """The first short ones of the held-out rows, each once; of the training rows where there are none."""
    long = {"prompt": messages("word " * 60), "chosen": "a", "rejected": "b"}
    lines = {"prompt": "two\nlines", "chosen": "a", "rejected": "b"}
    first = {"prompt": messages("Hi", "Hello", "What is 1+1?"), "chosen": "2", "rejected": "3"}
    other = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
    last = {"prompt": "x", "chosen": "a", "rejected": "b"}
    held_out = write_jsonl(here / "held.jsonl", [long, lines, first, first, other, last])
    rows = write_jsonl(here / "rows.jsonl", [{"Ask": "Training?", "chosen": "a", "rejected": "b"}])
    columns = {"prompt": "Ask"}
    assert questions(run_with(here / "a", data=rows, eval_data=held_out)) == ["What is 1+1?", "2+2="]
    assert questions(run_with(here / "b", data=rows, columns=columns)) == ["Training?"]
    listed = [{"path": rows, "columns": columns}]
    assert questions(run_with(here / "c", data=held_out, eval_data=listed)) == ["Training?"]
    os.makedirs(here / "c" / "final")
    assert questions(str(here / "c" / "final")) == ["Training?"]


def test_questions_that_cannot_be_known(here, monkeypatch):
    monkeypatch.setattr("data.hub.why_unreachable", lambda *_: pytest.fail("the hub was asked"))
    assert questions(run_with(here / "a", data="gone.jsonl")) == []
    assert questions(run_with(here / "b", data="Anthropic/hh-rlhf:test")) == []
    assert questions(run_with(here / "c", data="hh")) == []
    assert questions(str(here)) == questions("gpt2") == []


@pytest.mark.parametrize("reward, temperature", [
    ("r1_zero", 0), ("gsm8k", 0), ("my.py:score", 0), ("runs/rm, math", 0),
    ("runs/rm", 0.7), ("owner/name", 0.7), ("null", 0.7)])
def test_verified_answers_are_greedy(reward, temperature, here):
    (here / "runs" / "rm").mkdir(parents=True)
    assert usual_temperature(run_with(here / "run", algorithm="grpo", reward=reward)) == temperature


def test_other_models_are_sampled(here):
    assert usual_temperature(run_with(here / "run")) == usual_temperature("gpt2") == 0.7


# ---- how a question is put

NO_KEYS = SimpleNamespace(chat_template=None, system_prompt=None, chat_template_kwargs=None, temperature=1.0,
                          max_new_tokens=60)


def test_a_run_is_asked_as_it_was_trained(here, capsys):
    """In its prompt template, unless a key of the chat template is given; each line by itself."""
    (here / "own.prompt").write_text("Q: {question} A:")
    tiny_model(here / "run" / "final")
    run = run_with(here / "run", prompt_template="own.prompt", stop="null")
    assert form_of_questions(run, NO_KEYS) == ("Q: {question} A:", [])
    assert "every line is a question of its own, in prompt_template own.prompt" in capsys.readouterr().err
    with_system = SimpleNamespace(**vars(NO_KEYS) | {"system_prompt": "Be brief."})
    assert form_of_questions(run, with_system) == (None, [])
    assert form_of_questions("gpt2", NO_KEYS) == (None, [])
    speaker = Speaker(run, NO_KEYS)
    speaker.answer("1+1?")
    torch.manual_seed(0)
    speaker.answer("2+2?")
    reply = speaker.messages[-1]["content"]
    asked = speaker.tokenizer("Q: 2+2? A:").input_ids
    torch.manual_seed(0)
    output = speaker.lm.generate(torch.tensor([asked]), do_sample=True, top_k=0, max_new_tokens=60,
                                 eos_token_id=258, pad_token_id=258)
    assert reply == speaker.tokenizer.decode(output[0, len(asked):], skip_special_tokens=True)

    end = re.search("[A-Za-z]", reply).end()
    speaker = Speaker(run_with(here / "run", prompt_template="own.prompt", stop=reply[end - 1]), NO_KEYS)
    torch.manual_seed(0)
    speaker.answer("2+2?")
    assert speaker.messages[-1]["content"] == reply[:end]
    (here / "own.prompt").unlink()
    assert "own.prompt, the prompt_template of" in refused(form_of_questions, run, NO_KEYS)


@pytest.mark.parametrize("norm", ["input_layernorm", "norm"])
def test_an_adapter_with_norms_over_a_base_in_bf16(norm, here):
    """Its norms are in fp32, the layers that read their output in bf16."""
    peft = pytest.importorskip("peft")
    tiny_model(here / "base")
    lm = AutoModelForCausalLM.from_pretrained(here / "base", dtype=torch.bfloat16)
    lm.save_pretrained(here / "base")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[norm], task_type="CAUSAL_LM")
    model = peft.get_peft_model(lm, settings)
    model.save_pretrained(here / "adapter")
    byte_tokenizer().save_pretrained(here / "adapter")
    replies = []
    for path in ("base", "adapter"):                   # which changes nothing
        speaker = Speaker(str(here / path), SimpleNamespace(**vars(NO_KEYS) | {"temperature": 0}))
        speaker.answer("1+1?")
        assert speaker.lm.dtype == torch.bfloat16
        replies.append(speaker.messages[-1]["content"][:8])
    assert replies[0] == replies[1] != ""


# ---- the command line

def test_both_forms_of_an_option(here):
    words = ["runs/x", "temperature=0", "max_new_tokens=7", "--seed=3", "chat-template-kwargs={a: 1}"]
    args = parser().parse_args(with_dashes(words))
    assert (args.model, args.temperature, args.max_new_tokens, args.seed) == (["runs/x"], 0, 7, 3)
    assert args.chat_template_kwargs == {"a": 1}
    said = refused(with_dashes, ["m", "temprature=0"])
    assert "unknown key 'temprature' (command line); fix: write temperature" in said
    (here / "lr=3").mkdir()
    assert with_dashes(["lr=3", "runs/a/lr=1"]) == ["lr=3", "runs/a/lr=1"]


def test_every_option_has_both_forms():
    shown = parser().format_help()
    assert all(f"--{key} " in shown for key in KEYS)
    assert len([word for word in shown.split() if word.startswith("--")]) >= len(KEYS)


def test_an_unknown_run_lists_the_runs(here, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("tiny-dpo", "tiny-grpo"):
        run_with(here / "runs" / name)
    said = refused(check_name, "runs/tiny")
    assert "there is no directory runs/tiny (runs holds tiny-dpo, tiny-grpo)" in said
    said = refused(check_name, "tiny-dp")
    assert "(runs holds tiny-dpo, tiny-grpo)" in said
    assert "runs holds" not in refused(check_name, "owner/tiny")


# ---- at a terminal

class Terminal:
    """`python chat.py words...` in a terminal."""

    def __init__(self, directory, *words):
        self.ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, str(ROOT / "chat.py"), *words], cwd=directory,
                                        stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
        os.close(theirs)

    def until(self, end, typed=b""):
        """Type something; what is shown until `end`."""
        os.write(self.ours, typed)
        shown, limit = b"", time.monotonic() + 100
        while end not in shown and time.monotonic() < limit:
            if select.select([self.ours], [], [], 0.2)[0]:
                try:
                    shown += os.read(self.ours, 4096)
                except OSError:               # the other side has left
                    break
        assert end in shown, shown.decode()
        return shown.decode().replace("\r", "")


def test_a_conversation_at_a_terminal(here):
    """It greets, the arrow key brings the last line back, and Ctrl-D leaves."""
    child.project(here / "p", "dpo", tiny_model(here / "model"), output="runs/small", max_steps=1)
    assert child.train(here / "p").code == 0
    terminal = Terminal(here / "p", "runs/small", "temperature=0", "max_new_tokens=8")
    greeting = terminal.until(b"> ").splitlines()
    assert greeting[-5].startswith("runs/small: ") and greeting[-5].endswith("K parameters, greedy answers")
    assert greeting[-4:-2] == ["try: Q50: what is it? what is it? what is it?", "try: Q51: what is it?"]
    assert greeting[-2:] == ["An empty line starts a new conversation; Ctrl-D leaves.", "> "]
    first = terminal.until(b"\n> ", b"Hello\n")
    assert first.startswith("Hello\n") and first.count("\n") >= 2
    terminal.until(b"\n> ", b"\n")                                      # a new conversation
    again = terminal.until(b"\n> ", b"\x1b[A\n")
    assert again == first
    os.write(terminal.ours, b"\x04")
    assert terminal.process.wait(20) == 0
