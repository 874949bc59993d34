"""Whole runs of train.py against a plain loop: one unpadded sequence at a time, full logits, tokens spelled out by hand."""
import json
import math

import pytest
import torch
from helpers import (
    assert_same_weights,
    final_weights,
    metrics,
    pair_rows,
    sft_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from data.errors import RunError
from engine.loop import Engine, Step

PLAIN = dict(share_prompt="true", shuffle="false", schedule="constant", warmup=0, weight_decay=0, batch_size=4, lr=1e-3, max_length=256,
             save_every="null")
START, END = [257], [258]       # <|im_start|>, <|im_end|>


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by name: the start model and, for both algorithms, ten training rows and five held-out ones."""
    folder = tmp_path_factory.mktemp("files")
    rows = {"sft": sft_rows(10), "sft-eval": sft_rows(5, 10), "dpo": pair_rows(10), "dpo-eval": pair_rows(5, 10)}
    return {"model": tiny_model(folder / "model"), **{name: write_jsonl(folder / f"{name}.jsonl", rows[name]) for name in rows}}


@pytest.fixture
def run(files, tmp_path):
    """run(name, algorithm, key=value, ...) -> the directory of a finished run."""
    def run(name, algorithm, **values):
        config = write_config(tmp_path / f"{name}.yml", **dict(algorithm=algorithm, model=files["model"], data=files[algorithm],
                                                               output=tmp_path / name) | PLAIN | values)
        train_here(config)
        return tmp_path / name
    return run


def close(rows, expected, tolerance):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected):
        numbers = {name: value for name, value in other.items() if name != "split"}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=tolerance, abs=tolerance)


# ---- the plain loop ----

def ids(text):
    """The byte tokenizer's ids of ASCII text, from its definition: printable bytes in order, then the others."""
    return [ord(character) - 33 if character > " " else 188 + ord(character) for character in text]


def turn(role, text):
    return START + ids(f"{role}\n{text}") + END + ids("\n")


def chat(history):
    """A prompt: the turns so far and the beginning of the assistant's."""
    return sum([turn(message["role"], message["content"]) for message in history], []) + START + ids("assistant\n")


def sft_sequence(row):
    """[(token, trained)]"""
    if "prompt" in row:
        return [(token, False) for token in ids(row["prompt"])] + [(token, True) for token in ids(row["response"]) + END]
    sequence = []
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            sequence += [(token, False) for token in chat(row["messages"][:i])[len(sequence):]]
            sequence += [(token, True) for token in ids(message["content"]) + END]
    return sequence


def sequence_logps(lm, tokens, trained):
    """Log-probs of the trained tokens of one sequence, as a list."""
    logps = torch.log_softmax(lm(torch.tensor([tokens]), use_cache=False).logits[0], dim=-1)
    return [logps[i - 1, tokens[i]] for i in range(1, len(tokens)) if trained[i]]


def sft_loss_of(rows, policy, reference):
    logps = [logp for row in rows for logp in sequence_logps(policy, *zip(*sft_sequence(row)))]
    return -sum(logps) / len(logps), {}


def dpo_loss_of(rows, policy, reference, beta=0.1, smoothing=0.0):
    terms = []
    for row in rows:
        prompt, rewards, summed = chat(row["prompt"]), {}, {}
        for side in ("chosen", "rejected"):
            response = ids(row[side][0]["content"]) + END
            sequence = prompt + response, [False] * len(prompt) + [True] * len(response)
            summed[side] = sum(sequence_logps(policy, *sequence))
            rewards[side] = beta * (summed[side] - sum(sequence_logps(reference, *sequence)).detach())
        margin = rewards["chosen"] - rewards["rejected"]
        loss = -(1 - smoothing) * torch.log(torch.sigmoid(margin)) - smoothing * torch.log(torch.sigmoid(-margin))
        terms.append({"loss": loss, "rewards/chosen": rewards["chosen"], "rewards/rejected": rewards["rejected"],
                      "rewards/margins": margin, "rewards/accuracies": float(margin > 0),
                      "logps/chosen": summed["chosen"], "logps/rejected": summed["rejected"]})
    means = {name: sum(term[name] for term in terms) / len(terms) for name in terms[0]}
    return means.pop("loss"), {name: torch.as_tensor(value).item() for name, value in means.items()}


def plain_loop(model, data, loss_of, updates, batch_size=4, lr=1e-3, max_grad_norm=1.0):
    """-> the metrics of every update and the final weights."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False)
    with open(data) as file:
        rows, logged = [json.loads(line) for line in file], []
    batches = [rows[start:start + batch_size] for start in range(0, len(rows), batch_size)]
    for index in range(updates):
        loss, values = loss_of(batches[index % len(batches)], policy, reference)
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float((parameter.grad.double() ** 2).sum()) for parameter in policy.parameters()))
        for parameter in policy.parameters():
            parameter.grad *= min(1.0, max_grad_norm / (norm + 1e-6))
        optimizer.step()
        logged.append({"loss": loss.item(), "grad_norm": norm, **values})
    return logged, policy.state_dict()


@pytest.mark.parametrize("algorithm, loss_of, clip, options", [
    ("sft", sft_loss_of, 1.0, {}),
    ("dpo", dpo_loss_of, 1.0, {}),
    ("dpo", lambda *models: dpo_loss_of(*models, beta=0.5, smoothing=0.2), 100.0, {"beta": 0.5, "label_smoothing": 0.2}),
], ids=["sft", "dpo", "cdpo"])
def test_updates_equal_a_plain_loop(files, run, algorithm, loss_of, clip, options):
    """Six updates, two epochs whose last update is smaller; batches, targets, stop tokens, division, clipping and AdamW."""
    expected, weights = plain_loop(files["model"], files[algorithm], loss_of, updates=6, max_grad_norm=clip)
    result = run("ours", algorithm, epochs=2, max_grad_norm=clip, **options)
    close(metrics(result), expected, 1e-5)
    assert [row["epoch"] for row in metrics(result)] == [.3333, .6667, 1, 1.3333, 1.6667, 2]
    assert clip == 100 or max(row["grad_norm"] for row in expected) > 1      # clipping was at work
    assert_same_weights(final_weights(result), weights, 5e-5)     # AdamW magnifies the rounding of tiny gradients


# ---- what must not change the numbers ----

@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_the_cut_into_micro_batches_changes_nothing(run, algorithm):
    """One micro-batch of 8 = 8 of 1, prompts shared or not, attention by segments or with a mask, layers recomputed or not."""
    one = run("one", algorithm, batch_size=8, micro_batch_tokens=100_000, max_steps=4)
    others = {"eight": dict(micro_batch_tokens=2), "some": dict(micro_batch_tokens=200), "separate": dict(share_prompt="false"),
              "dense": dict(attn_implementation="dense"), "recomputed": dict(gradient_checkpointing="true")}
    for name, options in others.items():
        other = run(name, algorithm, **dict(batch_size=8, micro_batch_tokens=100_000, max_steps=4) | options)
        close(metrics(other), metrics(one), 1e-5)
        assert_same_weights(final_weights(other), final_weights(one), 1e-6)


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_watching_changes_nothing(files, run, algorithm):
    """Evaluation, samples, logging, checkpoints and a repetition: bit-identical weights."""
    options = dict(epochs=2, shuffle="true")
    bare = run("bare", algorithm, log_every=100, **options)
    held_out = files[f"{algorithm}-eval"]
    watched = run("watched", algorithm, eval_data=held_out, eval_every=1, sample_every=2, save_every=1, **options)
    again = run("again", algorithm, **options)
    assert_same_weights(final_weights(watched), final_weights(bare))
    assert_same_weights(final_weights(again), final_weights(bare))
    assert metrics(watched) == metrics(again) and [row for row in metrics(again) if row["step"] in (1, 6)] == metrics(bare)
    assert [row["step"] for row in metrics(watched, "eval")] == list(range(7))
    samples = [json.loads(line) for line in (watched / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [2] * 4 + [4] * 4 + [6] * 4


def test_evaluation_is_the_mean_over_all_held_out_rows(files, run):
    """Five rows, two at a time: the loss of each algorithm by the plain loop, with the start model."""
    for algorithm, loss_of in (("sft", sft_loss_of), ("dpo", dpo_loss_of)):
        held_out = files[f"{algorithm}-eval"]
        result = run(algorithm, algorithm, eval_data=held_out, batch_size=2, micro_batch_tokens=150, max_steps=1)
        (expected,), _ = plain_loop(files["model"], held_out, loss_of, updates=1, batch_size=5)
        expected.pop("grad_norm")
        close(metrics(result, "eval")[:1], [expected], 1e-5)


# ---- the plan ----

@pytest.mark.parametrize("schedule, warmup, expected", [
    ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
    ("constant", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
    ("linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ("linear", 2, [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("linear", 0.25, [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("cosine", 0.5, [1 / 4, 2 / 4, 3 / 4, 1, 1, (2 + 2 ** .5) / 4, 1 / 2, (2 - 2 ** .5) / 4]),
    ("linear", 8, [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1]),
])
def test_learning_rates(run, schedule, warmup, expected):
    result = run("rates", "sft", schedule=schedule, warmup=warmup, max_steps=8, lr=2e-4)
    assert [row["lr"] / 2e-4 for row in metrics(result)] == pytest.approx(expected, rel=1e-12)


def test_every_epoch_has_its_own_order(run, monkeypatch):
    seen = []
    original = Step.__init__

    def spy(self, engine, index, examples):
        seen.append((index, [int(example.where.rpartition(":")[2]) for example in examples]))
        original(self, engine, index, examples)
    monkeypatch.setattr(Step, "__init__", spy)
    run("order", "sft", epochs=2, shuffle="true", seed=3)
    plan = dict(seen)
    assert [len(plan[index]) for index in range(1, 7)] == [4, 4, 2, 4, 4, 2]
    first, second = (sum((plan[index] for index in indices), []) for indices in ((1, 2, 3), (4, 5, 6)))
    assert sorted(first) == sorted(second) == list(range(1, 11)) and first != second and first != sorted(first)
    run("other-seed", "sft", epochs=1, shuffle="true", seed=4)
    assert [dict(seen[-3:])[index] for index in (1, 2, 3)] != [plan[index] for index in (1, 2, 3)]


# ---- step-0 invariants ----

def test_dpo_starts_at_log_two(run):
    row = metrics(run("start", "dpo", max_steps=1))[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["rewards/chosen"] == row["rewards/rejected"] == row["rewards/accuracies"] == 0


@pytest.mark.parametrize("error", [3e-4, -3e-4])
def test_a_wrong_reference_stops_the_run(run, tmp_path, monkeypatch, error):
    original = Engine.frozen_logps
    monkeypatch.setattr(Engine, "frozen_logps", lambda *arguments: original(*arguments) + error)
    with pytest.raises(RunError, match="policy and reference differ"):
        run("wrong", "dpo", max_steps=1)
    assert metrics(tmp_path / "wrong") == []


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_weights_that_do_not_move_stop_the_run(run, algorithm):
    with pytest.raises(RunError, match="no weight moved in the first update"):
        run("still", algorithm, max_steps=2, lr=1e-30)


def test_a_loss_that_is_not_finite_stops_before_the_update(run, tmp_path, monkeypatch):
    rows, original = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: rows.append(len(rows)) or original(self))
    monkeypatch.setattr("algorithms.sft.sft_loss", lambda logps: (-logps * (math.nan if len(rows) == 2 else 1), {}))
    with pytest.raises(RunError, match="update 3, before the weights were touched; rows: .*sft.jsonl:9, .*sft.jsonl:10;"):
        run("nan", "sft", epochs=2)
    assert len(rows) == 2 and [row["step"] for row in metrics(tmp_path / "nan")] == [1, 2]
