"""Whole runs of train.py against a plain loop: one unpadded sequence at a time, full logits, tokens spelled
out by hand."""
import json
import math

import pytest
import torch
from helpers import (
    ALGORITHMS,
    assert_adam_made,
    assert_same_gradients,
    assert_same_weights,
    final_weights,
    metrics,
    tiny_model,
    train_here,
    trained_weights,
    watch_updates,
    write_config,
    write_jsonl,
)
from transformers import AutoModelForCausalLM

from data.errors import RunError
from engine.loop import Engine
from engine.step import Step

PLAIN = dict(
    share_prompt="true", shuffle="false", schedule="constant", warmup=0, weight_decay=0, batch_size=4,
    lr=1e-3, max_length=256, save_every="null")
START, END = [257], [258]       # <|im_start|>, <|im_end|>
SIDES = "chosen", "rejected"
TOLERANCE = 1e-4                # of fp32 runs: log-probs of a response that differ by less are equal


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by name: the start model and, for every algorithm, ten training rows and five held-out ones
    (`dpo`, `dpo-eval`)."""
    folder = tmp_path_factory.mktemp("files")
    paths = {"model": tiny_model(folder / "model")}
    for name, rows in ALGORITHMS.items():
        paths[name] = write_jsonl(folder / f"{name}.jsonl", rows(10))
        paths[f"{name}-eval"] = write_jsonl(folder / f"{name}-eval.jsonl", rows(5, 10))
    return paths


@pytest.fixture
def updates(monkeypatch):
    return watch_updates(monkeypatch)


@pytest.fixture
def run(files, tmp_path):
    """run(name, algorithm, key=value, ...) -> the directory of a finished run."""
    def run(name, algorithm, **values):
        keys = dict(algorithm=algorithm, model=files["model"], data=files[algorithm], output=tmp_path / name)
        train_here(write_config(tmp_path / f"{name}.yml", **keys | PLAIN | values))
        return tmp_path / name
    return run


def close(rows, expected, tolerance):
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected):
        numbers = {name: value for name, value in other.items() if name != "split"}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=tolerance, abs=tolerance)


# ---- the plain loop ----

def ids(text):
    """The byte tokenizer's ids of ASCII text, from its definition: printable bytes in order, then the
    others."""
    return [ord(character) - 33 if character > " " else 188 + ord(character) for character in text]


def turn(role, text):
    return START + ids(f"{role}\n{text}") + END + ids("\n")


def chat(history):
    """A prompt: the turns so far and the beginning of the assistant's."""
    turns = [turn(message["role"], message["content"]) for message in history]
    return sum(turns, []) + START + ids("assistant\n")


def untrained(tokens):
    return [(token, False) for token in tokens]


def trained(tokens):
    return [(token, True) for token in tokens]


def sft_sequence(row):
    """[(token, whether it is trained)]"""
    if "prompt" in row:
        return untrained(ids(row["prompt"])) + trained(ids(row["response"]) + END)
    sequence = []
    for i, message in enumerate(row["messages"]):
        if message["role"] == "assistant":
            prompt = chat(row["messages"][:i])
            sequence += untrained(prompt[len(sequence):])
            sequence += trained(ids(message["content"]) + END)
    return sequence


def sequence_logps(lm, sequence):
    """Log-probs of the trained tokens of one sequence, as a list."""
    tokens = [token for token, _ in sequence]
    logps = torch.log_softmax(lm(torch.tensor([tokens]), use_cache=False).logits[0], dim=-1)
    return [logps[i - 1, token] for i, (token, is_trained) in enumerate(sequence) if is_trained]


def answer_sequence(prompt, response):
    """A prompt and a response with its stop token, both lists of messages."""
    return untrained(chat(prompt)) + trained(ids(response[0]["content"]) + END)


def answer_logps(lm, prompt, response):
    return sequence_logps(lm, answer_sequence(prompt, response))


def mean(values):
    return sum(values) / len(values)


# `loss_of(rows, policy, reference)` -> the loss of one update and the numbers to be logged beside it

def all_logps(rows, policy):
    logps = []
    for row in rows:
        logps += sequence_logps(policy, sft_sequence(row))
    return logps


def sft_loss_of(rows, policy, reference):
    return -mean(all_logps(rows, policy)), {}


def dft_loss_of(rows, policy, reference):
    logps = all_logps(rows, policy)
    weighted = [math.exp(logp.item()) * logp for logp in logps]
    return -mean(weighted), {"nll_loss": -mean(logps).item()}


def over_pairs(reward, loss, average=False, nll=None):
    """`reward(logp, reference_logp)` of a response, both summed or averaged over its tokens;
    `loss(chosen, rejected)` of a pair's rewards; `nll`: the weight of the chosen tokens' mean negative
    log-prob (None: it is not even logged)."""
    def total(logps):
        return mean(logps) if average else sum(logps)

    def pair(row, policy, reference):
        """-> the numbers of a pair, the log-probs of its chosen tokens."""
        logps, rewards, tolerance = {}, {}, 0.0
        for side in SIDES:
            tokens = answer_logps(policy, row["prompt"], row[side])
            logps[side] = tokens
            rewards[side] = reward(total(tokens), total(answer_logps(reference, row["prompt"], row[side])))
            tolerance += TOLERANCE / len(tokens)
        margin = rewards["chosen"] - rewards["rejected"]
        rounding = reward(tolerance if average else TOLERANCE, 0.0)
        return {
            "loss": loss(rewards["chosen"], rewards["rejected"]),
            "rewards/chosen": rewards["chosen"],
            "rewards/rejected": rewards["rejected"],
            "rewards/margins": margin,
            "rewards/accuracies": (margin > rounding).float(),
            "logps/chosen": total(logps["chosen"]),
            "logps/rejected": total(logps["rejected"]),
        }, logps["chosen"]

    def loss_of(rows, policy, reference):
        terms, likelihoods = [], []
        for row in rows:
            numbers, chosen = pair(row, policy, reference)
            terms.append(numbers)
            likelihoods += chosen
        means = {}
        for name in terms[0]:
            means[name] = mean([term[name] for term in terms])
        if nll is not None:
            means["nll_loss"] = -mean(likelihoods)
            means["loss"] = means["loss"] + nll * means["nll_loss"]
        total_loss = means.pop("loss")
        return total_loss, {name: torch.as_tensor(value).item() for name, value in means.items()}
    return loss_of


def cross_entropy(margin, smoothing=0.0):
    """-log sigmoid(margin), and with smoothing a share of it for the opposite label."""
    labelled = torch.log(1 + torch.exp(-margin.double()))
    opposite = torch.log(1 + torch.exp(margin.double()))
    return (1 - smoothing) * labelled + smoothing * opposite


def log_odds(logp):
    return logp - torch.log(1 - torch.exp(logp))


def dpo_loss_of(beta=0.1, smoothing=0.0, rpo_alpha=None, with_reference=1, average=False):
    def reward(logp, frozen):
        return beta * (logp - with_reference * frozen)
    return over_pairs(reward, lambda c, r: cross_entropy(c - r, smoothing), average, nll=rpo_alpha)


def ipo_loss_of(beta=0.1, average=True):
    def loss(chosen, rejected):
        return ((chosen - rejected) / beta - 1 / (2 * beta)) ** 2
    return over_pairs(lambda logp, frozen: beta * (logp - frozen), loss, average)


def apo_loss_of(beta=0.1):
    def loss(chosen, rejected):
        kept, lost = torch.exp(chosen), torch.exp(rejected)
        return 1 - kept / (1 + kept) + lost / (1 + lost)
    return over_pairs(lambda logp, frozen: beta * (logp - frozen), loss)


def orpo_loss_of(beta=0.1):
    def loss(chosen, rejected):
        return beta * cross_entropy(log_odds(chosen / beta) - log_odds(rejected / beta))
    return over_pairs(lambda logp, _: beta * logp, loss, True, 1.0)


def simpo_loss_of(beta=2.0, gamma=1.0, smoothing=0.0, cpo_alpha=0.0):
    def loss(chosen, rejected):
        return cross_entropy(chosen - rejected - gamma, smoothing)
    return over_pairs(lambda logp, _: beta * logp, loss, True, cpo_alpha)


def cpo_loss_of(beta=0.1, smoothing=0.0, cpo_alpha=1.0):
    def loss(chosen, rejected):
        return cross_entropy(chosen - rejected, smoothing)
    return over_pairs(lambda logp, _: beta * logp, loss, nll=cpo_alpha)


def kto_loss_of(beta=0.1, desirable=1.0, undesirable=1.0):
    def log_ratio(lms, prompt, response):
        """-> log pi / pi_ref, log pi."""
        logps, frozen = [sum(answer_logps(lm, prompt, response)) for lm in lms]
        return logps - frozen, logps.item()

    def mismatched(rows, i):
        """The row before with another prompt."""
        j = i - 1
        while rows[j % len(rows)]["prompt"] == rows[i]["prompt"]:
            j -= 1
        return rows[j % len(rows)]

    def loss_of(rows, *lms):
        kl = 0.0
        for i, row in enumerate(rows):
            ratio, _ = log_ratio(lms, row["prompt"], mismatched(rows, i)["completion"])
            kl += ratio.item() / len(rows)
        kl = max(kl, 0.0)
        terms, rewards, logps = [], {True: [], False: []}, {True: [], False: []}
        for row in rows:
            label = row["label"]
            ratio, logp = log_ratio(lms, row["prompt"], row["completion"])
            value = 1 / (1 + torch.exp(-beta * (ratio - kl if label else kl - ratio)))
            terms.append((desirable if label else undesirable) * (1 - value))
            rewards[label].append(beta * ratio.item())
            logps[label].append(logp)
        numbers = {"kl": kl}
        for side, label in zip(SIDES, (True, False)):
            if rewards[label]:
                numbers[f"rewards/{side}"] = mean(rewards[label])
                numbers[f"logps/{side}"] = mean(logps[label])
        if rewards[True] and rewards[False]:
            numbers["rewards/margins"] = numbers["rewards/chosen"] - numbers["rewards/rejected"]
        return mean(terms), numbers
    return loss_of


def rm_loss_of(center=0.0):
    def score(policy, prompt, response):
        tokens = [token for token, _ in answer_sequence(prompt, response)]
        return policy.model(torch.tensor([tokens]), use_cache=False).last_hidden_state[0, -1] @ policy.head[0]

    def loss_of(rows, policy, reference):
        losses, chosen, rejected, right = [], [], [], []
        for row in rows:
            c, r = [score(policy, row["prompt"], row[side]) for side in SIDES]
            losses.append(cross_entropy(c - r - row.get("margin", 0.0)) + center * (c + r) ** 2)
            chosen.append(c.item())
            rejected.append(r.item())
            right.append(float(c - r > TOLERANCE))
        return mean(losses), {
            "rewards/chosen": mean(chosen),
            "rewards/rejected": mean(rejected),
            "margin": mean(chosen) - mean(rejected),
            "mean_reward": (mean(chosen) + mean(rejected)) / 2,
            "accuracy": mean(right),
        }
    return loss_of


LOSS_OF = {
    "sft": sft_loss_of,
    "dft": dft_loss_of,
    "dpo": dpo_loss_of(),
    "rpo": dpo_loss_of(rpo_alpha=1.0),
    "ipo": ipo_loss_of(),
    "apo": apo_loss_of(),
    "kto": kto_loss_of(),
    "orpo": orpo_loss_of(),
    "simpo": simpo_loss_of(),
    "cpo": cpo_loss_of(),
    "rm": rm_loss_of(),
}


def read(path):
    with open(path) as file:
        return [json.loads(line) for line in file]


def plain_loop(model, data, algorithm, loss_of, updates, batch_size=4, lr=1e-3, max_grad_norm=1.0):
    """-> the metrics of every update, its clipped gradients by the names of final/, the trained policy and
    the reference."""
    policy = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    reference.requires_grad_(False)
    if algorithm == "rm":
        generator = torch.Generator().manual_seed(0)
        policy.head = torch.nn.Parameter(torch.randn(1, 32, generator=generator) / math.sqrt(33))
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=False)
    rows, logged, gradients = read(data), [], []
    batches = [rows[start:start + batch_size] for start in range(0, len(rows), batch_size)]
    for index in range(updates):
        loss, values = loss_of(batches[index % len(batches)], policy, reference)
        optimizer.zero_grad()
        loss.backward()
        found, squares = {}, 0.0
        for name, parameter in policy.named_parameters():
            if parameter.grad is not None:                         # rm has no use for the LM head
                found["v_head.summary.weight" if name == "head" else name] = parameter.grad
                squares += float((parameter.grad.double() ** 2).sum())
        norm = math.sqrt(squares)
        for gradient in found.values():
            gradient *= min(1.0, max_grad_norm / (norm + 1e-6))
        gradients.append({name: gradient.clone() for name, gradient in found.items()})
        optimizer.step()
        logged.append({"loss": loss.item(), "grad_norm": norm, **values})
    return logged, gradients, policy, reference


VARIANTS = {    # name: (algorithm, its loss by the plain loop, options)
    **{name: (name, loss_of, {}) for name, loss_of in LOSS_OF.items()},
    "cdpo": ("dpo", dpo_loss_of(0.5, 0.2), dict(beta=0.5, label_smoothing=0.2)),
    "rpo-weight": ("rpo", dpo_loss_of(0.5, 0.2, 0.3), dict(beta=0.5, label_smoothing=0.2, rpo_alpha=0.3)),
    "dpo-free": ("dpo", dpo_loss_of(with_reference=0), dict(reference_free="true")),
    "dpo-means": ("dpo", dpo_loss_of(5, 0.2, average=True),
                  dict(beta=5, label_smoothing=0.2, average_log_prob="true")),
    "apo-beta": ("apo", apo_loss_of(0.7), dict(beta=0.7)),
    "ipo-sums": ("ipo", ipo_loss_of(0.5, average=False), dict(beta=0.5, average_log_prob="false")),
    "kto-weights": ("kto", kto_loss_of(0.5, 1.5, 0.5),
                    dict(beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)),
    "cpo-simpo": ("simpo", simpo_loss_of(2.5, 0.5, 0.1, 0.7),
                  dict(beta=2.5, simpo_gamma=0.5, label_smoothing=0.1, cpo_alpha=0.7)),
    "cpo-smoothed": ("cpo", cpo_loss_of(0.3, 0.1, 0.5), dict(beta=0.3, label_smoothing=0.1, cpo_alpha=0.5)),
    "rm-centered": ("rm", rm_loss_of(0.05), dict(center_rewards_coefficient=0.05)),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_updates_equal_a_plain_loop(files, run, updates, name):
    """Six updates, two epochs whose last update is smaller; batches, targets, stop tokens, division, clipping
    and AdamW."""
    algorithm, loss_of, options = VARIANTS[name]
    clip = 0.05 if name == algorithm else 100.0
    loop = plain_loop(files["model"], files[algorithm], algorithm, loss_of, updates=6, max_grad_norm=clip)
    expected, expected_gradients, *_ = loop
    result = run("ours", algorithm, epochs=2, max_grad_norm=clip, **options)
    close(metrics(result), expected, 1e-5)
    assert [row["epoch"] for row in metrics(result)] == [.3333, .6667, 1, 1.3333, 1.6667, 2]
    assert clip == 100 or max(row["grad_norm"] for row in expected) > clip      # clipping was at work
    start, gradients = updates[result]
    assert_same_gradients(gradients, expected_gradients)
    assert_adam_made(trained_weights(result), start, gradients)


# ---- what must not change the numbers ----

@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_cut_into_micro_batches_changes_nothing(run, updates, algorithm):
    """One micro-batch of 8 = 8 of 1, prompts shared or not, attention by segments or with a mask, layers
    recomputed or not."""
    whole = dict(batch_size=8, micro_batch_tokens=100_000, max_steps=4)
    one = run("one", algorithm, **whole)
    others = {
        "eight": dict(micro_batch_tokens=2),
        "some": dict(micro_batch_tokens=200),
        "separate": dict(share_prompt="false"),
        "dense": dict(attn_implementation="dense"),
        "recomputed": dict(gradient_checkpointing="true"),
    }
    for name, options in others.items():
        other = run(name, algorithm, **whole | options)
        close(metrics(other), metrics(one), 1e-5)
        start, gradients = updates[other]
        assert_same_gradients(gradients, updates[one][1])
        assert_adam_made(trained_weights(other), start, gradients)


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "kto"])
def test_watching_changes_nothing(files, run, algorithm):
    """Evaluation, samples, logging, checkpoints and a repetition: bit-identical weights."""
    options = dict(epochs=2, shuffle="true")
    bare = run("bare", algorithm, log_every=100, **options)
    held_out = files[f"{algorithm}-eval"]
    watching = dict(eval_data=held_out, eval_every=1, sample_every=2, save_every=1)
    watched = run("watched", algorithm, **watching, **options)
    again = run("again", algorithm, **options)
    assert_same_weights(final_weights(watched), final_weights(bare))
    assert_same_weights(final_weights(again), final_weights(bare))
    assert metrics(watched) == metrics(again)
    assert [row for row in metrics(again) if row["step"] in (1, 6)] == metrics(bare)
    assert [row["step"] for row in metrics(watched, "eval")] == list(range(7))
    samples = [json.loads(line) for line in (watched / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [2] * 4 + [4] * 4 + [6] * 4


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation_is_the_mean_over_all_held_out_rows(files, run, algorithm):
    """Five rows in batches of four and one, cut further: before and after an update, by the plain loop."""
    held_out = files[f"{algorithm}-eval"]
    result = run(algorithm, algorithm, eval_data=held_out, micro_batch_tokens=150, max_steps=1)
    expected = []
    for updates in (0, 1):
        _, _, *models = plain_loop(files["model"], files[algorithm], algorithm, LOSS_OF[algorithm], updates)
        with torch.no_grad():
            loss, numbers = LOSS_OF[algorithm](read(held_out), *models)
        expected.append({"step": updates, "loss": loss.item(), **numbers})
    close(metrics(result, "eval"), expected, 1e-5)


# ---- the plan ----

@pytest.mark.parametrize("schedule, warmup, expected", [
    ("constant", 0, [1, 1, 1, 1, 1, 1, 1, 1]),
    ("constant", 4, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]),
    ("linear", 0, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
    ("linear", 2, [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("linear", 0.25, [1 / 2, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
    ("cosine", 0.5, [1 / 4, 2 / 4, 3 / 4, 1, 1, (2 + 2 ** .5) / 4, 1 / 2, (2 - 2 ** .5) / 4]),
    ("linear", 8, [1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8, 7 / 8, 1]),
])
def test_learning_rates(run, schedule, warmup, expected):
    result = run("rates", "sft", schedule=schedule, warmup=warmup, max_steps=8, lr=2e-4)
    assert [row["lr"] / 2e-4 for row in metrics(result)] == pytest.approx(expected, rel=1e-12)


def test_every_epoch_has_its_own_order(run, monkeypatch):
    seen = []
    original = Step.__init__

    def spy(self, engine, index, examples):
        lines = [int(example.where.rpartition(":")[2]) for example in examples]
        seen.append((index, lines))
        original(self, engine, index, examples)
    monkeypatch.setattr(Step, "__init__", spy)
    run("order", "sft", epochs=2, shuffle="true", seed=3)
    plan = dict(seen)
    assert [len(plan[index]) for index in range(1, 7)] == [4, 4, 2, 4, 4, 2]
    first = plan[1] + plan[2] + plan[3]
    second = plan[4] + plan[5] + plan[6]
    assert sorted(first) == sorted(second) == list(range(1, 11))
    assert first != second and first != sorted(first)
    run("other-seed", "sft", epochs=1, shuffle="true", seed=4)
    other = dict(seen[-3:])
    assert first != other[1] + other[2] + other[3]


# ---- step-0 invariants ----

def test_dpo_starts_at_log_two(run):
    row = metrics(run("start", "dpo", max_steps=1))[0]
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [row["rewards/chosen"], row["rewards/rejected"]] == pytest.approx([0, 0], abs=1e-5)
    assert row["rewards/accuracies"] == 0


@pytest.mark.parametrize("algorithm, options", [
    ("dpo", {}), ("dpo", dict(average_log_prob="true")), ("ipo", {}), ("apo", {})])
def test_rounding_wins_no_pair(run, monkeypatch, algorithm, options):
    """The reference's log-probs are off by what another CPU, or another cut into micro-batches, may make of
    them."""
    original, generator = Engine.collect, torch.Generator().manual_seed(0)

    def rounded(*arguments):
        # 30 tokens make that 2e-5: more than the last place of a sum of 100 nats (8e-6), less than a tie
        # (1e-4)
        exact = original(*arguments)
        return [logps + 3e-6 * torch.randn(logps.shape, generator=generator) for logps in exact]

    monkeypatch.setattr(Engine, "collect", rounded)
    first, second = metrics(run("rounded", algorithm, max_steps=2, **options))
    assert first["rewards/margins"] != 0 and first["rewards/accuracies"] == 0 < second["rewards/accuracies"]


@pytest.mark.parametrize("error", [3e-4, -3e-4])
def test_a_wrong_reference_stops_the_run(run, tmp_path, monkeypatch, error):
    original = Engine.collect

    def shifted(*arguments):
        return [logps + error for logps in original(*arguments)]

    monkeypatch.setattr(Engine, "collect", shifted)
    with pytest.raises(RunError, match="policy and reference differ"):
        run("wrong", "dpo", max_steps=1)
    assert metrics(tmp_path / "wrong") == []


@pytest.mark.parametrize("shift", [0.0, 0.2])
def test_rounding_in_bf16_stops_no_run_but_a_wrong_reference_does(run, tmp_path, monkeypatch, shift):
    """Single log-probs of SmolLM2-135M in bf16 are off by 0.25, all of them by 0.03 on average."""
    original, generator = Engine.collect, torch.Generator().manual_seed(0)

    def rounded(*arguments):
        noisy = []
        for logps in original(*arguments):
            noise = 0.04 * torch.randn(logps.shape, generator=generator)
            noise[0] = 0.25
            noisy.append(logps + noise + shift)
        return noisy

    monkeypatch.setattr(Engine, "collect", rounded)
    if shift:
        with pytest.raises(RunError, match="policy and reference differ by 0.2"):
            run("bf16", "dpo", max_steps=1, precision="bf16")
    else:
        run("bf16", "dpo", max_steps=1, precision="bf16")
        assert len(metrics(tmp_path / "bf16")) == 1


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_weights_that_do_not_move_stop_the_run(run, algorithm):
    with pytest.raises(RunError, match="no weight moved in the first update"):
        run("still", algorithm, max_steps=2, lr=1e-30)


def test_a_loss_that_is_not_finite_stops_before_the_update(run, tmp_path, monkeypatch):
    made, original = [], torch.optim.AdamW.step

    def counted(optimizer):
        made.append(len(made))
        return original(optimizer)

    def loss(logps):
        return -logps * (math.nan if len(made) == 2 else 1), {}

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    monkeypatch.setattr("algorithms.sft.sft_loss", loss)
    says = "update 3, before the weights were touched; rows: .*sft.jsonl:9, .*sft.jsonl:10;"
    with pytest.raises(RunError, match=says):
        run("nan", "sft", epochs=2)
    assert len(made) == 2
    assert [row["step"] for row in metrics(tmp_path / "nan")] == [1, 2]
