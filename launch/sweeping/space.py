"""What a sweep searches: a YAML file, read and checked before anything runs.

config: launch/configs/v2_frozen_gate_floor.yaml   # every trial starts from it
settings: {training.steps: 2000}                   # the same in every trial
metric: {name: evaluation.losses.memory.mean, direction: minimize}
search: {method: adaptive, trials: 40, seed: 0}
parameters:
  graft.memory.dim: [128, 256, 512]                # values
  graft.memory.step_size: {low: 1.0e-3, high: 1.0, log: true}   # a range, not on a grid
  rule:                                            # several settings at once
    pairs:
      sgd: {graft.memory.rule.optimizer: sgd}
      momentum: {graft.memory.rule.optimizer: momentum, graft.memory.write: token}
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from launch.arguments import check_setting, parse
from launch.sweeping.parameters import Parameter, SweepError, make_parameter
from titans_ds.errors import ConfigError
from titans_ds.validation import build, check_choices, require, shown
from titans_ds.yaml_files import read_yaml

MOST = 10_000  # trials of a sweep
ROOT = Path(__file__).resolve().parents[2]
_CHECKED = 300  # points of a grid that are tried as configurations before anything runs
_OWN = ("dir", "overwrite", "resume", "trust_checkpoint")  # of `run`: the sweep gives them on the command line


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
        named = re.fullmatch(r"(evaluation|train)(\.[\w-]+)+", self.name)
        example = "evaluation.… or train.…, such as evaluation.losses.memory.mean"
        require(named is not None, f"metric.name is {shown(self.name)}; expected {example}")


@dataclass(frozen=True)
class Search:
    """How points of the space are chosen.

    Args:
        method: `grid` runs every combination once, in an order drawn by the seed; `random` draws each trial by seed and
            number; `adaptive` lets Optuna's TPE choose from the results so far.
        seed: of all of it.
        trials: how many, for random and adaptive.
        pruning: rule that ends a bad trial early, at one of its values of the metric.
        startup_trials: drawn at random before TPE learns; as many end before `median` prunes any.
        warmup_steps: training steps before which no trial is pruned.
    """

    method: Literal["grid", "random", "adaptive"] = "grid"
    seed: int = 0
    trials: int | None = None
    pruning: Literal["none", "median", "halving"] = "none"
    startup_trials: int = 10
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        check_choices(self)
        require(
            self.method != "grid" or self.trials is None,
            "search.trials is set, but a grid has as many trials as combinations; leave it out",
        )
        require(
            self.method == "grid" or 1 <= (self.trials or 0) <= MOST,
            f"search.method {self.method!r} needs search.trials, the number of trials, from 1 to {MOST:,}; it is "
            f"{self.trials}",
        )
        for name in ("startup_trials", "warmup_steps"):
            require(getattr(self, name) >= 0, f"search.{name} is {getattr(self, name)}; it must be 0 or more")


@dataclass(frozen=True)
class Space:
    """A checked space.

    Args:
        config: path of the base configuration, as it was given.
        settings: dotted name -> value, the same in every trial.
        metric: judges.
        search: chooses.
        retries: how often a trial that ends with an error is tried again before it counts as failed.
        parameters: in the order of the file, which is the order of conditions.
    """

    config: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    metric: Metric = field(default_factory=Metric)
    search: Search = field(default_factory=Search)
    retries: int = 2
    parameters: list[Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choices(self)
        require(bool(self.config), "expected `config:`, the file that trials start from")
        require(self.retries >= 0, f"retries is {self.retries}; it must be 0 or more")

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, in an order drawn by the seed: the first trials are then spread over the whole grid.

        Raises:
            SweepError: there are more than a sweep takes.
        """
        count = math.prod(len(parameter.choices) for parameter in self.parameters)
        if count > MOST:
            raise SweepError(f"the grid has {count:,} points; a sweep takes at most {MOST:,}. Take fewer values")
        names = [parameter.name for parameter in self.parameters]
        values = itertools.product(*(parameter.choices for parameter in self.parameters))
        points = [dict(zip(names, chosen, strict=True)) for chosen in values]
        random.Random(f"grid {self.search.seed}").shuffle(points)
        return points

    def trial_config(self, base: Mapping[str, Any], point: Mapping[str, Any]) -> str:
        """The whole configuration at a point as YAML, checked as launch/train.py does, without the run folder's place.

        Raises:
            ConfigError: these settings can't work together.
        """
        settings = dict(self.settings)
        for parameter in self.parameters:
            settings |= parameter.set(point[parameter.name])
        texts = {n: value if isinstance(value, str) else json.dumps(value) for n, value in settings.items()}
        options = [f"--{name}={text}" for name, text in texts.items()]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(yaml.safe_dump(dict(base)), encoding="utf-8")
            _, text = parse([f"--config={path}", *options])
        whole = yaml.safe_load(text)
        whole["run"] = {name: value for name, value in whole["run"].items() if name not in _OWN}
        return yaml.safe_dump(whole, sort_keys=False)

    def check_grid(self, base: Mapping[str, Any], where: str) -> None:
        """Refuse a grid with combinations that can't work. Beyond the first few hundred, they end as `invalid`."""
        for point in self.grid()[:_CHECKED]:
            try:
                self.trial_config(base, point)
            except ConfigError as error:
                raise SweepError(
                    f"{where}: a combination can't work: {show(point)}: {error}. Name those that can under `pairs:`"
                ) from error


def show(point: Mapping[str, Any]) -> str:
    """A point in a line of text."""
    shown = {name: f"{value:.5g}" if isinstance(value, float) else str(value) for name, value in point.items()}
    return ", ".join(f"{name.rsplit('.', 1)[-1]} {value}" for name, value in shown.items())


def read_space(path: Path) -> dict[str, Any]:
    """What a space's file says; `parse_space` checks it. Raises ConfigError where it is no YAML mapping."""
    return read_yaml(path, "a space, as those in launch/spaces/ do")


def base_config(config: str, where: Path) -> dict[str, Any]:
    """The base configuration, from the working folder, the space's own folder, or the checkout."""
    places = [Path(config), where.parent / config, ROOT / config]
    path = next((place for place in places if place.is_file()), places[0])
    return read_yaml(path, "a configuration, as those in launch/configs/ do")


def parse_space(content: Mapping[str, Any], where: str) -> Space:
    """Check a space.

    Args:
        content: of the file.
        where: its name, for messages.

    Raises:
        SweepError: an unknown key or setting (names the nearest), or a space that can't work.
    """
    try:
        given = content.get("parameters")
        if not isinstance(given, dict) or not given:
            raise SweepError("no parameters; name at least one setting and its values under `parameters:`")
        parameters = [make_parameter(str(name), spec) for name, spec in given.items()]
        space: Space = build(Space, {**content, "parameters": parameters}, "", False)
        _check(space)
    except (TypeError, ConfigError, SweepError) as error:
        raise SweepError(f"{where}: {error}") from error
    return space


def _check(space: Space) -> None:
    """What concerns several parameters, and the names of settings."""
    for name in space.settings:
        check_setting(name, "settings: ")
    names = [name for parameter in space.parameters for name in parameter.settings]
    for name in names:
        check_setting(name, "parameters: ")
        if name.split(".")[0] == "run":
            raise SweepError(f"{name} is the sweep's own business: every trial has a run folder in the study")
        if name in space.settings:
            raise SweepError(f"{name} stands under settings and under parameters; leave it to one of them")
        if names.count(name) > 1:
            raise SweepError(f"two parameters set {name}; leave it to one of them")
    if space.search.method == "grid":
        ranges = [parameter.name for parameter in space.parameters if not parameter.choices]
        if ranges:
            raise SweepError(f"{ranges[0]} is a range; a grid needs a list of values")
        space.grid()
