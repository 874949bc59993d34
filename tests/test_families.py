"""One family of models per mechanism; `python tests/families.py` tests all of them, in every cell."""
import os

import pytest
from family_runs import Family, prepare, write_data

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

QUICK = {
    "llama": "sft ppo ranks dry_run",                      # flat rows with shared prompts
    "granite": "sft dpo_tied",                             # logits divided
    "phi": "sft grpo",                                     # head with a bias
    "gemma2": "sft grpo ppo",                              # soft-cap of scores and logits
    "gpt_oss": "sft grpo",                                 # sinks, a mixture of experts
    "bitnet": "sft",                                       # an MLP with a norm inside
    "bloom": "sft grpo",                                   # ALiBi
    "opt": "checkpointing",                                # dropout in functions, learned positions
    "qwen3_5_text": "sft grpo ppo lora ranks dry_run",     # linear attention
    "mamba": "sft grpo checkpointing",                     # no attention
    "qwen3_moe": "lora router",                            # experts as 3-D parameters
    "gemma3_full": "sft lora reload dry_run",              # a text model inside one that sees
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    prepare()
    folder = tmp_path_factory.mktemp("families")
    write_data(folder)
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_every_number_is_that_of_the_models_own_class(data, name):
    family = Family(name, data)
    for cell in QUICK[name].split():
        assert family.cell(cell) == "ok", cell


def test_long_rows_among_short_ones(data):
    """Positions above 32 change the rotation of every token of a row, and of that row alone."""
    family = Family("phi3_longrope", data, title="long")
    assert family.cell("mixed") == "ok"


def test_bf16_does_not_let_rows_leak_into_each_other(data):
    family = Family("lfm2", data, title="bf16")
    assert family.cell("bf16") == "ok"
