"""The loop of one sweep process: fill the free slots with trials, watch them, record how they end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from launch.sweeping import keeper, outcome
from launch.sweeping.errors import SweepError
from launch.sweeping.executors import Executor
from launch.sweeping.ledger import Attempt, Ledger, run_pattern, with_mark
from launch.sweeping.outcome import Outcome
from launch.sweeping.points import show
from launch.sweeping.processes import MARK, kill_marked, out_of_memory_kills
from launch.sweeping.study import Study

if TYPE_CHECKING:
    from launch.sweeping.adaptive import Adaptive

_TICK, _SCAN, _LOOK = 0.1, 0.5, 0.25  # seconds between looks at processes, at the study folder, at metrics
STOPPED = 143  # exit code
_FAILURES = 8  # in a row
_PATIENCE = 600.0  # seconds that the study folder may be away


@dataclass
class Running:
    """An attempt that runs under a keeper.

    Args:
        attempt: this process's claim.
        keeper: process id.
        since: monotonic time of its start.
        status: signature of the run folder's status before it.
        memory_kills: of the kernel, before it.
        asked: to end, and why.
        looked: when its metrics were last read.
    """

    attempt: Attempt
    keeper: int
    since: float
    status: tuple[int, int]
    memory_kills: int
    asked: str | None = None
    looked: float = 0.0


class Worker:
    """One sweep process.

    Args:
        study: shared with others.
        executor: its slots.
        say: takes a line of progress.
        lease: seconds without a sign of life after which others take its trials over.
        grace: seconds that a trial has to save itself when it is asked to end.
        limit: of attempts that it starts; None for no limit.
        patience: seconds without anything to do after which it leaves; None to wait for the end of the study, since
            a trial that another process runs may have to be run again.
    """

    def __init__(
        self,
        study: Study,
        executor: Executor,
        say: Callable[[str], None],
        lease: float = 180.0,
        grace: float = 120.0,
        limit: int | None = None,
        patience: float | None = None,
    ) -> None:
        self.study, self.executor, self.say = study, executor, say
        self.lease, self.grace, self.limit, self.patience = lease, grace, limit, patience
        self.adaptive = _adaptive(study)
        self.ledger = Ledger(study, lease, self.adaptive, say)
        self.running: dict[str, Running] = {}
        self._signals, self._scanned, self._started = 0, 0.0, 0
        self._idle_since = time.monotonic()
        self._trouble: float | None = None
        self._failures = 0

    def run(self) -> int:
        """Work until every trial of the study has ended, here or elsewhere. Returns the exit code: 0; 143 where it was
        asked to stop (its trials save themselves, and go on when a sweep process comes back)."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        before[keeper.STOP] = signal.signal(keeper.STOP, signal.SIG_IGN)  # a keeper has it so until it is ready
        try:
            while not self._try_step():
                time.sleep(_TICK)
        finally:
            for running in self.running.values():
                _kill(running.keeper)
            for number, handler in before.items():
                signal.signal(number, handler)
            self.executor.release()
        return STOPPED if self._signals else 0

    def _try_step(self) -> bool:
        """A round; the study folder may be away for a while. What a round could not write is found a lease later."""
        try:
            done = self._step()
        except OSError as error:
            if self._trouble is None:
                self._trouble = time.monotonic()
                self.say(f"the study folder can't be used now: {error}")
            if time.monotonic() - self._trouble > max(self.lease, _PATIENCE):
                raise SweepError(f"{self.study.path} could not be used for a long time: {error}") from error
            return False
        self._trouble = None
        return done

    def _step(self) -> bool:
        """One round; whether all is done."""
        for slot in list(self.running):
            self._reap(slot)
        if self._signals:
            self._stop_all()
            return not self.running
        self._check_failures()
        self._fill()
        self._prune()
        with contextlib.suppress(OSError):
            self.executor.beat()
        return not self.running and (self._is_exhausted() or self.ledger.all_ended())

    def _check_failures(self) -> None:
        if self._failures >= _FAILURES:
            raise SweepError(
                f"{self._failures} attempts in a row have failed here (their reasons stand above). This process stops, "
                "so that a broken machine does not use up the retries of every trial; mend it, and start it again"
            )

    def _is_exhausted(self) -> bool:
        waited = time.monotonic() - self._idle_since
        spent = self.limit is not None and self._started >= self.limit
        return spent or (self.patience is not None and waited > self.patience)

    def _fill(self) -> None:
        free = [slot for slot in self.executor.slots if slot not in self.running]
        if not free or time.monotonic() - self._scanned < _SCAN:
            return
        for slot in free:
            if self.limit is not None and self._started >= self.limit:
                return
            busy = {running.attempt.trial.number for running in self.running.values()}
            attempt = self.ledger.take(lambda trial, slot=slot: self.executor.launch(trial, slot), busy)
            if attempt is None:
                self._scanned = time.monotonic()
                return
            self._start(slot, attempt)

    def _start(self, slot: str, attempt: Attempt) -> None:
        trial = attempt.trial
        self._started += 1
        run = outcome.read_run(trial.run, self.study.space.metric)
        if run.state == "finished":  # its process was killed after the run's end, before it was recorded
            self._record(attempt, outcome.judge_finished(run, self.study.space.metric), 0.0, 0)
            return
        again = f", again from step {run.step}" if run.step else ""
        self.say(f"trial {trial.number}: attempt {attempt.number} on {slot}{again}: {show(trial.point)}")
        keeping = keeper.Keeping(
            with_mark(attempt, MARK),
            trial.claims,
            attempt.number,
            self.lease,
            self.grace,
            trial.log(attempt.number),
            run_pattern(trial),
        )
        status, kills = _signature(trial.run), out_of_memory_kills()
        self.executor.started(keeping.launch)
        process = keeper.start_keeper(keeping)
        self.running[slot] = Running(attempt, process, time.monotonic(), status, kills)

    def _reap(self, slot: str) -> None:
        running = self.running[slot]
        pid, status = os.waitpid(running.keeper, os.WNOHANG)
        if not pid:
            return
        del self.running[slot]
        self._scanned, self._idle_since = 0.0, time.monotonic()
        code = os.waitstatus_to_exitcode(status)
        code = code if code >= 0 else 128 - code
        if code:
            kill_marked(running.attempt.mark)
        seconds = time.monotonic() - running.since
        self._record(running.attempt, self._judge(running, code), seconds, code)

    def _judge(self, running: Running, code: int) -> Outcome:
        trial, metric = running.attempt.trial, self.study.space.metric
        run = outcome.read_run(trial.run, metric)
        fresh = _signature(trial.run) != running.status
        if fresh and run.state == "finished":
            return outcome.judge_finished(run, metric)
        if running.asked == "prune":
            return outcome.stopped(run, "pruned", f"pruned at step {run.step}")
        if running.asked == "stop":
            return outcome.stopped(run, "stopped", "the sweep was stopped")
        if code == keeper.SILENT:
            return outcome.stopped(run, "lost", "its signs of life could not be written to the study folder")
        kills = out_of_memory_kills() - running.memory_kills
        return outcome.judge(run, code, fresh, trial.log(running.attempt.number), metric, kills)

    def _record(self, attempt: Attempt, ended: Outcome, seconds: float, code: int) -> None:
        number = attempt.trial.number
        if not self.ledger.close(attempt, ended, seconds=round(seconds, 3), exit_code=code):
            self.say(f"trial {number}: attempt {attempt.number} was taken over by another sweep process")
            return
        self._failures = self._failures + 1 if ended.state == "failed" else 0
        value = "" if ended.value is None else f" {ended.value:.6g}"
        again = "" if number in self.ledger.ended else "; it will be run again"
        self.say(f"trial {number}: {ended.state}{value}{f' ({ended.reason})' if ended.reason else ''}{again}")

    def _prune(self) -> None:
        if self.adaptive is None or self.study.space.search.pruning == "none":
            return
        for running in self.running.values():
            if running.asked == "prune":
                _ask(running.keeper)
            elif time.monotonic() - running.looked > _LOOK:
                running.looked = time.monotonic()
                values = outcome.read_run(running.attempt.trial.run, self.study.space.metric).values
                if self.adaptive.should_prune(running.attempt.trial, values):
                    running.asked = "prune"

    def _stop_all(self) -> None:
        for running in self.running.values():
            running.asked = running.asked or "stop"
            if self._signals > 1:
                _kill(running.keeper)
            else:
                _ask(running.keeper)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals += 1


def _adaptive(study: Study) -> Adaptive | None:
    if study.space.search.method != "adaptive":
        return None
    try:
        from launch.sweeping.adaptive import Adaptive
    except ImportError as error:
        raise SweepError("search.method adaptive needs optuna: pip install 'titans-ds[sweep]'") from error
    return Adaptive(study)


def _ask(process: int) -> None:
    os.kill(process, keeper.STOP)


def _kill(process: int) -> None:
    """A keeper that is told that its sweep process has ended kills its trial."""
    os.kill(process, keeper.ORPHAN)


def _signature(run: Path) -> tuple[int, int]:
    """Changes with every write of the run's status."""
    try:
        stat = (run / "status.json").stat()
    except OSError:
        return (0, 0)
    return (stat.st_mtime_ns, stat.st_ino)
