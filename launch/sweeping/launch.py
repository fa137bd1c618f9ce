"""What an attempt at a trial runs: a command, its environment, and where."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from launch.sweeping.processes import die_with

# Left by a launcher that this process itself was started by; a trial must not take them for its own.
_RANK_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK"),
)


@dataclass(frozen=True)
class Launch:
    """One start of a trial.

    Args:
        arguments: of launch/train.py.
        program: what runs it, up to and with launch/train.py; empty to fork this process, which has imported it.
        cwd: working folder.
        environment: variables beside this process's own.
        hosts: other machines that it starts processes on.
        ssh: command that reaches them.
        slot: where it runs, for people.
    """

    arguments: Sequence[str]
    program: Sequence[str]
    cwd: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()
    ssh: tuple[str, ...] = ("ssh",)
    slot: str = ""

    @property
    def command(self) -> list[str]:
        """As it can be typed."""
        return [*(self.program or (sys.executable, "launch/train.py")), *self.arguments]

    def start(self) -> Child:
        """Start it; it dies with this process."""
        return _Forked(self) if not self.program else _Spawned(self)

    def variables(self) -> dict[str, str]:
        """The whole environment."""
        own = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        return {**own, **self.environment}


class Child(Protocol):
    """A started trial."""

    def poll(self) -> int | None:
        """Its exit code (128 + signal where a signal ended it), or None while it runs."""

    def ask_to_stop(self) -> bool:
        """SIGTERM to it; False where it is a launcher, whose ranks must be asked instead."""


class _Spawned:
    def __init__(self, launch: Launch) -> None:
        parent = os.getpid()
        self._process = subprocess.Popen(
            launch.command,
            cwd=launch.cwd,
            env=launch.variables(),
            stdin=subprocess.DEVNULL,
            preexec_fn=lambda: die_with(parent, signal.SIGKILL),
        )

    def poll(self) -> int | None:
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def ask_to_stop(self) -> bool:
        return False


class _Forked:
    def __init__(self, launch: Launch) -> None:
        parent = os.getpid()
        self._pid = os.fork()
        self._code: int | None = None
        if self._pid == 0:
            _run_inside(launch, parent)

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self._code = code if code >= 0 else 128 - code
        return self._code

    def ask_to_stop(self) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        return True


def _run_inside(launch: Launch, parent: int) -> None:
    """launch/train.py in this forked process, which never returns to what it was forked from."""
    code = 1
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        die_with(parent, signal.SIGKILL)
        os.chdir(launch.cwd)
        os.environ.clear()
        os.environ.update(launch.variables())
        _limit_threads(launch)
        from launch import train

        code = train.main(list(launch.arguments))
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _limit_threads(launch: Launch) -> None:
    """What OMP_NUM_THREADS does before torch is imported."""
    import torch

    if "OMP_NUM_THREADS" in launch.environment:
        torch.set_num_threads(int(launch.environment["OMP_NUM_THREADS"]))
