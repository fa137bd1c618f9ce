"""Finds modes by name: every file of this folder that has `MODES` (modes) or `FAMILIES` (modes with a value,
name=value).
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

from ..errors import EvalError
from .mode import Mode

Family = Callable[[str], Mode]


@cache
def _registry() -> tuple[dict[str, Mode], dict[str, Family]]:
    modes: dict[str, Mode] = {}
    families: dict[str, Family] = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        module = import_module(f"{__package__}.{info.name}")
        modes |= {mode.name: mode for mode in getattr(module, "MODES", [])}
        families |= getattr(module, "FAMILIES", {})
    return modes, families


def available_modes() -> dict[str, str]:
    """Return {name: description}; families as "name=VALUE"."""
    modes, families = _registry()
    described = {name: mode.description for name, mode in modes.items()}
    return described | {f"{name}=VALUE": (family.__doc__ or "").partition("\n")[0] for name, family in families.items()}


def get_modes(names: str) -> list[Mode]:
    """Return the modes of a comma-separated list, in its order; EvalError for one that is unknown or named twice."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise EvalError(f"--modes names no mode. Expected some of {', '.join(available_modes())}.")
    if len(set(wanted)) < len(wanted):
        raise EvalError(f"--modes {names} names a mode twice; expected each once.")
    return [_get(name) for name in wanted]


def _get(name: str) -> Mode:
    modes, families = _registry()
    if name in modes:
        return modes[name]
    family, equals, value = name.partition("=")
    if equals and family in families:
        return families[family](value)
    near = difflib.get_close_matches(name, [*modes, *families], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise EvalError(f"Unknown mode {name!r}.{hint} Available: {', '.join(available_modes())}.")
