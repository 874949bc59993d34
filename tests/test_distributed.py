"""Two processes under torchrun (gloo, sharded by FSDP2) equal one; they resume, evaluate and sample without a deadlock."""
import json
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import robust_helpers
from helpers import (
    assert_same_weights,
    final_weights,
    metrics,
    pair_rows,
    run_train,
    sft_rows,
    tiny_model,
    train_here,
    write_config,
    write_jsonl,
)

ROWS = {"sft": sft_rows, "dpo": pair_rows}


def join(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def two_ranks(config, *words):
    """What torchrun does, without its seconds of imports: two processes with its environment variables. -> the results of
    `robust_helpers.train`"""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = [config.with_name(f"rank{rank}") for rank in range(2)]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        shutil.copy(config, folder / "config.yml")

    def start(rank):
        return robust_helpers.train(folders[rank], *words, patch=join, arguments=(rank, port))
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(start, range(2)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """run(name, algorithm, processes) -> the run's directory. Three rows per update and ten rows: the ranks get two and one,
    and one and none; five held-out rows. Cached by name; `resume` continues what is there. dpo-2 runs under torchrun itself."""
    folder = tmp_path_factory.mktemp("distributed")
    model = tiny_model(folder / "model")

    def run(name, algorithm, processes, resume=False):
        directory = folder / name
        if directory.exists() and not resume:
            return directory
        data = {"data": write_jsonl(folder / f"{algorithm}.jsonl", ROWS[algorithm](10)),
                "eval_data": write_jsonl(folder / f"{algorithm}-eval.jsonl", ROWS[algorithm](5, 10))}
        config = write_config(folder / f"{name}.yml", algorithm=algorithm, model=model, **data, output=directory, batch_size=3,
                              epochs=2, lr=1e-3, weight_decay=0.1, max_length=256, eval_every=3, save_every=3, sample_every=4)
        if processes == 1:
            train_here(config, "sample_every=null")
        elif name == "dpo-2":
            done = run_train([config], processes)
            assert done.returncode == 0, done.stderr[-3000:]
            assert done.stdout.count("metrics  ") == 1      # one rank speaks
        else:
            ranks = two_ranks(Path(config), "sample_every=null")
            assert [rank.code for rank in ranks] == [0, 0], ranks
            assert "metrics  " in ranks[0].out and ranks[1].out == ranks[1].err == ""
        return directory
    return run


@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
def test_two_processes_equal_one(run, algorithm):
    one, two = run(f"{algorithm}-1", algorithm, 1), run(f"{algorithm}-2", algorithm, 2)
    for split, count in (("train", 8), ("eval", 4)):
        ours, theirs = metrics(one, split), metrics(two, split)
        assert len(ours) == count
        for x, y in zip(ours, theirs, strict=True):
            assert x.pop("split") == y.pop("split") and y == pytest.approx(x, rel=2e-5, abs=2e-5)
    assert_same_weights(final_weights(two), final_weights(one), 1e-5)
    assert json.loads((two / "run.json").read_text())["world_size"] == 2
    steps = [json.loads(line)["step"] for line in (two / "samples.jsonl").read_text().splitlines()]
    assert steps == ([4] * 4 + [8] * 4 if algorithm == "dpo" else [])


@pytest.mark.parametrize("processes", [2, 1])
def test_a_run_of_two_processes_resumes(run, processes):
    """From step 3, in the first epoch: with two processes to the bit, with one to rounding."""
    whole = run("dpo-2", "dpo", 2)
    part = whole.with_name(f"resumed-{processes}")
    shutil.copytree(whole, part)
    shutil.rmtree(part / "final")
    shutil.rmtree(part / "checkpoints" / "step-000006")
    run(part.name, "dpo", processes, resume=True)
    assert json.loads((part / "run.json").read_text())["resumed_from_step"] == 3
    if processes == 2:
        assert metrics(part) == metrics(whole) and metrics(part, "eval") == metrics(whole, "eval")
    assert [row["loss"] for row in metrics(part)] == pytest.approx([row["loss"] for row in metrics(whole)], abs=2e-5)
    assert_same_weights(final_weights(part), final_weights(whole), 0.0 if processes == 2 else 1e-5)


def test_an_error_ends_all_processes(run):
    """One line, exit code 2, no rank left waiting."""
    config = run("dpo-2", "dpo", 2).with_name("dpo-2.yml")
    for rank in two_ranks(config, "lr=5e-3"):
        assert rank.code == 2 and rank.err.count("\n") == 1 and "error: output: " in rank.err and "(lr differ)" in rank.err
