"""One trial: a point drawn, launch/train.py run at it, its metrics told to Optuna, and how it ended."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import optuna
import sqlalchemy
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import TrialState

from launch.sweeping import guard
from launch.sweeping.space import ROOT, Metric, Search, show
from launch.sweeping.study import Study, read_json
from titans_ds.errors import ConfigError
from titans_ds.files import write_text
from titans_ds.reading import read_metrics
from titans_ds.zero.ports import free_port

if TYPE_CHECKING:
    from launch.sweeping.worker import Worker

_KILLED = (75, 128 + 9, 128 + 15)  # exit codes of a run whose node or process was lost, or was told to end
_MOST_ATTEMPTS = 20  # a trial that goes down with its process this often is what brings it down
_MEMORY = re.compile(
    r"OutOfMemoryError|out of memory|can't allocate memory|\bMemoryError\b|the run needs about .* on each accelerator"
    r"|CUDNN_STATUS_ALLOC_FAILED|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_DIVERGED = re.compile(r"was not finite in \d+ steps in a row")
# Left by a launcher that this process was started by; a trial must not take them for its own.
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


class FailedError(Exception):
    """A trial ended with an error, after its retries."""


class StoppedError(Exception):
    """A trial saved itself, or was killed, since the sweep was stopped; it goes on when the sweep does."""


@dataclass(frozen=True)
class Slot:
    """A place for one trial at a time.

    Args:
        name: for people.
        launcher: what runs launch/train.py, up to its name; {port} stands for a free one.
        environment: variables beside this process's own.
    """

    name: str
    launcher: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def make_sampler(search: Search, index: int) -> BaseSampler:
    """For one trial. Its seed is of the trial's number: the same whoever draws it, and never that of another."""
    seed = int.from_bytes(hashlib.sha256(f"{search.seed} {index}".encode()).digest()[:4], "big")
    if search.method != "adaptive":
        return RandomSampler(seed=seed)
    startup = search.startup_trials
    return TPESampler(seed=seed, n_startup_trials=startup, multivariate=True, group=True, constant_liar=True)


def make_pruner(study: Study) -> BasePruner:
    """Its unit is the training step."""
    search = study.space.search
    if search.pruning == "median":
        return MedianPruner(n_startup_trials=search.startup_trials, n_warmup_steps=search.warmup_steps)
    if search.pruning == "halving":
        base = (study.meta["base"].get("evaluation") or {}).get("interval", 500)
        interval = int(study.space.settings.get("evaluation.interval", base))
        return SuccessiveHalvingPruner(min_resource=max(search.warmup_steps, interval, 1))
    return NopPruner()


class TrialRun:
    """A trial of Optuna's, on a slot of a sweep process.

    Args:
        worker: the process.
        trial: goes on in the folder of its point, where one before it was lost.
        slot: where it runs.
    """

    def __init__(self, worker: Worker, trial: optuna.Trial, slot: Slot) -> None:
        self.study, self.stop, self.grace, self.say = worker.study, worker.stop, worker.grace, worker.say
        self.trial, self.slot = trial, slot
        self.index: int = trial.user_attrs["index"]
        self.folder = self.study.folder(self.index)
        self.run = self.folder / "run"
        self._told: set[int] = set()

    def objective(self) -> float:
        """Draw the point and run it to its end; returns the metric's last value.

        Raises:
            TrialPruned: a bad trial, or one that ran out of memory, diverged, or whose settings can't work together:
                to samplers the worst there is, so that they leave that region.
            FailedError, StoppedError: as they say.
            UpdateFinishedTrialError: another process has taken this one for dead, and the trial over.
        """
        self.trial.study.sampler = make_sampler(self.study.space.search, self.index)
        point = {parameter.name: parameter.suggest(self.trial) for parameter in self.study.space.parameters}
        try:
            text = self.study.space.trial_config(self.study.meta["base"], point)
        except ConfigError as error:
            self._end("invalid", str(error))
        write_text(self.folder / "config.yaml", text)
        failures = 0
        # A run that came to its end before its process could say so is not run again.
        while not self._finished():
            outcome, reason = self._attempt(show(point))
            if outcome == "failed":
                failures += 1
            if outcome in ("out_of_memory", "diverged") or failures > self.study.space.retries:
                self._end(outcome, reason)
            if outcome != "complete":
                self.say(f"trial {self.index}: {outcome} ({reason}); it is run again")
        return self._value()

    def _value(self) -> float:
        metric = self.study.space.metric
        values, last = read_metric(self.run, metric)
        if not values:
            self._end("failed", f"the run's metrics have no {metric.name}; the last line: {last[:400]}")
        if not math.isfinite(values[max(values)]):
            self._end("diverged", f"{metric.name} is not finite at step {max(values)}")
        self._tell(values)
        return values[max(values)]

    def _end(self, outcome: str, reason: str) -> NoReturn:
        self.trial.set_user_attr("reason", reason[:500])
        self.trial.set_user_attr("outcome", outcome)
        if outcome == "failed":
            raise FailedError(reason)
        raise optuna.TrialPruned(f"{outcome}: {reason}")

    def _attempt(self, point: str) -> tuple[str, str]:
        """Run launch/train.py once: `complete`, `failed`, `killed`, `out_of_memory` or `diverged`, and why."""
        number = len(list(self.folder.glob("attempt-*.log"))) + 1
        if number > _MOST_ATTEMPTS + self.study.space.retries:
            self._end("failed", f"it has ended without a result {number - 1} times")
        self._check_owner()
        guard.kill_marked(str(self.folder))  # what a process that was killed or hangs has left on this machine
        before, kills = _changed(self.run / "status.json"), out_of_memory_kills()
        at = read_json(self.run / "status.json").get("step")
        self.say(f"trial {self.index}: attempt {number} on {self.slot.name}{f' from step {at}' if at else ''}: {point}")
        own = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
        log = self.folder / f"attempt-{number:03d}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                self._command(), cwd=self.study.meta["cwd"], env={**own, **self.slot.environment},
                stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True, bufsize=0,
            )  # fmt: skip
        assert process.stdin is not None
        try:
            self._watch(process)
        finally:
            process.stdin.close()  # the guard then ends what still runs
            code = process.wait()
        status = read_json(self.run / "status.json") if _changed(self.run / "status.json") != before else {}
        said = log.read_text(encoding="utf-8", errors="replace")[-60_000:]
        return judge(status, code, said, out_of_memory_kills() - kills)

    def _command(self) -> list[str]:
        port = str(free_port())
        launcher = [word.replace("{port}", port) for word in self.slot.launcher]
        train = [str(ROOT / "launch" / "train.py"), f"--config={self.folder / 'config.yaml'}"]
        # Every attempt has a mark of its own: the guard of one that is lost must not end the next.
        mark = f"{self.folder} {uuid.uuid4().hex}"
        watched = [sys.executable, guard.__file__, mark, str(self.study.lease / 2)]
        return [*watched, *launcher, *train, f"--run.dir={self.run}", "--run.resume=auto"]

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Until the attempt has ended, or is to be: by the pruner, by the sweep's end, or by another process."""
        assert process.stdin is not None
        beat = looked = seen = 0.0
        deadline = math.inf
        while process.poll() is None:
            now = time.monotonic()
            if now - beat > min(self.study.lease / 8, 5.0):
                beat = now
                # While the database does not answer the guard is told nothing, and ends the trial in time.
                with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError, StorageInternalError, BrokenPipeError):
                    self._check_owner()
                    process.stdin.write(b".")
            if now - looked > 0.25 and (at := _changed(self.run / "metrics.jsonl")) != seen:
                looked, seen = now, at
                values, _ = read_metric(self.run, self.study.space.metric)
                # A run that has come to its end meanwhile has a result; ending it would spare nothing.
                if self._tell(values) and not self._finished():
                    self._end("pruned", f"at step {max(self._told)}")
            if self.stop.is_set():
                # The file reaches the ranks under every launcher, on every node; it is taken away when a run begins.
                deadline = min(deadline, now + self.grace)
                if (self.run / "status.json").exists():
                    (self.run / "stop").touch()
                if now > deadline:
                    break
            time.sleep(0.05)
        if self.stop.is_set():
            if self._finished():
                return
            raise StoppedError("the sweep was stopped")

    def _finished(self) -> bool:
        return read_json(self.run / "status.json").get("state") == "finished"

    def _check_owner(self) -> None:
        if self.study.storage.get_trial(self.trial._trial_id).state != TrialState.RUNNING:
            raise UpdateFinishedTrialError(f"trial {self.index} was taken over by another process")

    def _tell(self, values: dict[int, float]) -> bool:
        """Report values of the metric that Optuna does not know; whether the trial is to end early."""
        for step in sorted(values.keys() - self._told):
            try:
                self.trial.report(values[step], step)
                pruned = self.study.space.search.pruning != "none" and self.trial.should_prune()
            except (sqlalchemy.exc.SQLAlchemyError, StorageInternalError):
                return False  # at the next look, or the guard ends the trial
            self._told.add(step)
            if pruned:
                return True
        return False


def read_metric(run: Path, metric: Metric) -> tuple[dict[int, float], str]:
    """The metric by step, from a run whose metrics may be written at this moment; and the last line that should have
    it."""
    kind, *names = metric.name.split(".")
    values: dict[int, float] = {}
    last: dict[str, Any] = {}
    for line in read_metrics(run) if (run / "metrics.jsonl").is_file() else ():
        if line["kind"] != kind:
            continue
        value: Any = line
        for name in names:
            value = value.get(name, "") if isinstance(value, dict) else ""
        if value is None or isinstance(value, (int, float)):  # not finite: null in a run's own lines
            values[line["step"]] = math.nan if value is None else float(value)
        last = line
    return values, json.dumps(last) if last else "none"


def judge(status: dict[str, Any], code: int, text: str, memory_kills: int) -> tuple[str, str]:
    """How an attempt ended, and why.

    Args:
        status: the run's status.json, where this attempt wrote it. (Launchers hide the exit codes of their ranks.)
        code: exit code, 128 + signal where it was killed.
        text: the end of what it printed.
        memory_kills: processes that the kernel killed meanwhile for want of memory.
    """
    if status.get("state") == "finished":
        return "complete", ""
    error = str(status.get("error", "")) if status.get("state") == "failed" else ""
    said = f"{text}\n{error}"
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    for outcome, pattern in (("out_of_memory", _MEMORY), ("diverged", _DIVERGED)):
        if code != 0 and pattern.search(error or text):
            return outcome, [line for line in lines if pattern.search(line)][-1]
    if code in _KILLED or status.get("state") == "stopped":
        if code == 128 + 9 and memory_kills:
            return "out_of_memory", "the kernel killed it for want of host memory"
        return "killed", f"exit code {code}"
    own = [line for line in lines if line.startswith("error: ") or re.match(r"[\w.]+(Error|Exception)\b", line)]
    return "failed", f"exit code {code}: {error or (own or lines or ['it printed nothing'])[-1]}"


def _changed(path: Path) -> float:
    """When a file was last written; 0 where there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def out_of_memory_kills() -> int:
    """How many processes the kernel has killed on this machine for want of memory."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/vmstat").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0
