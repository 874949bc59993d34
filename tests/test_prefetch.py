"""Micro-batches made on a thread are those made in the loop; errors arrive, and no thread is left."""
import random
import threading
import weakref

import numpy as np
import pytest
import torch
from helpers import (
    ONLINE,
    ROWS,
    config_of,
    metrics,
    random_lm,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)

from data.errors import RunError
from data.pack import Example, Response
from engine import loop, step
from engine.prefetch import made_ahead, prefetched
from engine.step import Step
from model.form import Form
from model.policy import Policy


def nothing():
    pass


class Thing:
    """Something that a weak reference can name."""


# ---- the generator ----

def test_on_a_cpu_nothing_is_made_ahead():
    numbers = iter([1, 2, 3])
    assert prefetched(numbers, torch.device("cpu")) is numbers


def test_on_a_gpu_the_thread_is_at_the_device_of_the_loop(monkeypatch):
    """Current devices are those of a thread: without it, every rank would take memory of GPU 0."""
    calls = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: calls.append((device, threading.current_thread())))
    device = torch.device("cuda", 1)
    assert list(prefetched(iter([5, 6]), device)) == [5, 6]
    (called_with, thread), = calls
    assert called_with == device and thread is not threading.main_thread()


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_the_same_in_the_same_order(count):
    assert list(made_ahead(iter(range(1, count + 1)), nothing)) == list(range(1, count + 1))


def test_one_ahead_and_no_more():
    """While the loop is at number k, the thread makes k + 1 and does not begin k + 2; at most two are in
    memory."""
    made = [threading.Event() for _ in range(7)]
    references = []

    def things():
        for i in range(6):
            thing = Thing()
            references.append(weakref.ref(thing))
            made[i].set()
            yield thing
            del thing

    place = 0
    for thing in made_ahead(things(), nothing):
        is_last = place == 5
        assert isinstance(thing, Thing) and (is_last or made[place + 1].wait(10))
        assert not made[min(place + 2, 6)].wait(0.02)
        assert sum(reference() is not None for reference in references) <= 2
        place += 1
    assert place == 6


def test_an_error_in_the_thread_is_raised_in_the_loop():
    """After what came before it, as it was."""
    error = RunError("weight of data.jsonl:7 has 3 numbers; fix: store one")

    def broken():
        yield from (1, 2)
        raise error

    got = []
    before = threading.active_count()
    with pytest.raises(RunError) as caught:
        for number in made_ahead(broken(), nothing):
            got.append(number)
    assert caught.value is error and got == [1, 2]
    assert threading.active_count() == before


def leave_by_break(numbers):
    for _ in numbers:
        break


def leave_by_an_error(numbers):
    with pytest.raises(ZeroDivisionError):
        for number in numbers:
            number / 0


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_an_error, list])
def test_no_thread_is_left(leave):
    before = threading.active_count()
    numbers = made_ahead(iter(range(1, 9)), nothing)
    leave(numbers)
    numbers.close()
    assert threading.active_count() == before


# ---- whole runs ----

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths by name: the start model, and for some algorithms ten training rows and five held-out ones."""
    folder = tmp_path_factory.mktemp("files")
    paths = {"model": tiny_model(folder / "model")}
    for name in RUNS:
        paths[name] = write_jsonl(folder / f"{name}.jsonl", ROWS[name](10))
        paths[f"{name}-eval"] = write_jsonl(folder / f"{name}-eval.jsonl", ROWS[name](5, 10))
    return paths


RUNS = {      # one whose micro-batches draw random numbers, one with a second pass, one with stored numbers
    "sft": dict(lora_r=4, lora_dropout=0.3),
    "kto": {},
    "grpo": ONLINE["grpo"],
}


@pytest.fixture
def run(files, tmp_path):
    """run(name, algorithm) -> the directory of a finished run of four updates with several micro-batches."""
    def run(name, algorithm):
        keys = dict(
            algorithm=algorithm, model=files["model"], data=files[algorithm], output=tmp_path / name,
            eval_data=files[f"{algorithm}-eval"], eval_every=2, batch_size=4, micro_batch_tokens=100,
            max_steps=4, lr=1e-3, max_length=256, save_every="null")
        train_here(write_config(tmp_path / f"{name}.yml", **keys | RUNS[algorithm]))
        return tmp_path / name
    return run


@pytest.fixture
def ahead(monkeypatch):
    """Make micro-batches ahead on the CPU too. -> the thread of every call of `Policy.collate`"""
    collate, threads = Policy.collate, []

    def watched(policy, examples):
        threads.append(threading.current_thread())
        return collate(policy, examples)

    def force():
        for module in (step, loop):
            monkeypatch.setattr(module, "prefetched", lambda batches, device: made_ahead(batches, nothing))
        monkeypatch.setattr(Policy, "collate", watched)
        return threads
    return force


@pytest.mark.parametrize("algorithm", RUNS)
def test_runs_are_the_same_to_the_bit(algorithm, run, ahead):
    if algorithm == "sft":
        pytest.importorskip("peft")
    plain = run("plain", algorithm)
    before = threading.active_count()
    threads = ahead()
    threaded = run("threaded", algorithm)
    assert threading.active_count() == before
    assert len([thread for thread in threads if thread is not threading.main_thread()]) > 8
    for split in ("train", "eval"):
        rows = metrics(plain, split)
        assert rows and metrics(threaded, split) == rows
    weights, = plain.glob("final/*model.safetensors")
    assert (threaded / "final" / weights.name).read_bytes() == weights.read_bytes()


def test_an_error_of_a_row_arrives(run, ahead, monkeypatch):
    """As it is, from the thread that has made two micro-batches before."""
    ahead()
    collate, calls = Policy.collate, []
    before = threading.active_count()

    def third(policy, examples):
        if threading.current_thread() is not threading.main_thread():
            calls.append(examples)
        if len(calls) == 3:
            raise RunError("data.jsonl:3 has 3 numbers; fix: store one")
        return collate(policy, examples)

    monkeypatch.setattr(Policy, "collate", third)
    with pytest.raises(RunError, match="^data.jsonl:3 has 3 numbers; fix: store one$"):
        run("broken", "kto")
    assert threading.active_count() == before


def test_an_error_of_the_loop_leaves_no_thread(run, ahead, monkeypatch):
    """In the first micro-batch of an update with several."""
    ahead()
    before = threading.active_count()
    waiting = []

    def failing(step, losses, metrics, split="train"):
        waiting.append(threading.active_count())
        raise RunError("this step; fix: none")

    monkeypatch.setattr(Step, "log", failing)
    with pytest.raises(RunError, match="^this step; fix: none$"):
        run("failing", "kto")
    assert waiting == [before + 1] and threading.active_count() == before


@pytest.mark.parametrize("attention", ["segments", "varlen"])
def test_collating_draws_nothing(attention):
    """It runs beside a forward that may draw."""
    policy = Policy(random_lm(config_of(), attn_implementation=attention), form=Form(attention))
    responses = [Response.all_trained([5, 6]), Response.all_trained([7])]
    example = Example(np.array([1, 2, 3], np.int32), responses, "here:1")

    def states():
        _, numbers, *others = np.random.get_state()
        return random.getstate(), numbers.tolist(), others, torch.get_rng_state().tolist()

    before = states()
    policy.collate([example])
    policy.collate([])
    assert states() == before
