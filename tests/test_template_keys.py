"""chat_template, system_prompt and chat_template_kwargs: every program renders by them, and final/ holds what
was trained."""
import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from helpers import (
    CHATML,
    REWARDS,
    byte_tokenizer,
    messages,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import AutoTokenizer

import chat
import evaluate
import sample
from data.errors import RunError, UserError
from data.templates import end_with_last_turn, set_template
from data.tokenise import Tokeniser, stop_ids
from engine.cast import cast
from engine.config import load_config

SYSTEM = 'Say "no"\nto {{ user }} and {% all %}: \\n, 你好 😀'
SWITCH = "{% if quick is defined and quick %}QUICK {% endif %}" + CHATML
BEGIN = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


def changed(tokenizer, **values):
    """(the tokenizer, what was told) with these keys."""
    told = []
    keys = dict.fromkeys(("chat_template", "system_prompt", "chat_template_kwargs"))
    set_template(tokenizer, SimpleNamespace(**keys | values), told.append)
    return tokenizer, told


def begin(tokenizer, *turns):
    prompt = messages(*turns) if isinstance(turns[0], str) else turns
    return tokenizer.decode(Tokeniser(tokenizer).prompt_ids(prompt))


def test_a_system_prompt_is_rendered_as_it_is_written():
    tokenizer, _ = changed(byte_tokenizer(), system_prompt=SYSTEM)
    assert begin(tokenizer, "q") == f"<|im_start|>system\n{SYSTEM}<|im_end|>\n{BEGIN}"
    own = [{"role": "system", "content": "mine"}, {"role": "user", "content": "q"}]
    assert begin(tokenizer, *own) == f"<|im_start|>system\nmine<|im_end|>\n{BEGIN}"
    again, _ = changed(tokenizer, system_prompt="Another.")            # of a run that starts from such a run
    assert begin(again, "q") == f"<|im_start|>system\nAnother.<|im_end|>\n{BEGIN}"


def test_a_template_of_parts_gets_a_system_prompt_in_parts():
    content = "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    parts = "{% for m in messages %}{{ m['role'] }}:" + content + "<|im_end|>{% endfor %}"
    tokenizer, _ = changed(byte_tokenizer(parts), system_prompt="Be brief.")
    assert begin(tokenizer, "q") == "system:Be brief.<|im_end|>user:q<|im_end|>"


@pytest.mark.parametrize("value, shown", [
    (True, "QUICK "), (False, ""), (None, ""), ("x", "QUICK "), ([1], "QUICK ")])
def test_variables_of_a_template(value, shown):
    tokenizer, _ = changed(byte_tokenizer(SWITCH), chat_template_kwargs={"quick": value})
    assert begin(tokenizer, "q") == shown + BEGIN
    said = tokenizer.apply_chat_template(
        messages("q"), tokenize=False, quick=True, add_generation_prompt=True)
    assert said == "QUICK " + BEGIN                    # a server's own argument still wins


def test_a_null_within_a_variable():
    template = "{% if levels.low is none %}NONE {% endif %}" + CHATML
    values = {"levels": {"low": None, "high": [True]}}
    tokenizer, _ = changed(byte_tokenizer(template), chat_template_kwargs=values)
    assert begin(tokenizer, "q") == "NONE " + BEGIN


def test_named_templates_are_all_changed():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "TOOLS " + CHATML}
    changed(tokenizer, system_prompt="Be brief.")
    for name, start in {"default": "", "tool_use": "TOOLS "}.items():
        said = tokenizer.apply_chat_template(messages("q"), chat_template=name, tokenize=False)
        assert said.startswith(f"{start}<|im_start|>system\nBe brief.<|im_end|>\n")


TURNS = "{% for m in messages %}{{ m.role }}: {{ m.content }}"


@pytest.mark.parametrize("template, ends", [
    (TURNS + "<|im_end|>\n{% endfor %}\n", "user: q<|im_end|>\nassistant: a<|im_end|>"),
    ("\n" + TURNS + "<|im_end|>{% endfor %}end\n\n", "\nuser: q<|im_end|>assistant: a<|im_end|>"),
    (TURNS + "<|im_end|>\n{% endfor %}{{ 'end' if not add_generation_prompt }}",
     "user: q<|im_end|>\nassistant: a<|im_end|>"),
    (TURNS + "\n{% endfor %}", "user: q\nassistant: a<|im_end|>"),      # no end of turn: eos, as in training
])
def test_what_a_template_writes_behind_the_last_turn_is_left_out(template, ends):
    tokenizer = byte_tokenizer({"default": template, "again": template})
    end_with_last_turn(tokenizer)
    for name in ("default", "again"):
        said = tokenizer.apply_chat_template(messages("q", "a"), chat_template=name, tokenize=False)
        assert said == ends


def test_without_a_template_nothing_is_left_out():
    tokenizer = byte_tokenizer(chat_template=False)
    end_with_last_turn(tokenizer)
    assert tokenizer.chat_template is None


# as the models' own cards show them
CARDS = {
    "chatml": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
              "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\ns<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "[INST] s\n\nq [/INST] a<|im_end|>[INST] r [/INST]",       # its eos, here <|im_end|>
    "gemma": "<start_of_turn>user\ns\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
             "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n",
}


@pytest.mark.parametrize("name", CARDS)
@pytest.mark.parametrize("bos", [False, True])
def test_built_in_templates(name, bos):
    tokenizer = byte_tokenizer(chat_template=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>"]})
    if bos:
        from tokenizers.processors import TemplateProcessing
        tokenizer.bos_token = "<|endoftext|>"
        with_bos = TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
        tokenizer.backend_tokenizer.post_processor = with_bos
    tokenizer, told = changed(tokenizer, chat_template=name)
    turns = [{"role": "system", "content": "s"}, *messages("q", "a", "r")]
    assert begin(tokenizer, *turns) == ("<|endoftext|>" if bos else "") + CARDS[name]
    assert told == [] and len(stop_ids(tokenizer)) == (1 if name in ("chatml", "mistral") else 2)


def test_a_built_in_template_whose_tokens_are_missing_is_told():
    _, (told,) = changed(byte_tokenizer(chat_template=False), chat_template="gemma")
    assert told == ("chat_template gemma: the tokenizer has no token with which it ends a turn; "
                    "<|im_end|> ends a response")


@pytest.mark.parametrize("template, values, says", [
    (False, {"system_prompt": "s"},
     "system_prompt is given, but the tokenizer has no chat template; fix: add chat_template: chatml"),
    (False, {"chat_template_kwargs": {"a": 1}},
     "chat_template_kwargs is given, but the tokenizer has no chat template"),
    (True, {"chat_template_kwargs": {"quick": True}},
     "the chat template does not read 'quick'; fix: remove it"),
    (SWITCH, {"chat_template_kwargs": {"quik": True}}, "does not read 'quik'; fix: write quick"),
    (True, {"chat_template": "chatm"},
     "'chatm' is neither one of chatml, gemma, llama3, mistral nor a UTF-8 file (FileNotFoundError); "
     "fix: give chatml"),
    (True, {"chat_template": "tests"}, "(IsADirectoryError); fix: give "),
    ("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}",
     {"system_prompt": "s y s"}, "system_prompt: the chat template leaves out a system turn"),
    ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
     "{{ messages[-1]['content'] }}",
     {"system_prompt": "s"}, "system_prompt: the chat template refuses a system turn"),
])
def test_what_is_refused(template, values, says):
    with pytest.raises(UserError) as error:
        changed(byte_tokenizer(template), **values)
    assert says in str(error.value)


def test_the_keys_are_read_from_the_file_and_the_command_line(tmp_path):
    path = tmp_path / "x.yml"
    path.write_text("algorithm: sft\nmodel: m\ndata: d\nsystem_prompt: |\n  One.\n  Two.\n"
                    "chat_template_kwargs:\n  enable_thinking: no\n  levels: {low: [1, 2.5, null]}\n")
    common = load_config([str(path)]).common
    assert common.system_prompt == "One.\nTwo."
    assert common.chat_template_kwargs == {"enable_thinking": False, "levels": {"low": [1, 2.5, None]}}
    words = ["chat_template_kwargs={enable_thinking: true}", "system_prompt=null"]
    common = load_config([str(path), *words]).common
    assert (common.chat_template_kwargs, common.system_prompt) == ({"enable_thinking": True}, None)
    wrong = ("on", "[1]", "{1: 2}", "{a b: 2}", "{a: .nan}", "{a: 2020-01-01}", "{a: ",
             "!!python/name:os.system x")
    for text in wrong:
        with pytest.raises(ValueError, match="a mapping such as {enable_thinking: false}"):
            cast(text, dict | None)


def test_a_run_with_all_keys(tmp_path, capsys, monkeypatch):
    """What is trained, what final/ holds, and that evaluate.py, sample.py and chat.py start with the same
    ids."""
    template = tmp_path / "own.jinja"
    template.write_text(SWITCH)
    model = tiny_model(tmp_path / "model", chat_template=False, max_position_embeddings=1024)
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages("q", "a")}] * 2)
    keys = {"chat_template": template, "system_prompt": "Be brief.", "chat_template_kwargs": "{quick: true}"}
    config = write_config(tmp_path / "x.yml", algorithm="sft", model=model, data=data,
                          output=tmp_path / "run", max_steps=1, max_length=200, **keys)
    train_here(config)
    start = "QUICK <|im_start|>system\nBe brief.<|im_end|>\n" + BEGIN
    shown = capsys.readouterr().err.splitlines()
    assert f"prompt    {start!r}" in shown and "response  '[[a<|im_end|>]]'" in shown
    final = AutoTokenizer.from_pretrained(tmp_path / "run" / "final")
    assert final.apply_chat_template(messages("q"), tokenize=False, add_generation_prompt=True) == start
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert stored["chat_template_kwargs"] == {"quick": True} and stored["system_prompt"] == "Be brief."

    seen = []
    original = Tokeniser.prompt_ids

    def watched(self, prompt):
        seen.append(original(self, prompt))
        return seen[-1]

    monkeypatch.setattr(Tokeniser, "prompt_ids", watched)
    no_keys = SimpleNamespace(**dict.fromkeys(keys), temperature=0.0, max_new_tokens=1)
    speaker = chat.Speaker(str(tmp_path / "run"), no_keys)
    speaker.answer("q")
    assert seen[0] == final(start, add_special_tokens=False).input_ids
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": messages("q"), "answer": "1"}])
    drawn = []
    from engine import results
    monkeypatch.setattr(results, "sample", lambda policy, tokenizer, prompts, *rest, original=results.sample:
                        drawn.append(prompts[0]) or original(policy, tokenizer, prompts, *rest))
    reward = f"reward={REWARDS}:varied"
    words = [f"data={prompts}", reward, "max_completion_length=2"]
    evaluate.main([str(tmp_path / "run"), *words, f"output={tmp_path / 'e'}"])
    with contextlib.suppress(RunError):                # no completion of two bytes ends by itself
        given = [f"{key}={value}" for key, value in keys.items()]
        sample.main([model, *words, f"output={tmp_path / 's'}", "n=2", *given])
    assert len(drawn) == 2 and all(np.array_equal(prompt, seen[0]) for prompt in drawn)
    settings = json.loads((tmp_path / "s" / "samples_settings.json").read_text())
    assert settings["system_prompt"] == "Be brief." and "digests of chat_template" in settings
