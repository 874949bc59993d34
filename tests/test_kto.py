"""What is KTO's own: responses to other prompts, one class in an update, labels, counts and weights."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    byte_tokenizer,
    labelled_rows,
    metrics,
    pair_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from algorithms.kto import lenders_of_data, mismatched
from data.errors import UserError
from data.pack import Example, Response


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def train(model, tmp_path):
    """train(rows, key=value, ...) -> the run's directory, in `train.directory`."""
    def train(rows, **values):
        options = dict(algorithm="kto", model=model, data=write_jsonl(tmp_path / "data.jsonl", rows), output=tmp_path / "run", batch_size=4,
                       epochs=1, lr=1e-3, max_length=256, save_every="null") | values
        train_here(write_config(tmp_path / "run.yml", **options))
        return options["output"]
    train.directory = tmp_path
    return train


def examples(prompts):
    """One example per prompt, whose response is its number."""
    return [Example(np.array(prompt, np.int32), [Response.all_trained([100 + i])], f"row {i}", {"label": i % 2 == 0})
            for i, prompt in enumerate(prompts)]


def pairing(prompts):
    """For every example the number of the one that lent its response."""
    rows = examples(prompts)
    others = mismatched(rows, 64, {})
    assert [other.prompt.tolist() for other in others] == [list(prompt) for prompt in prompts]
    return [int(other.responses[0].tokens[0]) - 100 for other in others]


A, B, C, D = (1,), (2, 2), (3, 1), (1, 3)


@pytest.mark.parametrize("prompts, expected", [
    ([A, B, C], [2, 0, 1]),
    ([A, A, B, B, C, C], [5, 5, 1, 1, 3, 3]),              # unpacked pairs, in the order of the file
    ([A, B, B, B], [3, 0, 0, 0]),
    ([B, B, B, A, D], [4, 4, 4, 2, 3]),
    ([A, B], [1, 0]),
])
def test_responses_come_from_the_other_prompt_before(prompts, expected):
    assert pairing(prompts) == expected
    assert all(prompts[i] != prompts[j] for i, j in enumerate(expected))


def borrowed(train_prompts, eval_prompts, update):
    """The numbers of the rows that lend to an update of these rows; held-out ones are the last numbers."""
    rows = examples([*train_prompts, *eval_prompts])
    count = len(train_prompts)
    of_data = lenders_of_data(SimpleNamespace(train_set=rows[:count], eval_set=rows[count:]))
    others = mismatched([rows[i] for i in update], 64, of_data)
    return [int(other.responses[0].tokens[0]) - 100 for other in others]


@pytest.mark.parametrize("update, expected", [
    ([4], [3]),                # A B B C C: the row before it has its prompt, the one before that has not
    ([0], [4]),                # before the first row comes the last one
    ([2], [0]),
    ([2, 1], [0, 0]),          # two rows with one prompt
    ([1, 4], [4, 1]),          # two prompts: the update is enough
    ([5], [4]),                # held-out rows come after the training rows ...
    ([6, 5], [4, 4]),          # ... where they have one prompt, and it is no training row's
])
def test_an_update_with_one_prompt_borrows_from_the_data(update, expected):
    data, held_out = [A, B, B, D, C], [(9, 9), (9, 9)]
    assert borrowed(data, held_out, update) == expected


def test_lenders_are_the_nearest_before():
    """Against a search that goes back row by row, over data with many repetitions."""
    generator = np.random.default_rng(0)
    for count in (2, 3, 7, 30):
        prompts = [(int(number),) for number in generator.integers(0, 3, count)]
        prompts[-1] = (3,)
        for i in range(count):
            back = next(k for k in range(1, count) if prompts[i - k] != prompts[i])
            assert borrowed(prompts, [], [i]) == [(i - back) % count]


def test_data_with_one_prompt_is_refused(train, tmp_path, capsys):
    rows = [{"prompt": "a", "response": f"{i}", "label": i % 2 == 0} for i in range(6)]
    message = r"kto: no training row has another prompt than .*jsonl:1, .*; fix: add rows"
    with pytest.raises(UserError, match=message):
        train(rows)
    assert metrics(tmp_path / "run") == [] and "reference log-probs" not in capsys.readouterr().err


def logp(lm, prompt, response):
    """The summed log-prob of a response and the end after it, with the library's own forward."""
    start, ids = len(prompt.encode()), byte_tokenizer()(prompt + response).input_ids + [258]
    with torch.no_grad():
        logits = lm(torch.tensor([ids])).logits[0, start - 1:-1].double()
    return float(logits.log_softmax(-1)[range(len(ids) - start), ids[start:]].sum())


@pytest.mark.parametrize("count, size, lender", [(5, 4, 3), (2, 1, 0), (5, 3, None)])
def test_kl_of_a_last_update_of_one_row(train, model, tmp_path, count, size, lender):
    """The last update's z0, from the weights before it: of its row with the response of the row before it in
    the file; of an update of two rows each has the other's."""
    rows = [{"prompt": f"{i}?", "response": "yes" * (i + 1), "label": True} for i in range(count)]
    rows[-1]["label"] = False
    keys = dict(batch_size=size, shuffle="false", save_every=1, lr=3e-3, schedule="constant", warmup=0)
    run = train(rows, **keys)
    last = metrics(run)[-1]
    before = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / f"step-{last['step'] - 1:06d}")
    start = AutoModelForCausalLM.from_pretrained(model)
    pairs = [(count - 1, lender)] if lender is not None else [(3, 4), (4, 3)]
    texts = [(rows[i]["prompt"], rows[j]["response"]) for i, j in pairs]
    moved = [logp(before, *text) - logp(start, *text) for text in texts]
    assert np.mean(moved) > 0.05 and last["kl"] == pytest.approx(np.mean(moved), rel=1e-3)


@pytest.mark.parametrize("size", [32, 1])
def test_a_row_too_many(train, size):
    """33 rows with the default batch_size, and updates of one row, the held-out one too."""
    rows = labelled_rows(33 if size == 32 else 4)
    held_out = rows[:1] if size == 1 else rows[:3]
    eval_data = write_jsonl(train.directory / "eval.jsonl", held_out)
    made = metrics(train(rows, batch_size=size, eval_data=eval_data))
    assert len(made) == (2 if size == 32 else 4)


def test_borrowing_is_the_same_after_a_stop(train, tmp_path, monkeypatch):
    """Five rows in updates of four, twice: a stop before each of the updates of one row."""
    from engine.loop import Engine
    keys = dict(epochs=2, save_every=1)
    whole = metrics(train(labelled_rows(5), output=tmp_path / "whole", **keys))
    original = Engine.clip_gradients
    for stop in (1, 3):
        def signalled(engine, stop=stop):
            original(engine)
            engine.signals.number = 15 if engine.step.index == stop else None
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(Engine, "clip_gradients", signalled)
            train(labelled_rows(5), output=tmp_path / "parts", **keys)
    parts = metrics(train(labelled_rows(5), output=tmp_path / "parts", **keys))
    assert parts == whole and len(whole) == 4 and whole[1]["kl"] > 1


def test_pairs_are_two_rows(train, capsys):
    run = train(pair_rows(10))
    printed = capsys.readouterr().err
    assert "10 desirable and 10 undesirable rows" in printed and len(metrics(run)) == 5
    first = metrics(run)[0]
    found = [first[name] for name in ("loss", "kl", "rewards/chosen")]
    assert found == pytest.approx([0.5, 0, 0], abs=1e-5)      # but for rounding


def test_chosen_is_the_desirable_one(train, tmp_path):
    """Pairs, and the same responses written out in two rows each: the same run."""
    unpacked = [{"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                for row in pair_rows(6) for side in ("chosen", "rejected")]
    pairs, rows = (metrics(train(rows, output=tmp_path / name)) for name, rows in (("pairs", pair_rows(6)), ("rows", unpacked)))
    assert pairs == rows and len(rows) == 3


@pytest.mark.parametrize("desirable, weights, expected", [
    (5, {}, "5 desirable and 5 undesirable rows: with undesirable_weight 1, desirable_weight is best between 1 and 1.33, and it is 1"),
    (2, {},
     "warning: 2 desirable and 8 undesirable rows: with undesirable_weight 1, desirable_weight is best between 4 and 5.33, and it is 1"),
    (2, {"undesirable_weight": 0.25},
     "2 desirable and 8 undesirable rows: with undesirable_weight 0.25, desirable_weight is best between 1 and 1.33, and it is 1"),
    (8, {"desirable_weight": 0.3},
     "8 desirable and 2 undesirable rows: with undesirable_weight 1, desirable_weight is best between 0.25 and 0.333, and it is 0.3"),
])
def test_counts_and_weights_are_printed(train, capsys, desirable, weights, expected):
    rows = [{"prompt": f"{i}?", "response": f"{i}", "label": i < desirable} for i in range(10)]
    train(rows, max_steps=1, **weights)
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(expected) == 1, lines


def test_updates_of_one_class(train):
    """The other class's metrics are left out of that update's row; the losses go on."""
    rows = [{"prompt": f"{i}?", "response": f"{i}", "label": i < 4} for i in range(8)]
    first, last = metrics(train(rows, shuffle="false"))
    assert {"rewards/chosen", "logps/chosen"} <= first.keys() and "rewards/rejected" not in first and "rewards/margins" not in first
    assert {"rewards/rejected", "logps/rejected"} <= last.keys() and "rewards/chosen" not in last and "rewards/margins" not in last
    assert first["loss"] == pytest.approx(0.5) and 0 < last["loss"] < 1


@pytest.mark.parametrize("label", [True, False])
def test_one_class_only_is_refused(train, label):
    with pytest.raises(UserError, match="label"):
        train([row | {"label": label} for row in labelled_rows(8)])


@pytest.mark.parametrize("label", ["yes", 2, 0.5, None, "true"])
def test_labels_that_are_not_boolean_are_refused(train, label):
    rows = labelled_rows(8)
    rows[4]["label"] = label
    with pytest.raises(UserError, match=r"data\.jsonl:5"):
        train(rows)


def test_labels_may_be_numbers(train):
    rows = [row | {"label": int(row["label"])} for row in labelled_rows(8)]
    assert len(metrics(train(rows))) == 2
