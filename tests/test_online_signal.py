"""Rewards that say nothing: all alike, none at all, or of completions that are not trained. No weight moves,
and the run says so."""
import importlib
import math
import signal
import statistics

import pytest
import torch
from helpers import (
    REWARDED,
    REWARDS,
    assert_same_weights,
    byte_tokenizer,
    config_of,
    final_weights,
    metrics,
    prompt_rows,
    random_lm,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)
from robust_helpers import train_on_ranks
from safetensors.torch import load_file
from transformers import MixtralConfig

from algorithms import gdpo, ppo, reinforce_pp, rloo
from data.errors import RunError, UserError
from data.pack import Example, Response
from engine import checkpoint
from engine.loop import Engine
from engine.rollout import Rollout, alike
from engine.rollouts import Rollouts
from engine.score import score_rollout
from engine.step import Step
from model.policy import Policy

NAN = math.nan
VALUES = 0.1, 0.3, 0.6, 0.7, 0.9, -0.1, 1 / 3
DTYPES = torch.float32, torch.float64
# one update per rollout, no reference
KEYS = dict(max_completion_length=6, batch_size=2, lr=1e-3, max_length=64, schedule="constant", warmup=0)
WITHOUT_KL = {"grpo": {"beta": 0}, "gdpo": {"beta": 0},
              "rloo": {"kl_coef": 0}, "reinforce_pp": {"kl_coef": 0},
              "dapo": {"max_resample_times": 1}, "gspo": {"num_mini_batches": 1},
              # the critic starts at 0, and with lam 1 the first advantages are the whole returns: all alike
              "ppo": {"kl_coef": 0, "lam": 1.0, "num_ppo_epochs": 1}}

CONSTANTS = """
def tenth(prompts, completions, **columns):
    return [0.1] * len(completions)

def partly(prompts, completions, **columns):
    return [None if i % 3 else 0.7 for i in range(len(completions))]

def in_two_parts(prompts, completions, **columns):
    return [(0.1 + 0.2, 0.3)[i % 2] for i in range(len(completions))]

def only_of_even_rows(prompts, completions, answer, **columns):
    return [None if int(a) % 4 < 2 else sum(map(ord, c)) % 97 for a, c in zip(answer, completions)]

def equal_for_half_of_the_rows(prompts, completions, answer, **columns):
    return [1 if int(a) % 4 < 2 else sum(map(ord, c)) % 97 / 97 for a, c in zip(answer, completions)]

def none(prompts, completions, **columns):
    return [None] * len(completions)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signal")
    (folder / "constants.py").write_text(CONSTANTS)
    data = write_jsonl(folder / "prompts.jsonl", prompt_rows(8))
    return {"model": tiny_model(folder / "model"), "data": data, "rewards": folder / "constants.py"}


@pytest.fixture
def run(files, tmp_path):
    """run(algorithm, reward, key=value, ...) -> the directory of a finished run."""
    def run(algorithm, reward="tenth", name="run", **values):
        group = {} if algorithm == "ppo" else {"num_generations": 4}
        keys = dict(algorithm=algorithm, model=files["model"], data=files["data"], output=tmp_path / name,
                    reward=reward if ":" in reward else f"{files['rewards']}:{reward}")
        train_here(write_config(tmp_path / f"{name}.yml", **keys | KEYS | group | values))
        return tmp_path / name
    return run


def told(run):
    return (run / "events.log").read_text()


def equal_on_two_ranks(one, tmp_path):
    """The directory of a run on two ranks, whose metrics are those of the finished run `one`."""
    two = tmp_path / "two"
    config = tmp_path / "two.yml"
    config.write_text((tmp_path / "one.yml").read_text().replace(str(one), str(two)))
    assert [rank.code for rank in train_on_ranks(config)] == [0, 0]
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert ours.pop("split") == theirs.pop("split") and ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)
    return two


# ---- the advantage of equal rewards ----

def less_the_kl(rewards):
    count = len(rewards)
    return rloo.kl_rewards(rewards, torch.zeros(count), torch.ones(count))


def whitened_returns(rewards):
    lengths = torch.full((len(rewards),), 3)
    kl = torch.zeros(3 * len(rewards))
    return reinforce_pp.whiten([reinforce_pp.token_returns(rewards, kl, lengths)])


def whitened_gae(rewards):
    parts = []
    for reward in rewards:
        tokens = ppo.token_rewards(reward[None], torch.zeros(3))
        parts.append(ppo.gae(tokens, torch.zeros(3), lam=1.0)[0])
    return ppo.whiten(parts)


ADVANTAGES = {name: importlib.import_module(f"algorithms.{name}").group_advantages for name in
              ("grpo", "gdpo", "dr_grpo", "dapo", "gspo", "cispo")}
OF_A_GROUP = {name: lambda rewards, made=made: made([rewards]) for name, made in ADVANTAGES.items()} | {
    "gdpo": lambda rewards: gdpo.decoupled_advantages([[rewards]], [1.0]),
    "gdpo-2": lambda rewards: gdpo.decoupled_advantages([[rewards], [-3 * rewards]], [1.0, 0.3]),
    "rloo": lambda rewards: [rloo.leave_one_out(rewards)],
    "rloo-kl-0": lambda rewards: [rloo.leave_one_out(less_the_kl(rewards))],
    "reinforce_pp": whitened_returns,
    "reinforce_pp-baseline": lambda rewards: whitened_returns(reinforce_pp.center(rewards)),
    "ppo": whitened_gae}


@pytest.mark.parametrize("name", OF_A_GROUP)
def test_equal_rewards_have_no_advantage(name):
    for dtype in DTYPES:
        for value in VALUES:
            for size in (*range(2, 33), 48, 64):
                for advantages in OF_A_GROUP[name](torch.full((size,), value, dtype=dtype)):
                    assert not advantages.any(), (dtype, value, size)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_completions_without_a_reward_do_not_count(name):
    """In the question whether the others are alike. Those that differ in their last bit are not."""
    one, = ADVANTAGES[name]([torch.tensor([0.1, NAN, 0.1, 0.1, NAN])])
    assert one.nan_to_num(7).tolist() == [0, 7, 0, 0, 7]
    near = torch.tensor([0.1, 0.1 + 1e-8, 0.1], dtype=torch.float64)
    other, = ADVANTAGES[name]([near])
    scale = 1.0 if name == "dr_grpo" else statistics.stdev(near.tolist()) + 1e-4
    mean = statistics.fmean(near.tolist())
    assert other.tolist() == pytest.approx([(value - mean) / scale for value in near.tolist()], rel=1e-6)


def test_alike():
    for values in ((0.1,), (), (NAN, NAN), (0.1, NAN, 0.1), (-0.0, 0.0)):
        assert alike(torch.tensor(values))
    for values in ((0.1, 0.2), (NAN, 1.0, 1.0 + 1e-6)):
        assert not alike(torch.tensor(values))


def test_rewards_that_differ_by_rounding_are_one():
    """0.1 + 0.2 is not 0.3 in fp64; one reward of 0.3 and two of 0.1 and 0.2 are the same."""
    from rewards.functions import Reward
    responses = [Response.all_trained([5])] * 2
    rollout = Rollout(0, [0], [Example([1], responses, "x:1", {"prompt": "p", "columns": {}})])
    returned = {"one": [0.1, 0.3], "two": [0.2, 0.0]}
    rewards = [Reward(name, 1.0, len) for name in returned]

    class Tokenizer:
        def decode(self, tokens, **options):
            return "text"

    def by_functions(functions, *arguments):
        return [returned[reward.name] for reward in functions]
    score_rollout(rollout, rewards, Tokenizer(), by_functions, None)
    rewards, = rollout.rewards
    assert rewards.dtype == torch.float64 and alike(rewards) and rewards[0] == torch.tensor(0.3).double()


# ---- whole runs ----

@pytest.mark.parametrize("algorithm", REWARDED)
def test_a_constant_reward_moves_nothing(algorithm, run, files):
    result = run(algorithm, max_steps=1 if algorithm == "ppo" else 3, **WITHOUT_KL.get(algorithm, {}))
    assert_same_weights(final_weights(result), load_file(f"{files['model']}/model.safetensors"))
    rows = metrics(result)
    assert all(row["reward"] == pytest.approx(0.1) for row in rows)
    if algorithm != "ppo":
        assert all(row["frac_reward_zero_std"] == 1 and row["reward_std"] == 0 for row in rows)
        assert all(row["grad_norm"] == 0 for row in rows)


@pytest.mark.parametrize("reward", ["partly", "in_two_parts"])
def test_a_reward_that_is_constant_where_it_judges(reward, run, files):
    result = run("grpo", reward, max_steps=2, beta=0)
    assert_same_weights(final_weights(result), load_file(f"{files['model']}/model.safetensors"))
    assert all(row["frac_reward_zero_std"] == 1 for row in metrics(result))


def test_ten_updates_without_a_signal_are_told_of_once(run):
    result = run("grpo", max_steps=22, beta=0, num_iterations=2, batch_size=1)
    lines = [line for line in told(result).splitlines() if "warning: in" in line]
    assert len(lines) == 1 and "in 10 updates all completions of a prompt got the same reward" in lines[0]
    assert "(mean reward 0.1, " in lines[0] and "try: " in lines[0]
    quiet = run("grpo", max_steps=9, beta=0, name="quiet")
    assert "warning: in" not in told(quiet)


def test_a_signal_now_and_then_is_enough(run, monkeypatch):
    """The count starts again with every rollout that teaches something."""
    calls = []

    def now_and_then(rollout, *arguments):
        score_rollout(rollout, *arguments)
        calls.append(rollout)
        if len(calls) % 8 == 0:
            rollout.rewards = [torch.arange(4.0).double()] * len(rollout.examples)
    monkeypatch.setattr("engine.rollouts.score_rollout", now_and_then)
    assert "warning: in" not in told(run("grpo", max_steps=20, beta=0))


def test_one_completion_per_prompt_is_compared_with_other_prompts(run):
    result = run("ppo", max_steps=10, kl_coef=0)
    assert "in 10 updates all completions of a rollout got the same reward" in told(result)
    assert "warning: in" not in told(run("ppo", name="varied", max_steps=10, reward=f"{REWARDS}:varied"))


# ---- nothing to train ----

EMPTY = {"none": dict(reward="only_of_even_rows", batch_size=1, shuffle="false"),
         "reuse": dict(reward="only_of_even_rows", batch_size=1, shuffle="false", num_iterations=2)}


def stop_after(step, patch):
    """A SIGTERM during the update, or the passing over, that ends at `step`."""
    stop_requested = Engine.stop_requested

    def requested(engine):
        if engine.step and engine.step.index == step:
            engine.signals.number = signal.SIGTERM
        return stop_requested(engine)
    patch.setattr(Engine, "stop_requested", requested)


@pytest.mark.parametrize("algorithm, name", [("grpo", "none"), ("grpo", "reuse"), ("ppo", "none"),
                                             ("reinforce_pp", "reuse")])
def test_a_rollout_with_nothing_to_train_is_passed_over(algorithm, name, run, monkeypatch):
    """Rows 0, 1, 4 and 5 have no reward: their updates are made by nobody, and a run that is stopped after
    any update, made or passed over, ends bit for bit as one that is not."""
    keys = EMPTY[name] | {"max_steps": 8, "save_every": 1, "keep": 9}
    if algorithm == "ppo":
        keys |= {"num_ppo_epochs": 1}
    whole = run(algorithm, name="whole", **keys)
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(1, 9))
    passes = keys.get("num_iterations", 1)
    for row in rows:
        is_empty = (row["step"] - 1) // passes % 4 < 2
        assert ("loss" not in row) == is_empty and (row["grad_norm"] == 0) == is_empty
        assert ("reward" not in row) == is_empty
        assert not any(isinstance(value, float) and math.isnan(value) for value in row.values())
    assert told(whole).count("it is passed over") == sum("loss" not in row for row in rows) // passes
    count = 1 if algorithm == "ppo" else 4
    assert f"nothing to train in rollout 1 ({count} without a reward); it is" in told(whole)
    # before the first real update there is nothing to keep; later a passed over update leaves all as it was
    kept = [int(path[-6:]) for path in checkpoint.checkpoints(str(whole))]
    assert kept == list(range(2 * passes + 1, 9))
    if passes == 1:
        folders = [whole / "checkpoints" / f"step-00000{step}" for step in (4, 6)]
        assert_same_weights(*(load_file(folder / "model.safetensors") for folder in folders))
    for step in (1, 2 * passes, 5, 6):
        part = f"part-{step}"
        with monkeypatch.context() as patch:
            stop_after(step, patch)
            with pytest.raises(SystemExit):
                run(algorithm, name=part, **keys)
        part = run(algorithm, name=part, **keys)
        assert metrics(part) == rows
        assert_same_weights(final_weights(part), final_weights(whole))


def test_cut_completions_that_are_masked(run, monkeypatch):
    """The second rollout has none that ended by itself."""
    sample_rollout = Rollouts.sample_rollout

    def cut(rollouts, number):
        rollout = sample_rollout(rollouts, number)
        rollout.truncated = [torch.full((4,), number == 1)] * len(rollout.examples)
        return rollout
    monkeypatch.setattr(Rollouts, "sample_rollout", cut)
    result = run("dapo", reward=f"{REWARDS}:varied", mask_truncated_completions="true", max_steps=3)
    assert ["loss" in row for row in metrics(result)] == [True, False, True]
    assert "nothing to train in rollout 2 (8 cut at max_completion_length, and masked); " in told(result)


def test_a_rollout_with_fewer_prompts_than_mini_batches(run, tmp_path):
    """The second one has two prompts for four updates; a mixture of experts divides by the examples of
    each."""
    experts = config_of(MixtralConfig, num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5)
    random_lm(experts).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(6))
    result = run("gspo", reward=f"{REWARDS}:varied", model=tmp_path / "model", data=data, batch_size=4,
                 num_mini_batches=4, max_steps=8, save_every=1, keep=9)
    rows = metrics(result)
    trained = [True] * 6 + [False] * 2
    assert ["loss" in row for row in rows] == [row["grad_norm"] > 0 for row in rows] == trained
    folders = [result / "checkpoints" / f"step-00000{step}" for step in (6, 8)]
    assert_same_weights(*(load_file(folder / "model.safetensors") for folder in folders))


def test_two_processes_pass_over_as_one_does(run, files, tmp_path):
    keys = EMPTY["reuse"] | {"max_steps": 8, "save_every": "null"}
    one = run("grpo", name="one", **keys)
    two = equal_on_two_ranks(one, tmp_path)
    assert told(two).count("it is passed over") == told(one).count("it is passed over") == 2


def test_a_run_that_trains_nothing_is_an_error(run, tmp_path):
    for steps, says in ((3, "nothing was trained in 3 updates"), (12, "so it was in 10 rollouts in a row")):
        with pytest.raises(RunError, match=says):
            run("grpo", "none", name=f"none-{steps}", max_steps=steps)
        assert not (tmp_path / f"none-{steps}" / "final").exists()
        assert len(metrics(tmp_path / f"none-{steps}")) == min(steps, 9)


# ---- what is said at the start ----

def test_what_top_p_and_top_k_mean_is_said(run):
    lines = told(run("grpo", reward=f"{REWARDS}:varied", max_steps=1, top_p=0.9, top_k=7))
    line = ("top_p 0.9, top_k 7: completions are drawn from the likeliest tokens, log-probs, ratios and KL "
            "are those of the full distribution")
    assert lines.count(line) == 1
    assert "full distribution" not in told(run("grpo", reward=f"{REWARDS}:varied", max_steps=1, name="plain"))


@pytest.mark.parametrize("algorithm, keys, forwards", [
    ("gspo", {}, 1),
    ("gspo", {"skip_zero_std": "true"}, 1),
    ("gspo", {"micro_batch_tokens": 24}, 1),
    ("rloo", {}, 2),                                # the policy's, and the reference's
    ("ppo", {"num_ppo_epochs": 1}, 2)])
def test_old_logps_are_computed_in_the_micro_batches_that_train(
        run, monkeypatch, algorithm, keys, forwards):
    """In bf16 others would round otherwise, by more than gspo's clip range."""
    computed, trained = [], []
    collate, made = Policy.collate, Step.__init__

    def tokens_of(examples):
        return [response.tokens.tolist() for example in examples for response in example.responses]

    def watch_forwards(policy, examples):
        computed.append(tokens_of(examples))
        return collate(policy, examples)

    def watch_updates(step, *arguments):
        made(step, *arguments)
        trained.extend(map(tokens_of, step.micro_batches))

    monkeypatch.setattr(Policy, "collate", watch_forwards)
    monkeypatch.setattr(Step, "__init__", watch_updates)
    run(algorithm, "equal_for_half_of_the_rows", **dict(batch_size=4, num_mini_batches=2, max_steps=2) | keys)
    count = len(trained)
    end = len(computed) - 1                         # the last is the check of the saved model
    assert computed[end - count:end] == trained
    for number in range(forwards):
        start = end - (number + 2) * count
        assert computed[start:start + count] == trained
    if "micro_batch_tokens" in keys:
        assert count > 8                            # several for a prompt, and more than a batch has


# ---- groups that are not computed ----

@pytest.mark.parametrize("algorithm", ["grpo", "gdpo", "dr_grpo", "gspo", "cispo"])
def test_groups_without_a_gradient_can_be_left_out(run, monkeypatch, algorithm):
    """The same gradient from fewer groups: half of the eight rows have equal rewards. Two groups make an
    update, so that some updates have none to compute."""
    computed = []
    made = Step.__init__

    def watch(step, *arguments):
        made(step, *arguments)
        computed.append(sum(map(len, step.micro_batches)))

    monkeypatch.setattr(Step, "__init__", watch)
    keys = dict(max_steps=12, num_mini_batches=2, batch_size=4)
    if algorithm in ("grpo", "gdpo", "dr_grpo"):
        keys["beta"] = 0
    whole = run(algorithm, "equal_for_half_of_the_rows", "whole", skip_zero_std="false", **keys)
    less = run(algorithm, "equal_for_half_of_the_rows", "less", skip_zero_std="true", **keys)
    flat = [row for row in metrics(whole) if row["grad_norm"] == 0]
    assert flat and computed[:12] == [2] * 12 and sum(computed[12:]) <= 18
    for row, of_less in zip(metrics(whole), metrics(less), strict=True):
        assert of_less["reward"] == row["reward"]
        assert of_less["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4, abs=1e-7)
    found = final_weights(less)
    for name, weight in final_weights(whole).items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-5)


def test_a_completion_without_a_reward_gives_no_gradient_either():
    rewards = torch.tensor([[1.0, NAN, 1.0], [1.0, NAN, 0.0]]).double()
    examples = []
    for _ in rewards:
        responses = [Response.all_trained([7]) for _ in range(3)]
        examples.append(Example([5], responses, "doc"))
    rollout = Rollout(0, [0, 1], examples)
    rollout.advantages = ADVANTAGES["grpo"](rewards)
    rollout.skip_zero_gradients()
    assert [example.has_gradient for example in rollout.examples] == [False, True]


def test_two_ranks_leave_out_the_same_groups(run, tmp_path):
    """Often one of two groups is computed, so that a rank has none."""
    keys = dict(max_steps=8, num_mini_batches=2, batch_size=4, beta=0, skip_zero_std="true")
    one = run("grpo", "equal_for_half_of_the_rows", "one", **keys)
    equal_on_two_ranks(one, tmp_path)


def test_no_group_is_left_out_where_the_kl_has_a_gradient(run):
    with pytest.raises(UserError, match="skip_zero_std.*: the KL term gives every group a gradient; fix"):
        run("grpo", beta=0.1, skip_zero_std="true")
