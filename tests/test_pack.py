"""Layout, order and packing against literals written by hand and plain Python formulations."""
import doctest
import random

import numpy as np
import pytest
import torch

import data.pack
from data.pack import Example, Response, collate, order, pack


def example(prompt, *responses, trained=None):
    made = [Response.all_trained(tokens) for tokens in responses]
    for response, mask in zip(made, trained or ()):
        response.trained = np.array(mask, bool)
    return Example(np.array(prompt, np.int32), made, "here")


def lists(batch):
    return {name: getattr(batch, name).tolist() for name in ("tokens", "positions", "source", "target", "last")} | {
        "lengths": batch.lengths, "segments": batch.segments}


def random_examples(count, responses, seed=0):
    draw = random.Random(seed)

    def tokens(most):
        return [draw.randrange(100) for _ in range(draw.randint(1, most))]
    made = [example(tokens(5), *(tokens(6) for _ in range(responses))) for _ in range(count)]
    for item in made:
        for response in item.responses:
            response.trained = np.array([draw.random() < 0.7 for _ in response.tokens])
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
    }


def test_three_responses_of_which_parts_are_trained():
    """As in conversations of several turns: 11 and 12 are context, and so is the first token of the last response."""
    batch = collate([example([5], [10, 11, 12, 13], [20, 21], [30, 31], trained=[[1, 0, 0, 1], [1, 1], [0, 1]]),
                     example([6, 7], [8], [9], [8])])
    assert lists(batch) == {
        "tokens": [5, 10, 11, 12, 13, 20, 21, 30, 31, 6, 7, 8, 9, 8],
        "positions": [0, 1, 2, 3, 4, 1, 2, 1, 2, 0, 1, 2, 2, 2],
        "source": [0, 3, 0, 5, 7, 10, 10, 10],
        "target": [10, 13, 20, 21, 31, 8, 9, 8],
        "last": [4, 6, 8, 11, 12, 13],
        "lengths": [2, 2, 1, 1, 1, 1],
        "segments": [(1, [4, 2, 2]), (2, [1, 1, 1])],
    }


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("responses", [1, 2, 3, 8])
def test_source_and_target_by_content(share_prompt, responses):
    """What a response's token sees is its prompt and its own beginning: the source's token, position and the target say so."""
    examples = random_examples(6, responses)
    batch = collate(examples, share_prompt)
    expected = []
    for item in examples:
        for response in item.responses:
            text = [*item.prompt.tolist(), *response.tokens.tolist()]
            expected += [(text[i - 1], i - 1, text[i]) for i, trained in enumerate(response.trained, len(item.prompt)) if trained]
    seen = batch.tokens[batch.source], batch.positions[batch.source], batch.target
    assert list(zip(*(x.tolist() for x in seen))) == expected
    assert batch.lengths == [int(response.trained.sum()) for item in examples for response in item.responses]
    assert batch.tokens[batch.last].tolist() == [response.tokens[-1] for item in examples for response in item.responses]
    assert len(batch.tokens) == sum(item.size(share_prompt) for item in examples) == sum(p + sum(r) for p, r in batch.segments)
    assert sum(batch.lengths) == len(batch.source) == sum(item.num_trained for item in examples)


def test_the_filler_trains_nothing():
    assert lists(collate([])) == {
        "tokens": [0], "positions": [0], "source": [], "target": [], "last": [], "lengths": [], "segments": [(1, [])]}
    assert collate([]).sum(torch.zeros(0)).shape == (0,)


def test_sum_mean_and_expand():
    batch = collate([example([5], [7, 8], [9]), example([5], [6], [1, 2, 3], trained=[[1], [1, 0, 1]])])
    x = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0], requires_grad=True)
    assert batch.lengths == [2, 1, 1, 2]
    assert batch.sum(x).tolist() == [3, 4, 8, 48]
    assert batch.mean(x).tolist() == [1.5, 4, 8, 24]
    assert batch.expand(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [1, 1, 2, 3, 4, 4]
    (batch.sum(x) * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert x.grad.tolist() == [1, 1, 2, 3, 4, 4]


# ---- order ----

def test_an_epoch_takes_every_example_once():
    for shuffle in (True, False):
        updates = order(23, 5, seed=1, epoch=0, shuffle=shuffle)
        assert [len(update) for update in updates] == [5, 5, 5, 5, 3]
        assert sorted(sum(updates, [])) == list(range(23))
    assert order(7, 3, 1, 5, shuffle=False) == [[0, 1, 2], [3, 4, 5], [6]]


def test_order_is_a_pure_function_of_seed_and_epoch():
    np.random.seed(0)
    first = order(50, 8, 1, 2, True)
    np.random.seed(1)
    assert order(50, 8, 1, 2, True) == first
    flat = [tuple(sum(order(50, 8, seed, epoch, True), [])) for seed in range(4) for epoch in range(4)]
    assert len(set(flat)) == 16
    assert sum(order(50, 3, 1, 2, True), []) == sum(first, [])       # the batch size only cuts the order


# ---- pack ----

@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("budget", [10, 37, 100, 10 ** 6])
def test_pack_deals_every_example_once_within_the_budget(world, budget):
    draw = random.Random(0)
    for count in (1, 2, 7, 40):
        sizes = [draw.randint(1, 60) for _ in range(count)]
        ranks = pack(sizes, budget, world)
        bins = [members for rank in ranks for members in rank]
        assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1
        assert sorted(sum(bins, [])) == list(range(count))
        assert all(sum(sizes[i] for i in members) <= budget or len(members) == 1 for members in bins)
        assert pack(sizes, budget, world) == ranks


def test_pack_examples():
    assert pack([4, 4, 4, 4], 8) == [[[0, 2], [1, 3]]]
    assert pack([50, 2, 3], 10) == [[[0], [1, 2]]]                       # an example over the budget is alone
    assert pack([5, 5, 5], 100, world=2) == [[[0, 2]], [[1]]]
    assert pack([5], 100, world=3) == [[[0]], [[]], [[]]]                # idle ranks get a filler
    assert len(pack([1] * 80, 8)[0]) == 10                               # no more micro-batches than needed
