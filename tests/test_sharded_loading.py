"""Several ranks load a model whose weights no rank ever holds whole, and train what one process trains."""
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import assert_same_weights, byte_tokenizer, config_of, metrics, random_lm, train_here
from robust_helpers import join, project, train_on_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from model.build import load_mapped
from model.load import stored_dtype

SHARE = 0.5                       # of two ranks
MOST = 0.9                        # of the fp32 weights: a share, a layer, and 40 MB of modules and threads


def model_in_bf16(directory, **config):
    random_lm(config_of(**config)).to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


def config_in(folder, algorithm, model, **values):
    """The configuration of a run into `folder`/out, which ranks in other directories can read, too."""
    values = dict(output=folder / "out", max_steps=2, eval_every=1000) | values
    return project(folder, algorithm, model, **values) / "config.yml"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_in_bf16(tmp_path_factory.mktemp("bf16") / "model")


def private_bytes():
    """This process's memory that it shares with no other, without mapped files."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])


def watch_memory(*place):
    """Print the most private memory while the model is loaded, sharded and checked, beyond that before it,
    and the bytes of its weights in fp32."""
    join(*place)
    from engine import build
    load, check = build.build_policy, build.check_policy
    seen, done = [], threading.Event()

    def watch():
        while not done.wait(0.001):
            seen.append(private_bytes())

    def build_policy(*arguments, **options):
        seen.append(private_bytes())
        threading.Thread(target=watch, daemon=True).start()
        return load(*arguments, **options)

    def check_policy(policy, *arguments):
        done.set()                # before activations
        whole = sum(4 * weight.numel() for weight in policy.parameters())
        print(f"bytes {max(seen) - seen[0]} of {whole}", flush=True)
        check(policy, *arguments)

    build.build_policy, build.check_policy = build_policy, check_policy


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_no_rank_holds_the_whole_model_while_it_is_loaded(tmp_path):
    """45M parameters in bf16: whole in fp32 they are 180 MB on each of two ranks."""
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=4)
    big = model_in_bf16(tmp_path / "model", **sizes)
    config = config_in(tmp_path / "run", "dpo", big, max_steps=1, save_every="null")
    for done in train_on_ranks(config, patch=watch_memory):
        assert done.code == 0, done.err
        found, whole = next(line.split()[1::2] for line in done.out.splitlines() if line.startswith("bytes"))
        assert int(whole) == 180037120
        assert SHARE * int(whole) < int(found) < MOST * int(whole)


@pytest.mark.parametrize("algorithm", ["dpo", "rm", "ppo"])
def test_a_model_in_bf16_trains_in_fp32_as_in_one_process(algorithm, model, tmp_path):
    """Its weights are exact in fp32; what is saved is in fp32, with its dtype in config.json."""
    one, two = (config_in(tmp_path / name, algorithm, model) for name in ("one", "two"))
    train_here(one)
    assert [rank.code for rank in train_on_ranks(two)] == [0, 0]
    runs = [one.with_name("out"), two.with_name("out")]
    for one, two in zip(*map(metrics, runs), strict=True):
        assert one.pop("split") == two.pop("split") and two == pytest.approx(one, rel=2e-5, abs=2e-5)
    ours, theirs = (json.loads((run / "final" / "config.json").read_text()) for run in runs)
    assert ours == theirs and ours["dtype"] == "float32"


def test_a_critic_in_bf16_files_resumes_exactly(model, tmp_path):
    """The saved critic is in fp32, its start model's files are in bf16."""
    whole, part = (config_in(tmp_path / name, "ppo", model) for name in ("whole", "part"))
    assert [rank.code for rank in train_on_ranks(whole)] == [0, 0]
    ours, theirs = whole.with_name("out"), part.with_name("out")
    shutil.copytree(ours, theirs)
    shutil.rmtree(theirs / "final")
    shutil.rmtree(theirs / "checkpoints" / "step-000002")
    part.write_text(whole.read_text().replace(str(ours), str(theirs)))
    settings = (theirs / "config.yaml").read_text()
    (theirs / "config.yaml").write_text(settings.replace(str(ours), str(theirs)))
    assert [rank.code for rank in train_on_ranks(part)] == [0, 0]
    assert json.loads((theirs / "run.json").read_text())["resumed_from_step"] == 1
    for name in ("model", "critic", "optimizer"):
        file = f"checkpoints/step-000002/{name}.safetensors"
        assert_same_weights(load_file(theirs / file), load_file(ours / file))


def deaf(*place):
    """A model check that no model passes."""
    join(*place)
    from model import check
    check.TOLERANCE = -1.0


def test_a_model_that_is_refused_ends_all_ranks_with_one_line(model, tmp_path):
    config = config_in(tmp_path / "refused", "dpo", model)
    for done in train_on_ranks(config, patch=deaf):
        assert done.code == 2 and "Traceback" not in done.err
        assert done.err.splitlines()[-1].startswith("error: model: a qwen2 is no causal language model here")


def broken_in_flat_rows(*place):
    """Layers that raise in any form of attention but their own."""
    join(*place)
    from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
    forward = Qwen2Attention.forward

    def own_only(layer, *arguments, **options):
        if layer.config._attn_implementation == "segments":
            raise TypeError("no such attention")
        return forward(layer, *arguments, **options)

    Qwen2Attention.forward = own_only


def test_layers_that_raise_while_they_are_checked(model, tmp_path):
    """In the middle of a sharded forward; the next form of rows is tried, and trained."""
    one = config_in(tmp_path / "one", "dpo", model, attn_implementation="plain")
    two = config_in(tmp_path / "two", "dpo", model)
    train_here(one)
    for done in train_on_ranks(two, patch=broken_in_flat_rows):
        assert done.code == 0, done.err
    for ours, theirs in zip(metrics(two.with_name("out")), metrics(one.with_name("out")), strict=True):
        assert ours.pop("split") == theirs.pop("split") and ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)


def test_the_dtype_of_files(model, tmp_path):
    """One for all weights, or None; such weights are mapped and become fp32, but not where buffers would be
    rounded with them."""
    assert stored_dtype(model) == torch.bfloat16
    lm = load_mapped(model, torch.float32)
    assert {(weight.dtype, weight.kept_as) for weight in lm.parameters()} == {(torch.bfloat16, torch.float32)}
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, buffer in whole.named_buffers():
        assert torch.equal(dict(lm.named_buffers())[name], buffer)
    mixed = tmp_path / "mixed"
    shutil.copytree(model, mixed)
    weights = load_file(mixed / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, mixed / "model.safetensors", metadata={"format": "pt"})
    assert stored_dtype(str(mixed)) is None
    gemma = model_in_bf16(tmp_path / "gemma", config_class=Gemma3TextConfig)
    lm = load_mapped(gemma, torch.float32)
    assert {weight.dtype for weight in lm.parameters()} == {torch.float32}
