"""What the trials of a study say now: read from their folders, by anyone, at any time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.sweeping.claims import Claims
from launch.sweeping.outcome import Run, read_run
from launch.sweeping.space import Metric
from launch.sweeping.study import Study, Trial


@dataclass(frozen=True)
class Result:
    """One trial now.

    Args:
        trial: which.
        state: of an ended trial; else `running`, or `waiting` for its first or next attempt.
        value: of the metric, where the trial completed or was pruned.
        reason: why it did not complete.
        attempts: how many there were.
        place: where the last attempt ran.
        silence: seconds since its last sign of life, by this machine's clock.
        run: its run folder.
    """

    trial: Trial
    state: str
    value: float | None
    reason: str
    attempts: int
    place: str
    silence: float | None
    run: Run


def read_results(study: Study) -> list[Result]:
    """All trials that exist, by number."""
    return [_read(trial, study.space.metric) for trial in study.trials()]


def best_of(results: Sequence[Result], metric: Metric) -> Result | None:
    """The best of the completed trials, the first of equals; None where none has completed."""
    return next(iter(ranked(results, metric)), None)


def ranked(results: Sequence[Result], metric: Metric) -> list[Result]:
    """The completed trials, from best to worst."""
    complete = [r for r in results if r.state == "complete" and r.value is not None]
    return sorted(complete, key=lambda r: (metric.sign * float(r.value or 0.0), r.trial.number))


def _read(trial: Trial, metric: Metric) -> Result:
    claims, run = trial.claims, read_run(trial.run, metric)
    numbers = claims.numbers()
    ended = trial.result()
    place, silence = _last_place(claims, numbers)
    if ended is not None:
        state, value, reason = ended["state"], ended["value"], ended["reason"]
        return Result(trial, state, value, reason, len(numbers), place, None, run)
    last = claims.ended(numbers[-1]) if numbers else None
    running = bool(numbers) and last is None
    reason = "" if last is None else str(last["reason"])
    value = run.values[max(run.values)] if run.values else None
    state = "running" if running else "waiting"
    return Result(trial, state, value, reason, len(numbers), place, silence if running else None, run)


def _last_place(claims: Claims, numbers: Sequence[int]) -> tuple[str, float | None]:
    claim: Any = claims.read(numbers[-1]) if numbers else None
    if claim is None:
        return "", None
    beat = claims.last_beat(claim.number)
    silence = None if beat is None else max(0.0, time.time() - beat["at"])
    return f"{claim.owner.host} {claim.details['slot']}".strip(), silence
