"""Where trials run: slots, each for one trial at a time, and the command that starts a trial on one.

The executors `local` and `fork` have slots on this machine, on GPUs of their own where there are any. A GPU is locked
on its machine against all other sweeps, of any study.
"""

from __future__ import annotations

import fcntl
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Protocol

from launch.sweeping.errors import SweepError
from launch.sweeping.launch import Launch
from launch.sweeping.study import Study, Trial
from titans_ds.zero.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
RUNNER = (sys.executable, "-m", "deepspeed.launcher.runner")


class Executor(Protocol):
    """Slots, and how a trial starts on one."""

    slots: list[str]

    def launch(self, trial: Trial, slot: str) -> Launch:
        """What runs a trial on a slot."""

    def started(self, launch: Launch) -> None:
        """Called when a trial is about to be started."""

    def beat(self) -> None:
        """Called every now and then: say that the slots are in use."""

    def release(self) -> None:
        """Give the slots back."""


class Local:
    """Slots on this machine.

    Args:
        study: gives the working folder.
        slots: how many; None for one, or as many as the GPUs allow.
        gpus: their indices or UUIDs; None for all; empty for none.
        ranks: processes of each trial, on a GPU each.
        inside: fork this process for each trial (one rank), which has imported everything once.
    """

    def __init__(self, study: Study, slots: int | None, gpus: list[str] | None, ranks: int, inside: bool) -> None:
        if inside and ranks > 1:
            raise SweepError("the executor fork runs a trial in one process; for more ranks use the executor local")
        self._study, self._ranks, self._inside = study, ranks, inside
        self._locks: list[IO[str]] = []
        present = visible_gpus() if gpus is None else gpus
        self._gpus = self._lock_gpus(present, slots) if present else {}
        self.slots = list(self._gpus) or [f"cpu{n}" for n in range(1 if slots is None else slots)]
        if inside:
            _import_training(study)

    def _lock_gpus(self, gpus: list[str], slots: int | None) -> dict[str, list[str]]:
        wanted = max(len(gpus) // self._ranks, 1) if slots is None else slots
        free = []
        for gpu in gpus:
            lock = _try_lock(gpu) if len(free) < wanted * self._ranks else None
            if lock is not None:
                self._locks.append(lock)
                free.append(gpu)
        found = [free[n : n + self._ranks] for n in range(0, len(free) - self._ranks + 1, self._ranks)]
        if not found or (slots is not None and len(found) < slots):
            self.release()
            raise SweepError(
                f"no slot: {wanted} with {self._ranks} GPU(s) each asked for, {len(gpus)} GPU(s) here, {len(free)} of "
                "them not in use by other sweeps. Ask for fewer with --slots or --ranks, name others with --gpus, or "
                "wait"
            )
        return {"gpu" + "+".join(group): group for group in found}

    def launch(self, trial: Trial, slot: str) -> Launch:
        """Plain Python for one rank, the deepspeed launcher for more."""
        gpus = self._gpus.get(slot)
        environment = self._share_of_cores() if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        if self._inside:
            program: Sequence[str] = ()
        elif self._ranks == 1:
            program = (sys.executable, "-u", TRAIN)
        else:
            number = () if gpus else ("--num_accelerators", str(self._ranks))  # with GPUs it takes the visible ones
            program = (*RUNNER, *number, "--master_port", str(free_port()), TRAIN)
        return Launch(trial.arguments, program, working_folder(self._study), environment, slot=slot)

    def _share_of_cores(self) -> dict[str, str]:
        """Trials side by side on a CPU slow one another down many times over if each takes all cores."""
        cores = len(os.sched_getaffinity(0)) // (len(self.slots) * self._ranks)
        return {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(cores, 1))}

    def started(self, launch: Launch) -> None:
        """Nobody else needs to know."""

    def beat(self) -> None:
        """The locks are the kernel's: they need none."""

    def release(self) -> None:
        """Give the GPUs back."""
        for lock in self._locks:
            lock.close()
        self._locks.clear()


def _import_training(study: Study) -> None:
    """Once, for all trials that are forked. CUDA can't be used in a fork of a process that has used it: count GPUs
    through NVML."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import launch.train  # noqa: F401
    from titans_ds.zero.engine import import_deepspeed

    if study.space.settings.get("deepspeed", study.meta["base"].get("deepspeed", "")) is not None:
        import_deepspeed()


def working_folder(study: Study) -> Path:
    """Where trials run. SweepError where this machine lacks the folder that the study was started in."""
    if not study.cwd.is_dir():
        raise SweepError(
            f"the study was started in {study.cwd}, which is not on {socket.gethostname()}; mount it there"
        )
    return study.cwd


def visible_gpus() -> list[str]:
    """Indices of the GPUs that this process may use; none where there is no NVIDIA driver."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return [name for name in allowed.split(",") if name and name != "-1"]
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(n) for n, line in enumerate(done.stdout.splitlines()) if line.startswith("GPU")]


def _try_lock(gpu: str) -> IO[str] | None:
    """This machine's lock on a GPU. Trials that are forked hold it, too: a GPU is free when nothing runs on it."""
    folder = Path(tempfile.gettempdir()) / "titans_ds_gpus"
    folder.mkdir(mode=0o1777, exist_ok=True)
    file = (folder / f"{gpu}.lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file
