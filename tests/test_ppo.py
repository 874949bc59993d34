"""PPO: worked numbers, plain loops over whole rollouts, the critic, and runs that resume or are cut otherwise."""
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    assert_adam_made,
    assert_same_gradients,
    assert_same_weights,
    byte_tokenizer,
    config_of,
    final_weights,
    messages,
    metrics,
    pair_rows,
    random_lm,
    saved_gradients,
    tiny_model,
    train_here,
    watch_updates,
    write_config,
    write_jsonl,
)
from robust_helpers import train_on_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from algorithms import ppo
from algorithms.ppo import Config, gae, ppo_policy_loss, ppo_value_loss, token_rewards, whiten
from data.errors import UserError
from data.pack import Example, Response
from engine.config import load_config
from engine.reward_models import reads_as
from model import sampler
from model.actor_critic import ActorCritic
from model.policy import Policy

STOPS = "a,b,c,d,e,f,g,h,i,j,k,l"            # a random model hardly draws a stop token
REWARD = '''
def letters(prompts, completions, answer, **columns):
    """Different for almost every completion."""
    return [sum(map(ord, text)) * (3 + int(gold)) % 97 / 40 - 1 for text, gold in zip(completions, answer)]

def some(prompts, completions, answer, **columns):
    return [None if gold in ("1", "4") else value for gold, value in zip(answer, letters(prompts, completions, answer))]
'''
NAMES = {*"objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward objective/scores policy/approxkl_avg "
         "policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg val/clipfrac_avg val/ratio val/ratio_var "
         "val/num_eos_tokens lr eps episode".split()}      # TRL's


def flat(x):
    return [round(value, 6) for part in x for value in part.tolist()]


# ---- worked numbers: two completions of 4 and 2 tokens ----

OLD = [torch.tensor([-1, -.5, -2, -.1]), torch.tensor([-.3, -.7])]
REFERENCE = [torch.tensor([-1.2, -.4, -1.5, -.1]), torch.tensor([-.5, -.6])]
VALUES = [torch.tensor([.1, .2, .3, .4]), torch.tensor([0, -.1])]
SCORES = [torch.tensor([1.]), torch.tensor([-1.])]
REWARDS = [token_rewards(score, old - reference) for score, old, reference in zip(SCORES, OLD, REFERENCE)]
ADVANTAGES, RETURNS = zip(*(gae(rewards, values) for rewards, values in zip(REWARDS, VALUES)))


def test_worked_rewards():
    assert flat(REWARDS) == [-.01, .005, .025, 1.0, -.01, -.995]
    assert flat(whiten(REWARDS, shift_mean=False)) == pytest.approx([-.017310, .006462, .038157, 1.583311, -.017310, -1.578311], abs=1.1e-6)
    for name, total in {"k1": -.4, "k2": .15, "k3": .172623}.items():
        rewards = token_rewards(torch.zeros(1), OLD[0] - REFERENCE[0], 1.0, name)
        assert -rewards.sum().item() == pytest.approx(total, abs=1e-6), name


def test_worked_advantages():
    assert flat(ADVANTAGES) == pytest.approx([.816988, .765250, .695000, .6, -.960250, -.895], abs=1.1e-6)
    assert flat(RETURNS) == pytest.approx([.916988, .965250, .995, 1.0, -.960250, -.995], abs=1.1e-6)
    assert flat(whiten(ADVANTAGES)) == pytest.approx([.757359, .696765, .614488, .503225, -1.324129, -1.247709], abs=1.1e-6)


def test_worked_losses():
    logps, old = torch.tensor([-.9, -.6, -1.6, -.1, -.4, -.7]), torch.cat(OLD)
    policy_losses, numbers = ppo_policy_loss(logps, old, torch.cat(whiten(ADVANTAGES)))
    assert policy_losses.mean().item() == pytest.approx(-.043709, abs=1e-6)
    assert numbers["policy/clipfrac_avg"].float().mean().item() == pytest.approx(1 / 6)
    assert numbers["policy/approxkl_avg"].mean().item() == pytest.approx(.015833, abs=1e-6)
    value_losses, numbers = ppo_value_loss(torch.tensor([.5, .2, .1, .8, -.4, -.2]), torch.cat(VALUES), torch.cat(RETURNS))
    assert value_losses.mean().item() == pytest.approx(.261443, abs=1e-6)
    assert numbers["val/clipfrac_avg"].float().mean().item() == .5
    assert (policy_losses + Config("r1_zero").vf_coef * value_losses).mean().item() == pytest.approx(-.017564, abs=1e-6)


# ---- plain loops, in Python's own floats ----

def plain_gae(rewards, values, gamma, lam):
    """The double sum of the paper: A_t = sum_l (gamma lam)^l delta_t+l."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * v_next - v for r, v, v_next in zip(rewards, values, after)]
    return [sum((gamma * lam) ** (j - i) * deltas[j] for j in range(i, len(deltas))) for i in range(len(deltas))]


def plain_whiten(parts, shift_mean=True):
    numbers = [x for part in parts for x in part]
    mean = sum(numbers) / len(numbers)
    std = math.sqrt(sum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1) + 1e-8)
    return [[(x - mean) / std + (0 if shift_mean else mean) for x in part] for part in parts]


@pytest.mark.parametrize("gamma, lam", [(1.0, .95), (.9, .5), (.99, 0.0), (1.0, 1.0)])
def test_gae(gamma, lam):
    rng = np.random.default_rng(0)
    for length in (1, 2, 30):
        rewards, values = rng.normal(size=(2, length)).astype(np.float32)
        advantages, returns = gae(torch.from_numpy(rewards), torch.from_numpy(values), gamma, lam)
        expected = plain_gae(rewards.tolist(), values.tolist(), gamma, lam)
        assert advantages.tolist() == pytest.approx(expected, abs=1e-5)
        assert returns.tolist() == pytest.approx([a + v for a, v in zip(expected, values.tolist())], abs=1e-5)


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten(shift_mean):
    rng = np.random.default_rng(1)
    parts = [rng.normal(3, 2, size=length).tolist() for length in (4, 1, 7)]
    found = whiten([torch.tensor(part) for part in parts], shift_mean)
    for ours, theirs in zip(found, plain_whiten(parts, shift_mean), strict=True):
        assert ours.tolist() == pytest.approx(theirs, abs=1e-5)
    with_gap = whiten([*(torch.tensor(part) for part in parts), torch.full((3,), math.nan)], shift_mean)
    assert all(torch.equal(*pair) for pair in zip(with_gap, found)) and with_gap[-1].isnan().all()
    assert whiten([torch.tensor([2.0])], shift_mean)[0].tolist() == [0.0 if shift_mean else 2.0]      # nothing to divide by


# ---- runs ----

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """.model, .other (another one), .data (5 prompts), .reward (path.py:letters), .folder"""
    folder = tmp_path_factory.mktemp("ppo")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": messages(f"Q{i}: " + "what? " * (i % 3)), "answer": str(i)} for i in range(5)]
    return SimpleNamespace(folder=folder, model=tiny_model(folder / "model"), other=tiny_model(folder / "other", seed=1),
                           data=write_jsonl(folder / "data.jsonl", rows), reward=f"{folder}/reward.py:letters")


def options_of(files, **values):
    """Two rollouts of five prompts, each for two passes in two parts: 8 updates."""
    return dict(algorithm="ppo", model=files.model, reference=files.other, data=files.data, reward=files.reward, stop=STOPS, batch_size=5,
                epochs=2, num_ppo_epochs=2, num_mini_batches=2, max_completion_length=12, max_length=128, lr=1e-3, schedule="constant",
                warmup=0, kl_coef=0.2, save_every=1, keep=20, seed=3) | values


@pytest.fixture(scope="module")
def updates():
    """Of every run in this process, see `watch_updates`."""
    with pytest.MonkeyPatch.context() as patch:
        yield watch_updates(patch)


@pytest.fixture(scope="module")
def run(files, updates):
    """run(name, key=value, ...) -> the directory of a run that is made only once."""
    done = {}

    def run(name, **values):
        if name not in done:
            train_here(write_config(files.folder / f"{name}.yml", **options_of(files, output=files.folder / name, **values)))
            done[name] = files.folder / name
        return done[name]
    return run


@pytest.fixture(scope="module")
def base(run):
    return run("base")


def stored_rollout(directory, step):
    """What the checkpoint after update `step` holds of its rollout: name -> per completion a list."""
    tensors = load_file(Path(directory) / "checkpoints" / f"step-{step:06d}" / "rollout.safetensors")
    lengths = tensors["lengths"].tolist()
    found = {"rows": tensors["rows"].tolist(), "tokens": [part.tolist() for part in tensors["tokens"].split(lengths)]}
    for name, values in tensors.items():
        if name.startswith("extras/"):
            found[name[7:]] = [part.tolist() for part in values.split(1 if len(values) == len(lengths) else lengths)]
    return found


def plain_forward(lm, head, prompt, tokens, temperature, trunk=None):
    """One completion alone, with full logits: log-probs and values of its tokens, as tensors (L,)."""
    ids, first = torch.tensor([[*prompt, *tokens]]), len(prompt)
    logps = (lm(ids).logits[0, first - 1:-1] / temperature).log_softmax(-1).gather(1, ids[0, first:, None])[:, 0]
    states = (trunk or lm)(ids, output_hidden_states=True).hidden_states[-1][0, first - 1:-1]
    return logps, states @ head[0]


def plain_run(files, directory, rewards_of, temperature, gamma, lam, kl_coef, penalty, vf_coef, clip, clip_value, seed=3):
    """The updates of the run in `directory` from the completions that its checkpoints hold, one completion at a time.
    -> rows of metrics, and the clipped gradients of every update by our names"""
    tokenizer = byte_tokenizer()
    prompts = [tokenizer.apply_chat_template(json.loads(line)["prompt"], tokenize=True, add_generation_prompt=True, return_dict=False)
               for line in Path(files.data).read_text().splitlines()]
    lm, trunk, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (files.model, files.model, files.other))
    head = torch.zeros(1, 32, requires_grad=True)
    parameters = [*lm.parameters(), *trunk.model.parameters(), head]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    names = {f"critic_trunk.lm.{name}": parameter for name, parameter in trunk.model.named_parameters()}
    names |= {"critic_head.weight": head, **dict(lm.named_parameters())}
    found, gradients = [], []
    for number in range(2):
        given = stored_rollout(directory, 4 * number + 1)
        texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in given["tokens"]]
        scores = [reward - penalty * truncated for reward, (truncated,) in zip(rewards_of(texts, given["rows"]), given["truncated"])]
        pieces = [(prompts[row], tokens, temperature) for row, tokens in zip(given["rows"], given["tokens"])]
        with torch.no_grad():
            old = [[x.tolist() for x in plain_forward(lm, head, *piece, trunk)] for piece in pieces]
            reference_logps = [plain_forward(reference, head, *piece)[0].tolist() for piece in pieces]
        rewards, advantages, returns, kls = [], [], [], []
        for (logps, values), ref, score in zip(old, reference_logps, scores):
            kl = [p - q for p, q in zip(logps, ref)]
            rewards.append([-kl_coef * k + (score if t == len(kl) - 1 else 0.0) for t, k in enumerate(kl)])
            advantages.append(plain_gae(rewards[-1], values, gamma, lam))
            returns.append([a + v for a, v in zip(advantages[-1], values)])
            kls.append(sum(kl))
        whitened = plain_whiten(advantages)
        def var(parts):
            return np.var([x for part in parts for x in part], ddof=1)
        of_rollout = {
            "objective/scores": np.mean(scores), "objective/kl": np.mean(kls), "objective/entropy": -np.mean([sum(o[0]) for o in old]),
            "objective/rlhf_reward": np.mean([sum(r) for r in rewards]), "objective/non_score_reward": -kl_coef * np.mean(kls),
            "val/mean": np.mean([v for o in old for v in o[1]]), "val/num_eos_tokens": sum(not t for t, in given["truncated"]),
            "val/explained_variance": 1 - var(advantages) / var(returns)}
        for k in range(4):
            order = np.random.default_rng((seed, number, k // 2)).permutation(5)
            mine = np.array_split(order, 2)[k % 2]
            count, sums = sum(len(given["tokens"][i]) for i in mine), {}

            def add(name, x, sums=sums):
                sums[name] = sums.get(name, 0.0) + (x.item() if torch.is_tensor(x) else x)
            for i in mine:
                logps, values = plain_forward(lm, head, *pieces[i], trunk)
                for t in range(len(logps)):
                    ratio, advantage = (logps[t] - old[i][0][t]).exp(), whitened[i][t]
                    lowered = min(max(ratio.item(), 1 - clip), 1 + clip)
                    less = lowered * advantage < ratio.item() * advantage
                    policy = torch.tensor(-lowered * advantage) if less else -ratio * advantage
                    value, old_value, goal = values[t].item(), old[i][1][t], returns[i][t]
                    near = old_value + min(max(value - old_value, -clip_value), clip_value)
                    more = (near - goal) ** 2 > (value - goal) ** 2
                    value = torch.tensor((near - goal) ** 2 / 2) if more else (values[t] - goal) ** 2 / 2
                    if (policy + vf_coef * value).requires_grad:
                        ((policy + vf_coef * value) / count).backward(retain_graph=True)
                    add("loss/policy_avg", policy)
                    add("loss/value_avg", value)
                    add("loss", policy + vf_coef * value)
                    add("policy/approxkl_avg", (logps[t] - old[i][0][t]) ** 2 / 2)
                    add("policy/clipfrac_avg", less)
                    add("policy/entropy_avg", -logps[t])
                    add("val/clipfrac_avg", more)
                    add("val/ratio", ratio)
                    add("val/ratio_var", (ratio - 1) ** 2)
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            gradients.append({name: parameter.grad.clone() for name, parameter in names.items()})
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)      # where all values are clipped their gradient is 0, and Adam's momentum goes on
            found.append({name: total / count for name, total in sums.items()} | of_rollout | {"grad_norm": float(norm)})
    return found, gradients


def letters(texts, rows):
    return [sum(map(ord, text)) * (3 + row) % 97 / 40 - 1 for text, row in zip(texts, rows)]


def test_a_run_equals_plain_loops(files, run, updates):
    """Two rollouts, each with two passes in two parts; every formula again, in separate code, one token at a time."""
    numbers = dict(temperature=.7, gamma=.9, lam=.8, kl_coef=.2, vf_coef=.5)
    directory = run("plain", **numbers, cliprange=.002, cliprange_value=.01, missing_eos_penalty=.7)
    numbers |= dict(clip=.002, clip_value=.01, penalty=.7)
    expected, expected_gradients = plain_run(files, directory, letters, **numbers)
    found = metrics(directory)
    assert len(found) == 8
    for ours, theirs in zip(found, expected, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, abs=1e-5, rel=1e-5), ours["step"]
    assert any(0 < row["policy/clipfrac_avg"] < 1 for row in found) and any(0 < row["val/clipfrac_avg"] < 1 for row in found)
    assert 0 < found[0]["val/num_eos_tokens"] < 5      # both kinds occur
    start, gradients = updates[directory]
    assert_same_gradients(gradients, expected_gradients)
    assert_adam_made(final_weights(directory) | critic_of(directory, 8), start, gradients)


def test_the_first_update_from_a_rollout(run):
    """Undivided its packing is that of the pass before it, so that the ratio is 1 to the bit; the reference is the start model."""
    rows = metrics(run("whole", num_mini_batches=1, max_steps=4, reference="null"))
    for row in (rows[0], rows[2]):
        assert row["val/ratio"] == 1 and row["val/ratio_var"] == row["policy/approxkl_avg"] == 0
        assert row["policy/clipfrac_avg"] == row["val/clipfrac_avg"] == 0 and abs(row["loss/policy_avg"]) < 1e-6 and row["grad_norm"] > 0.01
    for row in (rows[1], rows[3]):
        assert row["val/ratio_var"] > 0 and row["policy/approxkl_avg"] > 0
    first, later = rows[0], rows[2]
    assert first["objective/kl"] == first["objective/non_score_reward"] == first["val/mean"] == first["val/explained_variance"] == 0
    assert later["objective/kl"] != 0 and later["val/mean"] != 0 and later["val/explained_variance"] != 0
    assert (first["episode"], later["episode"]) == (5, 10)
    for line in (run("whole") / "metrics.jsonl").read_text().splitlines():
        assert NAMES < json.loads(line).keys() and json.loads(line)["eps"] > 0


CHANGED = {
    "kl_coef": 0.5, "kl_estimator": "k3", "cliprange": 1e-3, "cliprange_value": 1e-3, "vf_coef": 1.0, "gamma": 0.9, "lam": 0.5,
    "whiten_rewards": "true", "num_ppo_epochs": 1, "num_mini_batches": 1, "missing_eos_penalty": 1.0, "temperature": 0.7, "top_p": 0.5,
    "top_k": 5, "max_completion_length": 8, "stop": "a", "share_value_trunk": "true", "reference": "null"}


@pytest.mark.parametrize("key", CHANGED)
def test_every_option_has_an_effect(base, run, key):
    changed = run(f"changed-{key}", **{key: CHANGED[key]})
    ours, theirs = final_weights(changed), final_weights(base)
    assert any(not torch.equal(ours[name], theirs[name]) for name in theirs)
    first, plain = metrics(changed)[0], metrics(base)[0]
    if key == "missing_eos_penalty":
        assert first["objective/scores"] == pytest.approx(plain["objective/scores"] - plain["completions/clipped_ratio"], abs=1e-6)
        assert first["reward"] == plain["reward"] and 0 < plain["completions/clipped_ratio"] < 1
    if key in ("num_ppo_epochs", "num_mini_batches"):
        assert len(metrics(changed)) == 4
    if key == "kl_coef":
        assert first["objective/non_score_reward"] == pytest.approx(2.5 * plain["objective/non_score_reward"], rel=1e-5)
    if key in ("kl_estimator", "whiten_rewards"):
        assert first["objective/kl"] == plain["objective/kl"] and first["objective/scores"] == plain["objective/scores"]
        assert (first["objective/non_score_reward"] < 0) or key == "whiten_rewards"      # k3 is never negative
        assert first["val/explained_variance"] == 0 == plain["val/explained_variance"]


def test_k2_and_k3_are_their_own(base):
    """Of the stored log-probs, in plain numbers."""
    given = stored_rollout(base, 1)
    for old, ref, in zip(given["old_logps"], given["reference_logps"]):
        d = [x - y for x, y in zip(old, ref)]
        for name, expected in {"k2": [x * x / 2 for x in d], "k3": [math.exp(-x) - 1 + x for x in d]}.items():
            found = token_rewards(torch.zeros(1), torch.tensor(d), 0.3, name)
            assert found.tolist() == pytest.approx([-0.3 * x for x in expected], abs=1e-6)


def samples(directory):
    path = directory / "samples.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_num_sample_generations(base, run):
    """So often in the run, with the last update; sample_every goes first."""
    assert sorted(set(samples(base))) == [4, 8]                                # 10 are asked for, but there are two rollouts
    once = dict(num_ppo_epochs=1, num_mini_batches=1, epochs=6)
    assert sorted(set(samples(run("samples-3", num_sample_generations=3, **once)))) == [2, 4, 6]
    assert samples(run("samples-0", num_sample_generations=0, **once)) == []
    assert sorted(set(samples(run("samples-5", sample_every=5, **once)))) == [5, 6]


@pytest.mark.parametrize("key", ["rollout_batch_size", "local_rollout_forward_batch_size"])
def test_rollout_batch_size_and_its_alias(files, base, run, updates, key, monkeypatch):
    sizes, decoding = [], sampler.Decoding

    def counted(policy, places, sampling):
        if isinstance(sampling, Config):      # not in the trial before the run
            sizes.append(places)
        return decoding(policy, places, sampling)

    monkeypatch.setattr(sampler, "Decoding", counted)
    path = write_config(files.folder / "alias.yml", **options_of(files, **{key: 2}))
    assert load_config([path]).config.rollout_batch_size == 2
    assert load_config([path, f"{key}=3"]).config.rollout_batch_size == 3
    again = run(f"size-{key}", **{key: 2})
    assert sizes == [2, 2]      # of two rollouts; the other three prompts of each take places that are free
    assert_same_gradients(updates[again][1], updates[base][1])


def test_an_alias_and_its_key_are_one(files):
    both = options_of(files, rollout_batch_size=2, local_rollout_forward_batch_size=2)
    with pytest.raises(UserError, match="duplicate key 'rollout_batch_size'"):
        load_config([write_config(files.folder / "twice.yml", **both)])


def test_completions_without_a_reward_are_left_out(files, run, monkeypatch):
    """As if they had not been drawn: their tokens are in no mean, and no whitening."""
    trained, loss = [], ppo.ppo_policy_loss

    def watched(logps, old_logps, advantages, *bounds):
        trained.append(advantages)
        return loss(logps, old_logps, advantages, *bounds)

    monkeypatch.setattr(ppo, "ppo_policy_loss", watched)
    directory = run("some", reward=f"{files.folder}/reward.py:some", num_mini_batches=1)
    row, given = metrics(directory)[0], stored_rollout(directory, 1)
    judged = [i for i, number in enumerate(given["rows"]) if number not in (1, 4)]
    assert row["completions/without_reward"] == 2 and len(judged) == 3
    count = sum(len(given["old_logps"][i]) for i in judged)
    advantages = torch.cat(trained)[:count]                       # the first update's
    assert abs(advantages.mean()) < 1e-6 and advantages.std().item() == pytest.approx(1, abs=1e-5)
    assert row["val/ratio"] == 1 and all(math.isfinite(value) for value in row.values() if not isinstance(value, str))
    entropies = [-x for i in judged for x in given["old_logps"][i]]
    assert row["policy/entropy_avg"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)
    assert row["objective/rlhf_reward"] == pytest.approx(row["objective/scores"] + row["objective/non_score_reward"], abs=1e-6)


def test_equal_rewards_teach_nothing_and_stay_finite(files, run):
    """One prompt, one token: no variance anywhere."""
    directory = run("one-token", max_completion_length=1, batch_size=1, num_mini_batches=1, max_steps=2, reference="null", stop="null")
    for row in metrics(directory):
        assert "val/explained_variance" not in row and math.isfinite(row["loss"])


# ---- the critic ----

def examples():
    return [Example(np.array([1, 2, 3], np.int32), [Response.all_trained([4, 5]), Response.all_trained([6, 7, 8])], ""),
            Example(np.array([9], np.int32), [Response.all_trained([10])], "")]


@pytest.mark.parametrize("shared", [False, True])
def test_values_are_those_of_the_state_before_each_token(shared):
    lm, other = (random_lm(config_of(), seed=seed) for seed in (0, 1))
    head = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    flat_lm, flat_other = (random_lm(config_of(), seed=seed, attn_implementation="segments") for seed in (0, 1))
    model = ActorCritic(Policy(flat_lm), head, None if shared else Policy(flat_other.base_model))
    with torch.no_grad():
        logps, values = model(model.collate(examples()), 0.7, values=True)
        expected = [plain_forward(lm, head, example.prompt.tolist(), response.tokens.tolist(), 0.7, lm if shared else other)
                    for example in examples() for response in example.responses]
        assert torch.equal(model(model.collate(examples()), 0.7), logps)
    for found, part in zip((logps, values), zip(*expected)):
        assert torch.allclose(found, torch.cat(part), atol=1e-5)


def critic_of(directory, step):
    return load_file(directory / "checkpoints" / f"step-{step:06d}" / "critic.safetensors")


def test_where_the_critic_is_saved(files, base, run):
    """In checkpoints, without the LM's head; final/ is a plain model that anything loads."""
    assert sorted(path.name for path in (base / "final").iterdir() if path.suffix == ".safetensors") == ["model.safetensors"]
    assert final_weights(base).keys() == load_file(Path(files.model) / "model.safetensors").keys()
    AutoModelForCausalLM.from_pretrained(base / "final")
    critic = critic_of(base, 8)
    assert {"critic_head.weight", "critic_trunk.lm.embed_tokens.weight"} <= critic.keys() and not any("lm_head" in name for name in critic)
    assert critic_of(run("changed-share_value_trunk", share_value_trunk="true"), 8).keys() == {"critic_head.weight"}


@pytest.fixture(scope="module")
def reward_runs(files):
    """Finished runs of rm: of the policy's architecture, of another one, and with an adapter."""
    runs, data = {}, write_jsonl(files.folder / "pairs.jsonl", pair_rows(8))
    random_lm(config_of(LlamaConfig, hidden_size=16), seed=5).save_pretrained(files.folder / "llama")
    byte_tokenizer().save_pretrained(files.folder / "llama")
    for name, values in {"rm": {}, "rm-llama": dict(model=files.folder / "llama"), "rm-lora": dict(lora_r=2)}.items():
        options = dict(algorithm="rm", model=files.model, data=data, batch_size=4, lr=1e-2, max_length=256) | values
        train_here(write_config(files.folder / f"{name}.yml", **options, output=files.folder / name))
        runs[name] = files.folder / name
    return runs


@pytest.mark.parametrize("name, values", [("rm", {}), ("rm-llama", {}), ("rm", {"lora_r": 4})])
def test_a_reward_model_judges_and_starts_the_critic(files, run, reward_runs, name, values):
    """Scores are its head on the last token, first values its head on the state before each token."""
    directory = run(f"by-{name}-{len(values)}", reward=reward_runs[name], max_steps=5, **values)
    given = stored_rollout(directory, 1)
    lm = AutoModelForCausalLM.from_pretrained(reward_runs[name] / "final")
    head = load_file(reward_runs[name] / "final" / "value_head.safetensors")["v_head.summary.weight"]
    tokenizer = byte_tokenizer()
    for i, row in enumerate(given["rows"]):
        prompt = tokenizer.apply_chat_template(json.loads(Path(files.data).read_text().splitlines()[row])["prompt"], tokenize=True,
                                               add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            states = lm(torch.tensor([prompt + given["tokens"][i]]), output_hidden_states=True).hidden_states[-1][0] @ head[0]
        assert given["old_values"][i] == pytest.approx(states[len(prompt) - 1:-1].tolist(), abs=1e-5)
        assert given["scored"][i] == pytest.approx([states[-1].item()], abs=1e-5)
    assert len(metrics(directory)) == 5 and not (directory / "final" / "value_head.safetensors").exists()
    head_later = critic_of(directory, 5)["critic_head.weight"]
    assert not torch.equal(head_later, head) and torch.allclose(head_later, head, atol=0.1)


@pytest.mark.parametrize("name", ["rm", "rm-llama"])
def test_a_classifier_with_the_policy_s_tokenizer_starts_the_critic(files, run, reward_runs, name):
    """First values are the scores of transformers' own classifier in the states before each token; with
    another tokenizer, or a head of another name, the critic starts from the start model."""
    place = reward_runs[name] / "classifier"
    directory = run(f"classifier-{name}", reward=place, max_steps=4)
    given = stored_rollout(directory, 1)
    classifier = AutoModelForSequenceClassification.from_pretrained(place).eval()
    tokenizer = byte_tokenizer()
    lines = Path(files.data).read_text().splitlines()
    for i, row in enumerate(given["rows"]):
        turns = json.loads(lines[row])["prompt"]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        states = classifier.base_model(torch.tensor([prompt + given["tokens"][i]])).last_hidden_state
        values = classifier.score(states)[0, :, 0]
        assert given["old_values"][i] == pytest.approx(values[len(prompt) - 1:-1].tolist(), abs=1e-5)
    assert reads_as(str(place), tokenizer)
    tokenizer.add_tokens(["<x>"])
    assert not reads_as(str(place), tokenizer)
    assert not reads_as(files.model, byte_tokenizer())      # no classifier: nothing is named `score`


def test_a_shared_trunk_does_not_start_from_the_reward_model(run, reward_runs):
    directory = run("rm-shared", reward=reward_runs["rm"], share_value_trunk="true", max_steps=4)
    assert metrics(directory)[0]["val/mean"] == 0 and metrics(directory)[0]["objective/scores"] != 0


@pytest.mark.parametrize("values", [{}, {"lora_r": 4}], ids=["full", "lora"])
def test_a_reward_model_with_an_adapter(run, reward_runs, values):
    """Its adapter is what the critic trains; that of the policy may have another size."""
    directory = run(f"by-lora-{len(values)}", reward=reward_runs["rm-lora"], max_steps=5, **values)
    critic = critic_of(directory, 5)
    sizes = {len(tensor) for name, tensor in critic.items() if "lora_A" in name}
    assert sizes == {2} and metrics(directory)[0]["val/mean"] != 0


def test_reward_runs_that_are_none(files, tmp_path):
    for place in (files.folder / "base", tmp_path):
        place.mkdir(exist_ok=True)
        says = "^reward: .* (is a Qwen2ForCausalLM, which gives no score|cannot be loaded)"
        with pytest.raises(UserError, match=says):
            train_here(write_config(tmp_path / "x.yml", **options_of(files, output=tmp_path / "run", reward=place)))


# ---- LoRA ----

@pytest.fixture(scope="module")
def lora(run):
    return run("lora", lora_r=4, reference="null")


def test_lora(files, lora, run):
    """The reference is the policy without its adapter; the critic has an adapter of its own, or shares the policy's."""
    rows = metrics(lora)
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5) and rows[-1]["objective/kl"] != 0
    assert sorted(path.name for path in (lora / "final").iterdir() if path.suffix == ".safetensors") == ["adapter_model.safetensors"]
    critic = critic_of(lora, 8)
    assert critic.keys() > {"critic_head.weight"} and all("lora_" in name for name in critic if name != "critic_head.weight")
    shared = run("lora-shared", lora_r=4, reference="null", share_value_trunk="true")
    assert critic_of(shared, 8).keys() == {"critic_head.weight"}
    continued = run("lora-continued", model=lora, max_steps=4)
    assert any("lora_" in name for name in critic_of(continued, 4))


# ---- resume, ranks, micro-batches ----

@pytest.mark.parametrize("name, steps", [("base", [1, 3, 4, 6]), ("lora", [2]), ("changed-share_value_trunk", [6])])
def test_resume_is_exact(files, run, base, lora, name, steps, tmp_path):
    """From checkpoints in mid-rollout and between two: weights, critic, moments and metrics to the bit."""
    whole = run(name, share_value_trunk="true")
    for step in steps:
        part = tmp_path / f"{name}-{step}"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "final")
        for later in range(step + 1, 9):
            shutil.rmtree(part / "checkpoints" / f"step-{later:06d}")
        settings = (part / "config.yaml").read_text()
        (part / "config.yaml").write_text(settings.replace(str(whole), str(part)))
        train_here(part / "config.yaml")
        assert json.loads((part / "run.json").read_text())["resumed_from_step"] == step
        assert metrics(part) == metrics(whole)
        for file in ("optimizer", "critic", "adapter_model" if name == "lora" else "model"):
            ours, theirs = (load_file(directory / "checkpoints" / "step-000008" / f"{file}.safetensors") for directory in (part, whole))
            assert_same_weights(ours, theirs)


def test_the_cut_into_micro_batches_changes_nothing(base, run, updates):
    for name, values in {"small": dict(micro_batch_tokens=2), "separate": dict(share_prompt="false"),
                         "recomputed": dict(gradient_checkpointing="true")}.items():
        other = run(name, **values)
        for ours, theirs in zip(metrics(other), metrics(base), strict=True):
            assert ours.pop("split") == theirs.pop("split") and ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        start, gradients = updates[other]
        assert_same_gradients(gradients, updates[base][1])
        assert_adam_made(final_weights(other) | critic_of(other, 8), start, gradients)


def test_two_processes_equal_one(files, run, updates, reward_runs):
    """Where the critic shares the policy's trunk, and where it is a reward model of another architecture."""
    cases = {"shared": dict(share_value_trunk="true"), "other": dict(reward=reward_runs["rm-llama"])}
    for name, values in cases.items():
        options = options_of(files, output=files.folder / f"{name}-2", **values)
        ranks = train_on_ranks(Path(write_config(files.folder / f"{name}-2.yml", **options)))
        assert [rank.code for rank in ranks] == [0, 0], ranks
    for name, values in cases.items():
        one, two = run(f"{name}-1", **values), files.folder / f"{name}-2"
        for ours, theirs in zip(metrics(two), metrics(one), strict=True):
            assert ours.pop("split") == theirs.pop("split") and ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)
        gradients = saved_gradients(two, updates=8)
        assert_same_gradients(gradients, updates[one][1])
        assert_adam_made(final_weights(two) | critic_of(two, 8), updates[one][0], gradients)
