"""Losses and advantages of the online algorithms: worked numbers, TRL's own loss methods, and plain Python loops in float64. The loops
check `train` too, on an engine that only hands out log-probs from a table: what is summed, and divided by what."""
import importlib
import math
import statistics
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from algorithms import dapo, dr_grpo, grpo, reinforce_pp, rloo
from algorithms.cispo import cispo_loss
from algorithms.dapo import dapo_loss, soft_overlong
from algorithms.dr_grpo import dr_grpo_loss
from algorithms.gdpo import decoupled_advantages, gdpo_loss
from algorithms.grpo import grpo_loss
from algorithms.gspo import gspo_loss
from algorithms.reinforce_pp import reinforce_loss, token_returns, whiten
from algorithms.rloo import kl_rewards, leave_one_out, rloo_loss
from data.errors import UserError
from data.pack import Example, Response, collate
from engine.config import load_config
from engine.rollout import Rollout, alike

OF_TOKENS = {
    "grpo": grpo_loss, "gdpo": gdpo_loss, "dr_grpo": dr_grpo_loss, "dapo": dapo_loss, "cispo": cispo_loss,
    "reinforce_pp": reinforce_loss}


# ---- worked numbers: two completions of 4 and 2 tokens ----

OLD = torch.tensor([-1., -1, -1, -1, -1, -1])
NEW = torch.tensor([-.7, -1, -1.1, -.9, -1.3, -.6])
REFERENCE = torch.tensor([-1.2, -1, -1, -.8, -1, -1])
LENGTHS = torch.tensor([4, 2])
ADVANTAGES = torch.tensor([.8659, -.8659])
PER_TOKEN = ADVANTAGES.repeat_interleave(LENGTHS)


def sums(x):
    return torch.stack([x[:4].sum(), x[4:].sum()])


@pytest.mark.parametrize("loss, inputs, options, reduce, expected", [
    (grpo_loss, (PER_TOKEN,), {}, lambda x: (sums(x) / LENGTHS).mean(), .040442),
    (grpo_loss, (PER_TOKEN, REFERENCE), {}, lambda x: (sums(x) / LENGTHS).mean(), .042228),
    (dapo_loss, (PER_TOKEN,), {"epsilon_high": .2}, torch.mean, -.276826),
    (dapo_loss, (PER_TOKEN,), {}, torch.mean, -.288371),
    (dr_grpo_loss, (PER_TOKEN,), {}, lambda x: x.sum() / (2 * 8), -.103810),      # max_completion_length 8
    (gspo_loss, (ADVANTAGES, LENGTHS), {}, torch.mean, .022025),
    (cispo_loss, (PER_TOKEN,), {}, torch.mean, .299705),
    (reinforce_loss, (PER_TOKEN,), {}, torch.mean, -.276826)])                    # with these advantages dapo's
def test_worked_numbers(loss, inputs, options, reduce, expected):
    losses, _ = loss(NEW, OLD, *inputs, **options)
    assert reduce(losses).item() == pytest.approx(expected, abs=1e-6)


def test_worked_number_of_rloo():
    losses, metrics = rloo_loss(sums(NEW), sums(OLD), ADVANTAGES)
    assert losses.mean().item() == pytest.approx(-.041056, abs=1e-6)
    assert (metrics["clip_ratio/low_mean"].tolist(), metrics["clip_ratio/high_mean"].tolist()) == ([False, False], [True, False])


def test_worked_metrics():
    _, metrics = grpo_loss(NEW, OLD, PER_TOKEN, REFERENCE)
    means = {name: values.double().mean().item() for name, values in metrics.items()}
    assert means == pytest.approx({"clip_ratio/low_mean": 1 / 6, "clip_ratio/high_mean": 1 / 6, "clip_ratio/region_mean": 1 / 3,
                                   "entropy": 5.6 / 6, "kl": .039509}, abs=1e-6)


@pytest.mark.parametrize("loss, per_token, shape", [(loss, True, 6) for loss in OF_TOKENS.values()] + [(gspo_loss, False, 2)])
def test_first_pass(loss, per_token, shape):
    """Ratios are exactly 1 and nothing is clipped, whatever the bounds; the gradient is that of -A log pi."""
    logps = NEW.clone().requires_grad_()
    losses, metrics = loss(logps, logps.detach(), *((PER_TOKEN,) if per_token else (ADVANTAGES, LENGTHS)))
    assert losses.shape == (shape,) and not any(values.any() for name, values in metrics.items() if "clip" in name)
    if loss is not cispo_loss:
        assert torch.equal(losses.detach(), -PER_TOKEN if per_token else -ADVANTAGES)
    losses.sum().backward()
    assert torch.allclose(logps.grad, -PER_TOKEN if per_token else -PER_TOKEN / LENGTHS.repeat_interleave(LENGTHS))


# ---- advantages ----

NAN = math.nan
GROUPS = [[1., 0., 0., 1.], [.5] * 4, [1., NAN, 0., .25], [NAN, 2., NAN, NAN], [.1] * 3]


def tensors(groups, dtype=torch.float64):
    return [torch.tensor(group, dtype=dtype) for group in groups]


def assert_groups(advantages, expected):
    assert [pytest.approx(group, rel=1e-6, abs=1e-6, nan_ok=True) for group in expected] == [group.tolist() for group in advantages]


def spread(rewards):
    rewards = [reward for reward in rewards if reward == reward]
    return statistics.stdev(rewards) if len(rewards) > 1 else 0.0


def centered(group):
    mean = statistics.fmean(reward for reward in group if reward == reward)
    return [reward - mean for reward in group]


def test_worked_advantages():
    rewards = tensors(GROUPS[:2], torch.float32)
    for algorithm, expected in ((grpo, .865875), (dr_grpo, .5)):
        by_hand = [[expected, -expected, -expected, expected], [0] * 4]
        assert_groups(algorithm.group_advantages(rewards), by_hand)


@pytest.mark.parametrize("name", ["grpo", "gdpo", "dapo", "gspo", "cispo"])
def test_group_advantages_of_the_kin(name):
    advantages = importlib.import_module(f"algorithms.{name}").group_advantages(tensors(GROUPS))
    assert_groups(advantages, [[reward / (spread(group) + 1e-4) for reward in centered(group)] for group in GROUPS])
    assert_groups(dr_grpo.group_advantages(tensors(GROUPS)), map(centered, GROUPS))


def decoupled_by_hand(rewards, weights):
    """`rewards`: of each reward its groups, lists of numbers."""
    sums = []
    for groups in zip(*rewards):
        total = [NAN if all(reward != reward for reward in one) else 0.0 for one in zip(*groups)]
        for group, weight in zip(groups, weights):
            known = [reward for reward in group if reward == reward]
            for i, reward in enumerate(group):
                if reward == reward:
                    total[i] += weight * (reward - statistics.fmean(known)) / (spread(group) + 1e-4)
        sums.append(total)
    everything = [value for total in sums for value in total if value == value]
    mean, std = statistics.fmean(everything), statistics.stdev(everything)
    return [[(value - mean) / (std + 1e-4) for value in total] for total in sums]


def test_worked_advantages_of_two_rewards():
    """The spread of a reward does not count, its weight does; grpo hardly sees the second one."""
    large, small = tensors([[1000., 0., 1000., 0.]]), tensors([[0., 1., 1., 0.]])
    advantages, = decoupled_advantages([large, small], [1.0, 1.0])
    assert advantages.tolist() == pytest.approx([0, 0, math.sqrt(1.5), -math.sqrt(1.5)], abs=1e-3)
    of_sum, = grpo.group_advantages([large[0] + small[0]])
    assert of_sum.tolist() == pytest.approx([.86516, -.86516, .86689, -.86689], abs=1e-5)
    advantages, = decoupled_advantages([large, small], [3.0, 1.0])
    assert advantages.tolist() == pytest.approx([value * math.sqrt(.3) for value in (1, -1, 2, -2)], abs=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_decoupled_advantages(seed):
    """Against loops. Completions that one reward or all of them left out; groups that are alike in one of
    them or in all; a large and a small spread."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    rewards *= torch.tensor([100.0, .01, 1.0])[:, None, None]
    rewards[0, 1] = .1
    rewards[:, 2] = torch.tensor([1.0, .1, 3.0])[:, None]
    rewards[1, 3, 1:] = NAN
    rewards[2, 4] = NAN
    rewards[:, 5, 2] = NAN
    by_reward = [list(groups) for groups in rewards]
    for weights in ([1.0, 1.0, 1.0], [2.0, .5, -1.0]):
        advantages = decoupled_advantages(by_reward, weights)
        assert_groups(advantages, decoupled_by_hand(rewards.tolist(), weights))
        assert advantages[2].tolist() == [0] * 4
        assert advantages[5].isnan().tolist() == [False, False, True, False]


def test_decoupled_advantages_of_one_reward():
    """grpo's, divided by their standard deviation over the rollout."""
    of_grpo = grpo.group_advantages(tensors(GROUPS))
    std = statistics.stdev(value for group in of_grpo for value in group.tolist() if value == value)
    expected = [[value / (std + 1e-4) for value in group.tolist()] for group in of_grpo]
    assert_groups(decoupled_advantages([tensors(GROUPS)], [1.0]), expected)
    assert_groups(decoupled_advantages([tensors(GROUPS)], [7.0]), [
        [7 * value / (7 * std + 1e-4) for value in group.tolist()] for group in of_grpo])


def test_decoupled_advantages_without_a_signal():
    """One completion with a reward, or rewards that cancel out, leave no deviation to divide by."""
    one = decoupled_advantages([tensors([[NAN, 2., NAN], [NAN] * 3])], [1.0])
    assert_groups(one, [[NAN, 0, NAN], [NAN] * 3])
    pair = tensors([[1., 0., 2.]])
    assert decoupled_advantages([pair, [-pair[0]]], [1.0, 1.0])[0].tolist() == [0, 0, 0]


def leave_one_out_by_hand(group):
    advantages = []
    for i, reward in enumerate(group):
        others = [other for j, other in enumerate(group) if j != i and other == other]
        advantages.append(reward - statistics.fmean(others) if others else 0 * reward)
    return advantages


def test_leave_one_out():
    assert_groups(map(leave_one_out, tensors(GROUPS)), map(leave_one_out_by_hand, GROUPS))
    rewards = torch.tensor([1., 0., .5, .2])
    assert leave_one_out(rewards).tolist() == pytest.approx([.766667, -.566667, .1, -.3], abs=1e-6)
    kl = torch.tensor([.5, 1.5, 1., -.5, 0.])
    after = kl_rewards(rewards, kl, torch.tensor([2., 1., 1., 1.]), .05)
    assert after.tolist() == pytest.approx([.9, -.05, .525, .2])
    assert leave_one_out(after).tolist() == pytest.approx([.675, -.591667, .175, -.258333], abs=1e-6)


def test_returns_and_whitening():
    returns = token_returns(torch.tensor([1., -.5]), torch.tensor([.2, -.1, .3, 0, .1, .4]), torch.tensor([4., 2.]), .1)
    assert returns.tolist() == pytest.approx([.96, .98, .97, 1., -.55, -.54])
    advantages, = whiten([returns])
    assert advantages.tolist() == pytest.approx([.682622, .710484, .696553, .738346, -1.420967, -1.407036], abs=1e-6)
    parts = whiten([returns[:3], torch.tensor([NAN]), returns[3:]])                # of all prompts together; without a reward: nowhere
    assert torch.cat([parts[0], parts[2]]).tolist() == pytest.approx(advantages.tolist()) and parts[1].isnan().all()
    assert whiten([torch.tensor([.5, .5])])[0].tolist() == [0, 0]


def test_soft_overlong():
    lengths = torch.tensor([1., 80., 90., 95., 100.])
    assert soft_overlong(lengths, 100, 20).tolist() == pytest.approx([0, 0, -.5, -.75, -1])
    trl_rewards = pytest.importorskip("trl.rewards")
    theirs = trl_rewards.get_soft_overlong_punishment(100, 20)(completion_ids=[[0] * int(length) for length in lengths])
    assert soft_overlong(lengths, 100, 20).tolist() == pytest.approx(theirs)


def test_cispo_refuses_a_bound_below_one(tmp_path):
    file = tmp_path / "x.yml"
    file.write_text("algorithm: cispo\nmodel: m\ndata: d\nreward: gsm8k\n")
    with pytest.raises(UserError, match="epsilon_high .* is 0.2; fix: give 1 or more"):
        load_config([str(file), "epsilon_high=0.2"])
    assert load_config([str(file), "epsilon_high=1"]).config.epsilon_high == 1


def test_a_group_has_two_completions(tmp_path):
    file = tmp_path / "x.yml"
    file.write_text("model: m\ndata: d\nreward: gsm8k\nnum_generations: 1\n")
    for name in ("grpo", "gdpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"):
        with pytest.raises(UserError, match=r"num_generations \(.*x.yml:4\) is 1; fix: give 2 or more"):
            load_config([str(file), f"algorithm={name}"])
    assert load_config([str(file), "algorithm=reinforce_pp"]).config.num_generations == 1


def test_baseline_needs_a_group(tmp_path):
    file = tmp_path / "x.yml"
    file.write_text("algorithm: reinforce_pp\nmodel: m\ndata: d\nreward: gsm8k\nnum_generations: 1\n")
    with pytest.raises(UserError, match=r"num_generations \(.*x.yml:5\) is 1, .*fix: give 2 or more"):
        load_config([str(file), "baseline=true"])
    assert load_config([str(file)]).config.num_generations == 1


# ---- TRL's own loss methods ----

def random_batch(seed, count=10, longest=9):
    """Log-probs new (with gradient), old, of the reference (count, longest), 0 outside the completions; mask; advantages (count,)."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count, 1), generator=generator)
    mask = (torch.arange(longest) < lengths).long()
    old = -3 * torch.rand(count, longest, generator=generator) * mask
    new, reference = (old + .3 * torch.randn(count, longest, generator=generator) * mask for _ in range(2))
    advantages = torch.randn(count, generator=generator)
    advantages[3] = 0
    return new.requires_grad_(), old, reference, mask, advantages


def trl_stand_in(logps, **options):
    def same(tensor, reduction=None):
        return tensor
    accelerator = SimpleNamespace(device="cpu", gather=same, reduce=same, gather_for_metrics=same, num_processes=1, sync_gradients=True)
    defaults = dict(top_entropy_quantile=1.0, off_policy_mask_threshold=None, importance_sampling_level="token", beta=0.0,
                    loss_type="grpo", epsilon_low=.2, epsilon_high=.2, use_vllm=False, _entropy_bonus_enabled=False,
                    aux_loss_enabled=False, current_gradient_accumulation_steps=1, max_completion_length=9)
    return SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, _metrics={"train": defaultdict(list)},
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        _get_per_token_logps_and_entropies=lambda *arguments, **more: (logps, -logps.detach(), None), **defaults | options)


def by_trl(trainer_class, batch, **options):
    """(loss, {metric: value}) of TRL's trainer."""
    new, old, reference, mask, advantages = batch
    trainer, prompt = trl_stand_in(new, **options), torch.ones(len(mask), 1, dtype=torch.long)
    inputs = {"prompt_ids": prompt, "prompt_mask": prompt, "completion_ids": mask, "completion_mask": mask, "advantages": advantages,
              "old_per_token_logps": old, "old_logps": old.sum(1), "ref_per_token_logps": reference, "num_items_in_batch": mask.sum()}
    return trainer_class._compute_loss(trainer, None, inputs), {name: values[0] for name, values in trainer._metrics["train"].items()}


def assert_same(losses, metrics, reduce, theirs, logps):
    theirs, their_metrics = theirs
    ours = reduce(losses)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-6)
    gradient, other = (torch.autograd.grad(loss, logps, retain_graph=True)[0] for loss in (ours, theirs))
    assert torch.allclose(gradient, other, rtol=1e-5, atol=1e-7) and gradient.abs().max() > 0
    for name, values in metrics.items():
        assert values.double().mean().item() == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-6), name
    assert any(values.any() for name, values in metrics.items() if "clip" in name)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name, ours, theirs", [
    ("grpo", {"beta": 0}, {}),
    ("grpo", {"beta": .04}, {}),
    ("grpo", {"beta": .5, "epsilon": .1, "epsilon_high": .3}, {}),
    ("gdpo", {"beta": .04}, {"loss_type": "grpo"}),
    ("dr_grpo", {}, {}),
    ("dapo", {"epsilon_high": .28}, {}),
    ("gspo", {"epsilon": 3e-4, "epsilon_high": 4e-4}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("gspo", {"epsilon": .05, "epsilon_high": .1}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("cispo", {"epsilon_high": 1.2}, {})])
def test_equals_trl(name, ours, theirs, seed):
    trl = pytest.importorskip("trl")
    batch = new, old, reference, mask, advantages = random_batch(seed)
    theirs = {"loss_type": name, **theirs, **{{"epsilon": "epsilon_low"}.get(key, key): value for key, value in ours.items()}}
    lengths, kept = mask.sum(1), mask.bool()
    per_token = advantages.repeat_interleave(lengths)
    flat = new[kept], old[kept]
    if name == "gspo":
        losses, metrics = gspo_loss(*flat, advantages, lengths, **ours)
    elif name in ("grpo", "gdpo"):
        losses, metrics = OF_TOKENS[name](*flat, per_token, reference[kept] if ours["beta"] else None, **ours)
    else:
        losses, metrics = OF_TOKENS[name](*flat, per_token, **ours)

    def mean_of_means(x):
        return sum(part.mean() for part in x.split(lengths.tolist())) / 10

    reduce = {"grpo": mean_of_means, "gdpo": mean_of_means, "dr_grpo": lambda x: x.sum() / (10 * 9)}
    assert_same(losses, metrics, reduce.get(name, torch.mean), by_trl(trl.GRPOTrainer, batch, **theirs), new)


@pytest.mark.parametrize("seed", [0, 1])
def test_rloo_equals_trl(seed):
    trl = pytest.importorskip("trl")
    batch = new, old, _, mask, advantages = random_batch(seed)
    losses, metrics = rloo_loss((new * mask).sum(1), old.sum(1), advantages, .2, .3)
    assert_same(losses, metrics, torch.mean, by_trl(trl.RLOOTrainer, batch, epsilon_high=.3), new)


# ---- `train` against plain loops ----

TEMPERATURE, LONGEST = .7, 6


class Table:
    """A model that knows the log-prob of every token id; in these rollouts no id occurs twice."""

    def __init__(self, logps):
        self.logps = logps

    def __call__(self, batch, temperature):
        assert temperature == TEMPERATURE
        return self.logps[batch.target]


class Step(list):
    """Micro-batches, the counts of all of them together, and what is logged."""

    def __init__(self, parts):
        super().__init__(map(collate, parts))
        self.num_responses, self.num_tokens = (sum(map(count, self)) for count in (lambda b: len(b.lengths), lambda b: sum(b.lengths)))
        self.logged = defaultdict(list)

    def log(self, losses, metrics):
        for name, values in {"loss": losses, **metrics}.items():
            self.logged[name] += values.detach().double().tolist()


class Engine:
    """One rollout, one update. `fresh`: rewards of the groups that `resample` puts in, in turn."""

    def __init__(self, lengths, rewards, new, old, reference, fresh=()):
        ids = iter(range(len(new)))
        examples = [Example(np.zeros(2, int), [Response.all_trained([next(ids) for _ in range(length)]) for length in group], f"{i}",
                            {"truncated": torch.tensor(group) == LONGEST}) for i, group in enumerate(lengths)]
        self.rollout, self.fresh, self.resampled = Rollout(0, range(len(examples)), examples), list(fresh), []
        self.rollout.rewards = [torch.tensor(group, dtype=torch.float64) for group in rewards]
        self.new, self.old = new.clone().requires_grad_(), old
        self.policy, self.frozen = Table(self.new), Table(reference)
        self.rollout.sampler_logps = self.logps(self.policy, self.rollout)
        self.optimizer, self.calls = self, []

    def rollouts(self, config):
        self.online = SimpleNamespace(config=config)
        shape = (config.num_generations, config.num_iterations, config.num_mini_batches)
        assert config.rollout_shape() == shape
        yield self.rollout

    def score(self, rollout):
        rollout.metrics = {}

    def each_reward(self, rollout):
        """Twice the same reward, the second time of the other sign for one completion."""
        second = [group * torch.tensor([1, 1, 1, -1]) for group in rollout.rewards]
        return [rollout.rewards, second], WEIGHTS

    def resample(self, rollout, which, attempt):
        self.resampled.append((which, attempt))
        for i in which:
            rollout.examples[i].extras["rewards"] = self.fresh.pop(0)

    def reference(self, path):
        return self.frozen

    def logps(self, model, rollout):
        model = Table(self.old) if model is self.policy else model
        return [model(collate([example]), TEMPERATURE).detach() for example in rollout.examples]

    def old_logps(self, batch, logps):
        return self.old[batch.target]

    def steps(self, rollout, skip=None):
        """Micro-batches of at most two completions, and an empty one."""
        parts = []
        for i, example in enumerate(rollout.examples):
            out = example.extras["rewards"].isnan() | (skip[i] if skip else False)
            keep = (~out).nonzero()[:, 0].tolist()
            parts += [[example.part(keep[k:k + 2])] for k in range(0, len(keep), 2)]
        self.step_made = Step([*parts, []])
        yield self.step_made

    def clip_gradients(self):
        self.calls.append("clip")

    def step(self):
        self.calls.append("step")

    def zero_grad(self):
        self.calls.append("zero")


def clipped(log_ratio, advantage, low, high):
    ratio = math.exp(log_ratio)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def plain_loss(name, config, lengths, rewards, new, old, reference, weights):
    """The loss of the update by loops over groups, completions and tokens. `weights`: `new` where it counts as a constant."""
    kl_coef = getattr(config, "kl_coef", 0)
    ids, groups = iter(range(len(new))), []
    for group, group_rewards in zip(lengths, rewards):
        groups.append([(reward, [next(ids) for _ in range(length)]) for length, reward in zip(group, group_rewards)])
    if name == "gdpo":
        second = [[-reward if i == 3 else reward for i, reward in enumerate(group)] for group in rewards]
        decoupled = iter(decoupled_by_hand([rewards, second], WEIGHTS))
    everything = []                                                # (advantage, or one per token, and the tokens' ids)
    for group in groups:
        scores = [reward for reward, _ in group]
        if name == "rloo":
            scores = [reward - kl_coef * sum(old[t] - reference[t] for t in tokens) for reward, tokens in group]
            advantages = leave_one_out_by_hand(scores)
        elif name == "reinforce_pp":
            scores = centered(scores) if config.baseline else scores
            advantages = [[score - kl_coef * sum(old[u] - reference[u] for u in tokens[i:]) for i in range(len(tokens))]
                          for score, (_, tokens) in zip(scores, group)]
        elif name == "gdpo":
            advantages = next(decoupled)
        else:
            if name == "dapo" and config.soft_overlong_cache:
                start = LONGEST - config.soft_overlong_cache
                scores = [s - max(0, len(tokens) - start) / config.soft_overlong_cache for s, (_, tokens) in zip(scores, group)]
            advantages = [score if name == "dr_grpo" else score / (spread(scores) + 1e-4) for score in centered(scores)]
        everything += [(advantage, tokens) for advantage, (reward, tokens) in zip(advantages, group) if reward == reward]
    if name == "reinforce_pp":
        returns = [value for values, _ in everything for value in values]
        mean, std = statistics.fmean(returns), statistics.pstdev(returns)
        everything = [([(value - mean) / std for value in values], tokens) for values, tokens in everything]
    if getattr(config, "mask_truncated_completions", False):
        everything = [(advantage, tokens) for advantage, tokens in everything if len(tokens) < LONGEST]
    total, count, num_tokens = 0.0, len(everything), sum(len(tokens) for _, tokens in everything)
    for advantage, tokens in everything:
        bounds = getattr(config, "epsilon", None), config.epsilon_high
        log_ratios = [new[t] - old[t] for t in tokens]
        if name in ("grpo", "gdpo"):
            for t, log_ratio in zip(tokens, log_ratios):
                k3 = math.exp(reference[t] - new[t]) - (reference[t] - new[t]) - 1
                total += (clipped(log_ratio, advantage, *bounds) + config.beta * k3) / len(tokens) / count
        elif name == "dr_grpo":
            total += sum(clipped(log_ratio, advantage, *bounds) for log_ratio in log_ratios) / (count * LONGEST)
        elif name == "dapo":
            total += sum(clipped(log_ratio, advantage, *bounds) for log_ratio in log_ratios) / num_tokens
        elif name == "gspo":
            total += clipped(statistics.fmean(log_ratios), advantage, *bounds) / count
        elif name == "cispo":
            total += sum(-min(math.exp(weights[t] - old[t]), bounds[1]) * advantage * new[t] for t in tokens) / num_tokens
        elif name == "rloo":
            total += clipped(sum(log_ratios), advantage, *bounds) / count
        else:
            total += sum(clipped(log_ratio, a, *bounds) for log_ratio, a in zip(log_ratios, advantage)) / num_tokens
    return total


WEIGHTS = [1.0, .5]
GROUP_LENGTHS = [[3, 6, 1, 2], [5, 2, 4, 6], [1, 1, 3, 2]]
GROUP_REWARDS = [[1., 0., 0., 1.], [.5, NAN, 1., 0.], [0., 1., .25, NAN]]


def tables(seed=0):
    generator = torch.Generator().manual_seed(seed)
    old = -2 * torch.rand(sum(map(sum, GROUP_LENGTHS)), generator=generator, dtype=torch.float64) - .5
    return [old + .3 * torch.randn(len(old), generator=generator, dtype=torch.float64), old,
            old + .3 * torch.randn(len(old), generator=generator, dtype=torch.float64)]


@pytest.mark.parametrize("name, options", [
    ("grpo", {}), ("grpo", {"beta": 0}), ("gdpo", {}), ("gdpo", {"beta": 0}),
    ("dr_grpo", {}), ("dr_grpo", {"epsilon": .05}),
    ("dapo", {}), ("dapo", {"soft_overlong_cache": 3}), ("dapo", {"mask_truncated_completions": True}),
    ("gspo", {}), ("gspo", {"epsilon": .1, "epsilon_high": .2}), ("cispo", {}), ("cispo", {"epsilon_high": 1.1}),
    ("rloo", {}), ("rloo", {"kl_coef": 0, "epsilon": .9, "epsilon_high": 3}), ("reinforce_pp", {}), ("reinforce_pp", {"kl_coef": 0}),
    ("reinforce_pp", {"baseline": True, "kl_coef": .5})])
def test_train_equals_plain_loops(name, options):
    algorithm = importlib.import_module(f"algorithms.{name}")
    config = algorithm.Config(reward="gsm8k", temperature=TEMPERATURE, max_completion_length=LONGEST, **options)
    new, old, reference = tables()
    engine = Engine(GROUP_LENGTHS, GROUP_REWARDS, new, old, reference)
    algorithm.train(engine, config)
    assert engine.calls == ["clip", "step", "zero"]

    def loss(values):
        return plain_loss(name, config, GROUP_LENGTHS, GROUP_REWARDS, values, old.tolist(), reference.tolist(), new.tolist())

    logged = {metric: statistics.fmean(values) for metric, values in engine.step_made.logged.items()}
    assert logged["loss"] == pytest.approx(loss(new.tolist()), rel=1e-5, abs=1e-7)
    slopes = []
    for i in range(len(new)):
        up, down = ([value + sign * 1e-6 * (i == j) for j, value in enumerate(new.tolist())] for sign in (1, -1))
        slopes.append((loss(up) - loss(down)) / 2e-6)
    assert engine.new.grad.tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-7)
    with_reference = any(getattr(config, key, 0) > 0 for key in ("beta", "kl_coef"))
    assert sum(slope != 0 for slope in slopes) > 3 and ("kl" in logged) == with_reference
    if name in ("rloo", "reinforce_pp") and "kl" in logged:        # k1 under the policy that sampled, over the trained tokens
        trained = [t for batch in engine.step_made for t in batch.target.tolist()]
        assert logged["kl"] == pytest.approx(statistics.fmean((old - reference)[trained].tolist()), rel=1e-6)


# ---- dynamic sampling ----

@pytest.mark.parametrize("rewards, flat", [
    ([0., 0.], True), ([1., NAN], True), ([NAN, NAN], True), ([0., 1.], False), ([.5, .5, NAN, .4], False)])
def test_groups_without_signal(rewards, flat):
    assert alike(torch.tensor(rewards)) == flat


@pytest.mark.parametrize("options, expected", [
    ({}, [([0, 2], 0), ([2], 1)]),
    ({"max_resample_times": 1}, [([0, 2], 0)]),
    ({"soft_overlong_cache": 5}, [([0, 2], 0), ([2], 1)]),      # before the penalty, which makes them differ
    ({"dynamic_sample": False}, [])])
def test_dynamic_sampling(options, expected):
    config = dapo.Config(reward="gsm8k", temperature=TEMPERATURE, max_completion_length=LONGEST, **options)
    fresh = tensors([[1., 0., 0., 0.], [1.] * 4, [0., 1., 1., 1.]])
    engine = Engine(GROUP_LENGTHS, [[0.] * 4, [1., 0., 0., 1.], [1.] * 4], *tables(), fresh)
    dapo.train(engine, config)
    assert engine.resampled == expected
    rewards = [group.tolist() for group in engine.rollout.rewards]
    after = {0: [1.] * 4, 1: [1.] * 4, 2: [0., 1., 1., 1.]}      # the penalty is not stored
    assert rewards[2] == after[len(expected)]
    if options.get("soft_overlong_cache"):
        assert engine.rollout.metrics["rewards/soft_overlong/mean"] == pytest.approx(-24 / 5 / 12)


@pytest.mark.parametrize("algorithm", [rloo, reinforce_pp])
def test_restored_rollout_keeps_its_kl(algorithm):
    """Its log-probs were those of the policy that sampled; the policy of now is another."""
    config = algorithm.Config(reward="gsm8k", temperature=TEMPERATURE, max_completion_length=LONGEST)
    engine = Engine(GROUP_LENGTHS, GROUP_REWARDS, *tables())
    stored = [torch.full_like(logps, i) for i, logps in enumerate(engine.rollout.sampler_logps)]
    engine.rollout.once("old_logps", list, stored)
    algorithm.train(engine, config)
    kl = [old - other for old, other in zip(stored, engine.logps(engine.frozen, engine.rollout))]
    assert all(map(torch.equal, engine.rollout.kl, kl))
