"""`torchrun tests/stopped_rank.py config.yml`: train.py, where rank 1 gets SIGTERM twice in update 2
and rank 0 saves slowly."""
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from engine import sealed  # noqa: E402
from engine.loop import Engine  # noqa: E402

clip, place = Engine.clip_gradients, sealed.put_in_place


def clip_and_stop(engine):
    clip(engine)
    if engine.rank == 1 and engine.step.index == 2:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)


def place_slowly(temporary, directory):
    time.sleep(1)
    place(temporary, directory)


Engine.clip_gradients, sealed.put_in_place = clip_and_stop, place_slowly
runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
