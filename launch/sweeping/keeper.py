"""The keeper of one attempt: a process between the sweep and the trial, which never lets a trial run unowned.

It beats for the attempt's claim. It kills the trial, and all that the trial started, when the sweep process ends
(however that ends), when somebody has taken the claim over, or when it can't write its beat. When the keeper itself is
killed, the kernel kills the trial; what a launcher leaves behind then is found by its mark.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launch.sweeping.claims import Claims
from launch.sweeping.launch import Child, Launch
from launch.sweeping.processes import (
    Identity,
    adopt_orphans,
    ask_ranks_to_stop,
    die_with,
    kill_descendants,
    signal_remote,
)

TAKEN_OVER, ORPHANED, SILENT = 97, 98, 99  # exit codes of a keeper that killed its trial
STOP = signal.SIGUSR1  # sent to a keeper: let the trial save itself and end
ORPHAN = signal.SIGHUP  # sent to a keeper when its sweep process ends: kill the trial
_TICK = 0.05  # seconds
BEATS_IN_LEASE = 15


@dataclass(frozen=True)
class Keeping:
    """What a keeper is given.

    Args:
        launch: the trial.
        claims: of the trial.
        number: of the claim.
        lease: of the claim, in seconds.
        grace: seconds that a trial has to end after it was asked to.
        log: file that takes what the trial prints.
        pattern: regular expression for the command lines of its processes on other machines.
    """

    launch: Launch
    claims: Claims
    number: int
    lease: float
    grace: float
    log: Path
    pattern: str


def start_keeper(keeping: Keeping) -> int:
    """Fork a keeper with its trial; returns its process id. Its exit code is the trial's, or one of the above."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        code = _Keeper(keeping).run(parent)
    except BaseException:
        traceback.print_exc()
        kill_descendants()
    finally:
        os._exit(code)


class _Keeper:
    def __init__(self, keeping: Keeping) -> None:
        self.keeping, self.asked, self.orphaned = keeping, False, False
        self._beats, self._beaten = 0, 0.0

    def run(self, parent: int) -> int:
        os.setsid()  # a Ctrl-C in the terminal is for the sweep, which then asks its trials
        _write_output_to(self.keeping.log)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(STOP, self._on_stop)
        signal.signal(signal.SIGTERM, self._on_stop)  # Slurm sends it to all processes of a task
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # and this one; the trial ignores it, too
        signal.signal(ORPHAN, self._on_orphaned)
        die_with(parent, ORPHAN)
        adopt_orphans()
        self._identity, self._beaten = Identity.of(os.getpid()), time.monotonic()
        self._beat()
        child = self.keeping.launch.start()
        code = self._watch(child)
        kill_descendants()
        self._signal_hosts(signal.SIGKILL, self.keeping.pattern)  # whatever the code: launchers hide those of ranks
        return code

    def _watch(self, child: Child) -> int:
        deadline = None
        while True:
            code = child.poll()
            if code is not None:
                return code
            if self.orphaned:
                return ORPHANED
            if self._beat_is_due() and not self._beat():
                return TAKEN_OVER
            if time.monotonic() - self._beaten > self.keeping.lease / 2:
                return SILENT
            if self.asked and deadline is None:
                deadline = time.monotonic() + self.keeping.grace
                self._ask(child)
            if deadline is not None and time.monotonic() > deadline:
                return 128 + signal.SIGKILL
            time.sleep(_TICK)

    def _ask(self, child: Child) -> None:
        if child.ask_to_stop():
            return
        ask_ranks_to_stop()
        self._signal_hosts(signal.SIGTERM, f"local_rank=.*{self.keeping.pattern}")  # ranks, not their launcher

    def _signal_hosts(self, number: int, pattern: str) -> None:
        launch = self.keeping.launch
        away = signal_remote(launch.hosts, launch.ssh, number, pattern)
        if away:
            print(f"sweep: could not reach {', '.join(away)} to end the trial there", flush=True)

    def _beat_is_due(self) -> bool:
        return time.monotonic() - self._beaten > self.keeping.lease / BEATS_IN_LEASE

    def _beat(self) -> bool:
        """Beat; False where the claim is no longer ours. A beat that can't be written is tried again."""
        keeping, now = self.keeping, time.monotonic()
        if keeping.claims.lost(keeping.number):
            return False
        try:
            keeping.claims.beat(keeping.number, self._beats + 1, self._identity)
        except OSError as error:
            print(f"sweep: the beat can't be written: {error}", flush=True)
            return True
        self._beats, self._beaten = self._beats + 1, now
        return True

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def _on_orphaned(self, number: int, frame: FrameType | None) -> None:
        self.orphaned = True


def _write_output_to(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target in (1, 2):
        os.dup2(descriptor, target)
    os.close(descriptor)
