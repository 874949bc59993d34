"""Compare answers by the package math-verify, in a process that can be stopped.

sympy, with which math-verify evaluates answers, may need hours or all memory for a short one (9^{9^{9^9}}),
and hears no signal meanwhile. So one process, started at the first answer, imports math-verify and forks
another one that compares; where an answer takes too long, the system ends that one (SIGPROF) and the first
forks the next. Each question and each verdict is a line of JSON in a pipe, and both processes end with the
pipe. Windows has no such limits.
"""
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from functools import lru_cache
from pathlib import Path

SECONDS = 2.0           # computing time for one answer; most take milliseconds
SLOW = 0.5              # answers of one call that take longer ...
TOGETHER = 10.0         # ... have this many seconds together;
HASTY = 0.1             # after them each answer has this
MEMORY = 2 ** 31        # bytes of address space
INTEGER = re.compile(r"-?[0-9]+")
BRACKET = re.compile(r"(?:\\left *)?(\\\{|\(|\[)")

_lock = threading.Lock()
_process, _owner = None, None      # and the number of the process that started it


def rewards(answers: list, golds: list) -> list[float]:
    """1.0 for each answer, (text, is_formula) or None, that equals one of its golds (a list of formulas for
    each answer), else 0.0."""
    verdicts, spent, found = {}, 0.0, []
    for answer, formulas in zip(answers, golds):
        key = answer, tuple(formulas)
        if answer and key not in verdicts:
            started = time.monotonic()
            seconds = SECONDS if spent < TOGETHER else HASTY
            verdicts[key] = _ask([*answer, formulas, seconds])
            taken = time.monotonic() - started
            spent += taken if taken > min(SLOW, seconds) else 0.0
        found.append(float(verdicts.get(key, False)))
    return found


def _ask(question):
    global _process, _owner
    with _lock:
        if _owner != os.getpid() or _process.poll() is not None:
            _process, _owner = _started(), os.getpid()
        try:
            return _answered(_process, question)
        except BaseException:          # such as the end of the call's time: the verdict is still to come
            _process.kill()
            _process.wait()
            raise


def _started():
    here = Path(__file__)
    command = [sys.executable, "-m", f"{here.parent.name}.{here.stem}"]
    environment = os.environ | {"PYTHONHASHSEED": "0"}      # for sympy's order of terms
    process = subprocess.Popen(
        command, cwd=here.parents[1], env=environment, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    ready = json.loads(process.stdout.readline() or '"its process ended"')
    if ready is not True:
        raise RuntimeError(f"math-verify does not work ({ready})")
    return process


def _answered(process, question):
    process.stdin.write(json.dumps(question).encode() + b"\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the process of math-verify ended")
    return json.loads(line)


# ---- the other process ----

def main():
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                            # antlr prints warnings

    def write(value):
        pipe.write(json.dumps(value) + "\n")
        pipe.flush()

    try:
        import math_verify
        _parsed("1", True, math_verify)      # loads the grammar
    except Exception as error:  # noqa: BLE001  the package may fail in any way
        write(f"{type(error).__name__}: {error}"[:200])
        return
    write(True)
    while hasattr(os, "fork"):
        child = os.fork()
        if not child:
            _limit_memory()
            break
        _, status = os.waitpid(child, 0)
        if status == 0:                      # the end of the pipe
            return
        write(False)                         # about the answer that took too long
    for line in sys.stdin.buffer:
        text, is_formula, golds, seconds = json.loads(line)
        _limit_time(seconds)
        is_right = any(_is_equal(text, is_formula, gold, math_verify) for gold in golds)
        _limit_time(0)
        write(is_right)


def _limit_time(seconds):
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def _limit_memory():
    import resource
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    limit = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (limit, most))


def _is_equal(text, is_formula, gold, package):
    if INTEGER.fullmatch(text) and INTEGER.fullmatch(gold):
        return int(text) == int(gold)        # most of them, and a thousand times faster
    sides = [side.strip() for side in text.split("=")]
    if len(set(sides)) > 1 and all(map(INTEGER.fullmatch, sides)):
        return False                         # 17 = 18: math-verify reads the last side only
    brackets = BRACKET.match(text), BRACKET.match(gold)
    if is_formula and all(brackets) and brackets[0][1] != brackets[1][1]:
        return False                         # (1,2) may be a point: math-verify takes it for {1,2}
    try:
        wanted = _parsed(gold, True, package)
        if wanted and is_formula and text == gold:
            return True
        found = _parsed(text, is_formula, package)
        return bool(wanted) and package.verify(wanted, found, timeout_seconds=None)
    except Exception:  # noqa: BLE001  sympy cannot compare the two
        return False


@lru_cache(256)
def _parsed(text, is_formula, package):
    """What math-verify finds in the text, a list; a formula is all of its text."""
    if not is_formula:
        return package.parse(text, fallback_mode="no_fallback", parsing_timeout=None)
    boxed = package.LatexExtractionConfig(boxed_match_priority=0)
    return package.parse(f"\\boxed{{{text}}}", [boxed], fallback_mode="no_fallback", parsing_timeout=None)


if __name__ == "__main__":
    main()
