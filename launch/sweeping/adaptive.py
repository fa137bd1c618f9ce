"""Optuna behind an adaptive search: it chooses points from the results so far, and says which trials to end early.

Its journal is a file in the study folder, written by all sweep processes. The trial folders are the truth: whatever a
killed process has not told Optuna is told by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import warnings
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import TrialState

from launch.sweeping.parameters import Parameter
from launch.sweeping.points import Point, choose
from launch.sweeping.space import Search
from launch.sweeping.study import Study, Trial

_LOCK_GRACE = 15  # seconds after which the lock of a process that was killed in mid-write is broken
_ORPHAN_AGE = timedelta(minutes=10)

optuna.logging.set_verbosity(optuna.logging.ERROR)


class Adaptive:
    """One process's view of the search of a study.

    Args:
        study: with search.method adaptive.
    """

    def __init__(self, study: Study) -> None:
        self._study, search = study, study.space.search
        path = str(study.path / "journal.log")
        self._storage = JournalStorage(JournalFileBackend(path, _Lock(path)))
        self._optuna = optuna.create_study(
            storage=self._storage,
            study_name=study.id,
            direction=study.space.metric.direction,
            pruner=_pruner(search, study.meta),
            load_if_exists=True,
        )
        self._optuna_id = self._storage.get_study_id_from_name(study.id)
        self._reported: dict[int, set[int]] = {}

    def ask(self, number: int) -> tuple[Point, int]:
        """A point for a trial, and its number in the journal. The seed is of the trial's number: processes that ask
        at the same time do not ask for the same."""
        self._drop_orphans()
        search = self._study.space.search
        digest = hashlib.sha256(f"{search.seed} {number}".encode()).digest()
        self._optuna.sampler = _sampler(search, int.from_bytes(digest[:4], "big"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trial = self._optuna.ask()
            point = choose(self._study.space, lambda parameter: _suggest(trial, parameter))
        return point, trial.number

    def discard(self, number: int) -> None:
        """Forget a point that came to no trial."""
        self._tell(number, TrialState.FAIL)

    def should_prune(self, trial: Trial, values: Mapping[int, float]) -> bool:
        """Tell the metric by step so far; whether the trial is to end early."""
        if trial.optuna is None:
            return False
        identity = self._storage.get_trial_id_from_study_id_trial_number(self._optuna_id, trial.optuna)
        known = self._reported.setdefault(trial.number, set(self._storage.get_trial(identity).intermediate_values))
        for step in sorted(step for step in values if step not in known):
            known.add(step)
            try:
                self._storage.set_trial_intermediate_value(identity, step, values[step])
            except UpdateFinishedTrialError:  # another process has taken the trial over, and ended it
                return False
            if self._prunes(identity):
                return True
        return False

    def _prunes(self, identity: int) -> bool:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that are not finite, for which a trial is pruned
            return bool(self._optuna.pruner.prune(self._optuna, self._storage.get_trial(identity)))

    def tell(self, trial: Trial, result: Mapping[str, Any]) -> None:
        """Tell how a trial ended. What ran out of memory or diverged counts as the worst there is, not as unknown:
        the search then leaves that region."""
        if trial.optuna is None:
            return
        if result["state"] == "complete" and math.isfinite(result["value"]):
            self._tell(trial.optuna, TrialState.COMPLETE, result["value"])
        else:
            self._tell(trial.optuna, TrialState.FAIL if result["state"] == "failed" else TrialState.PRUNED)

    def _tell(self, number: int, state: TrialState, value: float | None = None) -> None:
        """Every process tells every end that it sees, so that none is missed where one is killed; the first counts."""
        with contextlib.suppress(UpdateFinishedTrialError):
            self._optuna.tell(number, value, state=state, skip_if_finished=True)

    def _drop_orphans(self) -> None:
        """Points of processes that were killed before they made the trial's folder."""
        known = {trial.optuna for trial in self._study.trials()}
        for trial in self._optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            age = datetime.now() - (trial.datetime_start or datetime.now())
            if trial.number not in known and age > _ORPHAN_AGE:
                self.discard(trial.number)


class _Lock(JournalFileSymlinkLock):  # type: ignore[misc]
    """The journal's lock, whose holder first cuts off what a killed process left half-written: Optuna can't read on
    after such a line."""

    def __init__(self, path: str) -> None:
        super().__init__(path, grace_period=_LOCK_GRACE)
        self._path = Path(path)

    def acquire(self) -> bool:
        taken = super().acquire()
        if self._path.stat().st_size:
            _cut_torn_line(self._path)
        return bool(taken)


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def _suggest(trial: optuna.Trial, parameter: Parameter) -> Any:
    interval = parameter.interval
    if interval is None:
        return trial.suggest_categorical(parameter.name, parameter.labels or [])
    low, high, step = interval.low, interval.high, interval.step
    if interval.integer:
        return trial.suggest_int(parameter.name, int(low), int(high), step=int(step or 1), log=interval.log)
    return trial.suggest_float(parameter.name, low, high, step=step, log=interval.log)


def _sampler(search: Search, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # experimental arguments
        if search.sampler == "tpe":
            options = {"multivariate": True, "group": True, "constant_liar": True}
            return TPESampler(seed=seed, n_startup_trials=search.startup_trials, **options)
        if search.sampler == "gp":
            return GPSampler(seed=seed, n_startup_trials=search.startup_trials, deterministic_objective=True)
        if search.sampler == "cmaes":
            return CmaEsSampler(seed=seed, n_startup_trials=search.startup_trials)
        return RandomSampler(seed=seed)


def _pruner(search: Search, meta: Mapping[str, Any]) -> BasePruner:
    """Its unit is the training step."""
    if search.pruning == "median":
        return MedianPruner(n_startup_trials=search.startup_trials, n_warmup_steps=search.warmup_steps)
    first = max(search.warmup_steps, _setting(meta, "evaluation", "interval", 500), 1)
    if search.pruning == "halving":
        return SuccessiveHalvingPruner(min_resource=first)
    if search.pruning == "hyperband":
        return HyperbandPruner(min_resource=first, max_resource=_setting(meta, "training", "steps", 1000))
    return NopPruner()


def _setting(meta: Mapping[str, Any], section: str, name: str, default: int) -> int:
    own = (meta["base"].get(section) or {}).get(name, default)
    return int(meta["space"]["settings"].get(f"{section}.{name}", own))
