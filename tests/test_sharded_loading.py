"""Several ranks load a model whose weights no rank ever holds whole, and train what one process trains."""
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from helpers import byte_tokenizer, config_of, metrics, random_lm, train_here, write_config
from robust_helpers import join, project, train_on_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from model.build import load_mapped
from model.load import stored_dtype

SHARE = 0.5                       # of two ranks
MOST = 0.75                       # of the fp32 weights: a rank's share, a layer, and what Python takes meanwhile


def model_in_bf16(directory, **config):
    random_lm(config_of(**config)).to(torch.bfloat16).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return str(directory)


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
    """60M parameters in bf16: whole in fp32 they are 240 MB on each of two ranks."""
    sizes = dict(hidden_size=512, intermediate_size=2048, num_hidden_layers=14, num_attention_heads=4)
    big = model_in_bf16(tmp_path / "model", **sizes)
    folder = project(tmp_path / "run", "dpo", big, max_steps=1, save_every="null", eval_every=1000)
    config = Path(write_config(folder / "config.yml", **settings(folder), output=tmp_path / "out"))
    for done in train_on_ranks(config, patch=watch_memory):
        assert done.code == 0, done.err
        found, whole = next(line.split()[1::2] for line in done.out.splitlines() if line.startswith("bytes"))
        assert int(whole) > 200e6
        assert SHARE * int(whole) < int(found) < MOST * int(whole)
