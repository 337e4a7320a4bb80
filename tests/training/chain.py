"""A program for two devices: the autoencoder, the detector and two stretches of the teacher, at a tiny size.

It stands on a clock that ticks when it is read, so that every stage trains for a few updates however fast the machine.
"""

import itertools
import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from tests.training.tiny import SIZE, TINY
from training import autoencoder, detector, teacher

STAGES = ("autoencoder", "teacher")
CLOCKS = (*STAGES, "clock", "detector")


def train(folder: Path) -> None:
    autoencoder.main(folder, seconds=9, batch=4, per_call=2, size=SIZE, dtype="float32")
    trained = {"autoencoder": folder / "autoencoder", "seconds": 9, "per_call": 1, "dtype": "float32"}
    detector.main(Namespace(**trained, output=folder, scenes=50, batch=2))
    first = {"output": folder, "scenes": 200, "batch": 4, "size": SIZE, "seed": 0, "rate": 1e-3}
    first |= {"name": "first", "resume": None, "tokenizers": None, "optimizer": "muon"}
    teacher.main(Namespace(**trained, **first))
    later = {"name": "teacher", "resume": folder / "first-weights", "tokenizers": folder / "tokenizers"}
    teacher.main(Namespace(**trained, **(first | later | {"seed": 1, "optimizer": "adam"})))


if __name__ == "__main__":
    with ExitStack() as patches:
        ticks = SimpleNamespace(monotonic=itertools.count().__next__)
        for stage in CLOCKS:
            patches.enter_context(patch(f"training.{stage}.time", ticks))
        for stage in STAGES:
            patches.enter_context(patch(f"training.{stage}.FLASH_MINI", TINY))
        train(Path(sys.argv[1]))
