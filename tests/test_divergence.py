"""The divergence of two models over the whole vocabulary, in slices, against full logits in fp64 and closed
forms. Mutations in test_mutations.py change the slopes, the teacher's normaliser and the temperature."""
import copy
import functools
import math

import pytest
import torch
from helpers import config_of, kinds, random_lm
from test_entropy import Largest, pairs
from transformers import LlamaConfig, Qwen2Config

from algorithms.distill import distill_loss
from data.pack import collate
from model import build  # noqa: F401  it registers the forms of attention
from model.divergence import PARTS, compared
from model.head import Predictions, SoftCap
from model.policy import Policy
from model.slices import LOGITS_AT_ONCE

BETAS = [0.0, 1.0, 0.5, 0.1]


def plain_divergence(student_logits, teacher_logits, beta):
    """(N, V), (N, V) -> (N,) in fp64, from the probabilities: KL is a sum of p log(p / q)."""
    student = student_logits.double().softmax(1)
    teacher = teacher_logits.double().softmax(1)

    def kl(p, q):
        return (p * (p / q).log()).sum(1)

    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def random_predictions(rows, vocabulary, size, seed, bias=False, cap=None):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, size, generator=generator)
    weight = torch.randn(vocabulary, size, generator=generator)
    biases = torch.randn(vocabulary, generator=generator) if bias else None
    return Predictions(hidden, weight, torch.float32, biases, cap)


def trainable(predictions):
    """The predictions and the tensors that have gradients."""
    tensors = {}
    for name in ("hidden", "weight", "bias"):
        value = getattr(predictions, name)
        if value is not None:
            tensors[name] = value.requires_grad_()
    return predictions._replace(**tensors), list(tensors.values())


def logits_of(predictions):
    """The full logits (N, V) in fp64."""
    logits = predictions.hidden.double() @ predictions.weight.double().T
    if predictions.bias is not None:
        logits = logits + predictions.bias
    cap = predictions.cap
    return logits if cap is None else cap.cap * torch.tanh(logits / cap.cap) / cap.temperature


def summed(beta):
    return functools.partial(distill_loss, beta=beta)


def weighted(values):
    return torch.linspace(-1, 2, len(values), dtype=values.dtype) @ values


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("width", [1, 7, 50, 100])      # for a vocabulary of 50
@pytest.mark.parametrize("bias, cap", [(False, None), (True, SoftCap(3.0, 0.7))])
def test_values_and_gradients_equal_full_logits(monkeypatch, beta, width, bias, cap):
    """The teacher has another width, and three rows more than the student, which do not count."""
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", width * 11 * PARTS)
    student, inputs = trainable(random_predictions(11, 50, 8, 0, bias, cap))
    teacher = random_predictions(11, 53, 5, 1, bias, cap)
    target = torch.arange(11)
    exact = logits_of(student)
    expected = plain_divergence(exact, logits_of(teacher)[:, :50], beta)
    expected_gradients = torch.autograd.grad(weighted(expected), inputs)

    logps, found = compared(student, teacher, summed(beta), target)
    gradients = torch.autograd.grad(weighted(found), inputs)
    assert found.dtype == torch.float32 and expected.max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=2e-5)
    assert not logps.requires_grad
    expected_logps = exact.log_softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(logps, expected_logps, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("beta", BETAS)
def test_a_head_without_a_gradient(beta):
    student, (hidden, weight) = trainable(random_predictions(5, 50, 8, 0))
    teacher = random_predictions(5, 50, 8, 1)
    _, found = compared(student, teacher, summed(beta), torch.arange(5))
    whole = torch.autograd.grad(found.sum(), hidden)
    weight.requires_grad_(False)
    _, found = compared(student, teacher, summed(beta), torch.arange(5))
    assert torch.equal(torch.autograd.grad(found.sum(), hidden)[0], whole[0])


def entropy(p):
    """Of two tokens, of which one has the probability p."""
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


BY_HAND = {
    0.0: 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
    1.0: 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5),
    0.5: entropy(3 / 8) - entropy(1 / 2) / 2 - entropy(1 / 4) / 2,
}


@pytest.mark.parametrize("beta", BY_HAND)
def test_two_tokens_by_hand(beta):
    """The student is at 1/4 and 3/4, the teacher at 1/2 and 1/2; Jensen-Shannon is a difference of
    entropies."""
    student = Predictions(torch.ones(1, 1), torch.tensor([[0.0], [math.log(3.0)]]), torch.float32, None, None)
    teacher = student._replace(weight=torch.zeros(2, 1))
    _, found = compared(student, teacher, summed(beta), torch.tensor([0]))
    assert found.item() == pytest.approx(BY_HAND[beta], rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_a_student_that_is_its_teacher_has_no_divergence(beta):
    student, inputs = trainable(random_predictions(9, 50, 8, 0))
    teacher = random_predictions(9, 50, 8, 0)
    _, found = compared(student, teacher, summed(beta), torch.arange(9))
    assert found.abs().max() < (1e-12 if beta in (0, 1) else 1e-6)
    for gradient in torch.autograd.grad(found.sum(), inputs):
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("beta", [0.5, 0.1])
def test_jensen_shannon_has_a_largest_value(beta):
    """Where the two have no token in common, it is the entropy of (beta, 1 - beta)."""
    student = Predictions(torch.ones(1, 1), torch.tensor([[60.0], [0.0]]), torch.float32, None, None)
    teacher = student._replace(weight=torch.tensor([[0.0], [60.0]]))
    _, found = compared(student, teacher, summed(beta), torch.tensor([0]))
    assert found.item() == pytest.approx(-beta * math.log(beta) - (1 - beta) * math.log(1 - beta), rel=1e-5)


@pytest.mark.parametrize("beta", BETAS)
def test_near_certainty_is_finite(beta):
    """Probabilities that fp32 cannot hold: their summands are 0, not NaN."""
    student, inputs = trainable(Predictions(torch.full((1, 1), 300.0), torch.tensor([[1.0], [0.0], [-1.0]]),
                                            torch.float32, None, None))
    teacher = student._replace(hidden=torch.full((1, 1), 200.0), weight=inputs[1].detach())
    _, found = compared(student, teacher, summed(beta), torch.tensor([0]))
    assert found.isfinite().all()
    for gradient in torch.autograd.grad(found.sum(), inputs):
        assert gradient.isfinite().all()


def test_no_tensor_has_the_size_of_the_logits(monkeypatch):
    """40 rows, 1,000 tokens: slices of 3 tokens are 120 numbers, hidden states 160, full logits 40,000."""
    monkeypatch.setitem(LOGITS_AT_ONCE, "cpu", 120)
    student = random_predictions(40, 1000, 4, 0)
    student.hidden.requires_grad_()
    teacher = random_predictions(40, 1000, 4, 1)
    with Largest() as largest:
        _, found = compared(student, teacher, summed(0.5), torch.zeros(40, dtype=torch.long))
        found.sum().backward()
    assert 120 <= largest.numbers <= 4000                     # a view of the teacher's head is (1000, 4)


@pytest.mark.parametrize("beta", BETAS)
def test_bf16_products(beta):
    exact = random_predictions(11, 50, 8, 0)
    student, inputs = trainable(exact._replace(dtype=torch.bfloat16))
    teacher = random_predictions(11, 50, 8, 1)._replace(dtype=torch.bfloat16)
    expected = plain_divergence(logits_of(student), logits_of(teacher), beta)
    _, found = compared(student, teacher, summed(beta), torch.arange(11))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05, check_dtype=False)
    theirs = torch.autograd.grad(expected.sum(), inputs)
    for gradient, other in zip(torch.autograd.grad(found.sum(), inputs), theirs):
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.999


# ---- the policy ----

def full_logits(lm, made, temperature):
    """(N, V) from the LM's own forward, one response at a time, divided by the temperature."""
    found = []
    for example in made:
        for response in example.responses:
            row = torch.tensor([[*example.prompt, *response.tokens]])
            logits = lm(row, use_cache=False).logits[0, len(example.prompt) - 1:-1]
            found.append(logits[torch.from_numpy(response.trained)] / temperature)
    return torch.cat(found)


# without gpt_oss: transformers' experts have no product in fp64
TIED = config_of(Qwen2Config, tie_word_embeddings=True)
FAMILIES = {"qwen2": config_of(Qwen2Config), "tied": TIED, **kinds()}
TEACHER = config_of(LlamaConfig, hidden_size=48, num_attention_heads=6, head_dim=8, num_key_value_heads=3)


@pytest.mark.parametrize("temperature, beta", [(1.0, 1.0), (0.7, 0.5), (0.7, 0.0)])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gpt_oss"])
def test_policy_and_teacher_equal_the_models_own_logits(family, temperature, beta):
    """Also of heads with a bias, a scale or a cap; the teacher is wider and of another family."""
    made, config = pairs(), FAMILIES[family]
    plain = random_lm(config, attn_implementation="eager").double()
    teacher_lm = random_lm(TEACHER, seed=3, attn_implementation="eager")
    with torch.no_grad():
        teacher_logits = full_logits(copy.deepcopy(teacher_lm).double(), made, temperature)
    expected = plain_divergence(full_logits(plain, made, temperature), teacher_logits, beta)
    weighted(expected).backward()

    policy = Policy(random_lm(config, attn_implementation="segments"))
    teacher = Policy(random_lm(TEACHER, seed=3, attn_implementation="segments"))
    batch = collate(made)
    with torch.no_grad():
        predictions = teacher(teacher.collate(batch.examples), temperature, predictions=True)
    logps, found = policy(batch, temperature, against=(predictions, summed(beta)))
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, check_dtype=False)
    torch.testing.assert_close(logps, policy(batch, temperature), rtol=1e-5, atol=1e-5)
    weighted(found).backward()
    for (name, ours), theirs in zip(policy.lm.named_parameters(), plain.parameters()):
        assert (ours.grad - theirs.grad).norm() < 2e-5 * max(theirs.grad.norm(), 0.1), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_filler_has_no_divergence_and_zero_gradients():
    policy = Policy(random_lm(config_of(), attn_implementation="segments"))
    teacher = Policy(random_lm(config_of(), seed=1, attn_implementation="segments"))
    with torch.no_grad():
        predictions = teacher(collate([]), predictions=True)
    logps, found = policy(collate([]), against=(predictions, summed(0.5)))
    assert logps.shape == found.shape == (0,)
    found.sum().backward()
    assert not any(parameter.grad.any() for parameter in policy.lm.parameters())
