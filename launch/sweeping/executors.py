"""Where trials run: slots, each for one trial at a time, and the command that starts a trial on one.

`local` and `fork` have slots on this machine, on GPUs of their own where there are any; `hostfile` has groups of
machines, each for one multi-node trial. Slots are this sweep process's alone: GPUs are locked on their machine for all
studies, groups of machines in the study for all its sweep processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from launch.sweeping.claims import Claims
from launch.sweeping.errors import SweepError
from launch.sweeping.keeper import BEATS_IN_LEASE
from launch.sweeping.launch import Launch
from launch.sweeping.processes import Identity
from launch.sweeping.study import Study, Trial

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
        wanted, free = len(gpus) // self._ranks if slots is None else slots, []
        for gpu in gpus:
            lock = _try_lock(gpu)
            if lock is not None:
                self._locks.append(lock)
                free.append(gpu)
        found = [free[n : n + self._ranks] for n in range(0, len(free) - self._ranks + 1, self._ranks)]
        if not found or (slots is not None and len(found) < slots):
            taken = f"{len(gpus) - len(free)} of them in use by other sweeps"
            raise SweepError(
                f"no slot: {wanted or 1} of {self._ranks} GPU(s) asked for, {len(gpus)} GPU(s) here, {taken}. Ask for "
                "fewer with --slots or --ranks, name others with --gpus, or wait"
            )
        return {"gpu" + "+".join(group): group for group in found[:wanted]}

    def launch(self, trial: Trial, slot: str) -> Launch:
        """Plain Python for one rank, the deepspeed launcher for more."""
        gpus = self._gpus.get(slot)
        environment = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        if self._inside:
            program: Sequence[str] = ()
        elif self._ranks == 1:
            program = (sys.executable, "-u", TRAIN)
        else:
            number = () if gpus else ("--num_accelerators", str(self._ranks))  # with GPUs it takes the visible ones
            program = (*RUNNER, *number, "--master_port", str(free_port()), TRAIN)
        return Launch(trial.arguments, program, working_folder(self._study), environment, slot=slot)

    def started(self, launch: Launch) -> None:
        """Nobody else needs to know."""

    def beat(self) -> None:
        """The locks are the kernel's: they need none."""

    def release(self) -> None:
        """Give the GPUs back."""
        for lock in self._locks:
            lock.close()
        self._locks.clear()


@dataclass(frozen=True)
class Group:
    """Machines for one trial at a time: a hostfile, and the number of this process's claim on it."""

    path: Path
    hosts: tuple[str, ...]
    claims: Claims
    number: int


class Hostfiles:
    """A pool of hostfile groups: several multi-node trials side by side.

    Args:
        study: keeps the groups' files and claims.
        files: hostfiles.
        nodes: split each into groups of so many hosts; None takes each file as one group.
        launcher: further options of the deepspeed launcher, such as `--launcher openmpi --ssh_port 2222`.
        slots: how many groups at most; None for all that are free.
        lease: seconds without a sign after which another sweep process takes a group over.
    """

    def __init__(
        self, study: Study, files: list[Path], nodes: int | None, launcher: str, slots: int | None, lease: float
    ) -> None:
        self._study, self._launcher, self._lease, self._beaten = study, shlex.split(launcher), lease, 0.0
        self._me, self._count = Identity.of(os.getpid()), 0
        groups = [group for path in files for group in _groups(path, nodes)]
        if not groups:
            raise SweepError("no slot: the executor hostfile needs --hostfile FILE with at least one host")
        self._groups = self._take(groups, slots)
        self.slots = list(self._groups)

    def _take(self, groups: list[list[str]], slots: int | None) -> dict[str, Group]:
        found: dict[str, Group] = {}
        for lines in groups:
            if slots is None or len(found) < slots:
                self._try(lines, found)
        if not found:
            raise SweepError(
                f"no slot: all {len(groups)} groups of hosts are in use by other processes of {self._study.path}. "
                f"A group whose process was killed on another machine is free {self._lease:.0f} s later"
            )
        return found

    def _try(self, lines: list[str], found: dict[str, Group]) -> None:
        hosts = tuple(line.split()[0] for line in lines)
        name = hosts[0] if len(hosts) == 1 else f"{hosts[0]}+{len(hosts) - 1}"
        place = self._study.path / "slots" / f"{name}-{hashlib.sha256(' '.join(hosts).encode()).hexdigest()[:6]}"
        claims = Claims(place)
        numbers = claims.numbers()
        last = claims.read(numbers[-1]) if numbers else None
        if last is not None and claims.ended(last.number) is None:
            if not self._is_dead(claims, last):
                return
            claims.end(last.number, {"state": "lost"})
        number = (numbers[-1] if numbers else 0) + 1
        if claims.take(number, self._me, self._lease, {}):
            (place / "hostfile").write_text("\n".join(lines) + "\n", encoding="utf-8")
            found[place.name] = Group(place / "hostfile", hosts, claims, number)

    def _is_dead(self, claims: Claims, last: object) -> bool:
        """Waits a lease for an owner elsewhere that gives no sign."""
        limit = time.monotonic() + self._lease * (1 + 2 / BEATS_IN_LEASE)
        beat = claims.last_beat(last.number)  # type: ignore[attr-defined]
        while not claims.is_dead(last):  # type: ignore[arg-type]
            if time.monotonic() > limit or claims.last_beat(last.number) != beat:  # type: ignore[attr-defined]
                return False
            time.sleep(min(1.0, self._lease / BEATS_IN_LEASE))
        return True

    def launch(self, trial: Trial, slot: str) -> Launch:
        """`deepspeed --hostfile GROUP …`."""
        group = self._groups[slot]
        port = 29500 + 1 + list(self._groups).index(slot)
        given = [] if "--master_port" in self._launcher else ["--master_port", str(port)]
        program = (*RUNNER, "--hostfile", str(group.path), *given, *self._launcher, TRAIN)
        hosts = tuple(host for host in group.hosts if host not in ("localhost", socket.gethostname()))
        return Launch(trial.arguments, program, working_folder(self._study), {}, hosts, self._ssh(), slot)

    def _ssh(self) -> tuple[str, ...]:
        options = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
        if "--ssh_port" in self._launcher:
            return (*options, "-p", self._launcher[self._launcher.index("--ssh_port") + 1])
        return options

    def started(self, launch: Launch) -> None:
        """The deepspeed launcher tells the other machines."""

    def beat(self) -> None:
        """Say that the groups are in use; OSError passes where the folder is away for a while."""
        if time.monotonic() - self._beaten < self._lease / BEATS_IN_LEASE:
            return
        self._beaten, self._count = time.monotonic(), self._count + 1
        for group in self._groups.values():
            group.claims.beat(group.number, self._count, self._me)

    def release(self) -> None:
        """Give the groups back."""
        for group in self._groups.values():
            group.claims.end(group.number, {"state": "released"})


def _import_training(study: Study) -> None:
    """Once, for all trials that are forked."""
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


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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


def _groups(path: Path, nodes: int | None) -> list[list[str]]:
    if not path.is_file():
        raise SweepError(f"the hostfile {path} does not exist")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    size = nodes or max(len(lines), 1)
    if lines and len(lines) % size:
        raise SweepError(f"{path} has {len(lines)} hosts, which don't make groups of {size}; change --nodes-per-trial")
    return [lines[n : n + size] for n in range(0, len(lines), size)]


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
