"""Whole runs equal TRL's over several updates: loss, gradient norm, rewards and log-probs. sft and dpo go
through `benchmark/vs_trl.py`, which holds the same against the real tokenizer and real HH pairs; the others
and length-normalised dpo train here on plain strings."""
import importlib
import importlib.util
import math
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers import byte_tokenizer, metrics, tiny_model, train_here, write_config, write_jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmark import vs_trl

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason="trl is not installed: pip install -r requirements-dev.txt")
SHAPE = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 260}


@pytest.fixture(autouse=True)
def restore_process():
    """The engine catches signals; the rest of the test run should not."""
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_metrics_equal_trl(algorithm, tmp_path):
    job = {
        "algorithm": algorithm, "data": None, "tokenizer": None, "source": None, "pairs": 24, "batch": 4,
        "lr": 1e-3, "shape": SHAPE, "max_length": 2048, "work": str(tmp_path), "model": f"{tmp_path}/model",
        "ours_rows": f"{tmp_path}/ours.jsonl", "trl_rows": f"{tmp_path}/trl.jsonl",
        "precision": "fp32", "per_device": 4, "precompute": False,
        "overrides": ["micro_batch_tokens=1000"]}      # several micro-batches per update on our side
    vs_trl.prepare(job)
    ours, theirs = vs_trl.train_ours(job), vs_trl.train_trl(job)
    assert ours["ids"] == theirs["ids"]
    assert len(ours["metrics"]) == 6
    wrong = [row for row in vs_trl.disagreements(job, ours, theirs) if row[-1] > 1]
    assert not wrong, wrong


# ---- the other algorithms ----

END = "<|im_end|>"
REWARDS = ["rewards/chosen", "rewards/rejected", "rewards/margins"]
LOGPS = ["logps/chosen", "logps/rejected"]


def make_rows():
    """-> pairs, and marked responses to the same prompts."""
    pairs, labelled = [], []
    for i in range(20):
        prompt = f"\n\nHuman: {'what ' * (i % 3 + 1)}{i}?\n\nAssistant:"
        chosen, rejected = f" it is {i}" * (i % 4 + 1), " no" * (5 - i % 5) + f" {i}"
        pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        label = i % 3 > 0
        labelled.append({"prompt": prompt, "completion": chosen if label else rejected, "label": label})
    return pairs, labelled


PAIRS, LABELLED = make_rows()
CPO, DPO = "trl.experimental.cpo.CPOTrainer", "trl.DPOTrainer"
CENTERED = dict(center_rewards_coefficient=0.01)
TRAINERS = {    # name: (TRL's trainer, its options, ours, the rows, the metrics with the same definition)
    # of the length-normalised losses TRL's metrics are of sums
    "dpo": (DPO, dict(loss_type="sigmoid_norm", beta=5.0), dict(average_log_prob="true", beta=5), PAIRS, []),
    "ipo": (DPO, dict(loss_type="ipo"), {}, PAIRS, []),
    "apo": (DPO, dict(loss_type="apo_zero"), {}, PAIRS, [*REWARDS, *LOGPS, "rewards/accuracies"]),
    "rpo": (DPO, dict(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5]), dict(rpo_alpha=0.5), PAIRS,
            [*REWARDS, *LOGPS]),
    "kto": ("trl.KTOTrainer", dict(desirable_weight=1.5), dict(desirable_weight=1.5), LABELLED,
            [*REWARDS, *LOGPS, "kl"]),
    "cpo": (CPO, dict(label_smoothing=0.1), dict(label_smoothing=0.1), PAIRS,
            [*REWARDS, *LOGPS, "rewards/accuracies", "nll_loss"]),
    "simpo": (CPO, dict(loss_type="simpo", beta=2.0, simpo_gamma=1.0, cpo_alpha=0.0), {}, PAIRS,
              [*REWARDS, *LOGPS, "rewards/accuracies"]),
    "rm": ("trl.RewardTrainer", CENTERED, CENTERED, PAIRS, ["accuracy", "margin", "mean_reward"]),
}
BATCH = 4       # rows per update


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"), initializer_range=0.05)


def train_ours(folder, algorithm, model, rows, **options):
    """-> the metrics of every update; several micro-batches in each."""
    data = write_jsonl(folder / "data.jsonl", rows)
    values = dict(
        algorithm=algorithm, model=model, data=data, output=folder / "ours", batch_size=BATCH, lr=1e-3,
        schedule="constant", warmup=0, weight_decay=0, max_length=256, shuffle="false", epochs=1,
        save_every="null", micro_batch_tokens=150, precision="fp32", share_prompt="true")
    train_here(write_config(folder / "ours.yml", **values | options))
    return metrics(folder / "ours")


def train_trl(folder, name, options, model, rows, batch=BATCH, tokenizer=None):
    """-> the metrics of every update of one of TRL's trainers. `tokenizer`: the model's, if it is not the
    byte tokenizer."""
    from datasets import Dataset
    package, _, trainer_name = name.rpartition(".")
    trl_module = importlib.import_module(package)
    trainer_class = getattr(trl_module, trainer_name)
    config_class = getattr(trl_module, trainer_name.replace("Trainer", "Config"))
    arguments = config_class(
        output_dir=str(folder / "trl"), learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0,
        weight_decay=0.0, seed=0, max_grad_norm=1.0, num_train_epochs=1, max_length=256,
        train_sampling_strategy="sequential", per_device_train_batch_size=batch, gradient_checkpointing=False,
        bf16=False, use_cpu=True, dataloader_pin_memory=False, logging_steps=1, disable_tqdm=True,
        save_strategy="no", eval_strategy="no", report_to="none", **options)
    if trainer_name == "RewardTrainer":
        policy = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
        policy.score.weight.data = start_head(policy.config.hidden_size)
    else:
        policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if tokenizer is None:
        tokenizer = byte_tokenizer(chat_template=False)
        rows = [stopped(row) for row in rows]
    trainer = trainer_class(model=policy, args=arguments, train_dataset=Dataset.from_list(rows),
                            processing_class=tokenizer)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row]


def stopped(row):
    """A row whose responses end with the stop token's text."""
    ends = {key: row[key] + END for key in ("chosen", "rejected", "completion") if key in row}
    return row | ends


def start_head(size):
    """Our reward model's head before the first update, for seed 0."""
    return torch.randn(1, size, generator=torch.Generator().manual_seed(0)) / math.sqrt(size + 1)


def assert_equal_metrics(ours, theirs, names):
    assert len(ours) == len(theirs) >= 3
    for a, b in zip(ours, theirs):
        for name in ["loss", "grad_norm", *names]:
            if name in a or name in b:                         # an update may hold one class of labels only
                assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)


@pytest.mark.parametrize("algorithm", TRAINERS)
def test_a_run_equals_trl(algorithm, model, tmp_path):
    trainer, their_options, our_options, rows, names = TRAINERS[algorithm]
    ours = train_ours(tmp_path, algorithm, model, rows, **our_options)
    theirs = train_trl(tmp_path, trainer, their_options, model, rows)
    assert_equal_metrics(ours, theirs, names)


def padded(pairs):
    """-> token ids and labels of the chosen, then the rejected sequences, padded on the right."""
    tokenizer, tokens, labels = byte_tokenizer(), [], []
    for side in ("chosen", "rejected"):
        for row in pairs:
            prompt = tokenizer(row["prompt"]).input_ids
            response = tokenizer(row[side] + END).input_ids
            tokens.append(torch.tensor(prompt + response))
            labels.append(torch.tensor([-100] * len(prompt) + response))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(tokens, batch_first=True, padding_value=256), pad(labels, batch_first=True, padding_value=-100)


def test_orpo_equals_trl(model, tmp_path):
    """TRL's methods for the preference term in a loop of our own: the likelihood of its trainer includes the
    prompt's tokens."""
    from trl.experimental.orpo import ORPOTrainer
    stand_in = SimpleNamespace(beta=0.25, accelerator=SimpleNamespace(device="cpu"))
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    expected = []
    for start in range(0, len(PAIRS), BATCH):
        tokens, labels = padded(PAIRS[start:start + BATCH])
        logits = policy(tokens, attention_mask=(tokens != 256).long(), use_cache=False).logits
        logps = ORPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
        losses, _, _, ratio, odds = ORPOTrainer.odds_ratio_loss(stand_in, *logps.chunk(2))
        chosen_logits, chosen_labels = logits[:BATCH, :-1], labels[:BATCH, 1:]
        likelihood = torch.nn.functional.cross_entropy(chosen_logits.flatten(0, 1), chosen_labels.flatten())
        loss = likelihood - losses.mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        expected.append({
            "loss": loss.item(), "grad_norm": norm.item(), "nll_loss": likelihood.item(),
            "log_odds_ratio": ratio.item(), "log_odds_chosen": odds.item()})
    ours = train_ours(tmp_path, "orpo", model, PAIRS, beta=0.25)
    assert_equal_metrics(ours, expected, ["nll_loss", "log_odds_ratio", "log_odds_chosen"])
