"""Trackers: what they are told is what metrics.jsonl holds, a resumed run goes on, and none stops a run."""
import importlib.util
import json
import math
import signal
from pathlib import Path

import pytest
import robust_helpers as child
from helpers import refused, tiny_model, train_here

from engine.config import load_config
from engine.logs import Run

FAKE = '''
import json

def note(*call):
    with open("calls.jsonl", "a") as file:
        file.write(json.dumps(call) + "\\n")

def init(**options):
    note("init", options)

def log(values, step):
    note("log", values, step)
    if step == {failing}:
        raise ConnectionError("no route\\nto the server")

def finish():
    note("finish")
'''
PACKAGES = ("wandb", "swanlab", "trackio")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def on_path(folder):
    """A patch of a process: packages that the test has made come first."""
    import sys
    sys.path.insert(0, str(folder))


def expected(directory):
    """(name, step, value) of every number in metrics.jsonl, but for its place."""
    found = []
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name not in ("step", "split") and value is not None:
                found.append((f"{row['split']}/{name}", row["step"], value))
    return sorted(found)


# ---- what is told

def events(directory):
    """(name, step, value) of every number in TensorBoard's files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    files = accumulator.EventAccumulator(str(directory / "tensorboard"), size_guidance={"scalars": 0})
    files.Reload()
    found = []
    for name in files.Tags()["scalars"]:
        for event in files.Scalars(name):
            found.append((name, event.step, event.value))
    return sorted(found)


def test_tensorboard_holds_what_metrics_jsonl_holds(model, tmp_path):
    """Also after a kill behind the last checkpoint, from which updates are made again, once."""
    pytest.importorskip("tensorboard")
    child.project(tmp_path, "dpo", model, report_to="tensorboard", save_every=2)
    arguments = (signal.SIGKILL, 4)
    killed = child.train(tmp_path, patch=child.signal_in_update, arguments=arguments)
    assert killed.code == -signal.SIGKILL
    steps = {step for _, step, _ in events(tmp_path / "run")}
    assert steps == {0, 1, 2, 3}
    assert child.train(tmp_path).code == 0
    found, wanted = events(tmp_path / "run"), expected(tmp_path / "run")
    assert [entry[:2] for entry in found] == [entry[:2] for entry in wanted] and len(found) > 50
    for (_, _, ours), (_, _, theirs) in zip(found, wanted):
        assert math.isclose(ours, theirs, rel_tol=1e-6)      # they are kept in fp32


def test_services_are_told_the_same(model, tmp_path):
    """As packages that write down how they are called; a resumed run keeps its id and goes on at its step."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in PACKAGES:
        (folder / f"{name}.py").write_text(FAKE.replace("{failing}", "-1").replace("calls", name))
    child.project(tmp_path, "dpo", model, report_to='["wandb", "swanlab", "trackio"]')
    words = dict(patch=on_path, arguments=(folder,))
    assert child.train(tmp_path, "max_steps=3", **words).code == 0
    assert child.train(tmp_path, "max_steps=5", **words).code == 0
    identities = set()
    for name in PACKAGES:
        made = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        kinds = [call[0] for call in made]
        starts = [call[1] for call in made if call[0] == "init"]
        assert kinds.count("finish") == 2 and kinds[0] == "init" and kinds[-1] == "finish"
        for options in starts:
            assert options["resume"] == "allow" and options["project"] == "minimal-llm-alignment"
            assert options["config"]["lr"] == 1e-3 and options["config"]["algorithm"] == "dpo"
        assert starts[0]["name"] == starts[1]["name"] and starts[0].get("id") == starts[1].get("id")
        identities.add(starts[0].get("id", ""))
        told = {}
        for call in made:
            if call[0] == "log":
                for key, value in call[1].items():
                    assert (key, call[2]) not in told or key.startswith("eval/")
                    told[key, call[2]] = value
        assert sorted((*place, value) for place, value in told.items()) == expected(tmp_path / "run")
    assert len(identities - {""}) == 1


def test_a_new_run_has_a_new_id(model, tmp_path):
    run = Run(str(tmp_path / "run"), report_to="trackio")
    identities = set()
    for step in (0, 0, 5, 6):
        run.trackers.open = {}
        run.trackers.notice = lambda text: None
        Path(run.directory).mkdir(exist_ok=True)
        run.trackers.start(run.directory, {}, step)
        identities.add((tmp_path / "run" / "tracker-id").read_text())
    assert len(identities) == 2


# ---- failures

@pytest.mark.parametrize("failing, says", [
    (2, "wandb fails (no route)"), (None, "wandb fails (no such key)")])
def test_a_tracker_that_fails_stops_no_run(failing, says, model, tmp_path):
    """At an update, or at its start. It is told once, and what works goes on."""
    folder = tmp_path / "packages"
    folder.mkdir()
    text = FAKE.replace("{failing}", str(failing))
    if failing is None:
        text = text.replace('note("init", options)', 'raise ValueError("no such key")')
    (folder / "wandb.py").write_text(text)
    (folder / "trackio.py").write_text(FAKE.replace("{failing}", "-1").replace("calls", "trackio"))
    child.project(tmp_path, "sft", model, report_to="wandb, trackio", max_steps=4)
    result = child.train(tmp_path, patch=on_path, arguments=(folder,))
    assert result.code == 0 and result.err.count("wandb fails") == 1
    assert f"warning: {says} and gets no more numbers" in result.err
    assert says in (tmp_path / "run" / "events.log").read_text()
    assert len((tmp_path / "trackio.jsonl").read_text().splitlines()) == 1 + len(rows(tmp_path / "run")) + 1


def rows(run):
    return (run / "metrics.jsonl").read_text().splitlines()


def test_other_ranks_report_nothing(tmp_path):
    run = Run(str(tmp_path), main=False, report_to="wandb")
    run.trackers.start(str(tmp_path), {}, 0)
    assert not run.trackers.open and not list(tmp_path.iterdir())


# ---- refused at the start

@pytest.mark.parametrize("value, says", [
    ("report_to=wandbb", "report_to (command line) is 'wandbb'; fix: give wandb"),
    ("report_to=trackio, mlflow", "fix: give one of tensorboard, wandb, swanlab, trackio"),
])
def test_unknown_names(value, says, monkeypatch):
    found = importlib.machinery.PathFinder.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    assert says in refused(load_config, ["example/tiny-dpo.yml", value])


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package(name, tmp_path, monkeypatch):
    """Also where a folder of its name is in the way."""
    if importlib.util.find_spec(name):
        pytest.skip("the package is installed")
    for _ in range(2):
        said = refused(load_config, ["example/tiny-dpo.yml", f"report_to={name}"])
        assert said == (f"report_to (command line) is {name}, whose package is not installed; "
                        f"fix: pip install {name}")
        (tmp_path / name).mkdir(exist_ok=True)
        monkeypatch.syspath_prepend(tmp_path)


def test_another_tracker_is_no_other_run(model, tmp_path):
    """A run that was started without a tracker continues with one."""
    pytest.importorskip("tensorboard")
    child.project(tmp_path, "sft", model)
    config = str(tmp_path / "config.yml")
    output = f"output={tmp_path}/run"
    train_here(config, output, "max_steps=2")
    train_here(config, output, "max_steps=3", "report_to=tensorboard")
    assert {step for _, step, _ in events(tmp_path / "run")} == {3}
