"""The losses against worked numbers, step-0 values, and plain Python in float64 with finite differences for the gradients."""
import importlib
import itertools
import math
import re
from functools import partial

import pytest
import torch

from algorithms.apo import apo_zero_loss
from algorithms.cpo import cpo_loss
from algorithms.dft import dft_loss
from algorithms.dpo import dpo_loss
from algorithms.ipo import ipo_loss
from algorithms.kto import kto_loss
from algorithms.orpo import log_odds, orpo_loss
from algorithms.rm import rm_loss
from algorithms.sft import sft_loss
from algorithms.simpo import simpo_loss

LOSSES = {
    "sft": sft_loss, "dft": dft_loss, "dpo": dpo_loss, "ipo": ipo_loss, "apo": apo_zero_loss, "kto": kto_loss,
    "orpo": orpo_loss, "simpo": simpo_loss, "cpo": cpo_loss, "rm": rm_loss}


# ---- worked numbers ----

SUMS = [-2.0, -3.5], [-4.0, -3.0], [-2.5, -3.0], [-3.5, -2.5]       # chosen, rejected; the same of the reference
LENGTHS = [4, 3], [2, 5], [4, 3], [2, 5]
AVERAGES = [[total / length for total, length in zip(*both)] for both in zip(SUMS, LENGTHS)]
MEANS = [-.5, -1.2], [-2.0, -.6]
LABELLED = [-2.0, -3.5, -4.0], [-2.5, -3.0, -3.5], torch.tensor([True, True, False])


@pytest.mark.parametrize("name, inputs, options, expected", [
    ("dpo", SUMS, {}, .668772),
    ("dpo", SUMS, {"label_smoothing": .1}, .673772),
    ("dpo", AVERAGES, {"beta": 5.0}, .508157),
    ("ipo", AVERAGES, {}, 23.530869),
    ("ipo", SUMS, {}, 20.5),
    ("apo", SUMS, {}, .987503),
    ("kto", (*LABELLED, .5 / 3), {}, .497223),
    ("kto", (*LABELLED, 0.0), {}, .495834),
    ("kto", (*LABELLED, .5 / 3), {"undesirable_weight": 1.5}, .577779),
    ("orpo", MEANS, {}, .0718755),
    ("simpo", MEANS, {}, 1.216006),
    ("simpo", MEANS, {"beta": 2.5, "simpo_gamma": 1.375}, 1.509411),
    ("cpo", ([-10.0, -12.0], [-14.0, -11.0]), {}, .628706),
    ("rm", ([1.0, .2], [.5, .7]), {}, .724077),
    ("rm", ([1.0, .2], [.5, .7], [.5, .5]), {}, 1.003204),
    ("rm", ([1.0, .2], [.5, .7]), {"center_rewards_coefficient": .01}, .739377),
])
def test_worked_numbers(name, inputs, options, expected):
    losses, _ = LOSSES[name](*map(torch.as_tensor, inputs), **options)
    assert losses.mean().item() == pytest.approx(expected, abs=1e-6, rel=1e-6)


@pytest.mark.parametrize("name, expected", [("sft", .766667), ("dft", .230851)])
def test_worked_numbers_of_tokens(name, expected):
    """Two micro-batches of 2 and 4 tokens: their sums over all 6 tokens, not the mean of their means (.825, .252883)."""
    parts = [torch.tensor([-.5, -1.5]), torch.tensor([-.1, -.2, -.3, -2.0])]
    assert sum(LOSSES[name](part)[0].sum() / 6 for part in parts).item() == pytest.approx(expected, abs=1e-6)
    if name == "dft":
        assert sum(dft_loss(part)[1]["nll_loss"].sum() / 6 for part in parts).item() == pytest.approx(.766667, abs=1e-6)


def averages(metrics):
    """Of every metric; a tuple is the sum of its parts' averages."""
    return {name: sum(part.double().mean().item() for part in (values if isinstance(values, tuple) else (values,)))
            for name, values in metrics.items()}


PAIR_METRICS = "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"


@pytest.mark.parametrize("name, inputs, expected", [
    ("dpo", SUMS, dict(zip(PAIR_METRICS, (0, -.05, .05, .5, -2.75, -3.5)))),
    ("apo", SUMS, dict(zip(PAIR_METRICS, (0, -.05, .05, .5, -2.75, -3.5)))),
    ("ipo", AVERAGES, dict(zip(PAIR_METRICS, (-.1 / 48, -.0175, .0175 - .1 / 48, .5, -5 / 6, -1.3)))),
    ("kto", (*LABELLED, .5 / 3), {"kl": .5 / 3, "rewards/chosen": 0, "rewards/rejected": -.05, "rewards/margins": .05,
                                  "logps/chosen": -2.75, "logps/rejected": -4}),
    ("orpo", MEANS, dict(zip(PAIR_METRICS, (-.085, -.13, .045, .5, -.85, -1.3)))
     | {"log_odds_chosen": .624925, "log_odds_ratio": -.718755}),
    ("simpo", MEANS, dict(zip(PAIR_METRICS, (-1.7, -2.6, .9, .5, -.85, -1.3)))),
    ("cpo", ([-10.0, -12.0], [-14.0, -11.0]), dict(zip(PAIR_METRICS, (-1.1, -1.25, .15, .5, -11, -12.5)))),
    ("rm", ([1.0, .2], [.5, .7]), {"accuracy": .5, "margin": 0, "mean_reward": .6, "rewards/chosen": .6, "rewards/rejected": .6}),
])
def test_worked_metrics(name, inputs, expected):
    _, metrics = LOSSES[name](*map(torch.as_tensor, inputs))
    assert averages(metrics) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["dpo", "ipo", "apo", "orpo", "simpo", "cpo", "rm"])
def test_a_difference_of_rounding_size_is_a_tie(name):
    """Of five pairs the first wins; without `tie`, the first two. Nothing else depends on it."""
    rejected = torch.full((5,), -1.0, dtype=torch.float64)
    inputs = [rejected + torch.tensor([.03, .01, 0, -.01, -.03]), rejected]
    if name in ("dpo", "ipo", "apo"):
        inputs += [rejected, rejected]
    for beta in {"rm": [{}]}.get(name, [{"beta": 0.1}, {"beta": 2.0}]):
        losses, metrics = LOSSES[name](*inputs, **beta, tie=.02)
        plain, others = LOSSES[name](*inputs, **beta)
        accuracy = "accuracy" if name == "rm" else "rewards/accuracies"
        assert metrics.pop(accuracy).tolist() == [True, False, False, False, False]
        assert others.pop(accuracy).tolist() == [True, True, False, False, False]
        assert torch.equal(losses, plain) and averages(metrics) == averages(others)
        each = torch.tensor([.02, .02, .02, .004, .004])               # a tie may be each pair's own
        assert not LOSSES[name](*[x.flip(0) for x in inputs], **beta, tie=each.flip(0))[1][accuracy][:4].any()


# ---- step 0, where policy = reference, or where both responses are equally likely ----

def vectors(count, size=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(-10 * torch.rand(size, generator=generator, dtype=torch.float64) - .01).requires_grad_() for _ in range(count)]


@pytest.mark.parametrize("name, options, expected", [
    ("dpo", {}, math.log(2)), ("dpo", {"label_smoothing": .3}, math.log(2)), ("ipo", {}, 25),
    ("ipo", {"beta": .5}, 1), ("apo", {}, 1), ("apo", {"beta": 2.0}, 1), ("kto", {}, .5),
    ("orpo", {}, .1 * math.log(2)), ("simpo", {}, math.log(1 + math.e)), ("cpo", {}, math.log(2)),
    ("rm", {}, math.log(2))])
def test_step_zero(name, options, expected):
    first, second = vectors(2)
    labels = torch.arange(7) % 2 == 0
    both = first, second, first, second
    inputs = {"dpo": both, "ipo": both, "apo": both,
              "kto": (first, first, labels, torch.tensor(0.0))}.get(name, (first, first))
    losses, metrics = LOSSES[name](*inputs, **options)
    assert losses.tolist() == pytest.approx([expected] * 7, rel=1e-6)
    margin = "margin" if name == "rm" else "rewards/margins"
    assert averages(metrics)[margin] == 0
    assert not metrics.get("rewards/accuracies", metrics.get("accuracy", torch.zeros(1))).any()      # a tie is not a win


# ---- plain Python ----

def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x):
    return -math.log(1 + math.exp(-x))


def smoothed(margin, smoothing):
    return -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)


def odds(logp):
    return math.exp(logp) / (1 - math.exp(logp))


BY_HAND = {
    "sft": lambda logp: -logp,
    "dpo": lambda pc, pr, rc, rr, beta=.1, label_smoothing=0.0: smoothed(beta * ((pc - rc) - (pr - rr)), label_smoothing),
    "ipo": lambda pc, pr, rc, rr, beta=.1: ((pc - rc) - (pr - rr) - 1 / (2 * beta)) ** 2,
    "apo": lambda pc, pr, rc, rr, beta=.1: 1 - sigmoid(beta * (pc - rc)) + sigmoid(beta * (pr - rr)),
    "orpo": lambda pc, pr, beta=.1: -beta * log_sigmoid(math.log(odds(pc) / odds(pr))),
    "simpo": lambda pc, pr, beta=2.0, simpo_gamma=1.0, label_smoothing=0.0: smoothed(beta * (pc - pr) - simpo_gamma, label_smoothing),
    "cpo": lambda pc, pr, beta=.1, label_smoothing=0.0: smoothed(beta * (pc - pr), label_smoothing),
    "rm": lambda c, r, m=0.0, center_rewards_coefficient=0.0: -log_sigmoid(c - r - m) + center_rewards_coefficient * (c + r) ** 2,
}
# tensor arguments
COUNTS = {"sft": 1, "dpo": 4, "ipo": 4, "apo": 4, "orpo": 2, "simpo": 2, "cpo": 2, "rm": 3}


def kto_by_hand(policy, reference, desirable, kl, beta=.1, desirable_weight=1.0, undesirable_weight=1.0):
    sign, weight = (1, desirable_weight) if desirable else (-1, undesirable_weight)
    return weight * (1 - 1 / (1 + math.exp(-beta * sign * (policy - reference - kl))))


def slope(function, values, i, step=1e-5):
    """Of the i-th of `values`, by central differences."""
    up, down = ([value + sign * step * (j == i) for j, value in enumerate(values)] for sign in (1, -1))
    return (function(*up) - function(*down)) / (2 * step)


def assert_equals_by_hand(loss, by_hand, inputs, tolerance):
    """Values, and the gradients of every input."""
    before = [x.detach().clone() for x in inputs]
    losses, _ = loss(*inputs)
    assert losses.shape == inputs[0].shape
    losses.sum().backward()
    assert all(torch.equal(x.detach(), old) for x, old in zip(inputs, before))
    rows = list(zip(*(x.tolist() for x in before)))
    assert losses.tolist() == pytest.approx([by_hand(*row) for row in rows], rel=tolerance, abs=1e-9)
    for i, x in enumerate(inputs):
        expected = [slope(by_hand, row, i) for row in rows]
        assert x.grad.tolist() == pytest.approx(expected, rel=10 * tolerance, abs=1e-7), f"gradient of input {i}"


@pytest.mark.parametrize("name, options", [
    ("sft", {}), ("dpo", {}), ("dpo", {"beta": 2.0}), ("dpo", {"beta": .3, "label_smoothing": .2}),
    ("ipo", {}), ("ipo", {"beta": .7}), ("apo", {}), ("apo", {"beta": 2.0}), ("orpo", {}),
    ("orpo", {"beta": 1.5}),
    ("simpo", {}), ("simpo", {"beta": .5, "simpo_gamma": .25, "label_smoothing": .2}),
    ("cpo", {}), ("cpo", {"beta": .5, "label_smoothing": .3}), ("rm", {}),
    ("rm", {"center_rewards_coefficient": .01})])
def test_values_and_gradients_equal_plain_python(name, options):
    tolerance = 3e-6 if name == "orpo" else 1e-8          # orpo works in fp32
    assert_equals_by_hand(partial(LOSSES[name], **options), partial(BY_HAND[name], **options), vectors(COUNTS[name]), tolerance)


@pytest.mark.parametrize("kl", [0.0, 1.5])
@pytest.mark.parametrize("desirable", [True, False])      # each class alone, as in a micro-batch
@pytest.mark.parametrize("options", [{}, {"beta": .5, "desirable_weight": 1.5, "undesirable_weight": .25}])
def test_kto_values_and_gradients_equal_plain_python(kl, desirable, options):
    labels = torch.full((7,), desirable)
    assert_equals_by_hand(lambda p, r: kto_loss(p, r, labels, torch.tensor(kl), **options),
                          lambda p, r: kto_by_hand(p, r, desirable, kl, **options), vectors(2), 1e-7)


def test_kto_mixed_labels():
    policy, reference = vectors(2)
    labels = torch.tensor([True, False, False, True, True, False, True])
    losses, metrics = kto_loss(policy, reference, labels, torch.tensor(.7), 0.2, 1.5, .5)
    expected = [kto_by_hand(*row, .7, .2, 1.5, .5) for row in zip(policy.tolist(), reference.tolist(), labels.tolist())]
    assert losses.tolist() == pytest.approx(expected, rel=1e-6)
    assert len(metrics["rewards/chosen"]) == 4 and len(metrics["rewards/rejected"]) == 3


def test_dft_weighs_without_a_gradient_through_the_weight():
    logps, = vectors(1)
    losses, metrics = dft_loss(logps)
    losses.sum().backward()
    weights = [math.exp(logp) for logp in logps.tolist()]
    assert losses.tolist() == pytest.approx([-w * logp for w, logp in zip(weights, logps.tolist())], rel=1e-12)
    assert logps.grad.tolist() == pytest.approx([-w for w in weights], rel=1e-12)
    assert metrics["nll_loss"].tolist() == [-logp for logp in logps.tolist()]


# ---- far away ----

@pytest.mark.parametrize("name, inputs, expected", [
    ("dpo", (-5000, -1, -1, -5000), 9998), ("cpo", (-5000, -1), 4999), ("simpo", (-5000, -1), 5000), ("rm", (-5000, -1), 4999)])
def test_no_overflow(name, inputs, expected):
    options = {} if name == "rm" else {"beta": 1.0}
    inputs = [torch.tensor([float(x)], requires_grad=True) for x in inputs]
    loss = LOSSES[name](*inputs, **options)[0]
    loss.backward()
    assert loss.item() == expected and [abs(x.grad.item()) for x in inputs] == [1] * len(inputs)


@pytest.mark.parametrize("logps, expected", [((-5000, -1, -1, -5000), 2), ((-1, -5000, -5000, -1), 0)])
def test_apo_has_an_end_on_both_sides(logps, expected):
    """A pair that is far from the reference, on the wrong side or the right one, moves nothing any more."""
    inputs = [torch.tensor([float(x)], requires_grad=True) for x in logps]
    loss = apo_zero_loss(*inputs, 1.0)[0]
    loss.backward()
    assert loss.item() == expected and [x.grad.item() for x in inputs] == [0] * 4


def test_orpo_is_finite_everywhere():
    """Also where a response is certain: 1 - P would be 0, its logarithm and their gradients infinite."""
    for chosen, rejected in itertools.product((-1e-7, 0.0, -1e-8, -50.0, -104.0, -5000.0), repeat=2):
        inputs = [torch.tensor([x], requires_grad=True) for x in (chosen, rejected)]
        losses, metrics = orpo_loss(*inputs)
        losses.sum().backward()
        for values in (losses, *metrics.values(), *(x.grad for x in inputs)):
            assert values.isfinite().all(), (chosen, rejected)


def test_log_odds():
    """Against exact values on both sides of the branch, in fp32."""
    logps = [-1e-7, -1e-6, -1e-3, -.1, -.69, -.70, -1.0, -5.0, -20.0, -50.0]
    expected = [logp - math.log(-math.expm1(logp)) for logp in logps]
    assert log_odds(torch.tensor(logps)).tolist() == pytest.approx(expected, rel=2e-6, abs=1e-6)


# ---- documentation ----

@pytest.mark.parametrize("name", LOSSES)
def test_every_metric_is_explained(name):
    documentation = importlib.import_module(f"algorithms.{name}").__doc__
    explained = re.search(r"^Metrics:(.*?)^Step 0:", documentation, re.DOTALL | re.MULTILINE)[1]
    inputs = (*vectors(2), torch.arange(7) > 3, torch.tensor(0.0)) if name == "kto" else vectors({"dft": 1, **COUNTS}.get(name))
    metrics = LOSSES[name](*inputs)[1]
    assert [metric for metric in ["loss", *metrics] if not re.search(rf"(?<![\w/]){metric}(?![\w/])", explained)] == []
