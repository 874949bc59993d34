"""Whole runs of distillation: updates and evaluations against a plain loop, what must not change them, the
share of own samples, and what stops a run before it loads weights."""
import json
import math

import numpy as np
import pytest
import torch
from helpers import (
    SAMPLED,
    assert_adam_made,
    assert_same_gradients,
    assert_same_weights,
    byte_tokenizer,
    config_of,
    ending_model,
    final_weights,
    metrics,
    prompt_rows,
    random_lm,
    refused,
    sft_rows,
    train_here,
    watch_updates,
    write_config,
    write_jsonl,
)
from robust_helpers import train_on_ranks
from test_divergence import plain_divergence
from test_engine_exact import PLAIN, chat, close, ids, read, sft_sequence
from test_resume import assert_same_run, resumed_from, train  # noqa: F401  a fixture
from transformers import AutoModelForCausalLM, LlamaConfig

from data.errors import RunError
from engine.config import Common
from engine.forecast import forecast
from engine.options import Generation
from engine.rollouts import Rollouts
from engine.step import Step
from model.load import empty_lm, load_lm
from model.policy import Policy
from model.sampler import sample

LENGTH = SAMPLED["max_completion_length"]
KEYS = PLAIN | dict(algorithm="distill", batch_size=3, eval_every=1000, max_completion_length=LENGTH)
FOUR = dict(num_iterations=2, num_mini_batches=2)      # updates from each rollout


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A start model whose completions do end."""
    return ending_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Wider, of another family, and with five rows in its head that stand for no token."""
    folder = tmp_path_factory.mktemp("teacher")
    sizes = dict(hidden_size=48, num_attention_heads=6, num_key_value_heads=3, vocab_size=264)
    config = config_of(LlamaConfig, **sizes)
    random_lm(config, seed=3).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(model, teacher, tmp_path):
    """run(name, rows, key=value, ...) -> the directory of a finished run."""
    def run(name, rows, **values):
        data = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        keys = KEYS | dict(model=model, teacher=teacher, data=data, output=tmp_path / name) | values
        train_here(write_config(tmp_path / f"{name}.yml", **keys))
        return tmp_path / name
    return run


@pytest.fixture
def seen(monkeypatch):
    """The examples of every update, in order."""
    found, update = [], Step.__init__

    def watch(step, engine, index, examples):
        if index:
            found.append(examples)
        update(step, engine, index, examples)

    monkeypatch.setattr(Step, "__init__", watch)
    return found


@pytest.fixture
def updates(monkeypatch):
    return watch_updates(monkeypatch)


# ---- the plain loop ----

def trained_places(example):
    """[(all tokens of prompt and response, the places of its trained tokens)]"""
    found = []
    for response in example.responses:
        tokens = [*example.prompt.tolist(), *response.tokens.tolist()]
        places = [len(example.prompt) + i for i, trained in enumerate(response.trained) if trained]
        found.append((tokens, places))
    return found


def divergences(policy, teacher, examples, beta, temperature):
    """(divergence of each trained token, its -log p), from both models' full logits, a response at a time."""
    losses, surprises = [], []
    for example in examples:
        for tokens, places in trained_places(example):
            before = [place - 1 for place in places]
            logits = policy(torch.tensor([tokens]), use_cache=False).logits[0, before] / temperature
            with torch.no_grad():
                wanted = teacher(torch.tensor([tokens]), use_cache=False).logits[0, before, :259]
            losses.append(plain_divergence(logits, wanted / temperature, beta))
            chosen = torch.tensor([tokens[place] for place in places])
            surprises.append(-logits.log_softmax(1).gather(1, chosen[:, None])[:, 0])
    return torch.cat(losses), torch.cat(surprises)


def eager(path):
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()


def plain_loop(model, teacher, updates, beta, temperature, lr=1e-3, max_grad_norm=1.0):
    """-> the metrics of every update, and its clipped gradients."""
    policy, teacher = eager(model), eager(teacher)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    logged, gradients = [], []
    for examples in updates:
        losses, surprises = divergences(policy, teacher, examples, beta, temperature)
        optimizer.zero_grad()
        losses.mean().backward()
        squares = [float((parameter.grad.double() ** 2).sum()) for parameter in policy.parameters()]
        norm = math.sqrt(sum(squares))
        for parameter in policy.parameters():
            parameter.grad *= min(1.0, max_grad_norm / (norm + 1e-6))
        gradients.append({name: parameter.grad.clone() for name, parameter in policy.named_parameters()})
        optimizer.step()
        logged.append({"loss": losses.mean().item(), "grad_norm": norm, "entropy": surprises.mean().item()})
    return logged, gradients


CASES = {    # name: (rows, keys)
    "reverse": (prompt_rows, dict(beta=1, temperature=0.8)),
    "forward": (prompt_rows, dict(beta=0)),
    "jensen-shannon": (prompt_rows, dict(beta=0.1, temperature=1.3)),
    "half of the data": (sft_rows, dict(beta=0.5, lmbda=0.5)),
    "all of the data": (sft_rows, dict(beta=0, lmbda=0)),
}


@pytest.mark.parametrize("name", CASES)
def test_updates_equal_a_plain_loop(model, teacher, run, seen, updates, name):
    """Four updates from one rollout, examples cut by small micro-batches, and two of the next."""
    rows, keys = CASES[name]
    result = run("run", rows(8), **keys, **FOUR, max_steps=6, max_grad_norm=0.1, micro_batch_tokens=90)
    temperature = keys.get("temperature", 1.0)
    beta = keys["beta"]
    expected, expected_gradients = plain_loop(model, teacher, seen, beta, temperature, max_grad_norm=0.1)
    logged = metrics(result)
    close(logged, expected, 1e-5)
    start, gradients = updates[result]
    assert_same_gradients(gradients, expected_gradients)
    assert_adam_made(final_weights(result), start, gradients)
    assert max(row["grad_norm"] for row in expected) > 0.1             # clipping was at work
    difference = "sampling/sampling_logp_difference/mean"
    if keys.get("lmbda") != 0:
        assert all(row[difference] < 1e-5 for row in (logged[0], logged[4]))
    assert difference not in logged[1]
    lengths = []
    for example in [*seen[0], *seen[1]]:
        lengths += [len(response.tokens) for response in example.responses]
    assert logged[0]["completions/mean_length"] == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize("rows, lmbda", [(prompt_rows, 1), (sft_rows, 0.5)])
def test_the_cut_into_micro_batches_changes_nothing(run, updates, rows, lmbda):
    """One micro-batch = one example at a time, prompts not shared, layers recomputed."""
    keys = dict(max_steps=3, lmbda=lmbda, beta=0.5)
    one = run("one", rows(8), **keys, micro_batch_tokens=100_000)
    other = run("other", rows(8), **keys, micro_batch_tokens=90, rollout_batch_size=2, share_prompt="false",
                attn_implementation="dense", gradient_checkpointing="true")
    close(metrics(other), metrics(one), 1e-5)
    start, gradients = updates[other]
    assert_same_gradients(gradients, updates[one][1])
    assert_adam_made(final_weights(other), start, gradients)


def test_two_processes_equal_one(run, tmp_path):
    """Own samples and responses of the data; in the last rollout one rank has nothing to sample."""
    held_out = write_jsonl(tmp_path / "held-out.jsonl", sft_rows(3, 50))
    one = run("one", sft_rows(7), lmbda=0.5, beta=0.5, **FOUR, epochs=1, eval_data=held_out, eval_every=6)
    config = tmp_path / "two.yml"
    config.write_text((tmp_path / "one.yml").read_text().replace(f"{one}\n", f"{tmp_path / 'two'}\n"))
    assert [rank.code for rank in train_on_ranks(config)] == [0, 0]
    for split in ("train", "eval"):
        for ours, theirs in zip(metrics(tmp_path / "two", split), metrics(one, split), strict=True):
            assert ours.pop("split") == theirs.pop("split")
            assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_a_student_of_itself_has_nothing_to_learn(run, model, beta):
    result = run("self", prompt_rows(8), teacher=model, beta=beta, max_steps=1)
    row, = metrics(result)
    assert abs(row["loss"]) < 1e-6 and row["grad_norm"] < 1e-5


def test_lora_trains_an_adapter_and_leaves_the_teacher(run, model):
    """Also where the teacher is the start model: at the first update its adapter changes nothing."""
    result = run("lora", prompt_rows(8), teacher=model, lora_r=4, max_steps=1)
    assert abs(metrics(result)[0]["loss"]) < 1e-6
    result = run("other", prompt_rows(8), lora_r=4, max_steps=8, lr=1e-2, batch_size=8)
    rows = metrics(result)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert (result / "final" / "adapter_model.safetensors").exists()


# ---- the share of own samples ----

def test_the_responses_of_the_data_are_trained_as_they_are(run, seen):
    """Conversations of several turns too, whose user's turns are not trained."""
    rows = sft_rows(9)
    run("data", rows, lmbda=0, max_steps=3)
    found = []
    for examples in seen:
        for example in examples:
            response, = example.responses
            tokens = [*example.prompt.tolist(), *response.tokens.tolist()]
            trained = [False] * len(example.prompt) + response.trained.tolist()
            found.append(list(zip(tokens, trained)))
    assert found == [sft_sequence(row) for row in rows]


def test_each_prompt_is_drawn_to_be_sampled_or_not(run, seen):
    """A draw belongs to its rollout and row: the batch size does not change it, an epoch does."""
    def own(examples):
        return {example.where: bool(example.extras["sampled"].all()) for example in examples}

    rows = sft_rows(60)
    run("once", rows, lmbda=0.7, batch_size=60, max_steps=2)
    first, second = map(own, seen)
    assert 30 <= sum(first.values()) <= 54 and first != second
    for example in seen[0]:
        response, = example.responses
        assert example.extras["sampled"].item() == (not torch.equal(
            torch.from_numpy(response.tokens), torch.from_numpy(
                own_tokens(rows[int(example.where.rpartition(":")[2]) - 1]))))


def own_tokens(row):
    sequence = sft_sequence(row)
    start = [trained for _, trained in sequence].index(True)
    return np.array([token for token, _ in sequence[start:]], np.int32)


# ---- held-out prompts ----

def test_held_out_prompts_are_answered_and_compared(run, model, teacher, tmp_path):
    """At step 0 and every second update, on the student's own completions, with the same numbers."""
    held_out = prompt_rows(5, 8)
    file = write_jsonl(tmp_path / "held-out.jsonl", held_out)
    keys = dict(eval_data=file, eval_every=2, max_steps=5, temperature=0.8, beta=0.5)
    result = run("eval", prompt_rows(8), **keys, **FOUR)
    rows = metrics(result, "eval")
    assert [row["step"] for row in rows] == [0, 2, 4, 5]
    for row, path in ((rows[0], model), (rows[-1], result / "final")):
        given = [line["prompt"] for line in held_out]
        prompts = [ids(prompt) if isinstance(prompt, str) else chat(prompt) for prompt in given]
        given = [torch.tensor(prompt, dtype=torch.int32).numpy() for prompt in prompts]
        policy = Policy(load_lm(str(path)).eval())
        draws = [(0, 0, i) for i in range(5)]
        sampling = Generation(max_completion_length=LENGTH, temperature=0.8)
        found = sample(policy, byte_tokenizer(), given, draws, 1, sampling)
        losses = []
        student, wanted = eager(path), eager(teacher)
        for prompt, (completion,) in zip(prompts, found):
            tokens = [*prompt, *completion.tokens.tolist()]
            before = range(len(prompt) - 1, len(tokens) - 1)
            with torch.no_grad():
                own = student(torch.tensor([tokens])).logits[0, before] / 0.8
                other = wanted(torch.tensor([tokens])).logits[0, before, :259] / 0.8
                losses.append(plain_divergence(own, other, 0.5))
        assert row["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-5)
        lengths = [len(completion.tokens) for completion, in found]
        assert row["completions/mean_length"] == pytest.approx(sum(lengths) / 5)


def test_watching_changes_nothing(run, tmp_path):
    """And samples.jsonl has no reward."""
    keys = FOUR | dict(max_steps=6)
    bare = run("bare", prompt_rows(8), **keys)
    held_out = write_jsonl(tmp_path / "held-out.jsonl", prompt_rows(5, 8))
    watching = dict(eval_every=1, eval_data=held_out, sample_every=1, save_every=1)
    watched = run("watched", prompt_rows(8), **keys | watching)
    assert_same_weights(final_weights(watched), final_weights(bare))
    assert metrics(watched) == metrics(bare)
    samples = read(watched / "samples.jsonl")
    assert [line["step"] for line in samples] == [step for step in range(1, 7) for _ in range(3)]
    assert all(line.keys() == {"step", "prompt", "completion", "truncated"} for line in samples)


def test_a_rollout_of_both_kinds_resumes_exactly(train, tmp_path):  # noqa: F811
    """Stopped within a rollout with responses of several turns, some of whose tokens are not trained."""
    data = write_jsonl(tmp_path / "rows.jsonl", sft_rows(10))
    keys = dict(epochs=1, save_every=6, eval_every=3, lmbda=0.5, data=data, eval_data=data)
    whole = train("whole", "distill", **keys)
    for last in (2, 7, None):
        part = train("part", "distill", last, **keys)
    assert resumed_from(part) == 7
    assert_same_run(part, whole)


# ---- what stops a run ----

@pytest.mark.parametrize("error", [3e-4, math.nan])
def test_a_sampler_that_differs_stops_the_run(run, tmp_path, monkeypatch, error):
    def wrong(*arguments):
        found = []
        for group in sample(*arguments):
            found.append([completion._replace(logps=completion.logps + error) for completion in group])
        return found
    monkeypatch.setattr("engine.importance.sample", wrong)
    with pytest.raises(RunError, match="the training forward and the sampler differ by .* of rollout 1"):
        run("wrong", sft_rows(8), lmbda=0.5)
    assert metrics(tmp_path / "wrong") == []


def test_a_reward_is_refused_and_so_is_its_score(run, monkeypatch):
    with pytest.raises(Exception, match="reward .* is used by .*, not by distill"):
        run("reward", prompt_rows(8), reward="gsm8k")
    rollouts = Rollouts.iterate

    def scored(self):
        for rollout in rollouts(self):
            self.engine.score(rollout)
            yield rollout
    monkeypatch.setattr(Rollouts, "iterate", scored)
    says = "engine.score was called in a run without a reward; fix: remove the line"
    with pytest.raises(RunError, match=says):
        run("score", prompt_rows(8))


def other_tokenizer(folder):
    """A model whose tokenizer has a token more."""
    random_lm(config_of(vocab_size=260)).save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|tool|>"])
    tokenizer.save_pretrained(folder)
    return str(folder)


def larger_head(folder):
    """A student whose head has more rows than the teacher's."""
    random_lm(config_of(vocab_size=300)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def test_what_cannot_be_distilled_is_refused_before_weights_load(run, tmp_path, monkeypatch):
    monkeypatch.setattr("model.build.load_lm", None)
    rows = prompt_rows(8)
    name = other_tokenizer(tmp_path / "tokenizer")
    assert f"teacher: {name} has another tokenizer than the model" in refused(run, "a", rows, teacher=name)
    error = refused(run, "b", rows, model=larger_head(tmp_path / "larger"))
    assert "knows 264 tokens" in error and "300; fix: give a teacher with at least as many" in error
    assert "teacher: there is no directory runs/nothing" in refused(run, "c", rows, teacher="runs/nothing")
    error = refused(run, "d", rows, lmbda=0.5)
    assert "unknown columns" in error and "response" in error
    error = refused(run, "e", rows, lmbda=0.5, prompt_template="r1_zero")
    assert "prompt_template (" in error and "fix: lmbda=1, or remove prompt_template" in error
    assert "lmbda (" in refused(run, "f", rows, lmbda=1.5) and "beta (" in refused(run, "g", rows, beta=-1)
    assert not any((tmp_path / name).exists() for name in "abcdefg")


def test_a_prompt_without_room_for_a_completion_is_dropped(run):
    """Of rows with responses too: 100 tokens less 10 for a completion."""
    rows = sft_rows(8)
    rows.append({"prompt": "x" * 95, "response": "y"})
    rows.append({"prompt": "x" * 90, "response": "y"})
    result = run("room", rows, lmbda=0.5, max_length=100, max_steps=1)
    report = json.loads((result / "run.json").read_text())["data"]["train"]
    assert report["dropped"]["prompt that leaves no room for max_completion_length"] == 1


# ---- the forecast ----

def test_the_teacher_is_in_the_forecast(tmp_path):
    """Its parameters by hand: embedding, head, two layers of q k v o, MLP and norms, and a norm."""
    sizes = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=8, head_dim=128)
    config = config_of(LlamaConfig, **sizes)
    config.save_pretrained(tmp_path)
    layer = 2 * 1024 * 1024 + 2 * 1024 * 256 + 3 * 1024 * 4096 + 2 * 1024
    parameters = 2 * 259 * 1024 + 2 * layer + 1024
    student = config_of()
    common = Common(algorithm="distill", model="", data="")

    class Config(Generation):
        def frozen_models(self):
            return {"teacher": str(tmp_path)}

    lines = forecast(common, Config(), empty_lm(student, ""), tokens=100, online=True)
    line, = [line for line in lines if line.startswith("teacher (a frozen model)")]
    assert float(line.split()[-2]) == pytest.approx(4e-9 * parameters, abs=0.006)
    without = forecast(common, Generation(), empty_lm(student, ""), tokens=100, online=True)
    assert len(without) == len(lines) - 1
