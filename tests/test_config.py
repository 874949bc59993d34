"""engine/config.py and its readers: precedence, casting, errors and round trip. Algorithms are stand-ins, so
that no other piece is needed."""
import dataclasses
import json
import os
import random
import shlex

import pytest
import yaml

from data.errors import UserError
from engine import definition
from engine.command_line import parse_argv
from engine.config import Common, as_yaml, describe, load_config
from engine.definition import class_of
from engine.help import comments_of, help_for

SFT = """
from dataclasses import dataclass
from typing import Literal
from engine.options import Options
@dataclass
class Config(Options):
    train_on: Literal["assistant", "all"] = "assistant"    # which tokens are trained
"""
DPO = """
from dataclasses import dataclass
from engine.options import Options, Positive, Smoothing
@dataclass
class Config(Options):
    beta: Positive = 0.1                # strength of the KL constraint
    label_smoothing: Smoothing = 0.0    # share of flipped labels
    reference: str | None = None        # null = the start model
"""
BASE = "algorithm: dpo\nmodel: m\ndata: d.jsonl\n"    # three lines: what is added starts at line 4


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    """An empty working directory and the stand-in algorithms."""
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "algorithms" / "sft.py").write_text(SFT)
    (tmp_path / "algorithms" / "dpo.py").write_text(DPO)
    monkeypatch.setattr(definition, "ROOT", tmp_path)
    class_of.cache_clear()
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield
    class_of.cache_clear()


def load(text="", words="", path="x.yml", base=BASE):
    with open(path, "wb") as file:
        file.write(text if isinstance(text, bytes) else (base + text).encode())
    return load_config([path, *shlex.split(words)])


def error(text="", words="", **kwargs):
    with pytest.raises(UserError) as caught:
        load(text, words, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and "; fix: " in message
    return message


# ---- precedence and the command line

def test_defaults_yaml_and_command_line():
    run = load("lr: 3e-5\nbatch_size: 8\nbeta: 0.5", "lr=2e-5 --debug")
    assert (run.common.lr, run.common.batch_size, run.common.keep, run.config.beta) == (2e-5, 8, 2, 0.5)
    assert run.flags == {"debug"}
    places = {"lr": "command line", "batch_size": "x.yml:5", "keep": "default", "beta": "x.yml:6"}
    assert places.items() <= run.sources.items()
    assert set(run.sources) == {*Common.__annotations__, "beta", "label_smoothing", "reference"}
    assert tuple(run) == (run.common, run.config, run.sources, {"debug"}, "x")


@pytest.mark.parametrize("words", ["lr=2e-5 max_steps=3", "--lr=2e-5 --max-steps=3",
                                   "--overrides lr=2e-5 max-steps=3",
                                   "--overrides --lr=2e-5 --dry-run max_steps=3", "--lr 2e-5 --max-steps 3",
                                   "--max_steps 3 --overrides lr=2e-5", "--dry-run --lr 2e-5 max-steps=3"])
def test_forms_of_an_override(words):
    run = load("", words)
    assert (run.common.lr, run.common.max_steps) == (2e-5, 3)


def test_values_after_a_space():
    """They may hold "=" and spaces, and stand before the YAML file, which is no value."""
    run = load("", "--output runs/lr=1 --model 'a b' --resume ''x")
    assert (run.common.output, run.common.model, run.common.resume) == ("runs/lr=1", "a b", "x")
    assert load_config(["--lr", "3", "x.yml", "--beta", "1"]).common.lr == 3
    with pytest.raises(UserError, match="unknown key 'config'.*python train.py FILE.yml"):
        load_config(["--config", "x.yml"])


def test_hyphens_in_keys():
    assert load("batch-size: 3\nlabel-smoothing: 0.1", "max-steps=2").common.batch_size == 3
    assert "duplicate key 'batch_size' in x.yml:5, first in x.yml:4" in error("batch-size: 3\nbatch_size: 3")


def test_order_of_words_is_free():
    load()
    assert load_config(["--dry-run", "lr=1", "x.yml"]).common.lr == 1.0


def test_override_given_twice(capsys):
    assert load("", "lr=1e-5 lr=3e-5").common.lr == 3e-5
    assert "lr is given more than once" in capsys.readouterr().err


@pytest.mark.parametrize("words, says", [
    ("lr 2e-5", "lr=VALUE"), ("--lr", "--lr (command line) has no value; fix: write lr=VALUE"),
    ("--max-steps", "max_steps=VALUE"),
    ("--max-steps --debug", "max_steps=VALUE"), ("--lr max_steps=3", "lr=VALUE"), ("-lr=1", "key=value"),
    ("--gradient-checkpointing", "has no value; fix: write gradient_checkpointing=true"),
    ("--shuffle lr=1", "has no value; fix: write shuffle=true"),
    ("--bf16 --lr 2e-5", "unknown key 'bf16' (command line); fix: write precision"),
    ("--lr -1e-5", "lr (command line) is -1e-05; fix: give a number above 0"),
    ("--lr -.5", "lr (command line) is -0.5"),
    ("--reference -x", "'-x' in the command line is neither"),
    ("--algorithm", "algorithm (command line) is missing"),
    ("--dryrun", "--dry-run"), ("=3", "key=value"), ("x.yml", "two config files"),
    ("lr==3", "a number such as 2e-5"),
])
def test_bad_words(words, says):
    assert says in error("", words)


def test_no_config_file():
    with pytest.raises(UserError, match="no config file"):
        load_config(["lr=1"])


def test_a_path_may_contain_an_equals_sign(tmp_path):
    (tmp_path / "cwd" / "runs" / "lr=1").mkdir(parents=True)
    assert load(path="runs/lr=1/config.yaml", words="lr=3").common.lr == 3


def test_help():
    """Of the algorithm that the command line or the file names, else of none."""
    load()
    assert help_for(["x.yml", "lr=1"]) is None
    text = help_for(["--help"])
    assert "usage: python train.py" in text and "strength of the KL constraint" not in text
    assert "\nalgorithms:\n    dpo" in text and "algorithm=NAME --help" in text
    for field in dataclasses.fields(Common):
        assert f"\n    {field.name}: " in text and len(comments_of(Common)[field.name]) > 10
    for words in (["x.yml", "-h"], ["algorithm=dpo", "--help"]):
        text = help_for(words)
        assert "\n    beta: a number above 0 (default 0.1)\n        strength of the KL constraint\n" in text
        assert "\n    max_steps: 1 or more, or null (default null)\n" in text
        assert "\n    model: text (required)\n" in text and "train_on" not in text
    with pytest.raises(UserError, match="algorithm .* is 'dop'.*fix: give dpo"):
        help_for(["algorithm=dop", "--help"])


# ---- casting

@pytest.mark.parametrize("text, value", [
    ("5e-7", 5e-7), ("1", 1.0), ("5E-7", 5e-7), (".5", 0.5), ("'2e-5'", 2e-5),
])
def test_floats(text, value):
    lr = load(f"lr: {text}").common.lr
    assert lr == value and type(lr) is float


@pytest.mark.parametrize("text, value", [("1e3", 1000), ("12", 12), ("010", 10), ("8.0", 8)])
def test_ints(text, value):
    for run in (load(f"max_steps: {text}"), load("", f"max_steps={text}")):
        assert run.common.max_steps == value and type(run.common.max_steps) is int


@pytest.mark.parametrize("text, value", [
    ("true", True), ("No", False), ("off", False), ("ON", True), ("yes", True), ("0", False), ("1", True),
    ("False", False), ("'false'", False),
])
def test_bools(text, value):
    assert load(f"shuffle: {text}").common.shuffle is value


@pytest.mark.parametrize("text", ["", "null", "None", "none", "NULL"])
def test_null(text):
    assert load("reference: ~").config.reference is None
    assert load(f"reference: {text}\nmax_steps: {text}").config.reference is None
    run = load("max_steps: 5", f"max_steps={text} reference={text}")
    assert run.common.max_steps is None and run.config.reference is None


@pytest.mark.parametrize("text", [
    "no", "010", "1:30", "5e-7", "null", "2024-01-01", "0x1f", "1_000", "=", "!x/y", "a b",
])
def test_text_stays_as_written(text):
    assert load(f"model: '{text}'", base="algorithm: sft\ndata: d\n").common.model == text
    if text[0] not in "!":
        assert load(f"model: {text}", base="algorithm: sft\ndata: d\n").common.model == text


def test_choices_and_algorithm_keys():
    run = load("train_on: all\nschedule: Cosine\nshare_prompt: True", "algorithm=sft")
    assert (run.common.schedule, run.common.share_prompt, run.config.train_on) == ("cosine", "true", "all")
    assert load("truncate: none").common.truncate == "none"


@pytest.mark.parametrize("line, says", [
    ("lr: abc", "a number"), ("lr: nan", "a number"), ("lr: .inf", "a number"), ("lr: inf", "a number"),
    ("lr: 1e999", "a number"),
    ("lr:", "a number"), ("max_steps: 1.5", "a whole number"), ("max_steps: 1e400", "a whole number"),
    ("seed: 99999999999999999999", "whole"),
    ("shuffle: maybe", "true, yes, on"), ("shuffle: 2", "true, yes"),
    ("schedule: linaer", "give linear (choices: linear, cosine, constant)"),
    ("hh: xyz", "choices: messages, text"), ("attn_implementation:", "choices: auto, segments"),
    ("resume:", "text"),
    ("resume: |\n  a\n  b", "one line"),
    ("lr: 0", "above 0"), ("lr: -1e-5", "above 0"), ("max_grad_norm: 0", "above 0"),
    ("batch_size: 0", "1 or more"),
    ("epochs: 0", "1 or more"),
    ("eval_fraction: 1", "below 1"), ("eval_fraction: -0.1", "below 1"), ("warmup: -1", "0 or more"),
    ("warmup: 1.5", "whole number of"),
    ("max_length: 1", "2 or more"), ("keep: 1", "2 or more"), ("seed: -1", "0 to 4294967295"),
    ("max_steps: 0", "1 or more"),
    ("weight_decay: -0.1", "0 or more"), ("micro_batch_tokens: 0", "2 or more"),
    ("save_every: 0", "1 or more"),
    ("log_every: 0", "1 or more"),
])
def test_bad_values(line, says):
    message = error("# a comment\n" + line)
    assert says in message and message.startswith(f"{line.split(':')[0]} (x.yml:5) is ")
    if "\n" not in line:
        assert "(command line)" in error("", shlex.quote(line.replace(":", "=", 1).replace("= ", "=")))


@pytest.mark.parametrize("letter", "nyotf")
def test_no_choice_is_proposed_for_one_letter(letter):
    assert "fix: give one (choices: true, yes, on, 1, false, no, off, 0)" in error(f"shuffle: {letter}")


def test_eval_fraction_and_eval_data_exclude_each_other():
    assert "x.yml:5" in error("eval_data: e\neval_fraction: 0.1")
    assert load("eval_fraction: 0.1").common.eval_fraction == 0.1


# ---- the YAML file

def test_key_order_bom_and_crlf():
    assert load(b"\xef\xbb\xbfbeta: 0.2\r\ndata: d\r\nmodel: m\r\nalgorithm: dpo\r\n").config.beta == 0.2


@pytest.mark.parametrize("text, says", [
    (b"", "empty"), (b"# only a comment\n", "empty"), (b"---\n", "empty"), (b"- a\n- b\n", "mapping"),
    (b"lr:1e-6\n", "mapping"),
    (b"a: 1\nmodel: \xff\xfe\n", "UTF-8 in x.yml:2"), (b"a: 1\nb: \x00\n", "control character in x.yml:2"),
    (b"lr: 1\nseed: 1\nlr: 2\n", "duplicate key 'lr' in x.yml:3, first in x.yml:1"),
    (b"lr: 1\ntrain:\n  lr: 2\n", "nested value of 'train' in x.yml:2"),
    (b"data: [a, b]\n", "nested value of 'data'"),
    (b"{{ lr }}: 2\n", "nested"), (b"lr: " + b"[" * 5000, "nested"),
    (b"algorithm: dpo\n...\n---\nlr: 2\n", "x.yml:3:1"),
    (b"lr: 1\n\tseed: 2\n", "tab"), (b"model: @x\n", "x.yml:1:8: found character '@'"),
    (b"model: a: b\n", "in 'model: a: b'; fix: put"),
    (b"model: m\nlr:1e-6\nseed: 1\n",
    "x.yml:2:1: could not find expected ':' in 'lr:1e-6'; fix: put a space after the colon in line 2"),
    (b"lr:1e-6\nmodel: m\n", "fix: put a space after the colon in line 1"), (b"model: 'abc\n", "x.yml:2:1"),
    (b"lr: *a\n", "undefined alias"), (b"model: \"\\q\"\n", "x.yml:1"),
])
def test_bad_files(text, says):
    assert says in error(text)


def test_tags_run_nothing():
    assert load("output: !!python/name:os.system run").common.output == "run"
    assert "nested" in error("data: !!python/object/apply:os.system ['exit 1']", base="")


def test_missing_file_and_directory(tmp_path):
    load(path="tiny-dpo.yml")
    with pytest.raises(UserError, match=r"does not exist; fix: python train.py tiny-dpo.yml"):
        load_config(["tiny-dpu.yml"])
    (tmp_path / "cwd" / "example").mkdir()
    (tmp_path / "cwd" / "example" / "tiny-sft.yml").write_text("")
    with pytest.raises(UserError, match=r"fix: python train.py example/tiny-sft.yml"):
        load_config(["examples/tiny-sft.yml"])
    with pytest.raises(UserError, match="is a directory"):
        load_config(["example"])
    (tmp_path / "cwd" / "example" / "own dpo.yml").write_text("")
    with pytest.raises(UserError, match=r"fix: python train.py 'example/own dpo.yml'"):
        load_config(["own dpo.yaml"])


@pytest.mark.parametrize("text, says", [
    ("datasets:\n  - type: custom\n    path: d.json",
     "nested value of 'datasets' in x.yml:2; fix: write data"),
    ("datasets: [hh, shp]", "nested value of 'datasets' in x.yml:2; fix: write data"),
    ("test_datasets:\n  - path: d.json", "'test_datasets' in x.yml:2; fix: write eval_data"),
    ("model:\n  name_or_path: m\n  policy_dtype: float32",
     "'model' in x.yml:2; fix: keys are flat, write one 'key: value' per line: "
     "model for model.name_or_path, precision for model.policy_dtype"),
    ("loss:\n  name: dpo\n  beta: 0.1",
     "'loss' in x.yml:2; fix: keys are flat, write one 'key: value' per line: "
     "algorithm for loss.name, beta for loss.beta"),
    ("loss: {name: dpo}", "'loss' in x.yml:2; fix: write algorithm"),
    ("policy:\n  model_name_or_path: m",
     "'policy' in x.yml:2; fix: keys are flat, write one 'key: value' per line: "
     "model for policy.model_name_or_path"),
    ("trainer: {optim: {lr: 1}}", "lr for trainer.optim.lr"),
    ("wandb: {enabled: false}", "fix: write report_to (tensorboard, wandb, swanlab or trackio)"),
    ("model: {hf_token: canary}", "nested value of 'model' in x.yml:2"),
    ("lora_target_modules: [q_proj, v_proj]", "fix: write lora_targets"),
    ("unknown: {other: 1}", "fix: keys are flat"),
    ("exp_name: a\noutput: runs/${exp_name}",
     "output (x.yml:3) is 'runs/${exp_name}', but the value of exp_name is not put there"),
    ("model: ${seed.of}", "model (x.yml:2) is '${seed.of}', but the value of seed"),
])
def test_nested_values_of_older_projects(text, says):
    message = error("seed: 1\n" + text, base="")
    assert says in message and "canary" not in message


def test_text_that_only_looks_like_a_reference():
    assert load("output: runs/${HOME}").common.output == "runs/${HOME}"


# ---- keys

@pytest.mark.parametrize("line, says", [
    ("lrr: 1", "unknown key 'lrr' (x.yml:4); fix: write lr"), ("max_step: 1", "write max_steps"),
    ("Batch_Size: 1", "write batch_size"),
    ("train.max_step: 1", "write max_steps"), ("qqqqqqq: 1", "--help"), ("betta: 1", "write beta"),
    ("? \n: 1", "unknown key ''"),
    ("train_on: all", "train_on (x.yml:4) is used by sft, not by dpo; fix: remove it"),
])
def test_unknown_keys(line, says):
    assert says in error(line)


def test_key_of_another_algorithm_on_the_command_line():
    assert "beta (command line) is used by dpo, not by sft" in error("", "beta=1 algorithm=sft")


@pytest.mark.parametrize("theirs, ours", [
    ("total_batch_size", "batch_size"), ("n_epochs", "epochs"), ("num_train_epochs", "epochs"),
    ("exp_name", "output"),
    ("output_dir", "output"),
    ("learning_rate", "lr"), ("model_name_or_path", "model"), ("dataset_name", "data"),
    ("per_device_train_batch_size", "batch_size"),
    ("max_seq_length", "max_length"), ("num_epochs", "epochs"),
    ("warmup_ratio", "warmup"),
    ("warmup_steps", "warmup"), ("logging_steps", "log_every"), ("save_steps", "save_every"),
    ("eval_steps", "eval_every"),
    ("save_total_limit", "keep"), ("lr_scheduler_type", "schedule"), ("bf16", "precision"),
    ("fp16", "precision"),
    ("resume_from_checkpoint", "resume"),
])
def test_names_of_other_projects(theirs, ours):
    assert f"fix: write {ours}" in error(f"{theirs}: 1")


@pytest.mark.parametrize("key", [
    "hf_token", "HF_TOKEN", "token", "wandb_api_key", "password", "client_secret", "apikey",
])
def test_secrets_are_refused_and_never_shown(key):
    for line in (f"{key}: canary", f"{key}: @canary", f"{key}: [canary]"):
        assert "canary" not in error(line)
    assert "canary" not in error("", f"{key}=canary")
    assert "environment variable HF_TOKEN" in error(f"{key}: canary")
    assert "hf_abc" not in error("lr: hf_abcdefghijklmnopqrstuvwx")


def test_token_counts_are_no_secrets():
    assert load("micro_batch_tokens: 100").common.micro_batch_tokens == 100
    assert "HF_TOKEN" not in error("max_tokens: 5") + error("tokenizer: t")


def test_required_keys_and_algorithm():
    assert "model is missing in x.yml" in error(base="algorithm: dpo\ndata: d")
    assert "data is missing" in error(base="algorithm: dpo\nmodel: m")
    assert "algorithm (x.yml) is missing, algorithms/ holds dpo, sft" in error(base="model: m")
    message = error(base="algorithm: dop")
    assert "algorithm (x.yml:1) is 'dop', algorithms/ holds dpo, sft; fix: give dpo" in message
    assert "one of them" in error("", "algorithm=../train")
    message = error("rlhf-type: dpo", base="model: m\ndata: d\nlr: 1\n")
    assert "unknown key 'rlhf_type' (x.yml:4); fix: write algorithm" in message


# ---- output

def test_output():
    stems = {"tiny.dpo.yml": "tiny.dpo", "./a/x.yaml": "x", "runs/tiny-2/config.yaml": "tiny-2",
             "config.yaml": "cwd"}
    for path, stem in stems.items():
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        run = load(path=path)
        assert (run.common.output, run.stem) == (None, stem)
    for good in ("runs/a", "a b", "/some/where/new", "a..b", "./x", "x~"):
        run = load("", f"output={shlex.quote(good)}")
        assert run.common.output == good and run.sources["output"] == "command line"


@pytest.mark.parametrize("bad", [
    "..", "a/../b", "../x", "/", "~", "~/x", "a/~x", "//", "x" * 256, "é" * 128, "a\tb", "a\x7f",
])
def test_refused_outputs(bad):
    assert "output (x.yml:4) is " in error(f"output: {json.dumps(bad)}")


def test_output_is_not_the_repository(monkeypatch, tmp_path):
    monkeypatch.setattr("engine.config.ROOT", tmp_path / "cwd" / "repo")
    for bad in ("repo", "./repo/", ".", str(tmp_path)):
        assert "not the home directory, the repository or" in error("", f"output={bad}")
    assert load("", "output=repo/runs/x").common.output == "repo/runs/x"


# ---- writing it back

def test_round_trip_is_exact():
    generator = random.Random(0)
    words = ["no", "null", "1:30", "010", "a: b", "#x", "x #y", " padded ", "'", '"', "@x", "*a", "&a", "!t",
             "- a", "é漢😀", "[a]", "{a}", "?", "%a", "`", "|", ">", "a,b", "\\n", "true", "1e-5", "---", "=",
             "<<", "x" * 500, "a " * 200 + "b"]
    for _ in range(100):
        name = generator.choice(words)
        beta = generator.random() * 10 ** generator.randint(-300, 300)
        words_given = [f"lr={generator.uniform(1e-9, 1e-3)!r}", f"model={name}", f"data={name}x",
                       f"warmup={generator.random()}", f"beta={beta!r}",
                       f"shuffle={generator.choice(['yes', 'no'])}", f"reference={name}",
                       f"max_steps={generator.choice(['', '7'])}", f"seed={generator.randrange(2**32)}"]
        load()
        run = load_config(["x.yml", *words_given])
        text = as_yaml(run.common, run.config)
        again = load(text, base="", path="config.yaml")
        assert (again.common, again.config) == (run.common, run.config), text
        assert as_yaml(again.common, again.config) == text
        assert len(text.splitlines()) == len(run.sources)
        assert yaml.safe_load(text)["lr"] == run.common.lr    # other YAML readers agree


def test_describe():
    lines = describe(load("lr: 3e-5", "batch_size=4"))
    shown = ["".join(line.split()) for line in lines]
    for part in ("lr=3.0e-05(x.yml:4)", "batch_size=4(commandline)", "keep=2(default)", "beta=0.1(default)",
                 "reference=null(default)"):
        assert part in shown


def test_parse_argv_returns_text():
    expected = ("a.yml", {"x_y": ("1=2", "command line")}, {"dry-run"})
    assert parse_argv(["a.yml", "--x-y=1=2", "--dry-run"]) == expected
