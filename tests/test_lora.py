"""LoRA: the policy against peft's own model, what a run saves and continues, the reference under an adapter, what is refused."""
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    assert_adam_made,
    assert_same_gradients,
    assert_same_weights,
    byte_tokenizer,
    final_weights,
    metrics,
    pair_rows,
    refused,
    saved_gradients,
    sft_rows,
    tiny_model,
    train_here,
    watch_updates,
    write_config,
    write_jsonl,
)
from robust_helpers import train_on_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.dataset import build_dataset
from data.errors import UserError
from engine import checkpoint
from engine.config import load_config
from engine.shares import saved_tensors
from model import lora
from model.build import build_policy
from model.keys import ModelKeys
from model.load import base_of, is_adapter
from model.reward_model import build_reward_model
from train import main

peft = pytest.importorskip("peft")

ROWS = {"sft": sft_rows, "dpo": pair_rows, "rm": pair_rows}
LORA = dict(lora_r=4, lora_alpha=8)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def train(tmp_path_factory, base):
    """train(name, algorithm, *words, **keys) -> the run's directory: six updates of three of 9 rows, five held out. An existing run
    is continued."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name, algorithm, *words, store="shared", **keys):
        data = {"data": write_jsonl(folder / f"{algorithm}.jsonl", ROWS[algorithm](9)),
                "eval_data": write_jsonl(folder / f"{algorithm}-eval.jsonl", ROWS[algorithm](5, 9))}
        values = {"algorithm": algorithm, "model": base, **data, "output": folder / store / name, "batch_size": 3, "epochs": 2,
                  "lr": 1e-2, "max_length": 256, "eval_every": 3, "save_every": 3, **LORA, **keys}
        train_here(write_config(folder / f"{name}.yml", **{key: value for key, value in values.items() if value is not None}), *words)
        return folder / store / name
    return train


@pytest.fixture(scope="module")
def adapter(train):
    """An SFT run whose adapter the others continue, use as a reference or merge."""
    return train("adapter", "sft")


def build(path, **values):
    keys = ModelKeys(max_length=256, **values)
    return build_policy(str(path), byte_tokenizer(), keys, trains_adapter=is_adapter(str(path)))


def examples(tmp_path, rows, kind="pairs"):
    return build_dataset(write_jsonl(tmp_path / "rows.jsonl", rows), kind, byte_tokenizer(), 256).examples


def loaded(run):
    """The base model with a run's adapter, by peft alone."""
    final = Path(run) / "final"
    path = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), final).eval()


def plain_logps(lm, made):
    """Log-probs of the trained tokens from full logits, one response at a time."""
    parts = []
    for example in made:
        for response in example.responses:
            ids = torch.tensor([[*example.prompt, *response.tokens]])
            logps = lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(example.prompt) - 1:, 0]
            parts.append(logps[torch.from_numpy(response.trained)])
    return torch.cat(parts)


def randomize(lm):
    """As made, an adapter's B is 0: it changes nothing and A has no gradient."""
    torch.manual_seed(1)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1)


# ---- the policy

@pytest.mark.parametrize("targets", ["all-linear", "q_proj, v_proj"])
@pytest.mark.parametrize("tied", [False, True])
def test_equals_pefts_own_model(targets, tied, tmp_path):
    """Log-probs and gradients, against the saved adapter in peft's model with full logits."""
    path = tiny_model(tmp_path / "model", tie_word_embeddings=tied)
    policy = build(path, lora_targets=targets, **LORA)
    randomize(policy.lm)
    trained = {name: parameter for name, parameter in policy.lm.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * (7 if targets == "all-linear" else 2)
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    lora.save(policy.lm, trained, str(final))
    theirs, made = loaded(final.parent), examples(tmp_path, pair_rows(3))
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name)
    ours = policy(policy.collate(made))
    expected = plain_logps(theirs, made)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(len(ours))
    (ours * weights).sum().backward()
    (expected * weights).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, gradients["base_model.model." + name].grad, atol=1e-4, rtol=1e-4)
    assert all(parameter.grad is None for parameter in policy.lm.parameters() if not parameter.requires_grad)


def test_a_fresh_adapter_changes_nothing(base, tmp_path):
    made = examples(tmp_path, pair_rows(3))
    plain, policy = build(base), build(base, **LORA)
    again = build(base, **LORA)
    other = build(base, seed=1, **LORA)
    assert torch.equal(policy(policy.collate(made)), plain(plain.collate(made)))
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    first, second, third = (dict(x.lm.named_parameters())[name] for x in (policy, again, other))
    assert torch.equal(first, second) and not torch.equal(first, third)


def test_only_the_adapter_moves_and_is_counted(train, monkeypatch):
    from engine import loop
    seen = []
    init = loop.Engine.__init__

    def spy(engine, config, policy, *rest):
        seen.append((policy, {name: parameter.clone() for name, parameter in policy.named_parameters()}))
        init(engine, config, policy, *rest)
    monkeypatch.setattr(loop.Engine, "__init__", spy)
    run = train("moves", "dpo")
    (policy, before), = seen
    moved = {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in policy.named_parameters() if "lora_" in name}
    optimizer = load_file(run / "checkpoints" / "step-000006" / "optimizer.safetensors")
    assert {name.rpartition(":")[0] for name in optimizer} == moved
    assert metrics(run, "eval")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics(run, "train")[-1]["loss"] < 0.6


def test_dropout_acts_only_where_a_gradient_is_taken(base, tmp_path):
    policy = build(base, lora_dropout=0.5, **LORA)
    randomize(policy.lm)
    batch = policy.collate(examples(tmp_path, pair_rows(3)))
    with torch.no_grad():
        quiet, still = policy(batch), policy(batch)
    noisy = policy(batch)
    with torch.no_grad():
        after = policy(batch)
    assert torch.equal(quiet, still) and torch.equal(quiet, after) and not torch.allclose(noisy, quiet)


# ---- what a run saves

def test_the_adapter_loads_everywhere(adapter, base, tmp_path, monkeypatch):
    final = adapter / "final"
    assert sorted(path.name for path in final.glob("*.safetensors")) == ["adapter_model.safetensors"]
    settings = json.loads((final / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base and settings["inference_mode"] and (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert len(AutoTokenizer.from_pretrained(final)) == len(byte_tokenizer())
    made = examples(tmp_path, pair_rows(3))
    theirs = plain_logps(loaded(adapter), made)
    for path in (str(final), checkpoint.model_path(str(adapter), print)):
        policy = build(path)
        torch.testing.assert_close(policy(policy.collate(made)), theirs, atol=1e-5, rtol=1e-5)
    auto = AutoModelForCausalLM.from_pretrained(final, dtype=torch.float32)          # as chat.py does
    torch.testing.assert_close(plain_logps(auto.eval(), made), theirs, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(theirs, plain_logps(AutoModelForCausalLM.from_pretrained(base), made), atol=1e-2)


def test_merge_writes_a_plain_model(adapter, train, tmp_path):
    """The run is finished: `merge` only changes how its final model is written."""
    shutil.copytree(adapter, adapter.with_name("merged"))
    run = train("merged", "sft", "merge=true")
    assert not (run / "final" / "adapter_config.json").exists()
    made = examples(tmp_path, pair_rows(3))
    plain = AutoModelForCausalLM.from_pretrained(run / "final", dtype=torch.float32)
    torch.testing.assert_close(plain_logps(plain, made), plain_logps(loaded(adapter), made), atol=1e-5, rtol=1e-5)
    policy = build(run / "final")
    assert lora.settings(policy.lm) is None


def test_reward_model(train, tmp_path):
    """Head and adapter together, continued by a second run; merged it is exported as a classifier."""
    run = train("rm", "rm")
    assert sorted(path.name for path in (run / "final").glob("*.safetensors")) == ["adapter_model.safetensors", "value_head.safetensors"]
    assert not (run / "classifier").exists()
    shutil.copytree(run, run.with_name("rm-merged"))
    merged = train("rm-merged", "rm", "merge=true")
    assert (merged / "classifier" / "model.safetensors").exists()
    made, scores = examples(tmp_path, pair_rows(3)), []
    for path in (run / "final", merged / "final"):
        reward = build_reward_model(build(path), str(path), 0)
        scores.append(reward(reward.collate(made)))
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)


# ---- continuing

@pytest.mark.parametrize("algorithm, keys", [("dpo", {}), ("sft", {"lora_dropout": 0.3}), ("rm", {})])
def test_resumes_bit_for_bit(algorithm, keys, train):
    whole = train(f"whole-{algorithm}", algorithm, **keys)
    part = whole.with_name(f"part-{algorithm}")
    shutil.copytree(whole, part)
    shutil.rmtree(part / "final")
    shutil.rmtree(part / "checkpoints" / "step-000006")
    train(part.name, algorithm, **keys)
    assert json.loads((part / "run.json").read_text())["resumed_from_step"] == 3
    for file in ("final/adapter_model.safetensors", "checkpoints/step-000006/optimizer.safetensors"):
        assert_same_weights(load_file(part / file), load_file(whole / file))
    assert (part / "final" / "adapter_config.json").read_text() == (whole / "final" / "adapter_config.json").read_text()
    assert metrics(part) == metrics(whole) and metrics(part, "eval") == metrics(whole, "eval")


def test_the_reference_of_a_continued_adapter_is_the_adapter(adapter, base, train):
    """Not the base model. Also when a resumed run has to compute it again, and given as a path."""
    keys = dict(model=adapter, lora_r=None, lora_alpha=None)
    run = train("continued", "dpo", store="continued", **keys)
    at_start = metrics(run, "eval")[0]
    assert at_start["loss"] == pytest.approx(math.log(2), abs=1e-6) and at_start["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert base_of(str(run / "final")) == base
    part = run.with_name("again")
    shutil.copytree(run, part)
    shutil.rmtree(part / "final")
    shutil.rmtree(part / "checkpoints" / "step-000006")
    shutil.rmtree(run.parent / ".reference")
    train("again", "dpo", store="continued", **keys)
    assert metrics(part) == metrics(run)
    assert_same_weights(load_file(part / "final" / "adapter_model.safetensors"), load_file(run / "final" / "adapter_model.safetensors"))
    other = metrics(train("other", "dpo", store="other", reference=adapter), "eval")[0]
    for side in ("chosen", "rejected"):
        expected = 0.1 * (other[f"logps/{side}"] - at_start[f"logps/{side}"])         # base against adapter
        assert other[f"rewards/{side}"] == pytest.approx(expected, abs=1e-4) and abs(expected) > 1e-2


def test_a_run_directory_is_a_model(adapter, train):
    """`model: runs/x` is its final model, else its newest whole checkpoint, of plain runs and of adapters."""
    plain = train("plain", "sft", lora_r=None, lora_alpha=None)
    shutil.copytree(plain, plain.with_name("unfinished"))
    shutil.rmtree(plain.with_name("unfinished") / "final")
    for name, model in (("from-final", plain), ("from-checkpoint", plain.with_name("unfinished"))):
        run = train(name, "dpo", model=model, reference=model, max_steps=1)
        assert metrics(run, "eval")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert_same_weights(final_weights(plain), load_file(Path(base_of(str(run / "final"))) / "model.safetensors"))


def test_two_processes_equal_one(base, tmp_path, monkeypatch):
    """FSDP2 with frozen weights and an adapter in one group."""
    runs, updates = [], watch_updates(monkeypatch)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        data = {"data": write_jsonl(tmp_path / "d.jsonl", pair_rows(10)), "eval_data": write_jsonl(tmp_path / "e.jsonl", pair_rows(4, 10))}
        options = dict(algorithm="dpo", model=base, **data, output=tmp_path / name / "run", batch_size=3)
        options |= dict(lr=1e-2, schedule="constant", warmup=0, weight_decay=0, max_length=256, eval_every=2)
        options |= dict(save_every=1, keep=9, sample_every=4, merge="true", **LORA)
        path = write_config(tmp_path / name / "c.yml", **options)
        if name == "one":
            train_here(path)
        else:
            ranks = train_on_ranks(Path(path))
            assert [rank.code for rank in ranks] == [0, 0], ranks
        runs.append(tmp_path / name / "run")
    for ours, theirs in zip(metrics(runs[1]) + metrics(runs[1], "eval"), metrics(runs[0]) + metrics(runs[0], "eval"), strict=True):
        assert ours.pop("split") == theirs.pop("split") and ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)
    start, expected = updates[runs[0]]
    gradients = saved_gradients(runs[1], updates=4)
    assert_same_gradients(gradients, expected)
    adapter = {}
    last = runs[1] / "checkpoints" / "step-000004"
    for name, tensor in load_file(last / "adapter_model.safetensors").items():
        adapter[name.removeprefix("base_model.model.").replace(".weight", ".default.weight")] = tensor
    assert adapter.keys() == start.keys()
    assert_adam_made(adapter, start, gradients, lr=1e-2)
    final, before = final_weights(runs[1]), load_file(Path(base) / "model.safetensors")
    for name in adapter:
        if "lora_A" in name:
            product = adapter[name.replace("lora_A", "lora_B")] @ adapter[name]
            name = name.replace("lora_A.default.", "")
            merged = before[name] + LORA["lora_alpha"] / LORA["lora_r"] * product
            assert torch.allclose(final[name], merged, atol=1e-6)


# ---- 4-bit, forecast and errors

def test_dry_run_counts_what_is_trained(base, tmp_path, capsys):
    data = write_jsonl(tmp_path / "d.jsonl", sft_rows(4))
    path = write_config(tmp_path / "c.yml", algorithm="sft", model=base, data=data, max_length=256, **LORA)
    main([path, "--dry-run"])
    shown = capsys.readouterr().out
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]        # q k v o gate up down, in two layers
    count = 2 * sum(4 * (a + b) for a, b in widths)
    lm = AutoModelForCausalLM.from_pretrained(base)
    total = count + sum(parameter.numel() for parameter in lm.parameters())
    assert f"trained weights, fp32 ({count / 1e6:.2f}M of {total / 1e6:.2f}M parameters)" in shown and "frozen weights" in shown


def test_quantization_is_asked_of_bitsandbytes(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(lora, "BitsAndBytesConfig", lambda **options: options)
    cuda = SimpleNamespace(type="cuda")
    asked = lora.quantization(ModelKeys(load_in_4bit=True), cuda, torch.bfloat16)
    assert asked == {"device_map": {"": cuda}, "quantization_config": dict(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)}
    assert lora.quantization(ModelKeys(), cuda, torch.bfloat16) == {}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        lora.quantization(ModelKeys(load_in_4bit=True), cuda, torch.bfloat16)


@pytest.mark.parametrize("words, says", [
    ("lora_alpha=8", "lora_alpha .command line. belongs to LoRA, which lora_r turns on; fix: add lora_r"),
    ("lora_dropout=0.1", "lora_dropout .* lora_r"), ("lora_targets=q_proj", "lora_targets .* lora_r"),
    ("load_in_4bit=true", "load_in_4bit .* lora_r"), ("merge=true", "merge .* lora_r"),
    ("lora_r=4 lora_dropout=0.1", "with allows_dropout = True only: dpo"),
    ("lora_r=-1", "lora_r .* 0 or more"),
    ("lora_r=4 lora_alpha=0", "lora_alpha .* above 0"), ("lora_r=4 lora_dropout=1", "lora_dropout .* below 1"),
    ("lora_rank=4", "write lora_r"), ("target_modules=q_proj", "write lora_targets"),
])
def test_configurations_that_are_refused(words, says, base, tmp_path):
    path = write_config(tmp_path / "c.yml", algorithm="dpo", model=base, data="d.jsonl")
    with pytest.raises(UserError, match=says) as error:
        load_config([path, *words.split()])
    assert "\n" not in str(error.value) and "; fix: " in str(error.value)


def broken_adapters(folder, adapter):
    def copy(name, **changes):
        shutil.copytree(adapter / "final", folder / name)
        file = folder / name / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return folder / name

    copy("moved", base_model_name_or_path="/nowhere/base")
    copy("nameless", base_model_name_or_path=None)
    copy("prefix", peft_type="PREFIX_TUNING")
    copy("rank", r=2)
    copy("head", target_modules=["lm_head"])
    copy("more", target_modules=["q_proj"])
    os.truncate(copy("cut") / "adapter_model.safetensors", 100)
    os.remove(copy("empty") / "adapter_model.safetensors")
    weights = copy("less") / "adapter_model.safetensors"
    save_file(dict(list(load_file(weights).items())[1:]), weights)
    return folder


@pytest.mark.parametrize("name, says", [
    ("moved", "/nowhere/base, the base model of the adapter .* is not there"), ("nameless", "names no base model"),
    ("prefix", "PREFIX_TUNING adapter"), ("rank", "does not fit its base model"), ("head", "changes the embedding or the head"),
    ("more", "disagree"), ("less", "disagree"), ("cut", "cannot be loaded"), ("empty", "cannot be loaded"),
])
def test_adapters_that_are_refused(name, says, adapter, tmp_path):
    path = broken_adapters(tmp_path, adapter) / name
    with pytest.raises(UserError, match=says) as error:
        build(path)
    assert "\n" not in str(error.value) and "; fix: " in str(error.value)


def adapter_of(folder, base, **settings):
    """An adapter that another program made with these settings."""
    made = peft.LoraConfig(r=2, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), made)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")      # peft's, that some layers are tied
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [
    dict(target_modules=["q_proj"], trainable_token_indices=[65, 66]),
    dict(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    dict(target_modules=["q_proj", "embed_tokens"])])
def test_an_adapter_of_the_embedding_is_refused(settings, tied, tmp_path):
    base = tiny_model(tmp_path / "base", tie_word_embeddings=tied)
    said = refused(build, adapter_of(tmp_path / "adapter", base, **settings))
    assert said.startswith("model: this adapter changes the embedding or the head; fix: ")


@pytest.mark.parametrize("settings", [dict(init_lora_weights="pissa"), dict(init_lora_weights="olora")])
def test_an_adapter_that_was_made_of_its_base_can_be_merged(settings, base, tmp_path):
    """PiSSA's matrices begin as a part of the base's, which lacks it then. A trial of the merge has none."""
    path = adapter_of(tmp_path / "adapter", base, target_modules=["q_proj"], **settings)
    policy = build(path)
    outline = checkpoint.outline(policy)
    assert all(tensor.is_meta for tensor in outline.values())
    plain, weights = lora.merged(policy.lm, outline)
    assert weights.keys() == {f"lm.{name}" for name in plain.state_dict()}
    _, weights = lora.merged(policy.lm, saved_tensors(policy))
    start = load_file(Path(base) / "model.safetensors")
    for name, tensor in start.items():
        torch.testing.assert_close(weights[f"lm.{name}"], tensor, atol=1e-5, rtol=1e-5)


def test_keys_and_adapter_must_agree(adapter, base, monkeypatch):
    path = checkpoint.model_path(str(adapter), print)
    assert lora.settings(build(path, **LORA).lm).r == 4
    for changed, says in ((dict(lora_r=8), "lora_r: the adapter .* has 4, not 8"), (dict(lora_alpha=4), "lora_alpha"),
                          (dict(lora_targets="q_proj"), "lora_targets: .*, not q_proj")):
        with pytest.raises(UserError, match=says):
            build(path, **LORA | changed)
    with pytest.raises(UserError, match="no linear layers lm_head, x outside its head; fix: choose from down_proj, gate_proj"):
        build(base, lora_r=4, lora_targets="lm_head,x,q_proj")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=re.escape("fix: pip install peft")):
        build(base, lora_r=4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it works")
def test_four_bits_without_cuda(base, monkeypatch):
    monkeypatch.setattr("model.build.load_lm", None)               # nothing is loaded before the error
    with pytest.raises(UserError, match="load_in_4bit: this machine has no CUDA GPU"):
        build(base, lora_r=4, load_in_4bit=True)
