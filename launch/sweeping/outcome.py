"""How an attempt ended, from the run folder, its exit code and what it printed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launch.sweeping import files
from launch.sweeping.space import Metric

State = Literal["complete", "pruned", "out_of_memory", "diverged", "invalid", "failed", "stopped", "lost"]
FINAL = ("complete", "pruned", "out_of_memory", "diverged", "invalid")  # a failed trial is final after its retries
_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|\bMemoryError\b|the run needs about .* on each accelerator"
    r"|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_DIVERGED = re.compile(r"was not finite in \d+ steps in a row")
_TAIL = 60_000  # bytes of a log that are looked at
_KILLED = 137  # 128 + SIGKILL


@dataclass(frozen=True)
class Outcome:
    """The end of one attempt.

    Args:
        state: `complete`, `pruned`, `out_of_memory`, `diverged` and `invalid` are results; `failed` is tried again, up
            to the space's retries; `stopped` (asked to) and `lost` (killed) go on from the checkpoint.
        value: of the metric, the last one.
        reason: in a line, where it did not complete.
        step: training steps done.
    """

    state: State
    value: float | None = None
    reason: str = ""
    step: int = 0

    def plain(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)


@dataclass(frozen=True)
class Run:
    """What a run folder says now.

    Args:
        state: of status.json: running, finished, stopped, failed; None where there is none.
        step: training steps done.
        error: of a failed run.
        values: the metric by step.
        kinds: paths of all numbers in the last line of the metric's kind.
    """

    state: str | None
    step: int
    error: str
    values: dict[int, float]
    kinds: tuple[str, ...]


def read_run(folder: Path, metric: Metric) -> Run:
    """Read a run folder, which may be written at this moment, or not be there yet."""
    status = files.read(folder / "status.json") or {}
    values, last = _metric_values(folder / "metrics.jsonl", metric)
    return Run(
        status.get("state"), int(status.get("step", 0)), str(status.get("error", "")), values, tuple(sorted(last))
    )


def _metric_values(path: Path, metric: Metric) -> tuple[dict[int, float], dict[str, float | None]]:
    kind, _, wanted = metric.name.partition(".")
    values: dict[int, float] = {}
    last: dict[str, float | None] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # being written
            continue
        if entry.get("kind") == kind:
            last = _flat(entry, "")
            if wanted in last:
                value = last[wanted]
                values[int(entry["step"])] = float("nan") if value is None else value
    return values, last


def _flat(entry: Mapping[str, Any], prefix: str) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for name, value in entry.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            found[prefix + name] = value
    return found


def judge(run: Run, code: int, fresh: bool, log: Path, metric: Metric, memory_kills: int) -> Outcome:
    """How an attempt that has ended did, unless it was asked to end.

    Args:
        run: its run folder, read after its end.
        code: exit code, 128 + signal where it was killed.
        fresh: whether the run folder's status is of this attempt. (Launchers hide the exit codes of their ranks.)
        log: what it printed.
        metric: judges.
        memory_kills: processes that the kernel killed meanwhile for want of memory.
    """
    if fresh and run.state == "finished":
        return judge_finished(run, metric)
    if fresh and run.state == "stopped":
        return Outcome("stopped", _last(run), "SIGTERM from outside", run.step)
    text = _tail(log)
    error = run.error if fresh and run.state == "failed" else ""
    if _MEMORY.search(error) or (code != 0 and _MEMORY.search(text)):
        return Outcome("out_of_memory", None, _line_with(_MEMORY, f"{text}\n{error}"), run.step)
    if _DIVERGED.search(error or text):
        return Outcome("diverged", None, _line_with(_DIVERGED, error or text), run.step)
    if code == _KILLED and memory_kills:
        return Outcome("out_of_memory", None, "the kernel killed it for want of host memory", run.step)
    if code == _KILLED:
        return Outcome("lost", _last(run), "killed by SIGKILL", run.step)
    return Outcome("failed", None, error or _reason(text, code), run.step)


def judge_finished(run: Run, metric: Metric) -> Outcome:
    """The result of a run that came to its end."""
    kind, _, wanted = metric.name.partition(".")
    if not run.values:
        there = ", ".join(run.kinds) or "none"
        return Outcome("failed", None, f"no {wanted} in the run's {kind} lines; they have: {there}", run.step)
    value = run.values[max(run.values)]
    if not math.isfinite(value):
        return Outcome("diverged", None, f"{metric.name} is not finite at step {max(run.values)}", run.step)
    return Outcome("complete", value, "", run.step)


def stopped(run: Run, state: State, reason: str) -> Outcome:
    """The outcome of an attempt that the sweep itself ended."""
    return Outcome(state, _last(run), reason, run.step)


def _last(run: Run) -> float | None:
    finite = {step: value for step, value in run.values.items() if math.isfinite(value)}
    return finite[max(finite)] if finite else None


def _tail(log: Path) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        return file.read().decode("utf-8", errors="replace")


def _line_with(pattern: re.Pattern[str], text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if pattern.search(line)]
    return lines[-1][:500] if lines else "not finite"


def _reason(text: str, code: int) -> str:
    """The program's own message, or the last line that it printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    own = [
        line for line in lines if line.startswith("error: ") or re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)
    ]
    said = (own or lines or ["it printed nothing"])[-1]
    return f"exit code {code}: {said[:500]}"
