"""The embedded default: its files are what generate.py writes, nothing held out is trained on, its tokenizer
loses nothing."""
import importlib.util
import json
import re
from pathlib import Path

import pytest
import yaml

TINY = Path(__file__).resolve().parent.parent / "example" / "tiny"
KINDS = ("sft", "preference", "feedback", "prompts")


def load(name):
    spec = importlib.util.spec_from_file_location(f"tiny_{name}", TINY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate, measure = load("generate"), load("measure")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt(row):
    if "text" in row:  # a worked problem, or bare equations (which are no problem)
        return row["text"].split("\n")[0]
    return (row.get("prompt") or row["messages"])[0]["content"]


def problem(text):
    """A prompt without its names and things: template and numbers, found without asking the generator."""
    words = generate.NAMES + generate.THINGS + generate.CHINESE_NAMES + generate.CHINESE_THINGS
    return re.sub("|".join(words), "_", text)


def problems(path):
    return {problem(prompt(row)) for row in rows(path)}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    generate.write_large(folder, rows=4000)
    return folder


def test_committed_files_are_reproducible(tmp_path):
    generate.write_small(tmp_path)
    names = []
    for kind in KINDS:
        names += [f"{kind}.jsonl", f"eval-{kind}.jsonl"]
    assert sorted(names) == sorted(path.name for path in TINY.glob("*.jsonl"))
    for name in names:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), name
    assert sum((TINY / name).stat().st_size for name in names) < 2_500_000


def test_nothing_held_out_is_trained_on(large):
    trained = problems(large / "pretrain.jsonl") | problems(large / "base.jsonl")
    for kind in KINDS:
        trained |= problems(TINY / f"{kind}.jsonl")
    for kind in KINDS:
        held_out = TINY / f"eval-{kind}.jsonl"
        assert len(rows(held_out)) == generate.EVAL[kind]
        assert not trained & problems(held_out), kind


def test_answers_are_what_they_claim():
    for name in ("prompts", "eval-prompts"):
        for row in rows(TINY / f"{name}.jsonl"):
            assert 0 <= int(row["answer"]) <= 99 and len(prompt(row).encode()) <= 80
    for name in ("sft", "eval-sft"):
        for row in rows(TINY / f"{name}.jsonl"):
            text = row["messages"][1]["content"]
            thought, answer = re.fullmatch("<think>(.*)</think> <answer>(.*)</answer>", text).groups()
            for step in thought.split(", "):
                values = {eval(part) for part in step.split("=")}  # all parts of `47+38=77+8=85` are equal
                assert len(values) == 1, row
            assert values == {int(answer)}, row
            assert len(text.encode()) <= 70


def test_preferences_and_labels_agree_with_the_checker():
    for name in ("preference", "eval-preference"):
        for row in rows(TINY / f"{name}.jsonl"):
            good, bad = row["chosen"][0]["content"], row["rejected"][0]["content"]
            answer = good.split("<answer>")[1].split("<")[0]
            assert measure.is_right(good, answer) and not measure.is_right(bad, answer)
    labels = [row["label"] for row in rows(TINY / "feedback.jsonl")]
    assert 0.4 < sum(labels) / len(labels) < 0.6


def test_base_answers_are_mixed(large):
    answers = [row["messages"][1]["content"] for row in rows(large / "base.jsonl")]
    in_format = sum(map(measure.is_in_format, answers)) / len(answers)
    thoughtful = sum("<think>" in answer and "=" in answer for answer in answers) / len(answers)
    assert abs(in_format - 0.65) < 0.03 and abs(thoughtful - 0.40) < 0.03


@pytest.mark.parametrize("response, right, formatted", [
    ("<think>7+8=15</think> <answer>15</answer>", True, True),
    ("<think>7+8=15</think> <answer>16</answer>", False, True),
    ("<think>7+8=15</think> <answer>015 </answer>", True, True),
    ("<think>7+8=15</think> <answer>15 pens</answer>", False, True),
    ("<think>7+8=15</think> <answer></answer>", False, True),
    ("<think>7+8=15</think><answer>15</answer>", False, False),
    ("<think>7+8=15</think> <answer>15</answer> so 15", False, False),
    ("<think></think> <answer>14</answer><think></think> <answer>15</answer>", False, False),
    ("The answer is 7+8=15.", False, False),
    ("", False, False),
])
def test_checker(response, right, formatted):
    assert measure.is_right(response, "15") == right and measure.is_in_format(response) == formatted


def test_model_and_tokenizer_survive_saving(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    built = generate.build_tokenizer()
    generate.build_model(built).save_pretrained(tmp_path)
    built.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000
    assert (tmp_path / "model.safetensors").stat().st_size < 4_000_000
    assert len(tokenizer) == model.config.vocab_size == 259
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    for text in ("小明有47个苹果", "a\n b\t\x00", "🙂 naïve"):
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.encode()) and tokenizer.decode(ids) == text
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == (
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n")
    text = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    assert tokenizer(text).input_ids.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    shares = measure.measure(model, tokenizer, rows(TINY / "eval-prompts.jsonl")[:2])
    nothing = {"accuracy": 0.0, "format": 0.0}
    assert shares == {"sampled": nothing, "greedy": nothing}


def test_examples_are_flat_and_name_files_that_exist():
    for name in ("pretrain", "base", "sft", "dpo"):
        config = yaml.safe_load((TINY.parent / f"tiny-{name}.yml").read_text(encoding="utf-8"))
        assert not any(isinstance(value, (dict, list)) for value in config.values())
        for key in ("data", "eval_data"):
            if config.get(key, "").startswith("example/"):
                assert (TINY.parent.parent / config[key]).is_file()
