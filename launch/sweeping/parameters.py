"""One parameter of a space: values, a range, or settings that go together."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from launch.arguments import setting_types
from titans_ds.errors import TitansError
from titans_ds.validation import describe, fits, nearest, shown

_FORMS = {"values": ("values",), "pairs": ("pairs",), "low": ("low", "high", "log", "step")}
_RANGE = {"low": float, "high": float, "step": float | None, "log": bool}  # keys of a range and their types


class SweepError(TitansError):
    """A space, a study, its database or an executor can't work as it was given."""


@dataclass(frozen=True)
class Parameter:
    """One dimension of a space.

    Args:
        name: of the setting; any name for settings that go together.
        distribution: Optuna's, which samplers draw from.
        choices: value -> the settings that it stands for; empty for a range.
    """

    name: str
    distribution: BaseDistribution
    choices: dict[Any, dict[str, Any]] = field(default_factory=dict)

    @property
    def settings(self) -> list[str]:
        """Dotted names of what it sets."""
        return list({name for chosen in self.choices.values() for name in chosen}) or [self.name]

    def set(self, value: Any) -> dict[str, Any]:
        """The settings that a value stands for."""
        return self.choices.get(value) or {self.name: value}

    def suggest(self, trial: optuna.Trial) -> Any:
        """The trial's value: fixed where the trial was enqueued with one, else drawn by the study's sampler."""
        kind = self.distribution
        if isinstance(kind, IntDistribution):
            return trial.suggest_int(self.name, kind.low, kind.high, step=kind.step, log=kind.log)
        if isinstance(kind, FloatDistribution):
            return trial.suggest_float(self.name, kind.low, kind.high, step=kind.step, log=kind.log)
        return trial.suggest_categorical(self.name, list(self.choices))


def make_parameter(name: str, spec: Any) -> Parameter:
    """A parameter from what a space file says of it.

    Raises:
        SweepError: it is neither values, nor a range, nor pairs; or one of these that can't work.
    """
    spec = {"values": spec} if isinstance(spec, list) else spec
    form = [key for key in _FORMS if isinstance(spec, dict) and key in spec]
    if len(form) != 1:
        raise SweepError(f"{name} is {shown(spec)}; expected a list of values, a range (`low:`, `high:`), or `pairs:`")
    for key in spec:
        if key not in _FORMS[form[0]]:
            raise SweepError(f"{name}: unknown key {key!r}{nearest(str(key), _FORMS[form[0]])}")
    if form == ["low"]:
        return Parameter(name, _range(name, spec))
    choices = _values(name, spec["values"]) if form == ["values"] else _pairs(name, spec["pairs"])
    return Parameter(name, CategoricalDistribution(list(choices)), choices)


def label(value: Any) -> Any:
    """How samplers and tables know a value: lists and mappings by their JSON."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _values(name: str, values: Any) -> dict[Any, dict[str, Any]]:
    if not isinstance(values, list) or not values:
        raise SweepError(f"{name} has no values; a grid over nothing has no trials. Give a list of at least one")
    if any(isinstance(value, float) and not math.isfinite(value) for value in values):
        raise SweepError(f"{name}: {shown(values)} holds what is not finite; expected numbers, texts, true, false")
    choices = {label(value): {name: value} for value in values}
    if len(choices) < len(values):
        raise SweepError(f"{name}: a value stands twice in {shown(values)}")
    return choices


def _pairs(name: str, pairs: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(pairs, dict) or not pairs or not all(isinstance(c, dict) and c for c in pairs.values()):
        raise SweepError(f"{name}: pairs must be `label: mapping` of settings that go together")
    return {str(key): chosen for key, chosen in pairs.items()}


def _range(name: str, spec: Mapping[str, Any]) -> BaseDistribution:
    given = {"step": None, "log": False, **spec}
    for key, kind in _RANGE.items():
        if not fits(given.get(key), kind):
            raise SweepError(f"{name}: {key} is {shown(given.get(key))}; expected {describe(kind)}")
    low, high, step, log = (given[key] for key in _RANGE)
    # Whole numbers: by the setting's type, and by the numbers given where it allows both.
    hint = setting_types().get(name)
    kinds = {hint, *get_args(hint)}
    whole = all(isinstance(value, int) for value in (low, high, step) if value is not None)
    if int in kinds and float not in kinds and not whole:
        raise SweepError(f"{name} takes whole numbers; low, high and step must be whole, too")
    try:
        if whole and float not in kinds:
            return IntDistribution(low, high, log=log, step=step or 1)
        return FloatDistribution(low, high, log=log, step=step)
    except ValueError as error:
        raise SweepError(f"{name}: {error}") from error
