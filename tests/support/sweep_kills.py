"""Kill what runs a sweep, again and again, and count the rounds in which nothing was lost and nothing ran twice.

    python -m tests.support.sweep_kills FOLDER [--rounds 10] [--kinds trial worker sweep namespace]

A round is a new study of three trials. In the middle of one, at a random moment, SIGKILL goes to the trial; to one of
two sweep processes; to the only one; or to the first process of the Linux namespaces (network, processes, mounts) that
the only one lives in, with which everything inside of them dies. Then the same command is given again. Namespaces need
root. The trials are tests/support/sweep_trainer.py's.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from optuna.trial import TrialState

from launch.sweeping.study import Study
from tests.support.namespaces import ISOLATED
from tests.support.sweep_processes import ROOT, TRAINER, Process, kill_all, processes_of, wait_for, write_space

STEPS, TRIALS = 20, 3
KINDS = ("trial", "worker", "sweep", "namespace")
SECONDS = 240.0  # to wait for what takes a few on a quiet machine


def steps_of(study: Path, index: int) -> list[int]:
    """Every step that was ever trained for a point, in order."""
    log = study / f"trials/{index:04d}/run/steps.log"
    return [int(line) for line in log.read_text().splitlines()] if log.exists() else []


def running(study: Path) -> list[int]:
    """Points that run, past a few steps and not near their last."""
    rows = Study(study).rows() if (study / "study.json").exists() else []
    return [row.index for row in rows if row.state == "running" and 3 < row.step < STEPS - 5]


def one_round(kind: str, folder: Path) -> str:
    """Start a study, kill, give the command again; what was wrong at the end, or nothing."""
    folder.mkdir(parents=True)
    settings = {"training.steps": STEPS}
    space = write_space(folder / "space.yaml", {"training.seed": list(range(TRIALS))}, settings=settings)
    study = folder / "study"
    command = ["--space", space, "--study", study, "--launcher", TRAINER, "--lease", "8"]
    slow, fast = {"SWEEP_TRAINER_SECONDS": "0.15"}, {"SWEEP_TRAINER_SECONDS": "0.02"}
    if kind == "namespace":
        words = [sys.executable, str(ROOT / "launch" / "sweep.py"), *map(str, command)]
        inside = f"ip link set lo up; exec {shlex.join(words)}"
        with (folder / "1.log").open("w") as log:
            holder = subprocess.Popen(
                [*ISOLATED, "sh", "-c", inside], env={**os.environ, **slow, "PYTHONPATH": str(ROOT)}, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
    else:
        first = Process(folder / "1.log", *command, **slow)
    (hit, *_) = wait_for(lambda: running(study), SECONDS)
    time.sleep(random.uniform(0.0, 0.5))
    if kind == "trial":
        kill_all(processes_of(study / f"trials/{hit:04d}"))
        last = first
    elif kind == "namespace":
        holder.kill()  # which takes the first process inside with it
        holder.wait(SECONDS)
        last = Process(folder / "2.log", *command, **fast)
    elif kind == "sweep":
        first.send(signal.SIGKILL)
        first.code(SECONDS)
        last = Process(folder / "2.log", *command, **fast)
    else:
        last = Process(folder / "2.log", *command, **slow)
        wait_for(lambda: "trial" in last.said(), SECONDS)
        first.send(signal.SIGKILL)
        first.code(SECONDS)
    code = last.code(SECONDS)
    return faults(study, code)


def faults(study: Path, code: int) -> str:
    """What a study that has ended should not show."""
    found, rows = [], Study(study).rows()
    if code != 0:
        found.append(f"exit code {code}")
    for row in rows:
        steps = steps_of(study, row.index)
        if row.state != "complete":
            found.append(f"trial {row.index} is {row.state}")
        if sorted(set(steps)) != list(range(1, STEPS + 1)):
            found.append(f"trial {row.index} lacks steps")
        # From its checkpoint a trial repeats at most the step that it was killed in.
        if len(steps) > STEPS + row.attempts - 1:
            found.append(f"trial {row.index} trained {len(steps) - STEPS} steps twice in {row.attempts} attempts")
    ends = sum(trial.state == TrialState.COMPLETE for trial in Study(study).trials())
    if ends != TRIALS:
        found.append(f"{ends} trials came to an end, not {TRIALS}")
    return "; ".join(found)


def main() -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    lost = 0
    for kind in options.kinds:
        bad = 0
        for number in range(options.rounds):
            try:
                wrong = one_round(kind, options.folder / f"{kind}{number}")
            finally:
                Process.end_all()
            if wrong:
                bad += 1
                print(f"{kind}, round {number}: {wrong}", flush=True)
        print(f"{kind}: {options.rounds - bad} of {options.rounds}", flush=True)
        lost += bad
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
