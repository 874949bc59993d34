"""Unit tests: the share of a row's tests that the code in a completion passes.

    python train.py example/qwen2.5-grpo.yml data=problems.jsonl \
        reward=example/rewards/unit_tests.py:unit_tests reward_timeout=600

A row has a column `tests`: a list of Python statements, such as "assert add(1, 2) == 3". The code is the last
block between ``` and ``` that is marked as Python or not at all, else the whole completion.

This runs what the model writes. Each completion runs in a process of its own, in an empty directory, without
the environment's variables, with limits of time, memory and the size of files. That stops
accidents, not attacks: for a model that you do not trust, run the whole training in a container without a
network.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor

SECONDS = 10                   # for all tests of a completion
MEMORY = 2 ** 30               # bytes
FILE_SIZE = 2 ** 20            # bytes of any file that it writes, and of what it prints
BLOCK = re.compile(r"^[^\n`]*```([^\n`]*)\n(.*?)```", re.DOTALL | re.MULTILINE)
PYTHON = ("", "python", "python3", "py")     # what may stand behind the first ```
# Each test runs by itself, so that one that fails does not hide the others. The count stands behind a mark,
# so that it is not mistaken for something that the code prints.
PROGRAM = """
import json, resource, sys
job = json.load(sys.stdin)
for name, limit in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
names = {}
exec(job["code"], names)
passed = 0
for test in job["tests"]:
    try:
        exec(test, names)
        passed += 1
    except Exception:
        pass
print("\\n" + job["mark"], passed)
"""
LIMITS = {"RLIMIT_CPU": SECONDS, "RLIMIT_AS": MEMORY, "RLIMIT_FSIZE": FILE_SIZE, "RLIMIT_CORE": 0}


def unit_tests(prompts, completions, tests, **columns):
    """Per completion the share of its row's tests that pass; None where the row has none."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(share_passed, completions, tests))


def share_passed(completion: str, tests: list[str] | None) -> float | None:
    if not tests:
        return None
    return run(code_in(completion), tests) / len(tests)


def code_in(completion: str) -> str:
    code = completion
    for language, block in BLOCK.findall(completion):
        if language.strip().lower() in PYTHON:
            code = textwrap.dedent(block)      # a block in a list is indented
    return code


def run(code: str, tests: list[str]) -> int:
    """How many tests pass."""
    mark = os.urandom(16).hex()
    job = {"code": code, "tests": tests, "limits": LIMITS, "mark": mark}
    # what the code prints goes to a file, since that has a limit
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", PROGRAM], cwd=folder, env={}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=printed, stderr=subprocess.DEVNULL)
        try:
            process.communicate(json.dumps(job).encode(), timeout=SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            kill(process)
        printed.seek(0)
        output = printed.read()
    found = re.findall(rf"{mark} (\d+)".encode(), output)
    return int(found[-1]) if found else 0


def kill(process: subprocess.Popen) -> None:
    """End the process and all that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
