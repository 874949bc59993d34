"""Layout, order and packing against literals written by hand and plain Python formulations."""
import doctest
import random

import numpy as np
import pytest
import torch

import data.pack
from data.errors import RunError
from data.pack import Example, Response, collate
from data.packing import order, pack
from engine.config import Common
from engine.plan import Plan


def example(prompt, *responses, trained=None):
    made = [Response.all_trained(tokens) for tokens in responses]
    for response, mask in zip(made, trained or ()):
        response.trained = np.array(mask, bool)
    return Example(np.array(prompt, np.int32), made, "here")


def lists(batch):
    """A batch as plain lists by name."""
    found = {"lengths": batch.lengths, "segments": batch.segments, "prefix": batch.prefix}
    for name in ("tokens", "positions", "source", "target", "last"):
        found[name] = getattr(batch, name).tolist()
    return found


def random_examples(count, responses, seed=0, prefix=()):
    draw = random.Random(seed)

    def tokens(most):
        return [draw.randrange(100) for _ in range(draw.randint(1, most))]

    made = []
    for _ in range(count):
        prompt = [*prefix, *tokens(5)]
        item = example(prompt, *[tokens(6) for _ in range(responses)])
        for response in item.responses:
            response.trained = np.array([draw.random() < 0.7 for _ in response.tokens])
        made.append(item)
    return made


def test_the_documentation_is_true():
    result = doctest.testmod(data.pack)
    assert result.attempted >= 4 and result.failed == 0


@pytest.mark.parametrize("share_prompt", [True, False])
def test_one_response(share_prompt):
    assert lists(collate([example([5, 6], [7, 8]), example([1, 2, 3], [4])], share_prompt)) == {
        "tokens": [5, 6, 7, 8, 1, 2, 3, 4],
        "positions": [0, 1, 2, 3, 0, 1, 2, 3],
        "source": [1, 2, 6],
        "target": [7, 8, 4],
        "last": [3, 7],
        "lengths": [2, 1],
        "segments": [(2, [2]), (3, [1])],
        "prefix": 0,
    }


def test_pairs_share_their_prompt():
    assert lists(collate([example([5, 6], [7, 8], [9]), example([1], [2], [3, 4])])) == {
        "tokens": [5, 6, 7, 8, 9, 1, 2, 3, 4],
        "positions": [0, 1, 2, 3, 2, 0, 1, 1, 2],
        "source": [1, 2, 1, 5, 5, 7],              # 9 is predicted by 6 and 3 by 1: the ends of their prompts
        "target": [7, 8, 9, 2, 3, 4],
        "last": [3, 4, 6, 8],
        "lengths": [2, 1, 1, 2],
        "segments": [(2, [2, 1]), (1, [1, 2])],
        "prefix": 0,
    }


def test_pairs_with_separate_prompts():
    assert lists(collate([example([5, 6], [7, 8], [9]), example([1], [2], [3, 4])], share_prompt=False)) == {
        "tokens": [5, 6, 7, 8, 5, 6, 9, 1, 2, 1, 3, 4],
        "positions": [0, 1, 2, 3, 0, 1, 2, 0, 1, 0, 1, 2],
        "source": [1, 2, 5, 7, 9, 10],
        "target": [7, 8, 9, 2, 3, 4],
        "last": [3, 6, 8, 11],
        "lengths": [2, 1, 1, 2],
        "segments": [(2, [2]), (2, [1]), (1, [1]), (1, [2])],
        "prefix": 0,
    }


def test_what_prompts_begin_with_is_laid_out_once(monkeypatch):
    """The second prompt keeps its last token, so the 7 of all three is not shared."""
    monkeypatch.setattr("data.packing.MIN_PREFIX", 2)
    made = [example([5, 6, 7, 4], [1, 2], [3]), example([5, 6, 7], [8]), example([5, 6, 7, 7], [9])]
    assert lists(collate(made)) == {
        "tokens": [5, 6, 7, 4, 1, 2, 3, 7, 8, 7, 7, 9],
        "positions": [0, 1, 2, 3, 4, 5, 4, 2, 3, 2, 3, 4],
        "source": [3, 4, 3, 7, 10],
        "target": [1, 2, 3, 8, 9],
        "last": [5, 6, 8, 11],
        "lengths": [2, 1, 1, 1],
        "segments": [(2, [2, 1]), (1, [1]), (2, [1])],
        "prefix": 2,
    }
    assert collate(made, share_prompt=False).prefix == collate(made[:1]).prefix == 0
    monkeypatch.setattr("data.packing.MIN_PREFIX", 3)
    assert collate(made).prefix == 0


def test_three_responses_of_which_parts_are_trained():
    """As in conversations of several turns: 11, 12 and 30 are context."""
    first = example([5], [10, 11, 12, 13], [20, 21], [30, 31], trained=[[1, 0, 0, 1], [1, 1], [0, 1]])
    second = example([6, 7], [8], [9], [8])
    assert lists(collate([first, second])) == {
        "tokens": [5, 10, 11, 12, 13, 20, 21, 30, 31, 6, 7, 8, 9, 8],
        "positions": [0, 1, 2, 3, 4, 1, 2, 1, 2, 0, 1, 2, 2, 2],
        "source": [0, 3, 0, 5, 7, 10, 10, 10],
        "target": [10, 13, 20, 21, 31, 8, 9, 8],
        "last": [4, 6, 8, 11, 12, 13],
        "lengths": [2, 2, 1, 1, 1, 1],
        "segments": [(1, [4, 2, 2]), (2, [1, 1, 1])],
        "prefix": 0,
    }


@pytest.mark.parametrize("prefix", [(), range(16)], ids=["", "prefix"])
@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("responses", [1, 2, 3, 8])
def test_source_and_target_by_content(share_prompt, responses, prefix):
    """The token before a trained token in its own text, and that token's position, belong to the source."""
    examples = random_examples(6, responses, prefix=prefix)
    batch = collate(examples, share_prompt)
    expected, lengths, ends = [], [], []
    for item in examples:
        for response in item.responses:
            text = [*item.prompt.tolist(), *response.tokens.tolist()]
            for i, trained in enumerate(response.trained, len(item.prompt)):
                if trained:
                    expected.append((text[i - 1], i - 1, text[i]))
            lengths.append(response.trained.tolist().count(True))
            ends.append(text[-1])
    source_tokens = batch.tokens[batch.source].tolist()
    source_positions = batch.positions[batch.source].tolist()
    assert list(zip(source_tokens, source_positions, batch.target.tolist())) == expected
    assert batch.lengths == lengths
    assert batch.tokens[batch.last].tolist() == ends
    size = sum(item.size(share_prompt) for item in examples)
    laid_out = batch.prefix + sum(prompt + sum(parts) for prompt, parts in batch.segments)
    assert batch.prefix == (len(prefix) if share_prompt else 0)
    assert len(batch.tokens) == laid_out == size - 5 * batch.prefix
    trained_tokens = sum(item.num_trained for item in examples)
    assert sum(batch.lengths) == len(batch.source) == trained_tokens


def test_the_filler_trains_nothing():
    filler = collate([])
    nothing = dict.fromkeys(("source", "target", "last", "lengths"), [])
    assert lists(filler) == nothing | {
        "tokens": [0], "positions": [0], "segments": [(1, [])], "prefix": 0}
    assert filler.sum(torch.zeros(0)).shape == filler.extra("advantages").shape == (0,)


def test_sum_mean_and_expand():
    batch = collate([example([5], [7, 8], [9]), example([5], [6], [1, 2, 3], trained=[[1], [1, 0, 1]])])
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    assert batch.lengths == [2, 1, 1, 2]
    assert batch.sum(x).tolist() == [3, 4, 8, 48]
    assert batch.mean(x).tolist() == [1.5, 4, 8, 24]
    assert batch.expand(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 1, 2, 3, 4, 4]
    (batch.sum(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [1, 1, 2, 3, 4, 4]


# ---- extras ----

def group(**extras):
    """A prompt with three responses of 2, 1 and 2 trained tokens."""
    item = example([5], [7, 8], [9], [1, 2, 3], trained=[[1, 1], [1], [1, 0, 1]])
    item.extras = extras
    return item


def test_extras_are_per_response_or_per_trained_token():
    values = torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
    first = group(reward=values, old=torch.arange(5.0))
    batch = collate([first, group(reward=-values, old=torch.arange(5.0, 10))])
    assert batch.extra("reward").tolist() == [0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    assert batch.extra("reward").dtype == torch.float32
    assert batch.extra("old").tolist() == list(range(10))


def test_an_unknown_extra_is_refused_with_the_known_ones():
    batch = collate([group(prompt="Q", advantages=torch.zeros(3), old_logps=torch.zeros(5))])
    with pytest.raises(RunError) as caught:
        batch.extra("advantage")
    expected = "the batch has no 'advantage'; it has advantages, old_logps; fix: "
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    with pytest.raises(RunError, match="it has no extra values; fix: "):
        collate([group()]).extra("advantage")


def test_a_part_keeps_the_numbers_of_its_responses():
    item = group(prompt="Q", reward=torch.tensor([10.0, 11.0, 12.0]), old=torch.arange(5.0))
    part = item.part([2, 0])
    assert [response.tokens.tolist() for response in part.responses] == [[1, 2, 3], [7, 8]]
    assert part.extras["prompt"] == "Q" and part.where == "here"
    assert part.extras["reward"].tolist() == [12, 10]
    assert part.extras["old"].tolist() == [3, 4, 0, 1]
    assert len(item.responses) == 3 and len(item.extras["old"]) == 5


@pytest.mark.parametrize("value", [torch.tensor(1.0), torch.zeros(1), torch.zeros(4), torch.zeros(6)])
def test_a_part_refuses_extras_of_another_length(value):
    with pytest.raises(RunError) as caught:
        group(old=value).part([0, 1])
    expected = f"old of here has {value.numel()} numbers, neither 3 (one per response) nor 5 ("
    assert str(caught.value).startswith(expected) and "; fix: " in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- order ----

def test_an_epoch_takes_every_example_once():
    for shuffle in (True, False):
        plan = Plan(Common("sft", "model", "data", batch_size=5, shuffle=shuffle, seed=1), num_rows=23)
        updates = [plan.rows(draw) for draw in range(1, 6)]
        assert [len(update) for update in updates] == [5, 5, 5, 5, 3]
        assert sorted(sum(updates, [])) == list(range(23))
    assert order(7, 1, 5, shuffle=False).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_order_is_a_pure_function_of_seed_and_epoch():
    np.random.seed(0)
    first = order(50, 1, 2, True).tolist()
    np.random.seed(1)
    assert order(50, 1, 2, True).tolist() == first
    orders = set()
    for seed in range(4):
        for epoch in range(4):
            orders.add(tuple(order(50, seed, epoch, True).tolist()))
    assert len(orders) == 16


# ---- pack ----

@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [10, 37, 100, 10 ** 6])
def test_pack_deals_every_example_once_within_the_budget(world, budget):
    draw = random.Random(0)
    for count in (1, 2, 7, 40):
        sizes = [draw.randint(1, 60) for _ in range(count)]
        ranks = pack(sizes, budget, world)
        bins = sum(ranks, [])
        assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1
        assert sorted(sum(bins, [])) == list(range(count))
        for members in bins:
            assert sum(sizes[i] for i in members) <= budget or len(members) == 1
        assert pack(sizes, budget, world) == ranks


def test_pack_examples():
    assert pack([4, 4, 4, 4], 8) == [[[0, 2], [1, 3]]]
    assert pack([50, 2, 3], 10) == [[[0], [1, 2]]]                       # an example over the budget is alone
    assert pack([5, 5, 5], 100, world=2) == [[[0, 2]], [[1]]]
    assert pack([5], 100, world=3) == [[[0]], [[]], [[]]]                # idle ranks get a filler
    assert len(pack([1] * 80, 8)[0]) == 10                               # no more micro-batches than needed
