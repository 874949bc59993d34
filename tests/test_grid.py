"""Grids: which words are one, what is refused before a run starts, and the runs of one."""
import os
import runpy
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import robust_helpers as child
from helpers import ROOT, assert_same_weights, final_weights, metrics, refused, tiny_model

import engine.grid
from engine.grid import grid_of, run_grid

DPO = "example/tiny-dpo.yml"
GRPO = "example/tiny-grpo.yml"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def start(directory, *words, processes=1):
    """`python train.py config.yml words...` in `directory`, under torchrun for more than one process."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += [str(ROOT / "train.py"), "config.yml", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=directory, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    """(exit code, what it printed on stdout, and on stderr)."""
    out, err = process.communicate(timeout=200)
    if "torch.distributed.run" not in process.args:      # torchrun has one of its own
        assert "Traceback" not in err
    return process.returncode, out, err


# ---- what is a grid

@pytest.mark.parametrize("words, grid", [
    ([DPO, "seed=0,1,2", "lr=1e-4, 3e-4"], {"seed": ["0", "1", "2"], "lr": ["1e-4", "3e-4"]}),
    ([DPO, "--seed", "0,1", "--reference-free=true,false"],
     {"seed": ["0", "1"], "reference_free": ["true", "false"]}),
    ([DPO, "schedule=linear,cosine", "max_steps=10,null"],
     {"schedule": ["linear", "cosine"], "max_steps": ["10", "null"]}),
    ([DPO, "algorithm=dpo,ipo", "beta=0.1,0.5"], {"algorithm": ["dpo", "ipo"], "beta": ["0.1", "0.5"]}),
    ([GRPO, "num_generations=4,8", "reward=r1_zero,gsm8k", "reward_weights=1,0"],
     {"num_generations": ["4", "8"]}),
    ([GRPO, "stop=a,b", "data=a.jsonl,b.jsonl", "lora_targets=q_proj,v_proj", "model=a,b"], {}),
    ([DPO, "chat_template_kwargs={a: 1, b: 2}", "system_prompt=Yes, sir"], {}),
    ([DPO, "seed=1"], {}),
])
def test_the_type_of_a_key_decides(words, grid):
    assert grid_of(words) == grid


@pytest.mark.parametrize("words, says", [
    (["seed=0,1", "lr=1e-4,x"], "lr (command line) is 'x'; fix: give a number such as 2e-5"),
    (["seed=0,-1"], "seed (command line) is -1"),
    (["algorithm=dpo,sftt"], "algorithm (command line) is 'sftt'"),
    (["algorithm=dpo,orpo", "reference_free=true"], "is used by dpo, not by orpo"),
    (["lr=1e-4,0.0001"], "lr (command line) holds the value '1e-4' twice"),
    (["seed=0,,1"], "fix: write seed=0,1"),
    (["seed=0,1", "resume=runs/x"], "resume (command line) names one run"),
    (["seed=0,1", "output=" + "x" * 250], "output (command line)"),
])
def test_what_is_refused_before_the_first_run(words, says, tmp_path, monkeypatch):
    def make(argv):
        run_grid(argv, grid_of(argv))

    monkeypatch.setattr("engine.grid.run_one", lambda *_: pytest.fail("a run was started"))
    assert says in refused(make, [str(ROOT / DPO), *words])


# ---- the runs

class Forked:
    """In the place of a grid's process for a run, with the interface of subprocess.Popen: a fork of this
    process, which has imported everything."""

    def __init__(self, command, env):
        self.pid = os.fork()
        if self.pid == 0:
            os.environ.clear()
            os.environ.update(env)
            code = 1
            try:
                sys.argv = command[1:]
                runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
                code = 0
            except SystemExit as ended:
                code = ended.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self):
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


def fork_runs():
    engine.grid.subprocess = SimpleNamespace(Popen=Forked)


def test_all_combinations_and_the_comparison(model, tmp_path):
    """One of four runs cannot start, the others are made. The second time only that one is; each is the run
    that its values make by themselves. Below, the runs are processes of their own; here forks, without the
    seconds of imports."""
    child.project(tmp_path, "dpo", model, output="null", max_steps=2)
    (tmp_path / "runs").mkdir()
    in_the_way = tmp_path / "runs" / "config-seed-0-lr-2e-3"
    in_the_way.write_text("")
    words = ["seed=0,1", "lr=2e-3,3e-3"]
    done = child.train(tmp_path, *words, patch=fork_runs)
    out, err = done.out, done.err
    assert done.code == 1 and "Traceback" not in err
    assert "1 of 4 runs failed: runs/config-seed-0-lr-2e-3" in err.splitlines()[-1]
    assert out.splitlines()[-1] == "report  runs/config-seed-lr.html"
    assert "| lr | 0.003 | 0.002 | 0.003 |" in out and "| seed | 0 | 1 | 1 |" in out
    page = (tmp_path / "runs" / "config-seed-lr.html").read_text()
    made = ["config-seed-0-lr-3e-3", "config-seed-1-lr-2e-3", "config-seed-1-lr-3e-3"]
    for name in made:
        assert name in page and f"| loss | {name} | 0.6931 at step 0 |" in out

    in_the_way.unlink()
    before = {name: child.contents(tmp_path / "runs" / name) for name in made}
    done = child.train(tmp_path, *words, patch=fork_runs)
    assert done.code == 0 and done.err.count("is finished already") == 3
    assert {name: child.contents(tmp_path / "runs" / name) for name in made} == before
    assert "| loss | config-seed-0-lr-2e-3 | 0.6931 at step 0 |" in done.out

    assert child.train(tmp_path, "seed=1", "lr=3e-3", "output=alone").code == 0
    assert metrics(tmp_path / "alone") == metrics(tmp_path / "runs" / "config-seed-1-lr-3e-3")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stopped_grid_goes_on(processes, model, tmp_path):
    """SIGTERM to the grid alone: its run saves. The same command makes the rest of it, and the other one."""
    child.project(tmp_path, "sft", model, output="runs/x", max_steps=30, save_every="null", eval_every=30)
    first, second = tmp_path / "runs" / "x-seed-0", tmp_path / "runs" / "x-seed-1"
    process = start(tmp_path, "seed=0,1", processes=processes)
    rows = first / "metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("train") > 2):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert "stopped by SIGTERM" in err and not second.exists()
    if processes == 1:
        assert code == 143 and err.splitlines()[-1] == "the grid is stopped; the same command continues it"
    assert len(list((first / "checkpoints").iterdir())) == 1

    code, out, err = finish(start(tmp_path, "seed=0,1", processes=processes))
    assert code == 0 and "resumed from runs/x-seed-0/checkpoints/step-" in err
    assert "report  runs/x-seed.html" in out
    if processes == 1:
        assert child.train(tmp_path, "seed=0", "output=alone").code == 0
        assert_same_weights(final_weights(first), final_weights(tmp_path / "alone"))
    assert len(metrics(first)) == len(metrics(second)) == 30
