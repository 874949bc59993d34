"""What a run leaves behind: every file, readable by others and enough to repeat the run."""
import hashlib
import json
import math
import os
import re

import pytest
import torch
import yaml
from helpers import (
    assert_same_weights,
    byte_tokenizer,
    final_weights,
    metrics,
    pair_rows,
    sft_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine.logs import Run
from engine.sealed import broken

TRAIN_KEYS = {"step", "split", "epoch", "loss", "grad_norm", "lr", "tokens_per_second"}
DPO_KEYS = {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
            "logps/rejected"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{"dpo", "sft"}: run directories of four updates; one pair is too long, one has no difference."""
    directory = tmp_path_factory.mktemp("runs")
    model = tiny_model(directory / "model")
    pairs = pair_rows(10)
    pairs[3] = {"prompt": "long " * 100, "chosen": "a", "rejected": "b"}
    pairs[5] = {"prompt": "same", "chosen": "a", "rejected": "a"}
    for algorithm, rows in (("dpo", pairs), ("sft", sft_rows(8))):
        data = write_jsonl(directory / f"{algorithm}.jsonl", rows)
        write_config(directory / f"{algorithm}.yml", algorithm=algorithm, model=model, data=data,
                     output=directory / algorithm, batch_size=4, epochs=2, lr=1e-3, max_length=200,
                     save_every=2, eval_every=2)
    evaluation = write_jsonl(directory / "eval.jsonl", pair_rows(4, 50))
    train_here(directory / "dpo.yml", f"eval_data={evaluation}", "sample_every=4")
    train_here(directory / "sft.yml")
    return directory


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files(runs):
    names = {"checkpoints", "config.yaml", "events.log", "final", "metrics.jsonl", "report.html",
             "run.json", "samples.jsonl"}
    assert set(os.listdir(runs / "sft")) == set(os.listdir(runs / "dpo")) == names
    part, = (runs / ".reference").glob("*/table-*")      # beside the runs, for the next one
    assert sorted(os.listdir(runs / "dpo" / "checkpoints")) == ["step-000002", "step-000004"]
    for sealed in (part, runs / "dpo" / "final", *(runs / "dpo" / "checkpoints").iterdir()):
        assert broken(str(sealed)) is None
    umask = os.umask(0)
    os.umask(umask)
    for path in (runs / "dpo").rglob("*"):      # a server under another user must be able to read the model
        assert path.stat().st_mode & 0o777 == (0o777 & ~umask if path.is_dir() else 0o644), path
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl")      # no pickles


def test_metrics(runs):
    rows = lines(runs / "dpo" / "metrics.jsonl")
    kinds = [f"{row['step']} {row['split']}" for row in rows]
    assert kinds == ["0 eval", "1 train", "2 train", "2 eval", "3 train", "4 train", "4 eval"]
    for row in rows:
        split = row.pop("split")
        own_keys = TRAIN_KEYS - {"split"} if split == "train" else {"step", "loss"}
        assert set(row) == own_keys | DPO_KEYS
        assert all(map(math.isfinite, row.values()))
        difference = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(difference, abs=1e-6)
    assert rows[0]["loss"] == pytest.approx(math.log(2)) and rows[0]["rewards/accuracies"] == 0
    assert rows[1]["lr"] == 1e-3
    assert [row["epoch"] for row in rows if "epoch" in row] == [0.5, 1.0, 1.5, 2.0]
    assert all(set(row) == TRAIN_KEYS for row in lines(runs / "sft" / "metrics.jsonl"))


def test_run_json(runs):
    run = json.loads((runs / "dpo" / "run.json").read_text())
    assert set(run) == {"command", "started", "versions", "machine", "world_size", "data", "digests",
                        "resumed_from_step", "final", "pace"}
    assert run["versions"]["torch"] == torch.__version__
    assert run["resumed_from_step"] == 0 and run["world_size"] == 1
    data = run["data"]["train"]
    assert data["sha256"] == hashlib.sha256((runs / "dpo.jsonl").read_bytes()).hexdigest()
    assert data["source"] == str(runs / "dpo.jsonl")
    assert (data["read"], data["used"]) == (10, 8)
    assert data["dropped"] == {"longer than max_length": 1, "chosen equals rejected": 1}
    assert data["first_dropped"]["longer than max_length"] == f"{runs}/dpo.jsonl:4"
    assert run["data"]["eval"]["used"] == 4
    sft = json.loads((runs / "sft" / "run.json").read_text())
    assert sft["data"]["eval"] is None


@pytest.mark.parametrize("algorithm", ["dpo", "sft"])
def test_config_yaml_repeats_the_run(algorithm, runs, tmp_path):
    config = runs / algorithm / "config.yaml"
    assert yaml.safe_load(config.read_text())["lr"] == 1e-3
    train_here(config, f"output={tmp_path / 'again'}")
    assert metrics(tmp_path / "again") == metrics(runs / algorithm)
    assert_same_weights(final_weights(tmp_path / "again"), final_weights(runs / algorithm))


def test_final_loads_anywhere(runs):
    final = runs / "dpo" / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForCausalLM.from_pretrained(final)
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    assert tokenizer.eos_token_id == 258 and tokenizer.pad_token_id == 256
    assert model.generation_config.eos_token_id == [258] and model.dtype == torch.float32
    assert json.loads((final / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
    # our attention exists in no other program
    assert "segments" not in (final / "config.json").read_text()
    messages = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)
    output = model.generate(**ids, max_new_tokens=4, do_sample=False)
    assert output.shape[1] > ids["input_ids"].shape[1]
    weights = final_weights(runs / "dpo")
    last = AutoModelForCausalLM.from_pretrained(runs / "dpo" / "checkpoints" / "step-000004")
    saved = last.state_dict()
    assert weights and all(torch.equal(saved[name], tensor) for name, tensor in weights.items())


def test_samples_and_events(runs):
    samples = lines(runs / "dpo" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [4] * 4
    assert all(set(sample) == {"step", "prompt", "completion"} for sample in samples)
    assert samples[0]["prompt"].endswith("<|im_start|>assistant\n")
    events = (runs / "dpo" / "events.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S", line) for line in events)
    assert any(line.endswith(f"run {runs / 'dpo'}") for line in events)
    assert any("held-out rows at step 2" in line for line in events)


def test_rows_of_updates_done_again_are_cut(tmp_path):
    """A kill may come after rows were written whose checkpoint was not, and in the middle of a line; a power
    failure leaves zeros."""
    run = Run(str(tmp_path))
    whole = "".join(f'{{"step": {step}}}\n' for step in (0, 1, 2, 2, 3, 4))
    for name in ("metrics.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text(whole + '\0\0\0\n{"step": 2, "spl')
    data = {"train": {"source": "d", "sha256": "0"}, "eval": None}
    (tmp_path / "run.json").write_text(json.dumps({"data": data}))
    run.begin("lr: 1\n", data, {}, 2)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert [row["step"] for row in lines(tmp_path / name)] == [0, 1, 2, 2]
    assert json.loads((tmp_path / "run.json").read_text())["resumed_from_step"] == 2
    run.begin("lr: 1\n", data, {}, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
