"""Two processes under torchrun (gloo, sharded by FSDP2) equal one; they resume, evaluate and sample without a deadlock."""
import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import robust_helpers
from helpers import (
    ONLINE,
    ROOT,
    ROWS,
    assert_same_weights,
    final_weights,
    metrics,
    run_train,
    tiny_model,
    train_here,
    trained_weights,
    write_config,
    write_jsonl,
)
from safetensors.torch import load_file


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
def config(tmp_path_factory):
    """config(name, algorithm, key=value, ...) -> the path of a configuration. Three rows per update and ten rows: the ranks get two and
    one, and one and none (of kto eleven: one row has no other's response); five held-out rows. Online seven rows: in the last of
    three rollouts one rank has no prompt to sample, and one of the two updates from it no example."""
    folder = tmp_path_factory.mktemp("distributed")
    model = tiny_model(folder / "model")

    def config(name, algorithm, **values):
        rows = ROWS[algorithm]
        count = 7 if algorithm in ONLINE else 11 if algorithm == "kto" else 10
        data = {"data": write_jsonl(folder / f"{algorithm}.jsonl", rows(count)),
                "eval_data": write_jsonl(folder / f"{algorithm}-eval.jsonl", rows(5, 10))}
        options = dict(algorithm=algorithm, model=model, **data, output=folder / name / "run", batch_size=3, epochs=2, lr=1e-3,
                       weight_decay=0.1, max_length=256, eval_every=3, save_every=3)
        if algorithm in ONLINE:
            options |= ONLINE[algorithm] | {"epochs": 1, "eval_every": 4, "sample_every": 4}
            options |= {"num_ppo_epochs" if algorithm == "ppo" else "num_iterations": 1}
        return Path(write_config(folder / f"{name}.yml", **options | values))
    return config


def torchrun(count, *words):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = subprocess.run([*launcher, *map(str, words)], cwd=ROOT, timeout=200, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture(scope="module")
def both(config):
    """Algorithm -> the directories of its run with one process and with two; all of the latter under one torchrun."""
    one, two = ({algorithm: config(f"{algorithm}-{count}", algorithm) for algorithm in ROWS} for count in (1, 2))
    for path in one.values():
        train_here(path)
    torchrun(2, "tests/all_algorithms.py", *two.values())
    return {algorithm: [path.with_suffix("") / "run" for path in (one[algorithm], two[algorithm])] for algorithm in ROWS}


@pytest.mark.parametrize("algorithm", ROWS)
def test_two_processes_equal_one(both, algorithm):
    one, two = both[algorithm]
    for split, count in zip(("train", "eval"), (6, 3) if algorithm in ONLINE else (8, 4)):
        ours, theirs = metrics(one, split), metrics(two, split)
        assert len(ours) == count
        for x, y in zip(ours, theirs, strict=True):
            assert x.pop("split") == y.pop("split") and y == pytest.approx(x, rel=2e-5, abs=2e-5)
    assert_same_weights(trained_weights(two), trained_weights(one), 2e-5)
    assert json.loads((two / "run.json").read_text())["world_size"] == 2
    if algorithm in ONLINE:
        assert len(completions(one)) == 4 and completions(two) == completions(one)


def completions(run):
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def test_two_processes_sample_with_an_adapter_as_one(config):
    pytest.importorskip("peft")
    one, two = (config(f"grpo-lora-{count}", "grpo", lora_r=4, lr=1e-2) for count in (1, 2))
    train_here(one)
    assert [rank.code for rank in two_ranks(two)] == [0, 0]
    one, two = (path.with_suffix("") / "run" for path in (one, two))
    assert completions(two) == completions(one)
    for x, y in zip(metrics(one), metrics(two), strict=True):
        assert x.pop("split") == y.pop("split") and y == pytest.approx(x, rel=2e-5, abs=2e-5)


@pytest.fixture(scope="module")
def whole(config):
    """A run of dpo under torchrun as a user starts it, with samples."""
    path = config("whole", "dpo", sample_every=4)
    done = run_train([path], processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("metrics  ") == 1      # one rank speaks
    return path.with_suffix("") / "run"


def test_torchrun(whole, both):
    assert metrics(whole) == metrics(both["dpo"][1])
    assert_same_weights(final_weights(whole), final_weights(both["dpo"][1]))
    steps = [json.loads(line)["step"] for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert steps == [4] * 4 + [8] * 4


RESUMED = [("dpo", 1, 2), ("dpo", 2, 2), ("dpo", 2, 1), ("dpo", 2, 3), ("grpo", 2, 2), ("grpo", 2, 1)]
# of grpo some gradients are so small that Adam makes their rounding a part of a step, and lr is 1e-3
CLOSE = {"dpo": 1e-6, "grpo": 5e-6}


@pytest.fixture(scope="module")
def resumed(config, both):
    """(algorithm, ranks before, ranks after) -> the directory of a run that went on from its checkpoint at step 3: of dpo
    in the first epoch, of grpo between two updates from one rollout."""
    runs, paths = {}, {1: [], 2: [], 3: []}
    for algorithm, before, after in RESUMED:
        whole = both[algorithm][before - 1]
        path = config(f"resumed-{algorithm}-{before}-{after}", algorithm)
        part = path.with_suffix("") / "run"
        shutil.copytree(whole, part)
        shutil.rmtree(part / "final")
        shutil.rmtree(part / "checkpoints" / "step-000006")
        settings = (part / "config.yaml").read_text()
        (part / "config.yaml").write_text(settings.replace(str(whole), str(part)))
        runs[algorithm, before, after] = part
        paths[after].append(path)
    for path in paths.pop(1):
        train_here(path)
    for count, those in paths.items():
        torchrun(count, "tests/all_algorithms.py", *those)
    return runs


@pytest.mark.parametrize("algorithm, before, after", RESUMED)
def test_a_run_resumes_on_any_number_of_processes(algorithm, before, after, resumed, both):
    """Weights and moments are those of one process without interruption; from two to two also those of two, to the bit."""
    run = resumed[algorithm, before, after]
    assert json.loads((run / "run.json").read_text())["resumed_from_step"] == 3
    assert json.loads((run / "run.json").read_text())["world_size"] == after
    for i, tolerance in enumerate((CLOSE[algorithm], 0.0) if before == after == 2 else (CLOSE[algorithm],)):
        whole = both[algorithm][i]
        assert_same_weights(final_weights(run), final_weights(whole), tolerance)
        assert_same_weights(moments(run), moments(whole), tolerance)
        for ours, theirs in zip(metrics(run), metrics(whole), strict=True):
            assert ours.pop("split") == theirs.pop("split") and ours == pytest.approx(theirs, rel=2e-5, abs=2e-5)


def moments(run):
    return load_file(run / "checkpoints" / "step-000006" / "optimizer.safetensors")


def test_an_error_ends_all_processes(whole):
    """One line of all ranks, which torchrun's table shows for each of them, and no rank left waiting."""
    done = run_train([whole.parent.with_suffix(".yml"), "lr=5e-3"], processes=2)
    lines = [line for line in done.stderr.splitlines() if "error: output: " in line and "(lr differ)" in line]
    assert done.returncode == 1 and lines[0].startswith("error: output: ")
    assert len(lines) == 3 and all(line.startswith("  traceback : error: output: ") for line in lines[1:])
    assert done.stderr.count("Traceback") == 1                                # torchrun's own
