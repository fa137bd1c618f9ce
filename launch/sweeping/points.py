"""Points of a space: which value each parameter has in a trial. A parameter whose condition does not hold has none."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from launch.sweeping.errors import SweepError
from launch.sweeping.parameters import Parameter
from launch.sweeping.space import Space

Point = dict[str, Any]


def grid_points(space: Space) -> list[Point]:
    """Every combination, in an order drawn by the seed: the first trials are then spread over the whole grid.

    Raises:
        SweepError: there is none.
    """
    points = list(_branches(space.parameters, {}))
    random.Random(f"grid {space.search.seed}").shuffle(points)
    return points


def random_point(space: Space, number: int) -> Point:
    """The point of a trial: a function of seed and number alone, whoever draws it."""
    rng = random.Random(f"random {space.search.seed} {number}")
    return choose(space, lambda parameter: parameter.draw(rng))


def choose(space: Space, pick: Callable[[Parameter], Any]) -> Point:
    """A point by asking `pick` for the value of one parameter after the other."""
    point: Point = {}
    for parameter in space.parameters:
        if parameter.holds(point):
            point[parameter.name] = pick(parameter)
    return point


def settings_of(space: Space, point: Point) -> dict[str, Any]:
    """Dotted name -> value of everything that a trial at this point sets.

    Raises:
        SweepError: two parameters set the same.
    """
    settings = dict(space.settings)
    for parameter in space.parameters:
        if parameter.name in point:
            new = parameter.set(point[parameter.name])
            twice = [name for name in new if name in settings and name not in space.settings]
            if twice:
                raise SweepError(f"two parameters set {twice[0]} at {show(point)}; give one of them a `when:`")
            settings.update(new)
    return settings


def show(point: Point) -> str:
    """A point in a line of text."""
    return ", ".join(f"{name.rsplit('.', 1)[-1]} {show_value(value)}" for name, value in point.items())


def show_value(value: Any) -> str:
    """A value as it is shown; a trial's folder has all digits of it."""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _branches(parameters: tuple[Parameter, ...], point: Point) -> Iterator[Point]:
    if not parameters:
        yield point
        return
    first, rest = parameters[0], parameters[1:]
    for value in first.values() if first.holds(point) else [None]:
        yield from _branches(rest, {**point, first.name: value} if first.holds(point) else point)
