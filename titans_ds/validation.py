"""Checks of settings that are dataclasses: types, choices, unknown keys with the nearest known one."""

from __future__ import annotations

import dataclasses
import difflib
import typing
import warnings
from collections.abc import Iterable
from typing import Any, Literal

from titans_ds.errors import ConfigError


def check_choices(config: Any) -> None:
    """Raise ConfigError where a field of type Literal has a value outside it, or a field has the wrong plain type."""
    hints = typing.get_type_hints(type(config))
    for item in dataclasses.fields(config):
        value, hint = getattr(config, item.name), hints[item.name]
        if not fits(value, hint):
            require(False, f"{item.name} is {shown(value)}; expected {describe(hint)}")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type that a setting has; numbers must be finite."""
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is list:
        return isinstance(value, list) and all(fits(v, typing.get_args(hint)[0]) for v in value)
    if origin is tuple:
        parts = typing.get_args(hint)
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(fits, value, parts))
    if origin is dict:
        return isinstance(value, dict)
    if origin is not None:  # a union
        return any(fits(value, choice) for choice in typing.get_args(hint))
    if hint in (int, float):
        kinds = (int, float) if hint is float else (int,)
        # No infinity, no NaN, and no integer that torch or numpy would overflow at.
        return isinstance(value, kinds) and not isinstance(value, bool) and -(2.0**63) <= value < 2.0**63
    return isinstance(value, hint) if isinstance(hint, type) and hint is not Any else True


def shown(value: Any) -> str:
    """A value as an error names it, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


def describe(hint: Any) -> str:
    """A setting's type, as an error says what was expected."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        return f"a list of {typing.get_args(hint)[0].__name__}"
    if typing.get_origin(hint) is tuple:
        return "a list of " + ", ".join(map(describe, typing.get_args(hint)))
    if typing.get_origin(hint) is dict:
        return "a mapping"
    if typing.get_origin(hint) is not None:
        return " or ".join(describe(choice) for choice in typing.get_args(hint))
    names = {type(None): "null", float: "float (finite)", int: "int (64 bits)"}
    return names.get(hint) or str(getattr(hint, "__name__", hint))


def nearest(name: str, known: Iterable[str]) -> str:
    """How an error about an unknown name ends: with the known one spelt most like it, or with all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def build(cls: Any, values: dict[str, Any], path: str, drop_unknown: bool) -> Any:
    """A dataclass out of plain values, nested ones too; unknown keys raise ConfigError, or warn and drop."""
    hints, known = typing.get_type_hints(cls), {f.name for f in dataclasses.fields(cls)}
    arguments = {}
    for key, value in values.items():
        if key not in known:
            hint = nearest(key, known)
            if not drop_unknown:
                raise ConfigError(f"unknown setting {path + key!r}{hint}")
            warnings.warn(f"unknown setting {path + key!r} is left out{hint}", stacklevel=3)
            continue
        nested = dataclasses.is_dataclass(hints[key]) and isinstance(value, dict)
        arguments[key] = build(hints[key], value, f"{path}{key}.", drop_unknown) if nested else value
    return cls(**arguments)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the condition holds."""
    if not condition:
        raise ConfigError(message)
