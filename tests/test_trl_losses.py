"""The losses equal TRL's own loss methods, on random token log-probs: values, gradients and metrics. The methods run on a stand-in for
their trainer, which holds the options and nothing else."""
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from algorithms.apo import apo_zero_loss
from algorithms.cpo import cpo_loss
from algorithms.distill import distill_loss
from algorithms.dpo import dpo_loss
from algorithms.ipo import ipo_loss
from algorithms.kto import kto_loss
from algorithms.orpo import orpo_loss
from algorithms.rm import rm_loss
from algorithms.rpo import rpo_loss
from algorithms.simpo import simpo_loss
from model.divergence import compared
from model.head import Predictions, SoftCap

trl = pytest.importorskip("trl", reason="trl is not installed: pip install -r requirements-dev.txt")
TOKENS = 9


def stand_in(**options):
    def same(tensor):
        return tensor
    accelerator = SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same)
    return SimpleNamespace(model=SimpleNamespace(training=True), accelerator=accelerator,
                           aux_loss_enabled=False, _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1, **options)


def responses(count, seed):
    """Token log-probs (count, TOKENS), zero outside the responses, and the mask (count, TOKENS + 1) of prompts (0) and responses (1)."""
    generator = torch.Generator().manual_seed(seed)
    first, last = torch.randint(1, 4, (count, 1), generator=generator), torch.randint(5, TOKENS + 1, (count, 1), generator=generator)
    mask = ((torch.arange(TOKENS + 1) >= first) & (torch.arange(TOKENS + 1) <= last)).long()
    logps = -3 * torch.rand(count, TOKENS, generator=generator) * mask[:, 1:]
    return logps.requires_grad_(), mask


def outputs(logps):
    """What TRL's fused head returns."""
    return SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), mean_logits=torch.zeros_like(logps),
                           is_top1=torch.zeros_like(logps, dtype=torch.bool))


def token_inputs(mask, **more):
    return {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask, **more}


def assert_same(loss, theirs, logps, metrics=None, their_metrics=None, atol=1e-7):
    """Two scalars, the gradients that they give `logps`, and the metrics that both sides have."""
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    (gradient,), (other,) = (torch.autograd.grad(x, [logps], retain_graph=True) for x in (loss, theirs))
    assert torch.allclose(gradient, other, rtol=1e-5, atol=atol) and gradient.abs().max() > 0
    for name, values in (metrics or {}).items():
        mean = sum(part.double().mean().item() for part in (values if isinstance(values, tuple) else (values,)))
        assert mean == pytest.approx(their_metrics[name][0], rel=1e-5, abs=1e-6), name


def by_trl(logps, mask, reference, **options):
    """(loss, metrics) of DPOTrainer for a batch of chosen, then rejected responses."""
    trainer = stand_in(ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, label_smoothing=0.0,
                       **{"beta": 0.1, "loss_types": ["sigmoid"], "loss_weights": [1.0], **options})
    chosen, rejected = reference.sum(1).detach().chunk(2)
    inputs = token_inputs(mask, ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    return trl.DPOTrainer._compute_loss(trainer, lambda **_: outputs(logps), inputs, False), trainer._metrics["train"]


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("loss_of, rpo_alpha", [(dpo_loss, 0.0), (rpo_loss, 0.5)])
def test_dpo_and_rpo(beta, loss_of, rpo_alpha):
    (logps, mask), (reference, _) = responses(12, 0), responses(12, 1)
    options = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, rpo_alpha]} if rpo_alpha else {}
    theirs, metrics = by_trl(logps, mask, reference * mask[:, 1:], beta=beta, **options)
    reference = (reference * mask[:, 1:]).detach()
    losses, ours = loss_of(*logps.sum(1).chunk(2), *reference.sum(1).chunk(2), beta)
    chosen = mask[:6, 1:].bool()
    assert_same(losses.mean() - rpo_alpha * logps[:6][chosen].mean(), theirs, logps, ours, metrics)


@pytest.mark.parametrize("beta", [0.1, 5.0])
def test_length_normalised_dpo(beta):
    (logps, mask), (reference, _) = responses(12, 11), responses(12, 12)
    reference = (reference * mask[:, 1:]).detach()
    theirs, _ = by_trl(logps, mask, reference, beta=beta, loss_types=["sigmoid_norm"])
    lengths = mask.sum(1)
    losses, _ = dpo_loss(*(logps.sum(1) / lengths).chunk(2), *(reference.sum(1) / lengths).chunk(2), beta)
    assert_same(losses.mean(), theirs, logps)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_apo_zero(beta):
    (logps, mask), (reference, _) = responses(12, 13), responses(12, 14)
    reference = (reference * mask[:, 1:]).detach()
    theirs, metrics = by_trl(logps, mask, reference, beta=beta, loss_types=["apo_zero"])
    losses, ours = apo_zero_loss(*logps.sum(1).chunk(2), *reference.sum(1).chunk(2), beta)
    assert_same(losses.mean(), theirs, logps, ours, metrics)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_ipo(beta):
    (logps, mask), (reference, _) = responses(12, 2), responses(12, 3)
    reference = (reference * mask[:, 1:]).detach()
    theirs, _ = by_trl(logps, mask, reference, beta=beta, loss_types=["ipo"])      # its metrics are of sums
    lengths = mask.sum(1)
    losses, _ = ipo_loss(*(logps.sum(1) / lengths).chunk(2), *(reference.sum(1) / lengths).chunk(2), beta)
    assert_same(losses.mean(), theirs, logps)


@pytest.mark.parametrize("options", [{"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
                                     {"beta": 0.4, "desirable_weight": 1.5, "undesirable_weight": 0.5}])
@pytest.mark.parametrize("shift", [1.0, -1.0])      # kl above 0, and below, where it is clamped
def test_kto(options, shift):
    (logps, mask), (reference, _), (mismatched, _), (mismatched_reference, _) = (responses(12, seed) for seed in range(4, 8))
    reference = (reference * mask[:, 1:]).detach()
    labels = torch.arange(12) % 3 == 0
    kl_logps, kl_reference = mismatched.sum(1).detach(), mismatched_reference.sum(1).detach()
    kl_logps = kl_logps + (kl_reference - kl_logps).mean() + shift
    trainer = stand_in(calculate_KL=True, _compute_kl_logps=lambda model, batch: kl_logps, precompute_ref_logps=True, loss_type="kto",
                       **options)
    inputs = token_inputs(mask, label=labels, ref_logps=reference.sum(1), ref_KL_logps=kl_reference)
    theirs = trl.KTOTrainer._compute_loss(trainer, lambda **_: outputs(logps), inputs, False)
    kl = (kl_logps - kl_reference).mean().clamp(min=0)
    losses, metrics = kto_loss(logps.sum(1), reference.sum(1), labels, kl, **options)
    assert_same(losses.mean(), theirs, logps, metrics, trainer._metrics["train"])


def means(count, seed):
    logps, mask = responses(count, seed)
    return (logps.sum(1) / mask.sum(1)).detach().requires_grad_()


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo(beta):
    from trl.experimental.orpo import ORPOTrainer
    logps = means(12, 8)
    losses, chosen, rejected, ratio, odds = ORPOTrainer.odds_ratio_loss(stand_in(beta=beta), *logps.chunk(2))
    ours, metrics = orpo_loss(*logps.chunk(2), beta)
    theirs = {"log_odds_ratio": ratio, "log_odds_chosen": odds, "rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    assert_same(ours.mean(), -losses.mean(), logps, {name: metrics[name] for name in theirs},
                {name: [value.item()] for name, value in theirs.items()})


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("loss, loss_type, options", [
    (cpo_loss, "sigmoid", {"beta": 0.1}), (cpo_loss, "sigmoid", {"beta": 1.0}),
    (simpo_loss, "simpo", {"beta": 2.0, "simpo_gamma": 1.0}), (simpo_loss, "simpo", {"beta": 2.5, "simpo_gamma": 1.375})])
def test_cpo_and_simpo(loss, loss_type, options, label_smoothing):
    from trl.experimental.cpo import CPOTrainer
    logps = means(12, 9)
    theirs, chosen, rejected = CPOTrainer.cpo_loss(
        stand_in(alpha=0.0, loss_type=loss_type, label_smoothing=label_smoothing, **options), *logps.chunk(2))
    ours, metrics = loss(*logps.chunk(2), **options, label_smoothing=label_smoothing)
    expected = {"rewards/chosen": [chosen.mean().item()], "rewards/rejected": [rejected.mean().item()]}
    assert_same(ours.mean(), theirs.mean(), logps, {name: metrics[name] for name in expected}, expected)


@pytest.mark.parametrize("center", [None, 0.01])
@pytest.mark.parametrize("margin", [False, True])
def test_rm(center, margin):
    generator = torch.Generator().manual_seed(10)
    scores = torch.randn(12, 1, generator=generator, requires_grad=True)
    margins = torch.rand(6, generator=generator) if margin else None
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=center))
    inputs = {"attention_mask": torch.ones(12, 3)} | ({"margin": margins} if margin else {})
    theirs = trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=scores), inputs)
    losses, metrics = rm_loss(*scores[:, 0].chunk(2), margins, center or 0.0)
    assert_same(losses.mean(), theirs, scores, {name: metrics[name] for name in ("accuracy", "margin", "mean_reward")},
                trainer._metrics["train"])


# ---- distillation ----

BETAS = [0.0, 1.0, 0.5, 0.1]


def predictions(size, seed, temperature):
    """Of 2 rows with 5 positions, over 40 tokens: (Predictions of the eight that are trained, hidden states,
    head)."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(2, 5, size, generator=generator), torch.randn(40, size, generator=generator)
    hidden.requires_grad_(), weight.requires_grad_()
    return Predictions(hidden[TRAINED] / temperature, weight, torch.float32, None, None), hidden, weight


TRAINED = torch.tensor([[False, True, True, True, True], [True, True, True, True, False]])


def by_ours(student, teacher, beta):
    """The mean over the eight trained tokens, as train() in distill.py makes it."""
    fixed = teacher._replace(hidden=teacher.hidden.detach(), weight=teacher.weight.detach())
    _, losses = compared(student, fixed, partial(distill_loss, beta=beta), torch.zeros(8, dtype=torch.long))
    return losses.sum() / 8


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("beta", BETAS)
def test_distillation_equals_gkd(beta, temperature):
    """GKDTrainer's loss, over full logits, divides by the trained tokens too."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer
    student, hidden, weight = predictions(8, 0, temperature)
    teacher, their_hidden, their_weight = predictions(6, 1, temperature)
    labels = torch.where(TRAINED, 1, -100)
    theirs = GKDTrainer.generalized_jsd_loss(
        hidden @ weight.T, (their_hidden @ their_weight.T).detach(), labels, beta, temperature)
    assert_same(by_ours(student, teacher, beta), theirs, hidden, atol=2e-6)
    assert_same(by_ours(student, teacher, beta), theirs, weight, atol=2e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("beta", BETAS)
def test_distillation_equals_the_distillation_trainer(beta, cap):
    """Its own chunked loss, with num_items_in_batch, the trained tokens of the whole batch."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    temperature = 0.7
    student, hidden, weight = predictions(8, 0, 1.0 if cap else temperature)
    teacher, their_hidden, their_weight = predictions(6, 1, 1.0 if cap else temperature)
    options = {"temperature": temperature, "num_items_in_batch": 8}
    if cap:
        student, teacher = (model._replace(cap=SoftCap(cap, temperature)) for model in (student, teacher))
        options |= {"student_final_logit_softcapping": cap, "teacher_final_logit_softcapping": cap}
    theirs, _, count = _chunked_divergence_loss(
        hidden, their_hidden.detach(), weight, their_weight.detach(), TRAINED.long(), beta, **options)
    assert count == 8
    assert_same(by_ours(student, teacher, beta), theirs, hidden, atol=2e-6)
    assert_same(by_ours(student, teacher, beta), theirs, weight, atol=2e-6)
