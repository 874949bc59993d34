"""`torchrun tests/all_algorithms.py a.yml b.yml ...`: train.py for each of them, in one process group,
with one start.

Every rank has a hash seed of its own, as always under torchrun, but the same one in each run of the tests:
the order of a set of texts differs between ranks."""
import os
import sys
from pathlib import Path

if os.environ.get("PYTHONHASHSEED") != os.environ["RANK"]:
    environment = {**os.environ, "PYTHONHASHSEED": os.environ["RANK"]}
    os.execve(sys.executable, [sys.executable, "-u", *sys.argv], environment)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from data.errors import run_program  # noqa: E402
from engine import ranks  # noqa: E402

stop = ranks.stop_processes
ranks.start_processes(deterministic=False)
ranks.start_processes, ranks.stop_processes = (lambda deterministic: None), (lambda: None)


def main(configs):
    for config in configs:
        train.main([config])
    stop()


run_program(main)
