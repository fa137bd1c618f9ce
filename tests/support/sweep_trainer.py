"""Stands in for launch/train.py where a test is about the sweep: the same run folder, without torch.

python tests/support/sweep_trainer.py launch/train.py --config=FILE --run.dir=DIR --run.resume=auto

Every step takes SWEEP_TRAINER_SECONDS, writes a line of metrics and a line of steps.log (which nothing cuts), and is
saved. While there is a file SWEEP_TRAINER_BRAKE, it waits at the step that stands in it, or a later one, so that a test
finds it in its midst. The loss falls with the steps towards the distance of the learning rate from 0.01.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml


def write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


def brake() -> float:
    """The step at which it waits now."""
    try:
        return int(Path(os.environ.get("SWEEP_TRAINER_BRAKE", "")).read_text())
    except (OSError, ValueError):  # none, or one that is being written
        return math.inf


def main() -> int:
    """Run the program."""
    given = dict(word.split("=", 1) for word in sys.argv[2:])
    config = yaml.safe_load(Path(given["--config"]).read_text())
    run = Path(given["--run.dir"])
    run.mkdir(exist_ok=True)
    (run / "stop").unlink(missing_ok=True)
    seed, rate, steps = config["training"]["seed"], config["optimizer"]["lr"], config["training"]["steps"]
    if seed == 13 and not os.path.exists(str(config["data"]["corpus"])):
        print("some words\nValueError: no corpus")
        return 1
    if seed == 14:
        print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB")
        return 1
    saved = run / "checkpoint.json"
    step = json.loads(saved.read_text())["step"] if saved.exists() else 0
    write(run / "status.json", {"state": "running", "step": step})
    while step < steps:
        while step >= brake() and not (run / "stop").exists():
            time.sleep(0.02)
        if (run / "stop").exists():
            write(run / "status.json", {"state": "stopped", "step": step})
            return 143
        time.sleep(float(os.environ.get("SWEEP_TRAINER_SECONDS", "0.02")))
        step += 1
        loss = math.inf if seed == 15 else abs(math.log10(rate) + 2) + 1 / step
        with (run / "steps.log").open("a") as file:
            file.write(f"{step}\n")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": "evaluation", "step": step, "losses": {"memory": {"mean": loss}}}) + "\n")
        write(saved, {"step": step})
        write(run / "status.json", {"state": "running", "step": step})
    write(run / "status.json", {"state": "finished", "step": step})
    return 0


if __name__ == "__main__":
    sys.exit(main())
