"""A few of the kills of kills.py, which makes hundreds of them; and that it would notice what they may do."""
import os
import shutil

import file_operations
import kills
import pytest
import robust_helpers as child

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="needs Linux")

SCRIPT = '''
import os
from pathlib import Path
os.makedirs("a/b")
Path("a/x").write_text("0123456789")
os.replace("a/x", "a/y")
with open("a/y", "a") as file:
    file.write("ab")
    file.write("cd")
    os.fsync(file.fileno())
open("a/y").close()
open("/dev/null", "w").close()
os.chmod("a/y", 0o600)
os.truncate("a/y", 3)
folder = os.open("a", os.O_RDONLY)
os.unlink("y", dir_fd=folder)
os.rmdir("a/b")
'''
OPERATIONS = ["mkdir a", "mkdir a/b", "open a/x", "half of a/x", "rename a/x a/y", "open a/y", "fsync a/y",
              "half of a/y", "chmod a/y", "truncate a/y", "remove a/y", "rmdir a/b"]


def script(directory, *arguments):
    """Run SCRIPT in `directory`; -> its exit code and what it did."""
    directory.mkdir()
    (directory / "script.py").write_text(SCRIPT)
    log = directory.parent / f"{directory.name}.operations"
    path = directory / "script.py"
    process = child.start(directory, path, [], file_operations.watch, (str(log), *arguments))
    process.join(60)
    return process.exitcode, log.read_text().splitlines()


def test_every_file_operation_is_seen_and_can_be_the_last(tmp_path):
    assert script(tmp_path / "whole") == (0, OPERATIONS)
    for number, there in [(2, None), (4, ("x", "01234")), (8, ("y", "0123456789ab"))]:
        directory = tmp_path / str(number)
        assert script(directory, number) == (-9, OPERATIONS[:number])
        assert (directory / "a" / "b").exists() == (number > 2)
        files = [(path.name, path.read_text()) for path in directory.glob("a/*") if path.is_file()]
        assert files == [there] * bool(there)


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    kinds = kills.make_kinds(folder, ["dpo", "evaluate", "evaluate_pairs", "sample"], save_every=3)
    return kills.Campaign(folder, kinds)


@pytest.fixture(scope="module")
def operations(campaign):
    return campaign.operations(campaign.kinds[0])


# the first two create the run, the last one is of final/
@pytest.mark.parametrize("where", [3, 4, 0.3, 0.7, 0.99])
def test_killed_before_a_file_operation(where, campaign, operations):
    number = where if where >= 1 else round(where * len(operations))
    record = campaign.operation_trial(campaign.kinds[0], number, operations[number - 1])
    assert not record["faults"] and record["kills"][0]["code"] == -9, record


@pytest.mark.parametrize("index", [1, 2, 3])
def test_disturbed_at_a_random_moment(index, campaign):
    record = campaign.random_trial(campaign.kinds[index], f"test-{index}")
    assert not record["faults"], record


def test_what_is_different_or_lost_is_found(campaign, tmp_path):
    """A whole run, changed in one place at a time, is no longer as the undisturbed one."""
    dpo, evaluate = campaign.kinds[:2]
    changed = [
        (dpo, "run/final/model.safetensors"),
        (dpo, "run/checkpoints/step-000006/trainer.json"),
        (dpo, "run/metrics.jsonl"),
        (evaluate, "out/many-prompts_eval_results.jsonl"),
    ]
    for kind, name in changed:
        directory = tmp_path / "copy"
        shutil.copytree(campaign.folder / f"{kind.name}-undisturbed", directory)
        assert not kills.compare(kind, directory, campaign.expected[kind.name])
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content.replace(content[-9:], b"\n"))
        (directory / f"{name}.tmp").touch()
        faults = kills.compare(kind, directory, campaign.expected[kind.name])
        assert [fault.kind for fault in faults] == ["different", "left behind"]
        shutil.rmtree(directory)
