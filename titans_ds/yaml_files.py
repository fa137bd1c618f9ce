"""Every YAML file that is read: a key that stands twice is an error, and nothing in a file is ever imported or run.

Loads no torch.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from titans_ds.errors import ConfigError

_MAX_ALIASES = 20  # of aliases within aliases: a hundred could stand for more values than there is memory


class _Refused(yaml.YAMLError):
    """It is YAML, but not to be used."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but for double keys and too many aliases. Reads 1e-4 as a number; YAML 1.1 does not."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > _MAX_ALIASES:
                raise _Refused(f"it has more than {_MAX_ALIASES} aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                raise _Refused(f"{key.value} stands twice, in lines {lines[key.value]} and {line}; take one out")
            lines[key.value] = line
        return dict(super().construct_mapping(node, deep))


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path, expected: str) -> dict[str, Any]:
    """The mapping that a file holds.

    Args:
        path: of the file.
        expected: what the mapping should be, as the error about another content says it.

    Raises:
        ConfigError: the file can't be read, is not YAML, or no mapping; or a key stands twice in it.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}") from error
    except _Refused as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold {expected}; what it holds is not a mapping")
    return values


def parse_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError or ValueError where it has none."""
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def option_value(text: str) -> Any:
    """What an option's text means, as YAML; the text itself where it is none."""
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError):
        return text
