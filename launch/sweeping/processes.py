"""Processes on this machine: who they are, that they die with their parent, and the end of all that one started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

MARK = "TITANS_SWEEP_ATTEMPT"  # in the environment of everything that an attempt starts
TRAIN = "launch/train.py"
_SSH_SECONDS = 20.0
_KILL_SECONDS = 20.0
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Identity:
    """One process among those of all machines, for ever: a process id is used again, its start time is not.

    Args:
        host: for people.
        machine: of this boot of this machine, and the process namespace on it.
        pid: process id.
        start: of the process, in clock ticks since boot.
    """

    host: str
    machine: str
    pid: int
    start: int

    @classmethod
    def of(cls, pid: int) -> Identity:
        """A process on this machine."""
        return cls(socket.gethostname(), _machine(), pid, _start_of(pid) or 0)

    @classmethod
    def read(cls, values: Any) -> Identity:
        """From plain values."""
        return cls(values["host"], values["machine"], values["pid"], values["start"])

    @property
    def here(self) -> bool:
        """Whether it is, or was, on this machine, where it can be looked up."""
        return self.machine == _machine()

    @property
    def alive(self) -> bool:
        """Whether it runs. Only where it is `here`."""
        return _start_of(self.pid) == self.start


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat; None where there is no such process, or a dead one that nobody has waited for."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])


def die_with(parent: int, number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, however that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), number)


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends, so that none gets out of sight."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def kill_descendants(seconds: float = _KILL_SECONDS) -> None:
    """SIGKILL everything that this process started, until nothing is left."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        left = psutil.Process().children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _reap()
        if not left:
            return
        time.sleep(0.02)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def ask_ranks_to_stop() -> None:
    """SIGTERM to the training ranks among this process's descendants; not to launchers, some of which would leave
    their ranks behind, and others kill them before they are saved."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if _program(process.cmdline()).endswith(TRAIN):
                process.send_signal(signal.SIGTERM)


def _program(command: list[str]) -> str:
    """The script that an interpreter runs."""
    return next((word for word in command[1:] if not word.startswith("-")), "")


def kill_marked(mark: str) -> int:
    """SIGKILL every process on this machine that belongs to an attempt, until none runs; how many there were."""
    return len(_kill_until_none(lambda: _marked(f"{MARK}={mark}".encode())))


def kill_tree(root: int) -> int:
    """SIGKILL a process and all that it has started, until none runs; how many there were."""
    try:
        tree = [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    starts = {pid: _start_of(pid) for pid in tree}
    return len(_kill_until_none(lambda: [pid for pid in tree if starts[pid] and _start_of(pid) == starts[pid]]))


def _kill_until_none(find: Callable[[], list[int]]) -> set[int]:
    """A killed process runs on until the kernel comes to it; who takes its place must not meet it there."""
    killed: set[int] = set()
    limit = time.monotonic() + _KILL_SECONDS
    while (found := find()) and time.monotonic() < limit:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        killed.update(found)
        time.sleep(0.01)
    return killed


def _marked(entry: bytes) -> list[int]:
    """Processes with this entry in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with contextlib.suppress(OSError):
            if pid != os.getpid() and entry in (folder / "environ").read_bytes().split(b"\0") and _start_of(pid):
                found.append(pid)
    return found


def signal_remote(hosts: tuple[str, ...], ssh: tuple[str, ...], number: int, pattern: str) -> list[str]:
    """Send a signal to the processes on other machines whose command line fits a pattern.

    Args:
        hosts: their names.
        ssh: the command up to the host.
        number: of the signal.
        pattern: a regular expression of pkill's.

    Returns:
        the hosts that could not be reached.
    """
    # The brackets keep the shell that runs pkill from fitting its own pattern.
    command = f"pkill -{number} -f -- '[{pattern[0]}]{pattern[1:]}'; true"
    running = {
        host: subprocess.Popen([*ssh, host, command], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for host in hosts
    }
    limit = time.monotonic() + _SSH_SECONDS
    return [host for host, process in running.items() if _fails(process, limit)]


def _fails(process: subprocess.Popen[bytes], limit: float) -> bool:
    try:
        return process.wait(max(0.1, limit - time.monotonic())) != 0
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait() != 0


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed on this machine for want of memory."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
