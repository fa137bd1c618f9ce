"""A study: a folder that any number of sweep processes on any number of machines share.

STUDY/
  study.json          what is searched, from which configuration: made once, never changed
  space.yaml          the space file as it was given
  journal.log         Optuna's, of an adaptive search
  trials/0007/        made whole, by one process
    trial.json          its point, settings and command: never changed
    config.yaml         its whole training configuration: never changed
    attempts/           who ran it, when, how that ended, what it printed (claims.py)
    run/                run folder of launch/train.py: status, metrics, checkpoints, adapter
    result.json         how the trial ended, once it has
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.sweeping import files
from launch.sweeping.claims import LOST, Claims
from launch.sweeping.configs import trial_config
from launch.sweeping.errors import SweepError
from launch.sweeping.outcome import FINAL, Outcome
from launch.sweeping.points import Point, grid_points, settings_of, show
from launch.sweeping.space import Space, base_config, load_space, parse_space
from titans_ds.errors import ConfigError
from titans_ds.training.run_folder import git_commit

_META, _TRIALS = "study.json", "trials"
_CHECKED = 300
_LOST_LIMIT = 20  # a trial that has gone down with its process this often is what brings it down


@dataclass(frozen=True)
class Trial:
    """One trial's folder.

    Args:
        folder: its place.
        number: in the study.
        point: parameter -> value.
        settings: dotted name -> value.
        optuna: its number in Optuna's journal.
    """

    folder: Path
    number: int
    point: Point
    settings: dict[str, Any]
    optuna: int | None

    @property
    def run(self) -> Path:
        """Run folder of launch/train.py."""
        return self.folder / "run"

    @property
    def claims(self) -> Claims:
        """Its attempts."""
        return Claims(self.folder / "attempts")

    @property
    def arguments(self) -> list[str]:
        """Of launch/train.py."""
        return [f"--config={self.folder / 'config.yaml'}", f"--run.dir={self.run}", "--run.resume=auto"]

    def log(self, number: int) -> Path:
        """What an attempt printed."""
        return self.folder / "attempts" / f"{number:04d}.log"

    def result(self) -> dict[str, Any] | None:
        """How it ended; None while it has not."""
        return files.read(self.folder / "result.json")

    def settle(self, outcome: Mapping[str, Any]) -> None:
        """Write the result; always the content of the last attempt's end, whoever writes it."""
        files.replace(self.folder / "result.json", dict(outcome))


class Study:
    """A study folder.

    Args:
        path: of the folder, with a study in it.
    """

    def __init__(self, path: Path) -> None:
        meta = files.read(path / _META)
        if meta is None:
            raise SweepError(f"{path} is no study; start one with launch/sweep.py --space FILE --study {path}")
        self.path, self.meta = path.resolve(), meta
        self.space: Space = parse_space(meta["space"], str(path / "space.yaml"))
        self._trials: dict[int, Trial] = {}
        self._grid: list[Point] | None = None

    @property
    def id(self) -> str:
        """Of this study alone, of all."""
        return str(self.meta["id"])

    @property
    def cwd(self) -> Path:
        """Where the study was started, which relative paths in its configuration count from."""
        return Path(self.meta["cwd"])

    @property
    def grid(self) -> list[Point]:
        """Points of a grid search by trial number."""
        if self._grid is None:
            self._grid = grid_points(self.space)
        return self._grid

    @property
    def size(self) -> int:
        """How many trials it will have."""
        return len(self.grid) if self.space.search.method == "grid" else int(self.space.search.trials or 0)

    def trials(self) -> list[Trial]:
        """Those that exist, by number."""
        for name in os.listdir(self.path / _TRIALS):
            if name.isdigit() and int(name) not in self._trials:
                self._trials[int(name)] = self._read(int(name))
        return [self._trials[number] for number in sorted(self._trials)]

    def next_number(self) -> int | None:
        """Of the next trial to make; None when all exist."""
        existing = {trial.number for trial in self.trials()}
        return next((n for n in range(self.size) if n not in existing), None)

    def make_trial(self, number: int, point: Point, optuna: int | None) -> Trial | None:
        """Make a trial's folder; None where another process has made this number. Settings that can't work make a
        trial that has ended as `invalid`."""
        settings = settings_of(self.space, point)
        partial = self.path / _TRIALS / f".{number:04d}.{uuid.uuid4().hex}.part"
        (partial / "attempts").mkdir(parents=True)
        trial = Trial(partial, number, point, settings, optuna)
        try:
            text = trial_config(self.meta["base"], settings)
        except ConfigError as error:
            text = ""
            trial.settle({"at": time.time(), **Outcome("invalid", reason=str(error)).plain()})
        (partial / "config.yaml").write_text(text, encoding="utf-8")
        self._describe(trial)
        if files.publish_folder(partial, self._folder(number)):
            return self._read(number)
        shutil.rmtree(partial)
        return None

    def _describe(self, trial: Trial) -> None:
        final = Trial(self._folder(trial.number), trial.number, trial.point, trial.settings, trial.optuna)
        command = ["python", "launch/train.py", *final.arguments]
        content = {"number": trial.number, "point": trial.point, "settings": trial.settings, "optuna": trial.optuna}
        files.replace(trial.folder / "trial.json", {**content, "command": command, "made": time.time()})
        for name in ("trial.json", "config.yaml"):
            (trial.folder / name).chmod(stat.S_IRUSR | stat.S_IRGRP | stat.S_IROTH)

    def _read(self, number: int) -> Trial:
        values = files.read(self._folder(number) / "trial.json")
        if values is None:
            raise SweepError(f"{self._folder(number)} has no readable trial.json; the study is damaged")
        return Trial(self._folder(number), number, values["point"], values["settings"], values["optuna"])

    def _folder(self, number: int) -> Path:
        return self.path / _TRIALS / f"{number:04d}"


def is_final(trial: Trial, outcome: Outcome, retries: int) -> bool:
    """Whether a trial has ended with this outcome of an attempt, or is tried again."""
    if outcome.state in FINAL:
        return True
    if outcome.state == "stopped":
        return False
    claims = trial.claims
    ends = [claims.ended(n) for n in claims.numbers()]
    before = sum(1 for end in ends if end is not None and end["state"] == outcome.state)
    return before >= (_LOST_LIMIT if outcome.state == LOST else retries)


def open_study(folder: Path, space_file: Path | None, settings: Mapping[str, Any]) -> Study:
    """The study of a folder: made, if there is none, and joined, if it is the same.

    Args:
        folder: the study's.
        space_file: what to search; None joins the study that is there.
        settings: dotted name -> value, the same in every trial, beside those of the space.

    Raises:
        SweepError: the folder holds a study of another space, or something else.
    """
    if space_file is None:
        if settings:
            raise SweepError("settings are part of the study from its start; give --space, too, or leave them out")
        return Study(folder)
    meta = _meta(space_file, settings)
    if not (folder / _META).is_file():
        _create(folder, meta, space_file)
    study = Study(folder)
    _check_same(study, meta)
    return study


def _meta(space_file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    content = load_space(space_file)
    content["settings"] = {**(content.get("settings") or {}), **settings}
    content = _plain(content)
    return {"space": content, "base": _plain(base_config(parse_space(content, str(space_file)), space_file))}


def _plain(content: Any) -> Any:
    """As it is read back from study.json, where keys are text."""
    return json.loads(json.dumps(content, default=str))


def _create(folder: Path, meta: dict[str, Any], space_file: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / _META).is_file():
        raise SweepError(f"{folder} exists and is no study; choose another folder")
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.part")
    (partial / _TRIALS).mkdir(parents=True)
    try:
        _check_points(parse_space(meta["space"], str(space_file)), meta["base"], space_file)
        own = {"format": 1, "id": uuid.uuid4().hex[:12], "cwd": os.getcwd(), "git_commit": git_commit()}
        files.replace(partial / _META, {**own, "made": time.time(), **meta})
        text = yaml.safe_dump(meta["space"], sort_keys=False)
        (partial / "space.yaml").write_text(text, encoding="utf-8")
        files.publish_folder(partial, folder)  # where another process was first, its study is looked at next
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_points(space: Space, base: Mapping[str, Any], space_file: Path) -> None:
    """Refuse a grid with combinations that can't work, before anything runs; elsewhere, and beyond the first few
    hundred, such trials end as `invalid`."""
    if space.search.method != "grid":
        return
    points, problems = grid_points(space)[:_CHECKED], []
    for point in points:
        try:
            trial_config(base, settings_of(space, point))
        except ConfigError as error:
            problems.append(f"{show(point)}: {error}")
    if problems:
        raise SweepError(
            f"{space_file}: {len(problems)} of {len(points)} combinations can't work, such as {problems[0]}. Give a "
            "parameter a `when:`, or pair it with another"
        )


def _check_same(study: Study, meta: Mapping[str, Any]) -> None:
    for name, what in (("space", "space"), ("base", "base configuration")):
        changed = sorted(_differences(study.meta[name], meta[name], ""))
        if changed:
            raise SweepError(
                f"{study.path} is a study of another {what}: {_listed(changed)}. A study never changes: use the space "
                f"and configuration it was started with ({study.path / 'space.yaml'}), or another folder"
            )


def _listed(names: Sequence[str]) -> str:
    return "; ".join(names[:3]) + (f"; and {len(names) - 3} more" if len(names) > 3 else "")


def _differences(there: Any, here: Any, path: str) -> list[str]:
    if isinstance(there, dict) and isinstance(here, dict):
        keys = [*there, *(key for key in here if key not in there)]
        return [d for key in keys for d in _differences(there.get(key), here.get(key), f"{path}.{key}".strip("."))]
    return [] if there == here else [f"{path} is {there!r} there, {here!r} here"]
