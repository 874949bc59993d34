"""Rewards that start processes, end or hang them, and change the process they are called in: runs of train.py with such files."""
import os
import signal
import textwrap
import time
from pathlib import Path

import pytest
import robust_helpers as child
from helpers import tiny_model

FAST = dict(num_iterations=1, num_mini_batches=1, max_completion_length=4, save_every=1, eval_data="null", max_steps=2, batch_size=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def project(model, tmp_path):
    """project(code, key=value, ...) -> the directory of a grpo run whose reward is the function `reward` of that code."""
    def project(code, **values):
        (tmp_path / "mine.py").write_text(textwrap.dedent(code))
        return child.project(tmp_path, "grpo", model, **FAST | {"reward": "mine.py:reward"} | values)
    return project


def lines(result):
    """What a run said on stderr, without a traceback."""
    assert "Traceback" not in result.err, result.err
    return result.err.splitlines()


# ---- processes ----

POOLS = """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    fork = multiprocessing.get_context("fork")

    def work(text):
        return len(text) / 10

    def reward(prompts, completions, **columns):
        with fork.Pool(2) as pool:
            values = pool.map(work, completions)
        with ProcessPoolExecutor(2, fork) as pool:
            assert list(pool.map(work, completions)) == values
        sleeper = fork.Process(target=multiprocessing.Event().wait)
        sleeper.start()
        sleeper.terminate()
        sleeper.join(20)
        assert sleeper.exitcode == -15
        return values
"""


def test_processes_in_a_reward_end(project):
    result = child.train(project(POOLS, max_steps=20, save_every="null"))
    assert result.code == 0 and "step 20/20" in result.err, result.err
