"""One parameter of a space: values, a range, or settings that go together; and the condition it depends on."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from launch.arguments import setting_types
from launch.sweeping.errors import SweepError

_DIGITS = 6  # significant digits of a drawn number: it reads well, and is finer than anything that matters
_FORMS = ("values", "pairs", "low")
_RANGE_KEYS = ("low", "high", "log", "step", "points")


@dataclass(frozen=True)
class Interval:
    """A range of numbers.

    Args:
        low: least value.
        high: greatest value.
        integer: whole numbers only.
        log: even on a logarithmic scale.
        step: distance between values.
        points: how many values a grid takes.
    """

    low: float
    high: float
    integer: bool
    log: bool = False
    step: float | None = None
    points: int | None = None

    def grid(self) -> list[float]:
        """The values of a grid, ends included."""
        if self.points is None:
            step = self.step or 1
            count = math.floor((self.high - self.low) / step + 1e-9) + 1
            return [self._fit(self.low + n * step) for n in range(count)]
        if self.points == 1:
            return [self._fit(self.low)]
        shares = [n / (self.points - 1) for n in range(self.points)]
        return list(dict.fromkeys(self.at(share) for share in shares))

    def draw(self, rng: random.Random) -> float:
        """One value at random."""
        if self.step is not None:
            return rng.choice(self.grid())
        if self.integer and not self.log:
            return rng.randint(int(self.low), int(self.high))
        return self.at(rng.random())

    def at(self, share: float) -> float:
        """The value at a share in [0, 1] of the range."""
        if self.log:
            return self._fit(math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low))))
        return self._fit(self.low + share * (self.high - self.low))

    def _fit(self, value: float) -> float:
        if self.integer:
            return min(max(round(value), int(self.low)), int(self.high))
        return min(max(float(f"{value:.{_DIGITS}g}"), self.low), self.high)


@dataclass(frozen=True)
class Parameter:
    """One dimension of a space.

    Args:
        name: of the setting; any name for settings that go together.
        choices: label -> settings that it sets; None for a range.
        interval: a range of the setting `name`.
        when: earlier parameter -> its values at which this one counts.
    """

    name: str
    choices: dict[Any, dict[str, Any]] | None = None
    interval: Interval | None = None
    when: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def labels(self) -> list[Any] | None:
        """Values by which conditions, tables and samplers know the choices; None for a range."""
        return None if self.choices is None else list(self.choices)

    @property
    def settings(self) -> list[str]:
        """Dotted names of what it sets."""
        if self.choices is None:
            return [self.name]
        return list(dict.fromkeys(name for chosen in self.choices.values() for name in chosen))

    def holds(self, point: Mapping[str, Any]) -> bool:
        """Whether it counts at a point that the parameters before it have chosen."""
        return all(name in point and point[name] in wanted for name, wanted in self.when.items())

    def values(self) -> list[Any]:
        """The values of a grid."""
        return list(self.choices) if self.choices is not None else self._interval.grid()

    def draw(self, rng: random.Random) -> Any:
        """One value at random."""
        return rng.choice(list(self.choices)) if self.choices is not None else self._interval.draw(rng)

    def set(self, value: Any) -> dict[str, Any]:
        """The settings that a value stands for."""
        return {self.name: value} if self.choices is None else self.choices[value]

    @property
    def _interval(self) -> Interval:
        assert self.interval is not None
        return self.interval


def make_parameter(name: str, spec: Any) -> Parameter:
    """A parameter from what a space file says of it.

    Raises:
        SweepError: it is neither values, nor a range, nor pairs.
    """
    if isinstance(spec, list):
        return Parameter(name, _values(name, spec))
    if not isinstance(spec, dict):
        raise SweepError(f"{name} is {spec!r}; expected a list of values, a range (low, high), or pairs")
    form = [key for key in _FORMS if key in spec]
    if len(form) != 1:
        raise SweepError(f"{name} needs one of `values:`, `low:` and `high:`, or `pairs:`; it has {', '.join(spec)}")
    _known(name, spec, ("when", *(_RANGE_KEYS if form == ["low"] else form)))
    when = _when(name, spec.get("when"))
    if form == ["low"]:
        return Parameter(name, None, _interval(name, spec), when)
    read = _values if form == ["values"] else _pairs
    return Parameter(name, read(name, spec[form[0]]), None, when)


def _known(name: str, spec: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = [key for key in spec if key not in known]
    if unknown:
        raise SweepError(f"{name}: unknown key {unknown[0]!r}; expected {', '.join(known)}")


def _label(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _values(name: str, values: Any) -> dict[Any, dict[str, Any]]:
    if not isinstance(values, list) or not values:
        raise SweepError(f"{name} has no values; a grid over nothing has no trials. Give a list of at least one")
    choices = {_label(value): {name: value} for value in values}
    if len(choices) < len(values):
        raise SweepError(f"{name}: a value stands twice in {values}")
    return choices


def _pairs(name: str, pairs: Any) -> dict[Any, dict[str, Any]]:
    if isinstance(pairs, list):
        if not all(isinstance(p, dict) for p in pairs):
            raise SweepError(f"{name}: every one of pairs must be a mapping of settings")
        pairs = {"/".join(str(_label(v)) for v in chosen.values()): chosen for chosen in pairs}
    if not isinstance(pairs, dict) or not pairs or not all(isinstance(c, dict) and c for c in pairs.values()):
        raise SweepError(f"{name}: pairs must be a list of mappings, or label: mapping, of settings that go together")
    return pairs


def _when(name: str, when: Any) -> dict[str, list[Any]]:
    if when is None:
        return {}
    if not isinstance(when, dict) or not when:
        raise SweepError(f"{name}: when is {when!r}; expected a mapping, earlier parameter: value or list of values")
    listed = {key: value if isinstance(value, list) else [value] for key, value in when.items()}
    return {key: [_label(v) for v in values] for key, values in listed.items()}


def _interval(name: str, spec: Mapping[str, Any]) -> Interval:
    low, high, step = spec["low"], spec.get("high"), spec.get("step")
    for key, value in (("low", low), ("high", high), *([("step", step)] if step is not None else [])):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise SweepError(f"{name}: {key} is {value!r}; expected a number")
    log, points = spec.get("log", False), spec.get("points")
    if low >= high:
        raise SweepError(f"{name}: low is {low} and high is {high}; low must be below high")
    if log is not False and (log is not True or low <= 0 or step is not None):
        raise SweepError(f"{name}: log must be true or false; a logarithmic range has low above 0, and no step")
    if points is not None and (not isinstance(points, int) or points < 1):
        raise SweepError(f"{name}: points is {points!r}; expected a whole number, 1 or more")
    if step is not None and step <= 0:
        raise SweepError(f"{name}: step is {step}; it must be above 0")
    return Interval(low, high, _is_integer(name, low, high, step), log, step, points)


def _is_integer(name: str, low: float, high: float, step: float | None) -> bool:
    """By the setting's type; by the numbers given where it has none."""
    hint = setting_types().get(name)
    kinds = {hint, *get_args(hint)}
    whole = all(isinstance(v, int) for v in (low, high, step) if v is not None)
    if int in kinds and float not in kinds and not whole:
        raise SweepError(f"{name} takes whole numbers; low, high and step must be whole, too")
    return whole and float not in kinds
