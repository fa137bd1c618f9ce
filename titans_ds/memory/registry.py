"""Kinds of memories, and presets by name.

A kind is a class of settings (and, for memories of one layer, a module). A preset is a kind with some settings changed:
`preset("titans")`, or `memory: {preset: titans}` in a YAML file. Every preset trains as it is.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from titans_ds.errors import ConfigError
from titans_ds.memory import delta, mlp
from titans_ds.memory.delta import DeltaConfig, DeltaMemory
from titans_ds.memory.mlp import MLPConfig, MLPMemory
from titans_ds.memory.prefix import PrefixConfig
from titans_ds.validation import build, nearest, shown

MemoryConfig = DeltaConfig | MLPConfig | PrefixConfig

DEFAULT = "delta"
KINDS: dict[str, type[MemoryConfig]] = {"delta": DeltaConfig, "mlp": MLPConfig, "prefix": PrefixConfig}
# name -> (kind, the settings that differ from the kind's own defaults)
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("delta", changes) for name, changes in delta.PRESETS.items()},
    **{name: ("mlp", changes) for name, changes in mlp.PRESETS.items()},
    "gradmem": ("prefix", {}),
}


def preset(name: str, **changes: Any) -> MemoryConfig:
    """The settings of a known memory: `delta`, `gated_delta`, `titans`, `ttt_linear`, `paper` or `gradmem`.

    Args:
        name: of the preset.
        changes: settings to put in place of the preset's; a group of settings (`rule`) takes a dict of them.

    Raises:
        ConfigError: an unknown preset or setting, naming the nearest; or a value that can't work.
    """
    return memory_config({"preset": name, **changes})


def memory_config(values: dict[str, Any], drop_unknown: bool = False) -> MemoryConfig:
    """Settings of a memory out of plain values, as in a YAML file or titans_config.json.

    Args:
        values: `preset` names what they start from; `kind`, which `to_plain` writes, starts from a kind's defaults.
            Without either they are those of the default memory, `delta`.
        drop_unknown: warn of unknown settings and leave them out, as for an adapter of a newer version.

    Raises:
        ConfigError: see `preset`.
    """
    given = dict(values)
    for key, known, what in (("preset", PRESETS, "preset"), ("kind", KINDS, "kind of memory")):
        value = given.get(key)
        if value is not None and not (isinstance(value, str) and value in known):
            raise ConfigError(f"graft.memory.{key} is {shown(value)}, which is no {what}{nearest(str(value), known)}")
    name, kind = given.pop("preset", None), given.pop("kind", None)
    start: dict[str, Any] = {}
    if name is not None or kind is None:
        own, start = PRESETS[name or DEFAULT]
        if kind not in (None, own):
            raise ConfigError(
                f"graft.memory.preset {name!r} is of kind {own!r}, not {kind!r}; leave graft.memory.kind out"
            )
        kind = own
    if not drop_unknown:
        _refuse_settings_of_others(given, kind, name or DEFAULT)
    config: MemoryConfig = build(KINDS[kind], _merged(start, given), "graft.memory.", drop_unknown)
    return config


def to_plain(config: MemoryConfig) -> dict[str, Any]:
    """The inverse of `memory_config`: plain values, with the kind."""
    return {"kind": kind_of(config), **dataclasses.asdict(config)}


def kind_of(config: MemoryConfig) -> str:
    """`delta`, `mlp` or `prefix`."""
    return next(kind for kind, cls in KINDS.items() if isinstance(config, cls))


def make_memory(hidden_size: int, config: MemoryConfig, layer_index: int) -> DeltaMemory | MLPMemory:
    """The memory of one layer of width `hidden_size`; a prefix has none."""
    if isinstance(config, DeltaConfig):
        return DeltaMemory(hidden_size, config, layer_index)
    assert isinstance(config, MLPConfig)
    return MLPMemory(hidden_size, config, layer_index)


def setting_types() -> dict[str, Any]:
    """Type of every setting of every kind by its dotted name, as `rule.chunk_size`; `preset` among them."""
    found: dict[str, Any] = {"preset": str, "kind": str}
    for cls in KINDS.values():
        for name, hint in _walk(cls, ""):  # one name may have another type in another kind
            found[name] = typing.Union[found[name], hint] if name in found else hint  # noqa: UP007
    return found


def _walk(cls: Any, prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    hints = typing.get_type_hints(cls)
    for item in dataclasses.fields(cls):
        found.append((prefix + item.name, hints[item.name]))
        if dataclasses.is_dataclass(hints[item.name]):
            found += _walk(hints[item.name], f"{prefix}{item.name}.")
    return found


def _refuse_settings_of_others(given: dict[str, Any], kind: str, name: str) -> None:
    """Say which presets know a setting that this one does not."""
    own = {field.name for field in dataclasses.fields(KINDS[kind])}
    for key in given:
        others = [p for p, (k, _) in PRESETS.items() if key in {f.name for f in dataclasses.fields(KINDS[k])}]
        if key not in own and others:
            raise ConfigError(
                f"graft.memory.{key} is no setting of the preset {name!r}; it is one of {', '.join(others)}. Leave "
                "it out, or set graft.memory.preset to one of these"
            )


def _merged(start: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `start`, group by group."""
    merged = dict(start)
    for key, value in changes.items():
        before = merged.get(key)
        if isinstance(value, dict) and dataclasses.is_dataclass(before) and not isinstance(before, type):
            before = dataclasses.asdict(before)
        merged[key] = _merged(before, value) if isinstance(value, dict) and isinstance(before, dict) else value
    return merged
