"""A run's directory is its own: one process at a time, nothing of the user's lost, nothing changed unnoticed
between two parts."""
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import robust_helpers as child
import torch
from helpers import ROOT, final_weights, prompt_rows, tiny_model, write_jsonl

from data.errors import UserError
from engine import checkpoint, sealed
from engine.claim import claim, release
from engine.directory import Place, choose_directory
from engine.fingerprint import check_unchanged, fingerprints, together

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def finished_project(tmp_path_factory, model):
    """A project whose run of three updates has ended, with the checkpoints of steps 2 and 3."""
    directory = child.project(tmp_path_factory.mktemp("finished"), "sft", model, max_steps=3, keep=9)
    assert child.train(directory).code == 0
    return directory


@pytest.fixture
def finished(finished_project, tmp_path):
    """A copy of it; its configuration names the data of the original."""
    shutil.copytree(finished_project, tmp_path, dirs_exist_ok=True)
    return tmp_path


def errors(result):
    return [line for line in result.err.splitlines() if line.startswith("error: ")]


# ---- one process, one directory

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from engine.claim import claim
print(claim(sys.argv[2], *sys.argv[3:]), flush=True)
time.sleep(60)
"""


@pytest.fixture
def hold():
    """hold(directory, name) -> a process that has claimed it."""
    processes = []

    def hold(directory, *name):
        words = [sys.executable, "-c", HOLD, ROOT, directory, *name]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "None\n"
        return process
    yield hold
    for process in processes:
        process.kill()
        process.wait()


def test_a_claim_ends_with_its_process(hold, tmp_path):
    run = str(tmp_path / "run")
    process = hold(run)
    assert claim(run).startswith(f"process {process.pid} on ")
    process.kill()
    process.wait()
    assert claim(run) is None and os.listdir(run) == [".lock"]
    release(run)
    assert os.listdir(run) == []


CLAIM_AND_FORK = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from engine.claim import claim
claim(sys.argv[2])
pid = os.fork()
if pid:
    print(pid, flush=True)
    os._exit(0)
time.sleep(60)
"""


def test_a_forked_child_keeps_no_claim(tmp_path):
    """An orphan of a reward function must not hold the directory of a run that was killed."""
    words = [sys.executable, "-c", CLAIM_AND_FORK, ROOT, tmp_path / "run"]
    done = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    orphan = int(done.stdout.readline())
    done.wait()
    try:
        assert claim(str(tmp_path / "run")) is None
        release(str(tmp_path / "run"))
    finally:
        os.kill(orphan, signal.SIGKILL)


CLAIM_AND_RELEASE = """
import os, sys
sys.path.insert(0, sys.argv[1])
from engine.claim import claim, release
run = sys.argv[2]
for _ in range(100):
    if claim(run) is None:
        os.mkdir(run + '/alone')
        os.rmdir(run + '/alone')
        release(run)
"""


def test_only_one_of_many_gets_a_directory(tmp_path):
    """Six processes that claim and release the same name a hundred times: never two at a time, and none
    fails."""
    words = [sys.executable, "-c", CLAIM_AND_RELEASE, ROOT, tmp_path / "run"]
    processes = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True) for _ in range(6)]
    assert [process.communicate(timeout=60)[1] for process in processes] == [""] * 6


def test_a_directory_that_goes_while_it_is_made(tmp_path, monkeypatch):
    """os.makedirs finds it there, and then not there."""
    def gone(*arguments, **options):
        monkeypatch.undo()
        raise FileExistsError(errno.EEXIST, "File exists", str(tmp_path / "run"))
    monkeypatch.setattr("engine.claim.os.makedirs", gone)
    assert claim(str(tmp_path / "run")) is None
    release(str(tmp_path / "run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        claim(str(tmp_path / "file"))


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr("engine.claim.fcntl.lockf", refuse)
    assert claim(str(tmp_path / "run")) is None
    assert "without locks" in capsys.readouterr().err
    release(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_default_name_passes_over_a_directory_in_use(hold, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hold("runs/x")
    assert choose_directory(None, "x", "auto", "lr: 1\n") == Place("runs/x-2")
    release("runs/x-2")
    says = "output: runs/x is in use by process .*; fix: wait for its end, or choose another output"
    with pytest.raises(UserError, match=says):
        choose_directory("runs/x", "x", "auto", "lr: 1\n")


def test_two_trainings_at_once(model, tmp_path):
    """The same command twice: one line for the one that comes second, and the first is the run it would have
    been alone."""
    alone = child.train(child.project(tmp_path / "alone", "sft", model))
    files = {key: tmp_path / "alone" / f"{key.partition('_')[0]}.jsonl" for key in ("data", "eval_data")}
    files["output"] = tmp_path / "run"
    folders = [child.project(tmp_path / name, "sft", model, **files) for name in ("one", "two")]
    results = [None, None]

    def start(number, *words):
        results[number] = child.train(folders[number], *words)
    threads = [threading.Thread(target=start, args=(0,)), threading.Thread(target=start, args=(1, "lr=5e-3"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone.code == 0 and sorted(result.code for result in results) == [0, 2]
    refused = next(result for result in results if result.code == 2)
    assert len(errors(refused)) == 1 and f"output: {tmp_path}/run " in errors(refused)[0]
    rate = "0.001" if results[0].code == 0 else "0.005"
    assert f"lr: {rate}\n" in (tmp_path / "run" / "config.yaml").read_text()
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 10      # six updates, four evaluations
    if rate == "0.001":
        ours, theirs = final_weights(tmp_path / "run"), final_weights(tmp_path / "alone" / "run")
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_refused_run_leaves_no_directory(model, tmp_path):
    child.project(tmp_path, "sft", model)
    for output in ("run", "new/folder/run"):
        assert child.train(tmp_path, "data=nowhere.jsonl", f"output={output}").code == 2
    assert not (tmp_path / "run").exists() and not (tmp_path / "new").exists()


def test_two_evaluations_at_once(hold, model, tmp_path):
    data = write_jsonl(tmp_path / "prompts.jsonl", prompt_rows(3))
    hold(str(tmp_path / "out"), ".prompts_eval.lock")
    words = [model, f"data={data}", "reward=gsm8k", f"output={tmp_path / 'out'}"]
    process = child.start(tmp_path, "evaluate.py", words)
    process.join(100)
    said = (tmp_path / child.ERR).read_text()
    assert process.exitcode == 2 and f"error: output: {tmp_path}/out is in use by process " in said
    assert os.listdir(tmp_path / "out") == [".prompts_eval.lock"]


def test_a_kill_before_config_yaml_is_whole_blocks_nothing(model, tmp_path):
    child.project(tmp_path, "sft", model, max_steps=1)
    (tmp_path / "run").mkdir()
    for name in (".lock", "config.yaml.tmp"):
        (tmp_path / "run" / name).write_text("half of")
    assert child.train(tmp_path).code == 0
    assert not [path for path in (tmp_path / "run").rglob("*") if ".tmp" in path.name or path.name == ".lock"]


def test_files_of_the_user_are_not_taken_for_leftovers(model, tmp_path):
    child.project(tmp_path, "sft", model, max_steps=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tmp").write_text("mine")
    assert "run is not empty and is not a run" in child.train(tmp_path).err
    (tmp_path / "run" / "thesis.tmp").rename(tmp_path / "thesis.tmp")
    result = child.train(tmp_path, patch=child.signal_in_update, arguments=(signal.SIGKILL, 1))
    assert result.code == -signal.SIGKILL
    (tmp_path / "thesis.tmp").rename(tmp_path / "run" / "thesis.tmp")
    assert child.train(tmp_path).code == 0 and (tmp_path / "run" / "thesis.tmp").read_text() == "mine"


# ---- what is finished stays

def test_an_edited_final_model_stays(finished):
    """Edited and added files make a finished run neither unfinished nor are they overwritten by the same
    command."""
    final = finished / "run" / "final"
    settings = json.loads((final / "generation_config.json").read_text())
    settings |= {"temperature": 0.7, "do_sample": True}
    (final / "generation_config.json").write_text(json.dumps(settings))
    (final / "NOTES.md").write_text("my model")
    before = child.contents(finished / "run")
    result = child.train(finished)
    assert result.code == 0 and "run is finished already: nothing is trained" in result.err
    assert "model    run/final" in result.out
    assert child.contents(finished / "run") == before
    told = []
    assert checkpoint.model_path(str(finished / "run"), told.append) == str(final)
    assert len(told) == 1 and "generation_config.json" in told[0] and told[0].endswith("it is used as it is")


def test_a_final_model_in_the_way_is_set_aside(finished):
    """Another max_steps goes on; what the user changed in final/ is kept beside the new one."""
    final = finished / "run" / "final"
    (final / "NOTES.md").write_text("my model")
    before = child.contents(final)
    result = child.train(finished, "max_steps=4")
    assert result.code == 0 and "run/final-1" in result.err
    assert child.contents(finished / "run" / "final-1") == before
    assert sealed.broken(str(final)) is None and not (final / "NOTES.md").exists()
    assert child.train(finished, "max_steps=5").code == 0 and not (finished / "run" / "final-2").exists()


@pytest.mark.parametrize("saved", [True, False])
def test_a_finished_run_that_was_killed_while_it_went_on(saved, finished):
    """final/ is that of three updates: the command that asks for five goes on, the one that asks for three is
    done."""
    words = ["max_steps=5"] if saved else ["max_steps=5", "save_every=null"]
    result = child.train(finished, *words, patch=child.signal_in_update, arguments=(signal.SIGKILL, 5))
    assert result.code == -signal.SIGKILL
    assert "is finished already" in child.train(finished).err
    result = child.train(finished, "max_steps=5")
    assert result.code == 0 and f"resumed from run/checkpoints/step-00000{4 if saved else 3}" in result.err
    assert "is finished already" in child.train(finished, "max_steps=5").err


def test_damaged_final_weights_are_said_and_made_again(finished):
    final = finished / "run" / "final"
    whole = child.contents(final)
    os.truncate(final / "model.safetensors", 1000)
    told = []
    path = checkpoint.model_path(str(finished / "run"), told.append)
    assert path == str(finished / "run" / "checkpoints" / "step-000003")
    assert len(told) == 1 and "model.safetensors has 1000 bytes" in told[0]
    assert "step-000003 is used instead" in told[0]
    assert child.train(finished).code == 0
    assert child.contents(final) == whole


def test_an_unfinished_run_as_a_model_is_said(finished):
    shutil.rmtree(finished / "run" / "final")
    told = []
    path = checkpoint.model_path(str(finished / "run"), told.append)
    assert told == [f"this run has no final model; {path} is used instead"] and path.endswith("step-000003")


def saved_contents(contents):
    saved = ("checkpoints/", "final/")
    return {name: content for name, content in contents.items() if name.startswith(saved)}


def test_going_back_removes_nothing_before_it_has_saved(finished):
    """resume=PATH of an older checkpoint, stopped before its first own one: everything is as if it had not
    been tried."""
    run = finished / "run"
    before = child.contents(run)
    words = ["resume=run/checkpoints/step-000001", "save_every=null"]
    result = child.train(finished, *words, patch=child.signal_in_update, arguments=(signal.SIGKILL, 2))
    assert result.code == -signal.SIGKILL
    assert saved_contents(child.contents(run)) == saved_contents(before)
    assert (run / "metrics.jsonl.replaced").read_bytes() == before["metrics.jsonl"]
    assert child.train(finished).code == 0             # the same command as at first: finished, as it was
    result = child.train(finished, "max_steps=4")      # goes on from step 3, with all the rows
    assert result.code == 0 and "resumed from run/checkpoints/step-000003" in result.err
    assert (run / "metrics.jsonl").read_bytes().startswith(before["metrics.jsonl"])
    assert not (run / "metrics.jsonl.replaced").exists()


def test_going_back_replaces_after_the_first_own_checkpoint(finished):
    run = finished / "run"
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [line for line in lines if json.loads(line)["step"] <= 1]
    back = "resume=run/checkpoints/step-000001"
    result = child.train(finished, back, patch=child.kill_after_save, arguments=(2,))
    assert result.code == -signal.SIGKILL
    assert [checkpoint.step_of(path) for path in checkpoint.checkpoints(run)] == [1, 2]
    assert (run / "metrics.jsonl").read_text().splitlines()[:len(rows)] == rows
    assert not (run / "metrics.jsonl.replaced").exists()


def test_rows_behind_the_final_model_stay(finished):
    """A finished run that is to go on from before its end, killed before it saves: its command finds all as
    it was."""
    run = finished / "run"
    shutil.rmtree(run / "checkpoints" / "step-000003")
    before = child.contents(run)
    words = ["resume=run/checkpoints/step-000002", "save_every=null"]
    result = child.train(finished, *words, patch=child.signal_in_update, arguments=(signal.SIGKILL, 3))
    assert result.code == -signal.SIGKILL
    assert child.train(finished).code == 0
    after = child.contents(run)
    assert all(after[name] == before[name] for name in ("metrics.jsonl", "final/model.safetensors"))


# ---- what a run depends on

def interrupted(tmp_path, algorithm, model, **values):
    child.project(tmp_path, algorithm, model, **values)
    assert child.train(tmp_path, patch=child.kill_after_save, arguments=(2,)).code == -signal.SIGKILL


def spoil(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def test_keys_that_an_older_version_did_not_have(tmp_path):
    """They are the same while they are off: its runs go on."""
    from engine.directory import differing
    (tmp_path / "config.yaml").write_text("beta: 0.1\n")
    assert differing(str(tmp_path), "beta: 0.1\ncolumns: null\naverage_log_prob: false\n") == []
    assert differing(str(tmp_path), "beta: 0.1\ncolumns: {prompt: q}\n") == ["columns"]
    assert differing(str(tmp_path), "beta: 0.2\n") == ["beta"]


@pytest.mark.parametrize("key, name", [
    ("model", "model/model.safetensors"),
    ("model", "model/tokenizer.json"),
    ("model", "model/chat_template.jinja"),
    ("reference", "reference/model.safetensors")])
def test_another_model_under_the_same_name(key, name, model, tmp_path):
    for folder in ("model", "reference"):
        shutil.copytree(model, tmp_path / folder)
    interrupted(tmp_path, "dpo", "model", reference="reference")
    spoil(tmp_path / name)
    before = child.contents(tmp_path / "run")
    result = child.train(tmp_path)
    line = (f"error: {key}: {name} has changed since the run in run started; "
            "fix: restore it, or choose another output")
    assert result.code == 2 and errors(result) == [line]
    assert child.contents(tmp_path / "run") == before
    spoil(tmp_path / name)
    assert child.train(tmp_path).code == 0


def test_another_reward_or_prompt_template_under_the_same_name(model, tmp_path):
    judge = ("def judge(prompts, completions, **columns):\n"
             "    return [len(c) for c in completions]\n")
    (tmp_path / "judge.py").write_text(judge)
    (tmp_path / "my.prompt").write_text("Q: {question}\nA: ")
    interrupted(tmp_path, "grpo", model, reward="judge.py:judge, gsm8k", prompt_template="my.prompt")
    for name, key in (("judge.py", "reward"), ("my.prompt", "prompt_template")):
        old = (tmp_path / name).read_text()
        (tmp_path / name).write_text(old + " ")
        result = child.train(tmp_path)
        line = f"error: {key}: {name} has changed since the run in run started"
        assert result.code == 2 and errors(result)[0].startswith(line)
        (tmp_path / name).write_text(old)
    assert child.train(tmp_path).code == 0


# ---- a model of the hub

def commit(cache, name, files):
    """Let a commit of owner/tiny, of which the hub's cache has `files` {name: content}, be the newest."""
    folder = cache / "models--owner--tiny"
    snapshot = folder / "snapshots" / name
    for path in (folder / "refs", folder / "blobs", snapshot):
        path.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        (folder / "blobs" / digest).write_bytes(content)
        (snapshot / file).symlink_to(f"../../blobs/{digest}")
    (folder / "refs" / "main").write_text(name)


def use_cache(path, step=None):
    from huggingface_hub import constants
    constants.HF_HUB_CACHE = path
    if step:
        child.kill_after_save(step)


def files_in(model):
    return {path.name: path.read_bytes() for path in Path(model).iterdir()}


def test_a_run_goes_on_after_a_commit_that_changes_the_readme(model, tmp_path):
    """It takes the weights from its checkpoint, so the cache has none of the new commit. A commit that
    changes the tokenizer ends it."""
    files = files_in(model)
    cache = tmp_path / "hub"
    commit(cache, "a" * 40, files)
    child.project(tmp_path, "sft", "owner/tiny")
    killed = child.train(tmp_path, patch=use_cache, arguments=(str(cache), 2))
    assert killed.code == -signal.SIGKILL, killed.err
    weights = files.pop("model.safetensors")
    other = files["tokenizer_config.json"].replace(b"{", b"{ ", 1)
    commit(cache, "b" * 40, files | {"tokenizer_config.json": other})
    result = child.train(tmp_path, patch=use_cache, arguments=(str(cache),))
    line = "error: model: owner/tiny has changed since the run in run started; fix: choose another output"
    assert result.code == 2 and errors(result) == [line]
    commit(cache, "c" * 40, files | {"README.md": b"new"})
    result = child.train(tmp_path, patch=use_cache, arguments=(str(cache),))
    assert result.code == 0, result.err
    digests = json.loads((tmp_path / "run" / "run.json").read_text())["digests"]["model"]["owner/tiny"]
    assert digests["commit"] == "c" * 40 and "README.md" not in digests["files"]
    assert digests["files"]["model.safetensors"] == hashlib.sha256(weights).hexdigest()


@pytest.mark.parametrize("before, after, is_same", [
    ("aa", {"commit": "aa", "files": {}}, True),                    # what earlier versions wrote
    ("aa", {"commit": "bb", "files": {}}, False),
    ({"files": {"x": "1", "y": "2"}}, {"files": {"x": "1"}}, True),
    ({"files": {"x": "1"}}, {"files": {"x": "1", "y": "2"}}, True),
    ({"files": {"x": "1", "y": "2"}}, {"files": {"x": "1", "y": "3"}}, False),
    ({"files": {"x": "1"}}, None, True),                            # the base of an adapter, not in the cache
    (None, {"files": {"x": "1"}}, True),
    ("aa", "aa", True),
    ("aa", None, False),
    (None, "aa", False),
])
def test_when_a_model_is_the_same(before, after, is_same):
    started, now = ({"model": {"m": digest} if digest else {}} for digest in (before, after))
    if is_same:
        check_unchanged(started, now, "run")
    else:
        with pytest.raises(UserError, match="model: m has changed since the run in run started; fix: "):
            check_unchanged(started, now, "run")


def test_what_the_cache_lacks_now_is_still_known():
    started = {"model": {"m": {"commit": "a", "files": {"x": "1", "y": "2"}}}, "reward": {"f": "3"}}
    now = {"model": {"m": {"commit": "b", "files": {"x": "1", "z": "4"}}}, "reference": {"g": "5"}}
    found = together(started, now)
    model = {"commit": "b", "files": {"x": "1", "y": "2", "z": "4"}}
    assert found == {"model": {"m": model}, "reward": {"f": "3"}, "reference": {"g": "5"}}
    assert together(started, {"model": {}}) == started


def test_a_cache_without_links(model, tmp_path, monkeypatch):
    """There the files themselves are read."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit(tmp_path, "a" * 40, {})
    snapshot = tmp_path / "models--owner--tiny" / "snapshots" / ("a" * 40)
    shutil.copytree(model, snapshot, dirs_exist_ok=True)
    found = fingerprints({"model": "owner/tiny"})["model"]["owner/tiny"]
    content = (snapshot / "tokenizer.json").read_bytes()
    assert found["files"]["tokenizer.json"] == hashlib.sha256(content).hexdigest()


def test_what_a_configuration_names(model, tmp_path, monkeypatch):
    """Every text that names a file, a function's file, a model directory or an adapter with its base; nothing
    else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text("")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": model}))
    found = fingerprints({
        "reward": "gsm8k, a.py:f",
        "model": "adapter",
        "stop": "</answer>",
        "lr": 0.1,
        "output": "adapter",
        "none": None,
    })
    assert list(found) == ["reward", "model"] and list(found["reward"]) == ["a.py"]
    names = {"adapter/adapter_config.json", f"{model}/model.safetensors", f"{model}/tokenizer.json"}
    assert names <= found["model"].keys()
    assert f"{model}/generation_config.json" not in found["model"]


@pytest.mark.parametrize("schedule, warmup, told", [
    ("linear", 0, True),
    ("cosine", 0, True),
    ("constant", 0, False),
    ("constant", 0.1, True)])
def test_another_number_of_updates_is_told_where_rates_depend_on_it(schedule, warmup, told, model, tmp_path):
    interrupted(tmp_path, "sft", model, schedule=schedule, warmup=warmup, max_steps=4)
    result = child.train(tmp_path, "max_steps=3")
    assert result.code == 0 and ("max_steps was 4 and is 3: under this schedule" in result.err) == told


# ---- damaged files of a run

@pytest.mark.parametrize("damage", [
    lambda path: path.unlink(),
    lambda path: path.write_text("{"),
    lambda path: path.write_text("[]"),
    lambda path: path.write_bytes(path.read_bytes()[:40]),
    lambda path: path.write_text('{"data": 3}'),
    lambda path: path.write_text('{"data": {"train": 3}}'),
    lambda path: path.write_text('{"data": {}, "digests": {"model": 3}}')])
def test_a_damaged_run_json(damage, model, tmp_path):
    interrupted(tmp_path, "sft", model)
    damage(tmp_path / "run" / "run.json")
    result = child.train(tmp_path)
    assert result.code == 2 and "Traceback" not in result.err
    assert errors(result)[0].startswith("error: output: run/run.json is damaged")


def test_damaged_rows_are_kept_aside(model, tmp_path):
    interrupted(tmp_path, "sft", model)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], '{"step": }\n', '{"mine": 1}\n', *lines[1:]]))
    spoiled = path.read_bytes()
    result = child.train(tmp_path)
    assert result.code == 0 and "2 lines are no rows of this run" in result.err
    assert (tmp_path / "run" / "metrics.jsonl.damaged").read_bytes() == spoiled
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]


def test_other_libraries_are_told(model, tmp_path):
    interrupted(tmp_path, "sft", model)
    path = tmp_path / "run" / "run.json"
    started = json.loads(path.read_text())
    started["versions"]["torch"], started["world_size"] = "2.0.0", 8
    path.write_text(json.dumps(started))
    result = child.train(tmp_path)
    changes = f"torch 2.0.0 -> {torch.__version__}, processes 8 -> 1; "
    assert result.code == 0 and f"since the run in run started: {changes}" in result.err


def test_a_finished_run_without_its_rows(finished):
    for text in (None, '{"step": 3}\n[]\n{"split": 1}\n'):
        (finished / "run" / "metrics.jsonl").unlink(missing_ok=True)
        if text:
            (finished / "run" / "metrics.jsonl").write_text(text)
        result = child.train(finished)
        assert result.code == 0 and "model    run/final" in result.out and "Traceback" not in result.err


def remove_the_run(step):
    from engine.loop import Engine

    def move():
        shutil.move("run", "moved")

    def due(engine):
        return engine.step.index == step
    child.before(Engine, "clip_gradients", move, due)


def test_a_moved_run_directory(model, tmp_path):
    child.project(tmp_path, "sft", model, save_every=2, log_every=100)
    result = child.train(tmp_path, patch=remove_the_run, arguments=(3,))
    assert result.code == 1 and errors(result) == ["error: output: run was deleted or moved during the run; "
                                                   "fix: put it back and run the same command again"]
    assert not (tmp_path / "run").exists()
    shutil.move(tmp_path / "moved", tmp_path / "run")
    result = child.train(tmp_path)
    assert result.code == 0 and "resumed from run/checkpoints/step-000002" in result.err


# ---- the reference pass

def stop_after_blocks(count):
    """SIGTERM in the `count`-th block of the reference pass."""
    from engine.loop import Engine
    calls = []

    def due(*_):
        calls.append(1)
        return len(calls) == count
    child.before(Engine, "collect", child.send(signal.SIGTERM), due)


def test_a_stopped_reference_pass_goes_on(model, tmp_path):
    """Two blocks of four of the fourteen pairs are done when the signal comes: the rest is computed by the
    next call."""
    child.project(tmp_path, "dpo", model)
    result = child.train(tmp_path, patch=stop_after_blocks, arguments=(2,))
    assert result.code == 143 and "stopped by SIGTERM" in result.err
    result = child.train(tmp_path)
    assert result.code == 0 and "reference log-probs: 16 of 28 responses from .reference/" in result.err
    alone = child.project(tmp_path / "alone", "dpo", model)
    assert child.train(alone).code == 0
    ours, theirs = final_weights(tmp_path / "run"), final_weights(alone / "run")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_killed_reference_pass_keeps_its_parts(model, tmp_path):
    from engine import frozen
    child.project(tmp_path, "dpo", model)
    result = child.train(tmp_path, patch=seal_every_block_and_kill, arguments=(3,))
    assert result.code == -signal.SIGKILL and frozen.SEAL_SECONDS > 10
    result = child.train(tmp_path)
    assert result.code == 0 and "reference log-probs: 16 of 28 responses" in result.err
    assert not list(tmp_path.rglob("*.tmp*"))


def seal_every_block_and_kill(count):
    from engine import frozen, loop
    frozen.SEAL_SECONDS, frozen.SEAL_SHARE = -1, 0
    calls = []

    def due(*_):
        calls.append(1)
        return len(calls) == count
    child.before(loop.Engine, "collect", child.send(signal.SIGKILL), due)


def test_two_reference_passes_write_one_after_the_other(hold, tmp_path):
    """A store that another process is writing into is waited for."""
    from engine.reference import read_table, whole_parts, write_part
    process = hold(str(tmp_path))
    waiting = threading.Thread(target=write_part, args=(str(tmp_path), [b"k" * 16], [torch.ones(3)]))
    waiting.start()
    time.sleep(0.5)
    assert not list(tmp_path.glob("table-*"))
    process.kill()
    waiting.join(10)
    stored, = read_table(whole_parts(str(tmp_path), print)).logps([b"k" * 16])
    assert torch.equal(stored, torch.ones(3))


