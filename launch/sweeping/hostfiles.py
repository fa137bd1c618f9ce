"""The executor `hostfile`: groups of machines, each for one multi-node trial at a time under the deepspeed launcher.

A group is this sweep process's alone among those of the study: it has a claim on it, as on a trial, and beats for it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from launch.sweeping.claims import Claim, Claims
from launch.sweeping.errors import SweepError
from launch.sweeping.executors import RUNNER, TRAIN, working_folder
from launch.sweeping.keeper import BEATS_IN_LEASE
from launch.sweeping.launch import Launch
from launch.sweeping.processes import Identity
from launch.sweeping.study import Study, Trial
from titans_ds.zero.ports import free_port


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

    def _is_dead(self, claims: Claims, last: Claim) -> bool:
        """Waits a lease for an owner elsewhere that gives no sign."""
        limit = time.monotonic() + self._lease * (1 + 2 / BEATS_IN_LEASE)
        beat = claims.last_beat(last.number)
        while not claims.is_dead(last):
            if time.monotonic() > limit or claims.last_beat(last.number) != beat:
                return False
            time.sleep(min(1.0, self._lease / BEATS_IN_LEASE))
        return True

    def launch(self, trial: Trial, slot: str) -> Launch:
        """`deepspeed --hostfile GROUP …`."""
        group = self._groups[slot]
        given = [] if "--master_port" in self._launcher else ["--master_port", str(free_port())]
        here = group.hosts in (("localhost",), (socket.gethostname(),))
        if len(group.hosts) == 1 and not here:
            given.append("--force_multi")  # else the launcher starts a single host's ranks on this machine
        program = (*RUNNER, "--hostfile", str(group.path), *given, *self._launcher, TRAIN)
        hosts = () if here else group.hosts
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


def _groups(path: Path, nodes: int | None) -> list[list[str]]:
    if not path.is_file():
        raise SweepError(f"the hostfile {path} does not exist")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    size = nodes or max(len(lines), 1)
    if lines and len(lines) % size:
        raise SweepError(f"{path} has {len(lines)} hosts, which don't make groups of {size}; change --nodes-per-trial")
    return [lines[n : n + size] for n in range(0, len(lines), size)]
