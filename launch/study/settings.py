"""A study as settings: bases, arms (one training configuration each), benchmarks, and how they are evaluated.

A study file is YAML; launch/studies holds the ones that come with this project, and says in comments what each is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from titans_ds.errors import ConfigError
from titans_ds.validation import nearest, require
from titans_ds.yaml_files import read_yaml

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = "shipped"
_SHIPPED_ROWS = ("as_is", "renamed")
_CONTROLS = {"ablation", "memory_wrong"}


@dataclass(frozen=True)
class Arm:
    """One trained memory.

    Args:
        base: name of a base of the study.
        config: training configuration, from the project's root.
        settings: changes to it, by dotted name.
        adapter: folder of the adapter that comes with this project, from its root; null where none does.
    """

    base: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: str | None = None


@dataclass(frozen=True)
class Study:
    """All arms and what they are evaluated on.

    Args:
        bases: folder or hub id of each base; `shipped` is the hybrid of this project, null must be given by --base.
        arms: by name.
        benchmarks: by name: `shipped/as_is` or `shipped/renamed` (packages first released in 2026), a jsonl file, or
            null where --data must give one.
        modes: of the evaluation (eval/modes); one with memory needs `ablation` and `memory_wrong` beside it.
        options: of `python -m eval.crosscodeeval run`, by name without dashes.
    """

    bases: dict[str, str | None]
    arms: dict[str, Arm]
    benchmarks: dict[str, str | None] = field(default_factory=dict)
    modes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(bool(self.arms), "the study has no arms; name at least one, with its base and config")
        for name, arm in self.arms.items():
            _known(arm.base, self.bases, f"arms.{name}.base")
            require((ROOT / arm.config).is_file(), f"arms.{name}.config: there is no file {arm.config} in {ROOT}")
        for name, rows in self.benchmarks.items():
            prefix, _, kind = str(rows).partition("/")
            require(
                prefix != SHIPPED or kind in _SHIPPED_ROWS,
                f"benchmarks.{name} is {rows!r}; expected shipped/as_is or shipped/renamed",
            )
        require(not self.benchmarks or bool(self.modes), "there are benchmarks but no modes; set modes: [memory, …]")
        lacking = sorted(_CONTROLS - set(self.modes))
        require(
            not lacking or not any(mode.startswith("memory") for mode in self.modes),
            f"modes lack {', '.join(lacking)}: no memory arm is evaluated without its controls. Add them",
        )


def load_study(path: Path) -> Study:
    """Read a study file.

    Raises:
        ConfigError: no such file, not YAML, or a setting that is unknown or wrong.
    """
    if not path.is_file():
        raise ConfigError(f"there is no study file {path}; those of this project are in {ROOT / 'launch' / 'studies'}")
    values = read_yaml(path, "settings by name: bases, arms, …")
    try:
        return _build(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _build(values: Any) -> Study:
    _check_keys(values, Study, "the study")
    require("bases" in values and "arms" in values, "the study needs bases and arms")
    arms = {}
    for name, arm in (values["arms"] or {}).items():
        _check_keys(arm, Arm, f"arms.{name}")
        require("base" in arm and "config" in arm, f"arms.{name} needs base and config")
        arms[name] = Arm(**arm)
    return Study(**{**values, "arms": arms})


def _check_keys(values: Any, kind: type, where: str) -> None:
    require(isinstance(values, dict), f"{where} is not a mapping of settings")
    for key in values:
        _known(key, [f.name for f in fields(kind)], where)


def select(study: Study, arms: Sequence[str] | None, benchmarks: Sequence[str] | None) -> Study:
    """The study with these arms and benchmarks alone; None keeps all."""
    for name in arms or ():
        _known(name, study.arms, "--arms")
    for name in benchmarks or ():
        _known(name, study.benchmarks, "--benchmarks")
    chosen = {name: arm for name, arm in study.arms.items() if arms is None or name in arms}
    used = {arm.base for arm in chosen.values()}
    return Study(
        {name: base for name, base in study.bases.items() if name in used},
        chosen,
        {name: rows for name, rows in study.benchmarks.items() if benchmarks is None or name in benchmarks},
        study.modes,
        study.options,
    )


def fill(study: Study, bases: Mapping[str, str], data: Mapping[str, str]) -> Study:
    """The study with what the command line gives.

    Raises:
        ConfigError: a name that the study lacks, a file that is not there, or a base or benchmark still without one.
    """
    for name in bases:
        _known(name, study.bases, "--base")
    for name, file in data.items():
        _known(name, study.benchmarks, "--data")
        require(Path(file).is_file(), f"--data {name}: there is no file {file}")
    filled_bases, filled_rows = {**study.bases, **bases}, {**study.benchmarks, **data}
    for name, value in filled_bases.items():
        hint = f"give --base {name}=FOLDER_OR_HUB_ID, or leave its arms out (--arms)"
        require(value is not None, f"base {name!r} is not set; {hint}")
    for name, value in filled_rows.items():
        hint = f"give --data {name}=FILE, or leave it out (--benchmarks)"
        require(value is not None, f"benchmark {name!r} has no rows; {hint}")
    return Study(filled_bases, study.arms, filled_rows, study.modes, study.options)


def _known(name: Any, names: Iterable[str], where: str) -> None:
    names = list(names)
    require(name in names, f"{where}: {name!r} is unknown{nearest(str(name), names)}")
