"""What a sweep searches: a YAML file, read and checked before anything runs.

config: launch/configs/v2_frozen_gate_floor.yaml   # every trial starts from it
settings: {training.steps: 2000}                   # the same in every trial
metric: {name: evaluation.losses.memory.mean, direction: minimize}
search: {method: grid, seed: 0}
parameters:
  graft.memory.dim: [128, 256, 512]                # values
  graft.memory.step_size: {low: 1.0e-3, high: 1.0, log: true, points: 4}   # a range; points: on a grid
  rule:                                            # several settings at once
    pairs:
      sgd: {graft.memory.rule.optimizer: sgd}
      momentum: {graft.memory.rule.optimizer: momentum, graft.memory.write: token}
  graft.memory.rule.momentum: {values: [0.5, 0.9], when: {rule: momentum}}  # a condition
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.arguments import check_setting
from launch.sweeping.errors import SweepError
from launch.sweeping.parameters import Parameter, make_parameter
from titans_ds.errors import ConfigError
from titans_ds.validation import build, check_choices

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Metric:
    """What a trial is judged by.

    Args:
        name: KIND.PATH of a line of metrics.jsonl: `evaluation.losses.memory.mean` is the held-out loss with memory,
            `train.loss` the training loss. A trial's value is the last one.
        direction: which way is better.
    """

    name: str = "evaluation.losses.memory.mean"
    direction: Literal["minimize", "maximize"] = "minimize"

    def __post_init__(self) -> None:
        check_choices(self)
        if not re.fullmatch(r"(evaluation|train)(\.[\w-]+)+", self.name):
            raise SweepError(
                f"metric.name is {self.name!r}; expected evaluation.… or train.…, such as evaluation.losses.memory.mean"
            )

    @property
    def sign(self) -> int:
        """1 where less is better, -1 where more is."""
        return 1 if self.direction == "minimize" else -1


@dataclass(frozen=True)
class Search:
    """How points of the space are chosen.

    Args:
        method: `grid` tries every combination, in an order drawn by the seed; `random` draws each trial by seed and
            number; `adaptive` lets Optuna choose from the results so far, and can stop bad trials early.
        seed: of all of it.
        trials: how many, for random and adaptive.
        sampler: of adaptive.
        pruning: of adaptive: rule that ends a trial early, after one of its evaluations.
        startup_trials: of adaptive: drawn at random before the sampler learns; as many end before any is pruned.
        warmup_steps: training steps before which no trial is pruned.
    """

    method: Literal["grid", "random", "adaptive"] = "grid"
    seed: int = 0
    trials: int | None = None
    sampler: Literal["tpe", "random", "gp", "cmaes"] = "tpe"
    pruning: Literal["none", "median", "halving", "hyperband"] = "none"
    startup_trials: int = 10
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        if self.method == "grid" and self.trials is not None:
            raise SweepError("search.trials is set, but a grid has as many trials as combinations; leave it out")
        if self.method != "grid" and (self.trials is None or self.trials < 1):
            raise SweepError(f"search.method {self.method!r} needs search.trials, the number of trials, 1 or more")
        if self.method != "adaptive" and self.pruning != "none":
            raise SweepError(
                f"search.pruning needs search.method 'adaptive' (there sampler 'random' draws as {self.method!r} does "
                "at random); or set search.pruning to 'none'"
            )


@dataclass(frozen=True)
class Space:
    """A checked space.

    Args:
        config: path of the base configuration, as it was given.
        settings: dotted name -> value, the same in every trial.
        metric: judges.
        search: chooses.
        retries: how often a trial that failed is tried again before it counts as failed.
        parameters: in the order of the file, which is the order of conditions.
    """

    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    metric: Metric = field(default_factory=Metric)
    search: Search = field(default_factory=Search)
    retries: int = 2
    parameters: tuple[Parameter, ...] = ()


def load_space(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
        SweepError: no such file, or no YAML mapping.
    """
    if not path.is_file():
        raise SweepError(f"the space {path} does not exist; launch/spaces/ has those that ship")
    return _read_yaml(path, path.read_text(encoding="utf-8"))


def parse_space(content: Mapping[str, Any], where: str) -> Space:
    """Check a space.

    Args:
        content: of the file.
        where: its name, for messages.

    Raises:
        SweepError, ConfigError: an unknown key or setting (names the nearest), or a space that can't work.
    """
    values = dict(content)
    given = values.pop("parameters", None)
    if not isinstance(given, dict) or not given:
        raise SweepError(f"{where} has no parameters; name at least one setting and its values under `parameters:`")
    for name, cls in (("metric", Metric), ("search", Search)):
        values[name] = _section(cls, values.get(name) or {}, name, where)
    settings = dict(values.get("settings") or {})
    parameters = tuple(make_parameter(name, spec) for name, spec in given.items())
    try:
        space = build(Space, {**values, "settings": settings, "parameters": parameters}, "", False)
    except (TypeError, ConfigError) as error:
        raise SweepError(f"{where}: {_missing_config(error)}") from error
    _check(space, where)
    return space


def base_config(space: Space, where: Path) -> dict[str, Any]:
    """The base configuration, from the working folder, the space's own folder, or the checkout.

    Raises:
        SweepError: in none of these is such a file.
    """
    places = [Path(space.config), where.parent / space.config, ROOT / space.config]
    found = next((p for p in places if p.is_file()), None)
    if found is None:
        raise SweepError(
            f"{where}: the configuration {space.config} does not exist; launch/configs/ has those that ship"
        )
    return _read_yaml(found, found.read_text(encoding="utf-8"))


def read_value(text: str) -> Any:
    """A value as it would be read from the file."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as the number that it is; YAML 1.1 wants 1.0e-4."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _read_yaml(path: Path, text: str) -> dict[str, Any]:
    try:
        content = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SweepError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SweepError(f"{path} must hold a mapping; launch/spaces/ has examples")
    return content


def _section(cls: type, values: Any, name: str, where: str) -> Any:
    if not isinstance(values, dict):
        raise SweepError(f"{where}: {name} is {values!r}; expected a mapping")
    try:
        return build(cls, values, f"{name}.", False)
    except ConfigError as error:
        raise SweepError(f"{where}: {error}") from error


def _missing_config(error: Exception) -> str:
    return (
        "`config:` is missing; name the configuration that trials start from" if "config" in str(error) else str(error)
    )


def _check(space: Space, where: str) -> None:
    if space.search.pruning != "none" and not space.metric.name.startswith("evaluation."):
        raise SweepError(f"{where}: search.pruning looks at evaluations; metric.name must be evaluation.…")
    if not isinstance(space.retries, int) or space.retries < 0:
        raise SweepError(f"{where}: retries is {space.retries!r}; expected 0 or more")
    for name in space.settings:
        check_setting(name, f"{where}: settings: ")
    seen: dict[str, Parameter] = {}
    for parameter in space.parameters:
        _check_names(space, parameter, where)
        _check_conditions(parameter, seen, where)
        _check_grid(space, parameter, where)
        seen[parameter.name] = parameter
    always = [name for p in space.parameters if not p.when for name in p.settings]
    twice = sorted({name for name in always if always.count(name) > 1})
    if twice:
        raise SweepError(f"{where}: two parameters set {twice[0]} in every trial; leave it to one of them")


def _check_names(space: Space, parameter: Parameter, where: str) -> None:
    for name in parameter.settings:
        check_setting(name, f"{where}: parameters: ")
        if name.split(".")[0] == "run":
            raise SweepError(f"{where}: {name} is the sweep's own business: every trial has a run folder in the study")
        if name in space.settings:
            raise SweepError(f"{where}: {name} stands under settings and under parameters; leave it to one of them")


def _check_conditions(parameter: Parameter, seen: Mapping[str, Parameter], where: str) -> None:
    for name, wanted in parameter.when.items():
        if name not in seen:
            known = ", ".join(seen) or "none"
            raise SweepError(
                f"{where}: {parameter.name} depends on {name}, which is no parameter above it (above: {known})"
            )
        labels = seen[name].labels
        unknown = [value for value in wanted if labels is not None and value not in labels]
        if unknown:
            raise SweepError(f"{where}: {parameter.name} waits for {name} to be {unknown[0]!r}; it can be {labels}")


def _check_grid(space: Space, parameter: Parameter, where: str) -> None:
    interval = parameter.interval
    if space.search.method == "grid" and interval is not None and not (interval.points or interval.step):
        raise SweepError(f"{where}: {parameter.name} is a range; a grid needs its `points:` (how many), or `step:`")
