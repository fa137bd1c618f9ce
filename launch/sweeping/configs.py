"""A trial's training configuration: the base's with the trial's settings, checked as launch/train.py does."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from launch.arguments import parse

_OWN = ("dir", "overwrite", "resume", "trust_checkpoint")  # settings of `run` that the sweep gives on the command line


def trial_config(base: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The whole configuration of a trial as YAML, without the place of its run folder.

    Args:
        base: configuration, nested.
        settings: dotted name -> value.

    Raises:
        ConfigError: these settings can't work together.
    """
    values: dict[str, Any] = copy.deepcopy(dict(base))
    for name, value in settings.items():
        _set(values, name.split("."), value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        _, text = parse(["--config", str(path)])
    whole = yaml.safe_load(text)
    whole["run"] = {name: value for name, value in whole["run"].items() if name not in _OWN}
    return yaml.safe_dump(whole, sort_keys=False)


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    *sections, last = path
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[last] = value
