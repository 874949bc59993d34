"""Every mistake is answered in one line that names it, before anything is written: `error: <what> in <where>; fix: <action>`."""
import fnmatch
import gzip
import json
import os
import re

import pytest
import robust_helpers as child
from helpers import (
    CHATML,
    byte_tokenizer,
    config_of,
    left_in,
    pair_rows,
    random_lm,
    sft_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM, Qwen2ForSequenceClassification

from data.errors import UserError
from engine.logs import environment


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A directory with `good` and models that cannot be trained."""
    directory = tmp_path_factory.mktemp("models")

    def new(name, **options):
        return tiny_model(directory / name, **options)

    def rewrite(name, file, change):
        path = os.path.join(new(name), file)
        with open(path, encoding="utf-8") as source:
            content = json.load(source)
        change(content)
        with open(path, "w") as target:
            json.dump(content, target)

    new("good")
    new("no-template", chat_template=False)
    forgets = "(message['content'] if message['role'] == 'user' or loop.last else '')"
    new("rewrites", chat_template=CHATML.replace("message['content']", forgets))
    new("refuses", chat_template="{{ raise_exception('no roles here') }}")
    new("small-embedding", vocab_size=100, pad_token_id=None, eos_token_id=None)
    with_image = byte_tokenizer()
    with_image.add_tokens(["<image>"], special_tokens=True)
    new("no-row-for-images")
    with_image.save_pretrained(directory / "no-row-for-images")
    rewrite("quantized", "config.json", lambda config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}))
    rewrite("unknown-type", "config.json", lambda config: config.update(model_type="nothing", architectures=["Nothing"]))
    rewrite("wrong-shape", "config.json", lambda config: config.update(intermediate_size=48))
    for name, file in (("cut-weights", "model.safetensors"), ("cut-tokenizer", "tokenizer.json"), ("cut-config", "config.json")):
        path = os.path.join(new(name), file)
        os.truncate(path, os.path.getsize(path) // 2)
    for name, file in (("no-weights", "model.safetensors"), ("no-tokenizer", "tokenizer.json"), ("no-config", "config.json")):
        os.remove(os.path.join(new(name), file))
    weights = os.path.join(new("no-head"), "model.safetensors")
    save_file({name: tensor for name, tensor in load_file(weights).items() if "lm_head" not in name}, weights, {"format": "pt"})
    with open(os.path.join(new("adapter"), "adapter_config.json"), "w") as file:
        file.write("{}")
    tokenizer = byte_tokenizer()
    BertForMaskedLM(BertConfig(vocab_size=259, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
                    ).save_pretrained(directory / "encoder")
    tokenizer.save_pretrained(directory / "encoder")
    config = config_of(num_labels=1)
    Qwen2ForSequenceClassification(config).save_pretrained(directory / "reward-model")
    tokenizer.save_pretrained(directory / "reward-model")
    tokenizer.eos_token = None
    random_lm(config_of()).save_pretrained(directory / "no-eos")
    tokenizer.save_pretrained(directory / "no-eos")
    (directory / "empty").mkdir()
    (directory / "model.gguf").write_bytes(b"GGUF")
    return directory


@pytest.fixture
def refused(tmp_path, models, monkeypatch, capfd):
    """-> a function: run a good project with the given words and other changes; its one error line. Nothing may be written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    write_jsonl(tmp_path / "sft.jsonl", sft_rows(6))
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(6))
    write_config(tmp_path / "x.yml", algorithm="sft", model=models / "good", data="sft.jsonl", max_length=200, output="runs/new")

    def run(*words):
        before = left_in(tmp_path)
        with pytest.raises(UserError) as caught:
            train_here("x.yml", *words)
        message = str(caught.value)
        assert caught.value.exit_code == 2 and "\n" not in message and "; fix: " in message and "hf_abc" not in message
        assert len(message) < 700 and left_in(tmp_path) == before
        assert "Traceback" not in capfd.readouterr().err
        return message
    return run


@pytest.mark.parametrize("words, says", [
    ("lr=abc", "lr (command line) is 'abc'; fix: give a number"),
    ("max_steps=1.5", "max_steps (command line) is '1.5'; fix: give a whole number"),
    ("shuffle=maybe", "shuffle (command line)"),
    ("precision=float16", "precision (command line) is 'float16'; fix: give one (choices: auto, fp32, bf16)"),
    ("attn_implementation=flash_attention_2", "attn_implementation (command line)"),
    ("beta=0.1", "beta (command line) is used by apo, cpo, distill, dpo"),
    ("algorithm=dpoo", "fix: give dpo"),
    ("learning_rate=1", "fix: write lr"),
    ("per_device_train_batch_size=1", "fix: write batch_size"),
    ("lrr=1", "unknown key 'lrr' (command line); fix: write lr"),
    ("train.lr=1", "fix: write lr"),
    ("--lr", "--lr (command line) has no value; fix: write lr=VALUE"),
    ("--lr abc", "lr (command line) is 'abc'"),
    ("lr 1", "'lr' in the command line is neither a .yml file nor key=value"),
    ("hf_token=hf_abcdefghijklmnopqrstu", "is a secret, which must not be in a config"),
    ("keep=1", "keep (command line) is 1; fix: give 2 or more"),
    ("eval_fraction=0.5 eval_data=sft.jsonl", "eval_fraction (command line) cannot be used with eval_data"),
    ("eval_fraction=0.99", "eval_fraction 0.99 of 6 examples leaves none to train on"),
    ("max_length=513", "max_length is 513, but the model"),
    ("max_length=513", "knows only 512 positions"),
    ("max_length=4", "longer than max_length"),
    ("resume=nowhere", "resume: nowhere is neither a run nor a checkpoint"),
])
def test_configuration(words, says, refused):
    message = refused(*words.split(" "))
    assert says in message, message


@pytest.mark.parametrize("content, says", [
    (b"", "empty config file x.yml"), (b"- a\n", "x.yml is not a mapping"), (b"lr: \xff\n", "UTF-8 in x.yml:1"),
    (b"lr: 1\nlr: 2\n", "duplicate key 'lr' in x.yml:2, first in x.yml:1"), (b"lr:1\nseed: 2\n", "space after the colon"),
    (b"lr: 1\n\tseed: 2\n", "tab"), (b"{{ lr }}: 1\n", "nested"), (b"hf_token: hf_abcdefghijklmnopqrstu\n", "x.yml"),
])
def test_yaml(content, says, refused, tmp_path):
    (tmp_path / "x.yml").write_bytes(content)
    assert says in refused()


@pytest.mark.parametrize("model, says", [
    ("nowhere/nothing", "HF_HUB_OFFLINE is set, and nowhere/nothing is neither a local directory nor"),
    ("./nothing", "./nothing"),
    ("a/b/c", "a/b/c"), ("{}/model.gguf", "model.gguf"), ("{}/empty", "no tokenizer can be loaded from .*/empty"),
    ("{}/no-tokenizer", "the tokenizer of .*/no-tokenizer has no vocabulary"), ("{}/cut-tokenizer", "no tokenizer can be loaded"),
    ("{}/no-eos", "no eos token"),
    ("{}/no-config", "no-config"), ("{}/cut-config", "cut-config"), ("{}/no-weights", "no-weights cannot be loaded"),
    ("{}/cut-weights", "cut-weights cannot be loaded"), ("{}/wrong-shape", "wrong-shape cannot be loaded"),
    ("{}/no-head", "no-head lacks 1 weights of a Qwen2ForCausalLM .lm_head.weight"),
    ("{}/reward-model", r"is a qwen2 \(Qwen2ForSequenceClassification\), not a causal language model"),
    ("{}/encoder", r"is a bert \(BertForMaskedLM\), not a causal language model"), ("{}/quantized", "is quantized"),
    ("{}/unknown-type", "unknown-type"),
    ("{}/adapter", "adapter_config.json names no base model"),
    ("{}/small-embedding", "the tokenizer has 259 tokens but the embedding only 100 rows"),
    ("{}/no-template", r"a conversation in sft.jsonl:1, but the tokenizer has no chat template"),
    ("{}/rewrites", "leaves out the assistant turn .message 2. in sft.jsonl:2"),
    ("{}/refuses",
     "chat template cannot render one question and its answer .the chat template refuses it: no roles here"),
])
def test_models(model, says, refused, models):
    message = refused("model=" + model.format(models))
    assert re.search(says, message), message


@pytest.mark.parametrize("words", ["data=image.jsonl", "data=sft.jsonl eval_data=image.jsonl"])
@pytest.mark.parametrize("place", ["prompt", "response"])
def test_a_row_with_a_token_that_the_embedding_has_not(words, place, refused, models, tmp_path):
    rows = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b"} | {place: "an <image> here"}]
    write_jsonl(tmp_path / "image.jsonl", rows)
    message = refused(f"model={models}/no-row-for-images", *words.split())
    fault = "model: image.jsonl:2 spells out <image>, a token for which the model has no embedding"
    assert message == f"{fault}; fix: remove it from the row"
    train_here("x.yml", f"model={models}/no-row-for-images", "max_steps=1")


SFT = json.dumps(sft_rows(1)[0]).encode() + b"\n"
PAIR = json.dumps(pair_rows(1)[0]).encode() + b"\n"


@pytest.mark.parametrize("name, content, says", [
    ("d.jsonl", b"", "the file is empty, no rows in d.jsonl"),
    ("d.json", b"[]", "the file is empty, no rows in d.json"),
    ("d.jsonl", SFT + b"{bad}\n" + SFT, "d.jsonl:2"),
    ("d.jsonl", SFT + SFT[:20], "seems cut off in d.jsonl:2"),
    ("d.jsonl", SFT.decode().encode("utf-16"), "not UTF-8 (byte 0xff"),
    ("d.jsonl", SFT + '{"text": "é"}'.encode("latin-1"), "not UTF-8 (byte 0xe9, number 11 of the line) in d.jsonl:2"),
    ("d.jsonl", SFT + b'{"text": "a", "text": "b"}', "duplicate key 'text') in d.jsonl:2"),
    ("d.jsonl", SFT + b'{"text": NaN}', "NaN is not JSON) in d.jsonl:2"),
    ("d.jsonl", SFT + b'["text"]\n', "d.jsonl:2"),
    ("d.jsonl.gz", gzip.compress(SFT * 50)[:-20], "cut off: d.jsonl.gz"),
    ("d.txt", b"some text", "not a data file"),
    ("d.parquet", b"PAR1 not really", "cannot read the Parquet file d.parquet"),
    ("d.csv", b"prompt,response\na,b,c\n", "3 fields, the header has 2) in d.csv:2"),
    ("d.jsonl", b'{"ask": "a", "output": "b"}', "unknown columns in d.jsonl:1: found ask, output"),
    ("d.jsonl", PAIR.replace(b"chosen", b"good"), "unknown columns in d.jsonl:1"),
    ("d.jsonl", b'{"prompt": "  ", "response": "b"}', "the prompt is empty in d.jsonl:1"),
    ("d.jsonl", b'{"prompt": "a", "response": " "}', "empty response"),
    ("d.jsonl", b'{"prompt": "a", "response": 3}', "d.jsonl:1"),
    ("d.jsonl", b'{"messages": []}', "is an empty list of messages in d.jsonl:1"),
    ("d.jsonl", b'{"messages": "hello"}', "d.jsonl:1"),
    ("d.jsonl", SFT.replace(b'"assistant"', b'"bot"'), "unknown role 'bot' of messages[1] in d.jsonl:1"),
    ("d.jsonl", b'{"messages": [{"role": "user", "content": null}, {"role": "assistant", "content": "b"}]}',
     "is null, not text, in d.jsonl:1"),
    ("d.jsonl", b'{"messages": [{"role": "user"}, {"role": "assistant", "content": "b"}]}', "messages[0]"),
    ("d.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}', "last turn is not the assistant's (first: d.jsonl:1)"),
    ("d.jsonl", b'{"prompt": "a", "response": "\\ud800"}', "surrogate pair"),
])
def test_data(name, content, says, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    message = refused(f"data={name}")
    assert says in message, message
    assert says in refused("data=sft.jsonl", f"eval_data={name}")


@pytest.mark.parametrize("row, says", [
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen equals rejected (first: d.jsonl:1)"),
    ({"prompt": "a", "chosen": "b"}, "unknown columns in d.jsonl:1: found prompt, chosen"),
    ({"messages": sft_rows(1)[0]["messages"]}, "unknown columns in d.jsonl:1: found messages"),
    ({"prompt": "", "chosen": "b", "rejected": "c"}, "the prompt is empty in d.jsonl:1"),
    ({"prompt": "a", "chosen": "", "rejected": "c"}, "empty response"),
    ({"chosen": "b", "rejected": "c"}, "no prompt in d.jsonl:1"),
    ({side: [{"role": "user", "content": side}, {"role": "assistant", "content": "x"}] for side in ("chosen", "rejected")},
     "chosen and rejected do not share their prompt"),
])
def test_pairs(row, says, refused, tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [row])
    message = refused("algorithm=dpo", "data=d.jsonl")
    assert says in message, message


def test_missing_data(refused, tmp_path):
    assert "no file sfd.jsonl (nearest in .: sft.jsonl" in refused("data=sfd.jsonl")
    assert "the directory nowhere/at/all does not exist" in refused("data=nowhere/at/all/d.jsonl")
    (tmp_path / "empty").mkdir()
    assert "empty is a directory without data files" in refused("data=empty")
    assert "neither an existing file nor a dataset" in refused("data=nobody/nothing")


def test_reference(models, tmp_path):
    """The only mistake that is found when the run's directory is already there."""
    child.project(tmp_path, "dpo", models / "good", max_steps=1)
    for reference, says in (("nowhere", "nowhere is neither"), (models / "small-embedding", "only 100 rows"),
                            (models / "no-head", "lacks 1")):
        result = child.train(tmp_path, f"reference={reference}", f"output={says}")
        error = result.err.splitlines()[-1]
        assert result.code == 2 and error.startswith("error: ") and says in error and "Traceback" not in result.err


def test_outputs(refused, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for text in ("\tx: [", "just text", "\x00"):      # a config.yaml that is somebody else's
        (tmp_path / "mine" / "config.yaml").write_text(text)
        assert "mine is not empty and is not a run; fix: choose another output" in refused("output=mine")
    (tmp_path / "mine" / "config.yaml").write_bytes(b"\xff\xfe")
    assert "mine is not empty and is not a run" in refused("output=mine")
    assert "file is a file; fix: choose another output" in refused("output=file")
    assert "output: file/run cannot be written (Not a directory)" in refused("output=file/run")
    for output in ("../x", "/", "~/x", "a\tb", "x" * 300):
        assert "output (command line) is " in refused(f"output={output}")


@pytest.mark.parametrize("words, line", [
    (["lr=abc"], "error: lr (command line) is 'abc'; fix: give a number such as 2e-5\n"),
    (["model=nowhere"],
     "error: model: the hub is not asked, *, and nowhere is neither a local directory *; fix: *\n"),
])
def test_what_the_user_sees(words, line, models, tmp_path):
    """Exit code 2, one line on stderr, nothing on stdout; with --debug the traceback too."""
    child.project(tmp_path, "sft", models / "good")
    result = child.train(tmp_path, *words)
    assert (result.code, result.out) == (2, "") and fnmatch.fnmatchcase(result.err, line) and result.err.count("\n") == 1
    result = child.train(tmp_path, *words, "--debug")
    assert result.code and "Traceback" in result.err and not (tmp_path / "run").exists()


def test_secrets_reach_no_file(models, tmp_path, monkeypatch):
    canary = "hf_CanaryCanaryCanaryCanary"
    monkeypatch.setenv("HF_TOKEN", canary)
    monkeypatch.setattr("sys.argv", ["train.py", "x.yml", f"note={canary}"])
    data = write_jsonl(tmp_path / "d.jsonl", sft_rows(6))
    config = write_config(tmp_path / "x.yml", algorithm="sft", model=models / "good", data=data, max_length=200, max_steps=1,
                          output=tmp_path / "run")
    train_here(config)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 8 and not any(canary.encode() in path.read_bytes() for path in files)
    assert "note=hf_…" in environment()["command"]
