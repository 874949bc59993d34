"""The losses against worked numbers, closed forms and an independent formulation in float64."""
import importlib
import math
import re

import pytest
import torch

from algorithms.dpo import dpo_loss
from algorithms.sft import sft_loss


def vectors(count, size=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [(-10 * torch.rand(size, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(count)]


def dpo_by_hand(pc, pr, rc, rr, beta, smoothing):
    """One pair, plain numbers -> (loss, d loss / d pc). With sigma = probability that the label is right."""
    sigma = 1 / (1 + math.exp(-beta * ((pc - rc) - (pr - rr))))
    loss = -(1 - smoothing) * math.log(sigma) - smoothing * math.log(1 - sigma)
    return loss, beta * (sigma - (1 - smoothing))


def test_sft_worked_number():
    """Two micro-batches of 2 and 4 tokens: their sums over all 6 tokens, not the mean of their means (.825)."""
    parts = [torch.tensor([-.5, -1.5]), torch.tensor([-.1, -.2, -.3, -2.0])]
    assert sum(sft_loss(part)[0].sum() / 6 for part in parts).item() == pytest.approx(.766667, abs=1e-6)


def test_sft_is_unreduced_and_its_gradient_is_minus_one():
    logps, = vectors(1)
    losses, metrics = sft_loss(logps)
    losses.sum().backward()
    assert losses.tolist() == [-x for x in logps.tolist()] and metrics == {}
    assert logps.grad.tolist() == [-1] * 7


CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = ([-2.0, -3.5], [-4.0, -3.0], [-2.5, -3.0], [-3.5, -2.5])


@pytest.mark.parametrize("smoothing, expected", [(0.0, .668772), (0.1, .673772)])
def test_dpo_worked_numbers(smoothing, expected):
    losses, metrics = dpo_loss(*map(torch.tensor, (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)), 0.1, smoothing)
    assert losses.mean().item() == pytest.approx(expected, abs=1e-6)
    means = {name: values.double().mean().item() for name, values in metrics.items()}
    assert means == pytest.approx({"rewards/chosen": 0, "rewards/rejected": -.05, "rewards/margins": .05,
                                   "rewards/accuracies": .5, "logps/chosen": -2.75, "logps/rejected": -3.5}, abs=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_dpo_starts_at_log_two(smoothing):
    chosen, rejected = vectors(2)
    losses, metrics = dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), 0.1, smoothing)
    assert losses.tolist() == pytest.approx([math.log(2)] * 7, rel=1e-12)
    assert metrics["rewards/margins"].tolist() == [0] * 7 and not metrics["rewards/accuracies"].any()    # a tie is not a win


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_equals_a_plain_loop_in_values_and_gradients(beta, smoothing):
    inputs = vectors(4)
    before = [x.detach().clone() for x in inputs]
    losses, metrics = dpo_loss(*inputs, beta, smoothing)
    assert losses.shape == (7,) and all(values.shape == (7,) for values in metrics.values())
    losses.sum().backward()
    assert all(torch.equal(x.detach(), old) for x, old in zip(inputs, before))
    expected = [dpo_by_hand(*row, beta, smoothing) for row in zip(*(x.tolist() for x in before))]
    slopes = [slope for _, slope in expected]
    assert losses.tolist() == pytest.approx([loss for loss, _ in expected], rel=1e-10)
    for x, sign in zip(inputs, (1, -1, -1, 1)):      # chosen up, rejected down; the reference the other way round
        assert x.grad.tolist() == pytest.approx([sign * slope for slope in slopes], rel=1e-9, abs=1e-12)
    assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta, smoothing)[0], inputs)


def test_dpo_does_not_overflow():
    far = [torch.tensor([x]) for x in (-5000.0, -1.0, -1.0, -5000.0)]
    loss, _ = dpo_loss(*far, 1.0)
    assert loss.item() == 9998


def test_dpo_changes_when_any_two_inputs_are_exchanged():
    inputs = [x.detach() for x in vectors(4)]
    loss = dpo_loss(*inputs)[0]
    for i, j in ((0, 1), (2, 3), (0, 2), (1, 3)):
        swapped = list(inputs)
        swapped[i], swapped[j] = inputs[j], inputs[i]
        assert not torch.allclose(dpo_loss(*swapped)[0], loss, atol=1e-3)


@pytest.mark.parametrize("name, count, loss", [("sft", 1, sft_loss), ("dpo", 4, dpo_loss)])
def test_every_metric_is_explained(name, count, loss):
    documentation = importlib.import_module(f"algorithms.{name}").__doc__
    explained = re.search(r"^Metrics:(.*?)^\w+:", documentation, re.DOTALL | re.MULTILINE)[1]
    metrics = loss(*vectors(count))[1]
    assert [metric for metric in ["loss", *metrics] if not re.search(rf"(?<![\w/]){metric}(?![\w/])", explained)] == []
