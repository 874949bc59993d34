"""The exact entropy beside the log-probs, against full logits in fp64. A mutation in test_mutations.py leaves
H out of the gradient; the comparisons of gradients here fail on it."""
import random

import numpy as np
import pytest
import torch
from helpers import config_of, random_lm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen2Config

from data.pack import Example, Response, collate
from model import build  # noqa: F401  it registers the forms of attention
from model.actor_critic import ActorCritic
from model.entropy import ChunkedEntropy
from model.logps import ChunkedLogps
from model.policy import Policy
from model.slices import LOGITS_AT_ONCE


def head_inputs(rows, vocabulary=50, size=8):
    """hidden (rows, size), weight (vocabulary, size), target (rows,); some rows predict with near
    certainty"""
    torch.manual_seed(0)
    hidden = 3 * torch.randn(rows, size)
    weight = torch.randn(vocabulary, size)
    target = torch.randint(vocabulary, (rows,))
    return hidden.requires_grad_(), weight.requires_grad_(), target


def mixed(logps, entropies):
    """A number that depends on every log-prob and every entropy with another weight."""
    count = len(logps)
    by_logps = torch.linspace(-1, 2, count, dtype=logps.dtype) @ logps
    return by_logps + torch.linspace(3, -2, count, dtype=logps.dtype) @ entropies


@pytest.mark.parametrize("width", [1, 7, 50, 100])      # for a vocabulary of 50
@pytest.mark.parametrize("trained_head", [True, False])
def test_values_and_gradients_equal_full_logits(monkeypatch, width, trained_head):
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", width * 11)
    hidden, weight, target = head_inputs(11)
    weight.requires_grad_(trained_head)
    inputs = [hidden, weight] if trained_head else [hidden]

    exact = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T)
    expected = exact.log_prob(target), exact.entropy()
    expected_gradients = torch.autograd.grad(mixed(*expected), inputs)

    ours = ChunkedEntropy.apply(hidden, weight, target, torch.float32)
    gradients = torch.autograd.grad(mixed(*ours), inputs)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert expected[1].min() < 0.1 and expected[1].max() > 1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[0], ChunkedLogps.apply(hidden, weight, target, torch.float32))


def test_equal_logits_have_the_entropy_of_a_fair_die():
    """log V, which is a maximum: the gradient is 0."""
    hidden = torch.zeros(3, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=True)
    _, entropies = ChunkedEntropy.apply(hidden, weight, torch.tensor([0, 1, 2]), torch.float32)
    torch.testing.assert_close(entropies, torch.full((3,), 50.0).log())
    gradient, = torch.autograd.grad(entropies.sum(), hidden)
    torch.testing.assert_close(gradient, torch.zeros(3, 8))


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that any operation returns."""
    numbers = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        for leaf in tree_leaves(result):
            if torch.is_tensor(leaf):
                self.numbers = max(self.numbers, leaf.numel())
        return result


def test_nothing_is_larger_than_the_hidden_states(monkeypatch):
    """40 rows, 1,000 tokens: slices of 3 tokens are 120 numbers, the hidden states 160, full logits
    40,000."""
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 120)
    hidden, weight, target = head_inputs(40, vocabulary=1000, size=4)
    weight.requires_grad_(False)
    with Largest() as largest:
        logps, entropies = ChunkedEntropy.apply(hidden, weight, target, torch.float32)
        mixed(logps, entropies).backward()
    assert 120 <= largest.numbers <= 160


def test_bf16_products():
    hidden, weight, target = head_inputs(11)
    exact = torch.distributions.Categorical(logits=hidden @ weight.T)
    _, entropies = ChunkedEntropy.apply(hidden, weight, target, torch.bfloat16)
    assert entropies.dtype == torch.float32
    torch.testing.assert_close(entropies, exact.entropy(), rtol=0, atol=0.05)
    ours = torch.autograd.grad(entropies.sum(), [hidden, weight])
    theirs = torch.autograd.grad(exact.entropy().sum(), [hidden, weight])
    for gradient, expected in zip(ours, theirs):
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.999


# ---- the policy ----

def pairs(count=3):
    """Examples with two responses, a part of whose tokens is trained."""
    draw = random.Random(0)
    made = []
    for i in range(count):
        parts = []
        for _ in range(3):
            parts.append(np.array(draw.choices(range(256), k=draw.randint(2, 9)), np.int32))
        responses = [Response(part, np.arange(len(part)) % 3 != 1) for part in parts[1:]]
        made.append(Example(parts[0], responses, f"here:{i}"))
    return made


def full_logits(lm, made, temperature):
    """Log-probs (N,) and entropies (N,) from the LM's own forward in fp64, one response at a time."""
    logps, entropies = [], []
    for example in made:
        for response in example.responses:
            row = torch.tensor([[*example.prompt, *response.tokens]])
            logits = lm(row, use_cache=False).logits[0, len(example.prompt) - 1:-1]
            predicted = torch.distributions.Categorical(logits=logits / temperature)
            trained = torch.from_numpy(response.trained)
            logps.append(predicted.log_prob(row[0, len(example.prompt):])[trained])
            entropies.append(predicted.entropy()[trained])
    return torch.cat(logps), torch.cat(entropies)


def gradients(lm, number):
    lm.zero_grad()
    number.backward()
    return {name: parameter.grad.double() for name, parameter in lm.named_parameters()}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_policy_equals_the_models_own_logits(temperature, tied, recompute):
    made = pairs()
    config = config_of(Qwen2Config, tie_word_embeddings=tied)
    plain = random_lm(config, attn_implementation="eager").double()
    expected = full_logits(plain, made, temperature)
    expected_gradients = gradients(plain, mixed(*expected))

    lm = random_lm(config, attn_implementation="segments")
    if recompute:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
        lm.train()
    policy = Policy(lm)
    batch = collate(made)
    ours = policy(batch, temperature, entropy=True)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert torch.equal(ours[0], policy(batch, temperature))
    found = gradients(lm, mixed(*ours))
    assert found.keys() == expected_gradients.keys()
    for name, gradient in found.items():
        assert (gradient - expected_gradients[name]).norm() < 1e-5 * expected_gradients[name].norm(), name


def test_with_values_of_a_critic():
    policy = Policy(random_lm(config_of(), attn_implementation="segments"))
    critic = ActorCritic(policy, torch.ones(1, 32))
    batch = collate(pairs())
    logps, entropies, values = critic(batch, 0.7, values=True, entropy=True)
    assert torch.equal(torch.stack([logps, entropies]), torch.stack(policy(batch, 0.7, entropy=True)))
    assert torch.equal(values, critic(batch, 0.7, values=True)[1])


def test_the_filler_has_no_entropy_and_zero_gradients():
    lm = random_lm(config_of(), attn_implementation="segments")
    logps, entropies = Policy(lm)(collate([]), entropy=True)
    assert logps.shape == entropies.shape == (0,)
    found = gradients(lm, logps.sum() + entropies.sum())
    assert not any(gradient.any() for gradient in found.values())
