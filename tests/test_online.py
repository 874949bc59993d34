"""Whole runs of the online algorithms: their updates against a plain loop, what must not change them, and what stops them."""
import math
import re
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    GROUPS,
    ONLINE,
    REWARDED,
    REWARDS,
    SAMPLED,
    assert_adam_made,
    assert_same_gradients,
    assert_same_weights,
    byte_tokenizer,
    ending_model,
    final_weights,
    metrics,
    prompt_rows,
    train_here,
    watch_updates,
    write_config,
    write_jsonl,
)
from some_rewards import coarse, some, varied
from test_engine_exact import PLAIN, chat, close, ids, read
from transformers import AutoModelForCausalLM

from data.errors import RunError, UserError, printable
from engine.options import Sampling
from engine.rollouts import Rollouts
from engine.step import Step
from model.load import load_lm
from model.policy import Policy
from model.sampler import sample

ONCE_GROUPS = SAMPLED | {"num_generations": 4, "num_mini_batches": 1}      # one update per rollout
LIMIT = SAMPLED["max_completion_length"]
RUN = PLAIN | dict(batch_size=3, eval_every=1000)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths: a start model whose completions do end, eight prompts and five held-out ones."""
    folder = tmp_path_factory.mktemp("files")
    return {"model": ending_model(folder / "model"),
            "data": write_jsonl(folder / "prompts.jsonl", prompt_rows(8)),
            "eval": write_jsonl(folder / "eval.jsonl", prompt_rows(5, 8))}


@pytest.fixture
def updates(monkeypatch):
    return watch_updates(monkeypatch)


@pytest.fixture
def run(files, tmp_path):
    """run(name, algorithm, key=value, ...) -> the directory of a finished run; a value of None leaves a key out."""
    def run(name, algorithm, **values):
        values = dict(algorithm=algorithm, model=files["model"], data=files["data"], output=tmp_path / name) | RUN | values
        train_here(write_config(tmp_path / f"{name}.yml", **{key: value for key, value in values.items() if value is not None}))
        return tmp_path / name
    return run


# ---- the plain loop ----

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [byte for byte in range(256) if byte not in PRINTABLE]      # the byte tokenizer's ids, from its definition


def text_of(tokens):
    return bytes(BYTES[token] for token in tokens if token < 256).decode("utf-8", "replace")


def prompt_ids(row):
    return ids(row["prompt"]) if isinstance(row["prompt"], str) else chat(row["prompt"])


@pytest.fixture
def seen(monkeypatch):
    """What a run did, in order: `rollouts`, each a list of groups (prompt's row number, responses); `updates`, each the number of its
    rollout and its responses; `first`, of every first update from a rollout the log-probs and the old ones."""
    seen = SimpleNamespace(rollouts=[], updates=[], first=[])
    steps, update, old_logps = Rollouts.steps, Step.__init__, Rollouts.old_logps

    def watch_steps(rollouts, rollout, *arguments):
        seen.rollouts.append([(int(example.extras["columns"]["answer"]), example.responses) for example in rollout.examples])
        return steps(rollouts, rollout, *arguments)

    def watch_update(step, engine, index, examples):
        seen.updates.append((len(seen.rollouts) - 1, [response for example in examples for response in example.responses]))
        update(step, engine, index, examples)

    def watch_old_logps(rollouts, batch, logps):
        old = old_logps(rollouts, batch, logps)
        if (rollouts.engine.step.index - 1) % rollouts.updates_per_rollout == 0:
            seen.first.append((logps.detach(), old))
        return old

    monkeypatch.setattr(Rollouts, "steps", watch_steps)
    monkeypatch.setattr(Step, "__init__", watch_update)
    monkeypatch.setattr(Rollouts, "old_logps", watch_old_logps)
    return seen


def token_logps(lm, completion, temperature):
    """(L,): each token of a completion, from the full logits of its own row."""
    logits = lm(torch.tensor([completion.prompt + completion.tokens]), use_cache=False).logits[0]
    places = range(len(completion.prompt) - 1, len(completion.prompt) + len(completion.tokens) - 1)
    return torch.stack([torch.log_softmax(logits[place] / temperature, 0)[token] for place, token in zip(places, completion.tokens)])


def mean_and_std(values, correction):
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - correction))


def by_group(completions):
    groups = {}
    for completion in completions:
        groups.setdefault(completion.group, []).append(completion)
    return groups.values()


def normalised(completions, is_scaled=True):
    """GRPO's advantages; without scaling Dr. GRPO's."""
    for group in by_group(completions):
        scores = [completion.score for completion in group]
        mean, deviation = mean_and_std(scores, 1)
        for completion in group:
            completion.advantage = completion.score - mean
            if is_scaled:
                completion.advantage /= deviation + 1e-4


def decoupled(completions):
    """GDPO's, of two rewards with the weights 1 and 0.25."""
    for completion in completions:
        completion.advantage = 0.0
    for which, weight in enumerate((1, 0.25)):
        for group in by_group(completions):
            judged = [completion for completion in group if completion.parts[which] is not None]
            if not judged:
                continue
            mean, deviation = mean_and_std([completion.parts[which] for completion in judged], 1)
            for completion in judged:
                completion.advantage += weight * (completion.parts[which] - mean) / (deviation + 1e-4)
    _, deviation = mean_and_std([completion.advantage for completion in completions], 1)
    for completion in completions:
        completion.advantage /= deviation + 1e-4


def left_out(completions, kl_coef=0.05):
    """RLOO's."""
    for completion in completions:
        completion.score -= kl_coef * sum(completion.kl)
    for group in by_group(completions):
        for completion in group:
            others = [other.score for other in group if other is not completion]
            completion.advantage = completion.score - sum(others) / len(others) if others else 0.0


def whitened(completions, kl_coef=0.01, baseline=False):
    """REINFORCE++'s: a list, one for each token."""
    means = {group[0].group: sum(completion.score for completion in group) / len(group) for group in by_group(completions)}
    for completion in completions:
        score = completion.score - baseline * means[completion.group]
        completion.advantage = [score - kl_coef * sum(completion.kl[i:]) for i in range(len(completion.tokens))]
    mean, deviation = mean_and_std([value for completion in completions for value in completion.advantage], 0)
    for completion in completions:
        completion.advantage = torch.tensor([(value - mean) / deviation for value in completion.advantage])


def surrogate(ratio, advantage, low, high):
    """PPO's, negative: beyond 1 - low (or 1 + high) it is flat where that would be to the advantage's liking."""
    bound = torch.where(torch.as_tensor(advantage) > 0, 1 + high, 1 - low)
    beyond = (ratio > bound) == (torch.as_tensor(advantage) > 0)
    return -torch.where(beyond, bound, ratio) * advantage


def per_token(divide, low=0.02, high=0.02, beta=0.0):
    """A loss of clipped token ratios; `divide(completions)`: how much each token of them counts."""
    def loss_of(completions):
        loss = 0.0
        for completion, weight in zip(completions, divide(completions)):
            losses = surrogate(torch.exp(completion.logps - completion.old), completion.advantage, low, high)
            if beta:
                distance = completion.reference - completion.logps
                losses = losses + beta * (torch.exp(distance) - distance - 1)
            loss = loss + weight * losses.sum()
        return loss
    return loss_of


def completion_means(completions):
    return [1 / len(completion.tokens) / len(completions) for completion in completions]


def token_means(completions):
    return [1 / sum(len(completion.tokens) for completion in completions)] * len(completions)


def by_a_constant(completions):
    return [1 / LIMIT / len(completions)] * len(completions)


def per_completion(ratio, low, high):
    def loss_of(completions):
        return sum(surrogate(ratio(completion.logps - completion.old), completion.advantage, low, high)
                   for completion in completions) / len(completions)
    return loss_of


def cispo_loss_of(completions):
    return -sum((min(1.0005, torch.exp(logp - old).item()) * completion.advantage * logp
                 for completion in completions for logp, old in zip(completion.logps, completion.old)), start=0.0
                ) / sum(len(completion.tokens) for completion in completions)


def punished(completions):
    """DAPO's soft punishment of the last 6 of 10 tokens."""
    for completion in completions:
        completion.score -= max(0.0, (len(completion.tokens) - 4) / 6)
    normalised(completions)


def plain_loop(model, seen, reward, advantages, loss_of, skip=False, temperature=0.8, lr=1e-3, max_grad_norm=1.0):
    """-> the metrics of every update, and its clipped gradients."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval() for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False)
    rows, logged, gradients = prompt_rows(8), [], []
    for number, rollout in enumerate(seen.rollouts):
        sampled = {}
        for group, (answer, responses) in enumerate(rollout):
            tokens = [response.tokens.tolist() for response in responses]
            rewards = reward([None] * len(tokens), list(map(text_of, tokens)), answer=[str(answer)] * len(tokens))
            for i, response in enumerate(responses):
                sampled[id(response)] = completion = SimpleNamespace(
                    group=group, prompt=prompt_ids(rows[answer]), tokens=tokens[i], reward=rewards[i], score=rewards[i],
                    truncated=tokens[i][-1] != 258, parts=getattr(rewards[i], "parts", None))
                with torch.no_grad():
                    completion.old, completion.reference = (token_logps(lm, completion, temperature) for lm in (policy, reference))
                completion.kl = (completion.old - completion.reference).tolist()
        judged = [completion for completion in sampled.values() if completion.reward is not None]
        advantages(judged)
        trained = [completion for completion in judged if not (skip and completion.truncated)]
        groups = [[completion.reward for completion in group] for group in by_group(judged)]
        empty = len(rollout) - len(groups)                        # groups without any reward
        lengths = [len(completion.tokens) for completion in sampled.values()]
        known = {"reward": sum(map(sum, groups)) / len(judged),
                 "reward_std": sum(mean_and_std(group, 1)[1] for group in groups) / len(rollout),
                 "frac_reward_zero_std": (sum(len(set(group)) == 1 for group in groups) + empty) / len(rollout),
                 "completions/mean_length": sum(lengths) / len(lengths), "completions/max_length": max(lengths),
                 "completions/clipped_ratio": sum(completion.truncated for completion in sampled.values()) / len(lengths)}
        if len(judged) < len(sampled):
            known["completions/without_reward"] = len(sampled) - len(judged)
        used = [sampled[id(response)] for place, responses in seen.updates if place == number for response in responses]
        for completion in used:
            assert any(completion is other for other in trained)
        assert len(used) % len(trained) == 0 or rollout is seen.rollouts[-1]      # every completion once per pass
        for place, responses in seen.updates:
            if place != number:
                continue
            completions = [sampled[id(response)] for response in responses]
            for completion in completions:
                completion.logps = token_logps(policy, completion, temperature)
            loss = loss_of(completions)
            optimizer.zero_grad()
            loss.backward()
            norm = math.sqrt(sum(float((parameter.grad.double() ** 2).sum()) for parameter in policy.parameters()))
            for parameter in policy.parameters():
                parameter.grad *= min(1.0, max_grad_norm / (norm + 1e-6))
            gradients.append({name: parameter.grad.clone() for name, parameter in policy.named_parameters()})
            optimizer.step()
            entropies = [-logp.item() for completion in completions for logp in completion.logps]
            logged.append({"loss": loss.item(), "grad_norm": norm, "entropy": sum(entropies) / len(entropies), **known})
    return logged, gradients


NARROW = dict(epsilon=0.02, epsilon_high=0.02)      # so that clipping is at work
GRPO = per_token(completion_means, beta=0.04)


def weighed(prompts, completions, answer):
    """Two rewards, the first of which always judges: what each says, and their weighted sum."""
    judged = []
    for first, second in zip(varied(prompts, completions, answer), some(prompts, completions, answer)):
        judged.append(Several(first + 0.25 * (second or 0.0)))
        judged[-1].parts = first, second
    return judged


class Several(float):
    """A sum of rewards that knows its parts."""


CASES = {    # name: (algorithm, its keys, the reward, advantages, loss of the completions of an update)
    "grpo": ("grpo", NARROW, varied, normalised, GRPO),
    "grpo-no-kl": ("grpo", NARROW | {"beta": 0}, varied, normalised, per_token(completion_means)),
    "grpo-none": ("grpo", NARROW, some, normalised, GRPO),
    "gdpo": ("gdpo", NARROW | {"reward_weights": "1, 0.25"}, weighed, decoupled, GRPO),
    "dr_grpo": ("dr_grpo", NARROW, varied, lambda made: normalised(made, False), per_token(by_a_constant)),
    "dr_grpo-kl": ("dr_grpo", NARROW | {"beta": 0.04}, varied, lambda made: normalised(made, False),
                   per_token(by_a_constant, beta=0.04)),
    "dapo": ("dapo", {"epsilon": 0.02, "epsilon_high": 0.03, "soft_overlong_cache": 0}, varied, normalised,
             per_token(token_means, high=0.03)),
    "dapo-all": ("dapo", {"epsilon": 0.02, "epsilon_high": 0.03, "soft_overlong_cache": 6, "mask_truncated_completions": "true"}, coarse,
                 punished, per_token(token_means, high=0.03)),
    "gspo": ("gspo", {}, varied, normalised, per_completion(lambda difference: torch.exp(difference.sum() / len(difference)), 3e-4, 4e-4)),
    "cispo": ("cispo", {"epsilon_high": 1.0005}, varied, normalised, cispo_loss_of),
    "rloo": ("rloo", NARROW, varied, left_out, per_completion(lambda difference: torch.exp(difference.sum()), 0.02, 0.02)),
    "reinforce_pp": ("reinforce_pp", NARROW, varied, whitened, per_token(token_means)),
    "reinforce_pp-baseline": ("reinforce_pp", NARROW | {"baseline": "true"}, some, lambda made: whitened(made, baseline=True),
                              per_token(token_means)),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_equal_a_plain_loop(files, run, seen, updates, name):
    """Four updates from one rollout, groups cut by small micro-batches, and two of the next, with which max_steps ends the run."""
    algorithm, options, reward, advantages, loss_of = CASES[name]
    named = f"{REWARDS}:varied, {REWARDS}:some" if reward is weighed else f"{REWARDS}:{reward.__name__}"
    keys = ONLINE[algorithm] | options | {"reward": named}
    result = run(name, algorithm, **keys, max_steps=6, temperature=0.8, max_grad_norm=0.7, micro_batch_tokens=90)
    assert len(seen.rollouts) == 2 and [place for place, _ in seen.updates] == [0, 0, 0, 0, 1, 1]
    expected, expected_gradients = plain_loop(files["model"], seen, reward, advantages, loss_of,
                                              "mask_truncated_completions" in options, max_grad_norm=0.7)
    logged = metrics(result)
    close(logged, expected, 1e-5)
    start, gradients = updates[result]
    assert_same_gradients(gradients, expected_gradients)
    assert_adam_made(final_weights(result), start, gradients)
    assert max(row["grad_norm"] for row in expected) > 0.7                   # clipping the gradients was at work
    region = "cispo_clip_ratio" if algorithm == "cispo" else "clip_ratio/region_mean"
    assert logged[0][region] == logged[4][region] == 0 and max(row[region] for row in logged) > 0      # and that of the ratios
    for logps, old in seen.first:
        assert (logps - old).abs().max() < 1e-5
    if name == "dapo-all":                                                   # groups all alike were replaced
        assert [answer for answer, _ in seen.rollouts[0]] != [0, 1, 2] or logged[0]["frac_reward_zero_std"] == 0


def once(algorithm):
    return SAMPLED | {"num_ppo_epochs": 1} if algorithm == "ppo" else ONCE_GROUPS


@pytest.mark.parametrize("algorithm", REWARDED)
def test_the_cut_into_micro_batches_changes_nothing(run, seen, updates, algorithm):
    """One micro-batch = groups cut in pieces, prompts laid out for each completion, layers recomputed, completions decoded two at a time.
    In the only update from a rollout the ratio is 1 to the bit."""
    one = run("one", algorithm, **once(algorithm), micro_batch_tokens=100_000, max_steps=3)
    assert len(seen.first) == 3 and all(torch.equal(logps, old) for logps, old in seen.first)
    assert not any(row[name] for row in metrics(one) for name in row if name.startswith(("clip_ratio", "policy/clipfrac")))
    other = run("other", algorithm, **once(algorithm), max_steps=3, micro_batch_tokens=90, rollout_batch_size=2, share_prompt="false",
                attn_implementation="dense", gradient_checkpointing="true")
    close(metrics(other), metrics(one), 1e-5)
    start, gradients = updates[other]
    assert_same_gradients(gradients, updates[one][1])
    assert_adam_made(final_weights(other), start, gradients)


# ---- held-out prompts ----

@pytest.mark.parametrize("keys, steps", [(ONCE_GROUPS, [0, 2, 4, 5]), (GROUPS, [0, 4, 5])])
def test_held_out_prompts_are_sampled_and_scored(files, run, keys, steps):
    """At step 0, whenever a rollout ends and two updates have passed, and at the end: one completion each, with the same numbers."""
    result = run("eval", "grpo", eval_data=files["eval"], **keys | {"max_steps": 5, "eval_every": 2, "rollout_batch_size": 2})
    rows = metrics(result, "eval")
    assert [row["step"] for row in rows] == steps
    for row, model in ((rows[0], files["model"]), (rows[-1], result / "final")):
        given = [torch.tensor(prompt_ids(line), dtype=torch.int32).numpy() for line in read(files["eval"])]
        completions = sample(Policy(load_lm(str(model)).eval()), byte_tokenizer(), given,
                             [(0, 0, i) for i in range(5)], 1, Sampling(**SAMPLED))
        tokens = [completion.tokens.tolist() for completion, in completions]
        rewards = varied(None, list(map(text_of, tokens)), [line["answer"] for line in read(files["eval"])])
        assert row["reward"] == pytest.approx(sum(rewards) / 5, abs=1e-6)
        assert row["completions/mean_length"] == pytest.approx(sum(map(len, tokens)) / 5)
        assert row["completions/clipped_ratio"] == pytest.approx(sum(not completion.finished for completion, in completions) / 5)


def test_held_out_prompts_without_a_reward(files, run):
    """No mean over none: metrics.jsonl holds numbers only."""
    result = run("eval", "grpo", eval_data=files["eval"], **ONCE_GROUPS | {"max_steps": 1, "reward": f"{REWARDS}:some_low"})
    row, _ = metrics(result, "eval")
    assert "reward" not in row and row["completions/without_reward"] == 5
    assert not any(isinstance(value, float) and math.isnan(value) for value in row.values())


def test_several_rewards_are_weighed(run, seen):
    """Where one does not judge a completion the others do. Each has its own mean and spread."""
    row, = metrics(run("two", "grpo", **ONCE_GROUPS | {"max_steps": 1, "reward": f"{REWARDS}:varied, {REWARDS}:some",
                                                       "reward_weights": "2, -0.5"}))
    texts = [(str(answer), text_of(response.tokens.tolist())) for answer, responses in seen.rollouts[0] for response in responses]
    first, second = (function(None, [text for _, text in texts], [answer for answer, _ in texts]) for function in (varied, some))
    known = [value for value in second if value is not None]
    assert 0 < len(known) < len(texts) == 12 and "completions/without_reward" not in row
    assert row["rewards/varied/mean"] == pytest.approx(sum(first) / 12)
    assert row["rewards/some/mean"] == pytest.approx(sum(known) / len(known))
    assert row["reward"] == pytest.approx((2 * sum(first) - 0.5 * sum(known)) / 12)
    for name, values in (("varied", first), ("some", second)):
        groups = [[value for value in values[start:start + 4] if value is not None] for start in (0, 4, 8)]
        spreads = [mean_and_std(group, 1)[1] if group else 0 for group in groups]
        assert row[f"rewards/{name}/std"] == pytest.approx(sum(spreads) / 3)
        assert row[f"rewards/{name}/frac_zero_std"] == pytest.approx(spreads.count(0) / 3)
    assert row["rewards/some/frac_zero_std"] > 0 == row["rewards/varied/frac_zero_std"]


def test_one_reward_has_no_numbers_of_its_own(run):
    row, = metrics(run("one", "grpo", **ONCE_GROUPS | {"max_steps": 1}))
    assert "reward_std" in row and not any(name.startswith("rewards/") for name in row)


@pytest.mark.parametrize("algorithm", ["dapo", "reinforce_pp"])
def test_each_of_several_rewards_is_logged(files, run, algorithm):
    """Held-out prompts have one completion each, so no spread."""
    keys = once(algorithm) | {"reward": f"{REWARDS}:varied, {REWARDS}:coarse", "max_steps": 1}
    result = run("two", algorithm, eval_data=files["eval"], **keys)
    numbers = set()
    for name in ("varied", "coarse"):
        numbers |= {f"rewards/{name}/{what}" for what in ("mean", "std", "frac_zero_std")}
    row, = metrics(result)
    assert {name for name in row if name.startswith("rewards/")} - {"rewards/soft_overlong/mean"} == numbers
    for row in metrics(result, "eval"):
        logged = {name for name in row if name.startswith("rewards/")}
        assert logged == {"rewards/varied/mean", "rewards/coarse/mean"}
        assert "reward_std" not in row


def test_watching_changes_nothing(files, run):
    keys = GROUPS | {"max_steps": 6}
    bare = run("bare", "grpo", **keys)
    watched = run("watched", "grpo", **keys | {"eval_every": 1}, eval_data=files["eval"], sample_every=1, save_every=1)
    assert_same_weights(final_weights(watched), final_weights(bare))
    assert metrics(watched) == metrics(bare)
    samples = read(watched / "samples.jsonl")
    group = GROUPS["num_generations"]
    assert [line["step"] for line in samples] == [step for step in range(1, 7) for _ in range(3 * group)]
    for start in range(0, len(samples), group):                  # whole groups
        assert len({line["prompt"] for line in samples[start:start + group]}) == 1
    of_last = [line for line in samples if line["step"] == 4]            # by default at the end of a rollout
    assert [line for line in read(bare / "samples.jsonl") if line["step"] == 4] == of_last
    for line in samples:
        assert set(line) == {"step", "prompt", "completion", "reward", "truncated"}
        assert line["reward"] in [row["reward"] for row in samples if row["completion"] == line["completion"]]


def test_samples_on_the_console(run, capsys):
    """A prompt, and below it the group's completions, each after its reward."""
    directory = run("shown", "grpo", **GROUPS | {"max_steps": 4, "show_samples": "true"})
    lines = capsys.readouterr().err.splitlines()
    samples = read(directory / "samples.jsonl")
    title = lines.index(f"samples at step 4 for {samples[0]['prompt']!r}")
    for line, row in zip(lines[title + 1:], samples[:GROUPS["num_generations"]]):
        assert line == printable(f"{row['reward']:8.3g}  {row['completion']!r}")


# ---- what stops a run ----

def refused(run, *arguments, name="refused", **keys):
    with pytest.raises(UserError) as caught:
        run(name, *arguments, **keys)
    assert "\n" not in str(caught.value) and "; fix: " in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("error", [3e-4, -3e-4, math.nan])
@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_sampler_that_differs_stops_the_run(run, tmp_path, monkeypatch, algorithm, error):
    def wrong(*arguments):
        return [[completion._replace(logps=completion.logps + error) for completion in group] for group in sample(*arguments)]
    monkeypatch.setattr("engine.importance.sample", wrong)
    with pytest.raises(RunError, match="the training forward and the sampler differ by .* of rollout 1"):
        run("wrong", algorithm, **ONLINE[algorithm])
    assert metrics(tmp_path / "wrong") == []


def test_weights_that_do_not_move_stop_the_run(run):
    with pytest.raises(RunError, match="no weight moved in the first update"):
        run("still", "grpo", **once("grpo"), max_steps=1, lr=1e-30)


def test_rewards_that_are_none_everywhere_stop_the_run(run):
    error = refused(run, "grpo", **GROUPS | {"reward": f"{REWARDS}:none"})
    assert "nothing was trained in 12 updates" in error


def test_a_reward_that_is_not_a_number_names_itself_prompt_and_completion(run):
    error = refused(run, "grpo", **GROUPS | {"reward": f"{REWARDS}:nan", "batch_size": 3})
    assert "reward nan returned nan, prompt 'Add 2. Go! Go!', completion '" in error


def test_gold_answers_that_do_not_verify_stop_the_run_before_the_model_loads(files, run, tmp_path, monkeypatch):
    monkeypatch.setattr("model.build.load_lm", None)
    rows = [row | {"answer": "none"} if i == 3 else row for i, row in enumerate(prompt_rows(8))]
    data = write_jsonl(tmp_path / "gold.jsonl", rows)
    for key in ("data", "eval_data"):
        error = refused(run, "grpo", name=key, **GROUPS | {key: data} | {"reward": "gsm8k"})
        assert "gsm8k cannot verify the gold answers of 1 of" in error and "gold.jsonl:4 ('none')" in error
    assert "'gsm9k' in reward is neither gsm8k" in refused(run, "grpo", **GROUPS | {"reward": "gsm9k"})
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize("key, value, says", [
    ("temperature", 0, r"temperature \("), ("reward", None, "reward is missing in"), ("num_generations", 1, r"num_generations \("),
    ("num_mini_batches", 4, r"num_mini_batches \(.*refused.yml:\d+\) is 4, more than the 3 prompts"),
    ("max_completion_length", 256, "leaves no room for a prompt")])
def test_impossible_keys_are_refused(run, key, value, says):
    assert re.search(says, refused(run, "grpo", **GROUPS | {key: value}))
