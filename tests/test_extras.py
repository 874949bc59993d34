"""Columns of numbers in the data reach `batch.extra`, each number at its own response or token."""
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ROOT,
    algorithms_of,
    assistant,
    byte_tokenizer,
    labelled_rows,
    metrics,
    pair_rows,
    refused,
    tiny_model,
    train_here,
    user,
    write_config,
    write_jsonl,
)

from data.dataset import build_dataset, combine, load_datasets, split_off
from data.pack import collate
from data.packing import order, pack
from engine.cast import Columns, cast

TOKENIZER = byte_tokenizer()


def build(path, kind, max_length=1000, **options):
    return build_dataset(path, kind, TOKENIZER, max_length, **options)


def written(folder, rows, name="x.jsonl"):
    return write_jsonl(folder / name, rows)


def shuffled_batches(examples):
    """Micro-batches of a shuffled epoch."""
    numbers = order(len(examples), seed=3, epoch=0, shuffle=True).tolist()
    for start in range(0, len(numbers), 4):
        rows = [examples[i] for i in numbers[start:start + 4]]
        sizes = [example.size() for example in rows]
        (bins,) = pack(sizes, 300)
        for positions in bins:
            yield collate([rows[i] for i in positions])


def row_of(example):
    """The number of its line, from 0."""
    return int(example.where.rpartition(":")[2]) - 1


def test_pairs(tmp_path):
    rows = pair_rows(10)
    for i, row in enumerate(rows):
        row |= {"weight": i + 0.5, "sure": i % 2 == 0, "score": [i, -i]}
        row |= {"chosen_len": 2 * i, "rejected_len": 7}
    for batch in shuffled_batches(build(written(tmp_path, rows), "pairs").examples):
        numbers = [row_of(example) for example in batch.examples]
        assert batch.extra("weight").tolist() == [i + 0.5 for i in numbers for _ in range(2)]
        assert batch.extra("sure").tolist() == [i % 2 == 0 for i in numbers for _ in range(2)]
        assert batch.extra("score").tolist() == [sign * i for i in numbers for sign in (1, -1)]
        chosen, rejected = batch.pairs(batch.extra("len"))
        assert chosen.tolist() == [2 * i for i in numbers] and rejected.tolist() == [7] * len(numbers)
        assert batch.extra("weight").dtype == torch.float32


def test_one_side_of_a_pair(tmp_path):
    """sft trains the chosen side, kto both, each with its own number."""
    rows = [row | {"weight": i, "score": [i, -i]} for i, row in enumerate(pair_rows(6))]
    path = written(tmp_path, rows)
    for batch in shuffled_batches(build(path, "responses").examples):
        numbers = [float(row_of(example)) for example in batch.examples]
        assert batch.extra("weight").tolist() == batch.extra("score").tolist() == numbers
    for batch in shuffled_batches(build(path, "labelled").examples):
        signs = [1 if example.extras["label"] else -1 for example in batch.examples]
        numbers = [float(row_of(example)) for example in batch.examples]
        assert batch.extra("weight").tolist() == numbers
        assert batch.extra("score").tolist() == [i * sign for i, sign in zip(numbers, signs)]


def test_labelled_rows(tmp_path):
    rows = [row | {"weight": i / 4} for i, row in enumerate(labelled_rows(9))]
    for batch in shuffled_batches(build(written(tmp_path, rows), "labelled").examples):
        assert batch.extra("weight").tolist() == [row_of(example) / 4 for example in batch.examples]


def test_a_number_per_token(tmp_path):
    """The byte tokenizer has a token per letter, and one for the end."""
    rows = []
    for i in range(8):
        response = "answer"[:i % 5 + 1]
        mask = [i + k / 8 for k in range(len(response) + 1)]
        rows.append({"prompt": f"q{i}", "response": response, "mask": mask})
    for batch in shuffled_batches(build(written(tmp_path, rows), "responses").examples):
        masks = [torch.tensor(rows[row_of(example)]["mask"]) for example in batch.examples]
        assert [len(mask) for mask in masks] == batch.lengths
        assert torch.equal(batch.extra("mask"), torch.cat(masks))
    rows[3]["mask"].append(1.0)
    message = refused(build, written(tmp_path, rows), "responses")
    assert "the column 'mask' has 6 numbers for 5 trained tokens" in message and "x.jsonl:4" in message
    again = build(written(tmp_path, rows), "responses", columns={"unused": "mask"})
    assert again.examples[0].extras == {} and not any("batch.extra" in notice for notice in again.notices)


def test_the_turns_of_a_conversation_have_their_share(tmp_path):
    """As one example, and as two where the template renders an earlier turn otherwise."""
    turns = [user("a"), assistant("bc"), user("d"), assistant("efg")]
    row = {"messages": turns, "mask": [1, 2, 3, 4, 5, 6, 7], "weight": 9}
    speaker = "{{ 'U' if m.role == 'user' else 'A' if loop.last else 'a' }}"
    template = ("{% for m in messages %}" + speaker + "{{ m.content }}<|im_end|>{% endfor %}"
                "{% if add_generation_prompt %}A{% endif %}")
    for tokenizer, count in (TOKENIZER, 1), (byte_tokenizer(template), 2):
        examples = build_dataset(written(tmp_path, [row]), "responses", tokenizer, 1000).examples
        assert len(examples) == count
        batch = collate(examples)
        assert batch.extra("mask").tolist() == row["mask"] and batch.extra("weight").tolist() == [9] * count


def test_raw_text(tmp_path):
    """A number goes with every piece; a list cannot be cut with the text."""
    path = written(tmp_path, [{"text": "abcdefgh", "weight": 2}])
    examples = build(path, "responses", max_length=5).examples
    assert [example.extras["weight"].tolist() for example in examples] == [[2.0], [2.0]]
    whole = build(written(tmp_path, [{"text": "abcd", "mask": [1, 2, 3, 4]}]), "responses").examples
    assert whole[0].extras["mask"].tolist() == [1, 2, 3, 4]
    path = written(tmp_path, [{"text": "abcdefgh", "mask": [1] * 7}])
    message = refused(build, path, "responses", max_length=5)
    assert "cut into pieces" in message and "x.jsonl:1" in message


def test_lists_of_another_length_are_refused(tmp_path):
    rows = pair_rows(3)
    for row, value in zip(rows, ([1, 2], [1, 2], [1, 2, 3])):
        row["score"] = value
    assert "3 numbers for 2 responses" in (message := refused(build, written(tmp_path, rows), "pairs"))
    assert "x.jsonl:3" in message


def test_lists_that_fit_in_no_row_are_ignored_with_a_word(tmp_path):
    """As in OpenR1-Math: verdicts on the generations, of which there may be one."""
    rows = []
    for verdicts in ([True, False], [True, True, False], [True]):
        row = {"problem": "q", "solution": "an answer", "complete": verdicts, "verified": verdicts}
        rows.append(row | {"count": 2})
    path = written(tmp_path, rows)
    dataset = build(path, "responses")
    assert [set(example.extras) for example in dataset.examples] == [{"count"}] * 3
    _, complete, verified = [notice for notice in dataset.notices if "warning" not in notice]
    assert "'complete' is ignored, since its lists of numbers (2) fit in no row" in complete
    assert f"{path}:1)" in complete and "'verified' is ignored" in verified


@pytest.mark.parametrize("name", ["mask", "two words"])
def test_the_proposed_name_is_free(tmp_path, name):
    """What the message proposes for one column can be done for two."""
    response = {"prompt": "q", "response": "ab"}
    lists = [{name: [1, 2, 3], "other": [1, 2, 3]}, {name: [1, 2], "other": [1, 2]}]
    path = written(tmp_path, [response | row for row in lists])
    columns = {}
    for column in (name, "other"):
        message = refused(build, path, "responses", columns=columns)
        mapping = re.search(r"rename it \(columns: (\{.*\})\)", message)[1]
        columns |= cast(mapping, Columns)
        assert column in columns.values()
    assert build(path, "responses", columns=columns).examples[0].extras == {}


def test_what_is_no_number_in_every_row_is_ignored_with_a_word(tmp_path):
    rows = pair_rows(4)
    for i, row in enumerate(rows):
        row |= {"id": f"row-{i}", "one": 1, "two": 2.0}
        row |= {"gap": 1} if i != 2 else {"gap": None}
        row |= {"mixed": 1} if i != 1 else {"mixed": "high"}
    path = written(tmp_path, rows)
    dataset = build(path, "pairs")
    assert all(example.extras.keys() == {"one", "two"} for example in dataset.examples)
    said, gap, mixed = dataset.notices
    assert said == f"{path}: the columns one, two are numbers and reach batch.extra"
    assert "'gap' is ignored" in gap and f"{path}:3)" in gap
    assert "'mixed' is ignored" in mixed and f"{path}:2)" in mixed
    for value in "1.5", math.nan, 1e40, [], ["a"], {"a": 1}:
        text = json.dumps(rows[0] | {"weight": value}).replace("NaN", '"nan"')
        (tmp_path / "y.jsonl").write_text(text + "\n")
        assert "weight" not in build(tmp_path / "y.jsonl", "pairs").examples[0].extras
    (tmp_path / "y.csv").write_text("prompt,response,weight\nq,a,1.5\nq,b,2\n")
    examples = build(tmp_path / "y.csv", "responses").examples
    assert [example.extras["weight"].tolist() for example in examples] == [[1.5], [2.0]]


def test_numbers_per_token_in_some_rows_only_are_ignored(tmp_path):
    rows = [{"prompt": "q", "response": "abc", "weight": value} for value in (1, [1, 2, 3, 4])]
    dataset = build(written(tmp_path, rows), "responses")
    assert [example.extras for example in dataset.examples] == [{}, {}]
    assert "'weight' is ignored" in dataset.notices[1]


def test_several_sources(tmp_path):
    """What one of them lacks is no extra; what all have stays, weighted and split."""
    with_both = [row | {"weight": i, "other": 1} for i, row in enumerate(pair_rows(6))]
    with_one = [row | {"weight": -i} for i, row in enumerate(pair_rows(6, 9))]
    both = written(tmp_path, with_both, "a.jsonl")
    one = written(tmp_path, with_one, "b.jsonl")
    dataset = combine([build(both, "pairs"), build(one, "pairs")], [2, 1], seed=0)
    assert len(dataset.examples) == 18 and "'other' is ignored" in dataset.notices[0]
    for part in split_off(dataset, 0.3, seed=1):
        for example in part.examples:
            sign = 1 if "a.jsonl" in example.where else -1
            assert example.extras.keys() == {"weight"}
            assert example.extras["weight"].tolist() == [sign * row_of(example)] * 2
    config = SimpleNamespace(
        data=[{"path": both}, {"path": one}], eval_data=None, eval_fraction=0, max_length=1000,
        truncate="none", hh="messages", seed=0, system_prompt=None, columns=None)
    notices = []
    load_datasets(config, "pairs", TOKENIZER, notices.append)
    assert sum("'other' is ignored" in notice for notice in notices) == 1


WEIGHTED = '''
SEEN = []


def weighted_dpo_loss(batch, *arguments):
    losses, metrics = dpo_loss(*arguments)
    weights = batch.extra("weight")                      # (S,)
    SEEN.append(([example.where for example in batch.examples], weights.tolist(), losses.detach().tolist()))
    return losses * batch.pairs(weights)[0], metrics     # (B,)
'''


def test_a_weighted_dpo_is_one_changed_line(tmp_path, monkeypatch):
    """A copy of dpo.py outside the repository: the loss of an update is the weighted mean of its pairs'."""
    text = (ROOT / "algorithms" / "dpo.py").read_text()
    assert text.count("        return dpo_loss(") == 1
    text = text.replace("        return dpo_loss(", "        return weighted_dpo_loss(batch,")
    folder = algorithms_of(tmp_path, monkeypatch)
    (folder / "weighted_pairs.py").write_text(text + WEIGHTED)
    rows = [row | {"weight": i / 4} for i, row in enumerate(pair_rows(10))]
    path = written(tmp_path, rows)
    config = write_config(
        tmp_path / "run.yml", algorithm="weighted_pairs", model=tiny_model(tmp_path / "model"), data=path,
        output=tmp_path / "run", batch_size=5, micro_batch_tokens=256, lr=1e-2, max_length=256, epochs=2,
        save_every="null")
    train_here(config)
    from algorithms import weighted_pairs
    seen = weighted_pairs.SEEN
    assert len(seen) > 4                                  # several micro-batches per update
    losses, count = [], 0
    for places, weights, values in seen:
        expected = [rows[int(where.rpartition(":")[2]) - 1]["weight"] for where in places]
        assert weights[::2] == weights[1::2] == expected
        losses += [weight * value for weight, value in zip(expected, values)]
        count += len(places)
    logged = [row["loss"] for row in metrics(tmp_path / "run")]
    assert count == 20 and len(logged) == 4
    for update, loss in enumerate(logged):
        assert loss == pytest.approx(sum(losses[5 * update:5 * update + 5]) / 5, rel=1e-5)
