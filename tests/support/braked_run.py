"""launch/train.py with a brake, so that a test finds a run in its midst however busy the machine is.

    deepspeed --num_accelerators 2 tests/support/braked_run.py [options of launch/train.py]

While there is a file RUN.brake beside the run folder, the run waits at the step that stands in it, or a later one.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch import train
from titans_ds.training.run_folder import RunFolder
from titans_ds.zero.leaving import leave


def brake_of(run: Path) -> Path:
    """The file."""
    return run.with_name(f"{run.name}.brake")


class BrakedFolder(RunFolder):
    """Rank 0's; the other ranks wait for it in a collective."""

    def status(self, state: str, **details: Any) -> None:
        """Written after every step, when its metrics are."""
        super().status(state, **details)
        while state == "running" and details["step"] >= self._step():
            time.sleep(0.02)

    def _step(self) -> float:
        try:
            return int(brake_of(self.path).read_text())
        except FileNotFoundError:
            return float("inf")


if __name__ == "__main__":
    train.RunFolder = BrakedFolder  # type: ignore[misc]
    leave(train.main())
