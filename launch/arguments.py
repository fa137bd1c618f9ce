"""Command line and YAML of launch/train.py: typed by the dataclasses of titans_ds.training.settings."""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from titans_ds.errors import ConfigError, TitansError
from titans_ds.training.settings import TrainConfig

_FREE_FORM = ("model.architecture",)  # keys below these are transformers' own


def make_parser() -> ArgumentParser:
    """Options --SECTION.KEY for every setting, --config FILE, --print_config, --help."""
    parser = ArgumentParser(
        prog="launch/train.py", description=TrainConfig.__doc__.splitlines()[0], exit_on_error=False
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file; options after it override it")
    parser.add_class_arguments(TrainConfig, as_group=False)
    return parser


def parse(argv: Sequence[str]) -> tuple[TrainConfig, str]:
    """The configuration, and itself as YAML.

    Args:
        argv: without the program's name. The launchers' --local_rank is dropped.

    Raises:
        ConfigError: an unknown key (names the nearest), a wrong type, a missing file, or settings that can't work.
    """
    arguments = [_full_name(a) for a in argv if not a.startswith(("--local_rank", "--local-rank"))]
    parser = make_parser()
    known = sorted(setting_types())
    _check_options(arguments, known)
    for path in _config_files(arguments):
        _check_file(path, known)
    try:
        namespace = parser.parse_args(_with_run_dir(arguments))
        text = parser.dump(namespace, skip_none=False)  # null is a value: of deepspeed not the default
        values = parser.instantiate(namespace)
    except TitansError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_one_line(str(error))) from error
    values.pop("config", None)
    return TrainConfig(**vars(values)), text


def _full_name(argument: str) -> str:
    """--resume is short for --run.resume."""
    return "--run." + argument[2:] if argument == "--resume" or argument.startswith("--resume=") else argument


def _with_run_dir(arguments: list[str]) -> list[str]:
    """runs/NAME of the last config file, before anything else, so that it may be overridden."""
    files = _config_files(arguments)
    name = Path(files[-1]).stem if files else "train"
    return [f"--run.dir=runs/{name}", *arguments]


def setting_types() -> dict[str, Any]:
    """Type hint of every setting and section by its dotted name, as `graft.memory.dim`."""
    return dict(_walk(TrainConfig, ""))


def check_setting(name: str, where: str) -> None:
    """Raise ConfigError, naming the nearest setting, where there is none of this dotted name.

    Args:
        name: of the setting.
        where: it was found, as the message begins.
    """
    _check_key(name, sorted(setting_types()), where)


def _walk(cls: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = get_type_hints(cls)
    for item in fields(cls):
        yield prefix + item.name, hints[item.name]
        for hint in (hints[item.name], *get_args(hints[item.name])):
            if is_dataclass(hint):
                yield from _walk(hint, f"{prefix}{item.name}.")


def _check_options(arguments: Sequence[str], known: list[str]) -> None:
    for argument in arguments:
        if argument.startswith("--"):
            key = argument[2:].split("=", 1)[0]
            if key not in ("config", "help", "print_config", "graft.help"):
                _check_key(key, known, "option --")


def _config_files(arguments: Sequence[str]) -> list[str]:
    inline = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    return inline + [b for a, b in itertools.pairwise(arguments) if a == "--config"]


def _check_file(path: str, known: list[str]) -> None:
    if not os.path.isfile(path):
        raise ConfigError(f"the configuration file {path} does not exist; see launch/configs/ for those that ship")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {_one_line(str(error))}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections (model, data, graft, …), one mapping each")
    for key in _keys_of(values):
        _check_key(key, known, f"{path}: key ")


def _keys_of(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict) and f"{prefix}{key}" not in _FREE_FORM:
            yield from _keys_of(value, f"{prefix}{key}.")


def _check_key(key: str, known: list[str], where: str) -> None:
    if key in known or key.startswith(tuple(f"{name}." for name in _FREE_FORM)):
        return
    near = _nearest(key, known)
    hint = f"did you mean {near}?" if near else "launch/train.py --help lists all"
    raise ConfigError(f"{where}{key} is unknown; {hint}")


def _nearest(key: str, known: list[str]) -> str | None:
    """A setting of that very name in another section, or else the one spelt most like it."""
    by_name = {name.rsplit(".", 1)[-1]: name for name in known}
    last = key.rsplit(".", 1)[-1]
    whole, part = difflib.get_close_matches(key, known, n=1), difflib.get_close_matches(last, by_name, n=1)
    return by_name.get(last) or next(iter(whole), None) or (by_name[part[0]] if part else None)


def _one_line(message: str) -> str:
    """jsonargparse explains a value that fits nothing over many lines; keep the key, what was expected, what came."""
    keys = re.findall(r'Parser key "([^"]+)"', message)
    expected = re.search(r"Expected an? (.+?)\. Got value: ([^\n]+)", message)
    if keys and expected:
        name = re.sub(r"<class '([^']+)'>", r"\1", expected.group(1))
        name = re.sub(r"typing\.Literal\[(.+?)\]", r"one of \1", name)
        prefix = [k for k in keys if k != keys[-1]][:1] if len(keys) > 1 and not keys[-1].startswith(keys[0]) else []
        return f"{'.'.join([*prefix, keys[-1]])} is {expected.group(2).strip()}; expected {name}"
    return re.sub(r"\s+", " ", message).strip()
