"""One process's view of who runs which trial: takes free trials, finds those whose process was killed, settles ends."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from launch.sweeping.claims import LOST, Claim, Claims
from launch.sweeping.launch import Launch
from launch.sweeping.outcome import Outcome, read_run
from launch.sweeping.points import Point, random_point
from launch.sweeping.processes import Identity, kill_marked, kill_tree, signal_remote
from launch.sweeping.study import Study, Trial, is_final

if TYPE_CHECKING:
    from launch.sweeping.adaptive import Adaptive


@dataclass(frozen=True)
class Attempt:
    """A claim of this process on a trial.

    Args:
        trial: which.
        number: of the attempt, from 1.
        launch: what runs it.
        mark: in the environment of all its processes.
    """

    trial: Trial
    number: int
    launch: Launch
    mark: str


@dataclass
class Ledger:
    """Trials and their attempts.

    Args:
        study: theirs.
        lease: seconds without a beat after which this process's attempts count as dead.
        adaptive: chooses points, of an adaptive study.
        say: takes a line about what happens.
    """

    study: Study
    lease: float
    adaptive: Adaptive | None
    say: Callable[[str], None]
    ended: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    _claims: dict[int, Claims] = field(default_factory=dict)

    def all_ended(self) -> bool:
        """Whether every trial that the study will ever have has its result."""
        return len(self.ended) == self.study.size

    def take(self, launch_on: Callable[[Trial], Launch], busy: set[int]) -> Attempt | None:
        """Claim a trial that can run now: one that was begun, or else a new one, or else one that failed before.

        Args:
            launch_on: what would run a trial.
            busy: trials that this process runs.
        """
        begun = [t for t in self.study.trials() if t.number not in busy and not self._has_ended(t)]
        failed = [trial for trial in begun if self._failed_last(trial)]
        return (
            self._claim_one_of([trial for trial in begun if trial not in failed], launch_on)
            or self._claim_new(launch_on)
            or self._claim_one_of(sorted(failed, key=lambda trial: len(trial.claims.numbers())), launch_on)
        )

    def _claim_one_of(self, trials: Sequence[Trial], launch_on: Callable[[Trial], Launch]) -> Attempt | None:
        attempts = (self._claim(trial, launch_on) for trial in trials)
        return next((attempt for attempt in attempts if attempt is not None), None)

    def _failed_last(self, trial: Trial) -> bool:
        numbers = trial.claims.numbers()
        end = trial.claims.ended(numbers[-1]) if numbers else None
        return end is not None and end["state"] == "failed"

    def _claim_new(self, launch_on: Callable[[Trial], Launch]) -> Attempt | None:
        while (number := self.study.next_number()) is not None:
            trial = self._make(number)
            attempt = None if trial is None or self._has_ended(trial) else self._claim(trial, launch_on)
            if attempt is not None:
                return attempt
        return None

    def close(self, attempt: Attempt, outcome: Outcome, **details: Any) -> bool:
        """Write how an attempt ended. False where another process took it over: then this result does not count."""
        final = is_final(attempt.trial, outcome, self.study.space.retries)
        content = {**outcome.plain(), "final": final, "attempt": attempt.number, **details}
        if not attempt.trial.claims.end(attempt.number, content):
            return False
        if final:
            self._settle(attempt.trial, content)
        return True

    def _has_ended(self, trial: Trial) -> bool:
        if trial.number not in self.ended:
            result = trial.result()
            if result is not None:
                self._note(trial, result)
        return trial.number in self.ended

    def _settle(self, trial: Trial, end: Mapping[str, Any]) -> None:
        result = {**end, "state": "failed"} if end["state"] == LOST else dict(end)
        trial.settle(result)
        self._note(trial, result)

    def _note(self, trial: Trial, result: Mapping[str, Any]) -> None:
        self.ended[trial.number] = result
        if self.adaptive is not None:
            self.adaptive.tell(trial, result)

    def _make(self, number: int) -> Trial | None:
        search, asked = self.study.space.search, None
        point: Point
        if self.adaptive is not None:
            point, asked = self.adaptive.ask(number)
        else:
            point = self.study.grid[number] if search.method == "grid" else random_point(self.study.space, number)
        trial = self.study.make_trial(number, point, asked)
        if trial is None and self.adaptive is not None and asked is not None:
            self.adaptive.discard(asked)
        return trial

    def _claim(self, trial: Trial, launch_on: Callable[[Trial], Launch]) -> Attempt | None:
        claims = self._claims.setdefault(trial.number, trial.claims)
        numbers = claims.numbers()
        if numbers and not self._is_open(trial, claims, numbers[-1]):
            return None
        number, launch = (numbers[-1] if numbers else 0) + 1, launch_on(trial)
        mark = f"{self.study.id}/{trial.number}/{number}"
        details = {
            "mark": mark,
            "command": launch.command,
            "environment": dict(launch.environment),
            "slot": launch.slot,
            "hosts": list(launch.hosts),
            "ssh": list(launch.ssh),
        }
        if not claims.take(number, Identity.of(os.getpid()), self.lease, details):
            return None
        return Attempt(trial, number, launch, mark)

    def _is_open(self, trial: Trial, claims: Claims, number: int) -> bool:
        """Whether the next attempt can be made, after settling what a killed process has left."""
        end = claims.ended(number)
        if end is None:
            claim = claims.read(number)
            if claim is None or not claims.is_dead(claim):
                return False
            end = self._bury(trial, claims, claim)
        if end is None:
            return False
        if end["final"]:
            self._settle(trial, end)
        return not end["final"]

    def _bury(self, trial: Trial, claims: Claims, claim: Claim) -> Mapping[str, Any] | None:
        """End what is left of a dead attempt, and then its claim. None where another process was first."""
        self._kill_rest(trial, claim)
        reason = f"its process {claim.owner.pid} on {claim.owner.host} was killed, or gave no sign of life"
        step = read_run(trial.run, self.study.space.metric).step
        outcome = Outcome("lost", None, reason, step)
        final = is_final(trial, outcome, self.study.space.retries)
        content = {**outcome.plain(), "final": final, "attempt": claim.number}
        if not claims.end(claim.number, content):
            return claims.ended(claim.number)
        self.say(f"trial {trial.number}: attempt {claim.number} is lost: {reason}")
        return content

    def _kill_rest(self, trial: Trial, claim: Claim) -> None:
        details = claim.details
        if claim.owner.here:
            keeper = (trial.claims.last_beat(claim.number) or {}).get("keeper")
            if keeper is not None and Identity.read(keeper).alive:  # it was stopped, or hangs
                kill_tree(int(keeper["pid"]))
            kill_marked(str(details["mark"]))
        if details["hosts"]:
            signal_remote(tuple(details["hosts"]), tuple(details["ssh"]), signal.SIGKILL, run_pattern(trial))


def run_pattern(trial: Trial) -> str:
    """Fits the command lines of the trial's ranks and launchers, on any machine."""
    return f"--run.dir={re.escape(str(trial.run))}( |$)"


def with_mark(attempt: Attempt, name: str) -> Launch:
    """What runs the attempt, its processes marked."""
    environment = {**attempt.launch.environment, name: attempt.mark}
    return replace(attempt.launch, environment=environment)
