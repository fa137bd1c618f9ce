"""Command line and YAML of launch/train.py: typed by the dataclasses of titans_ds.training.settings."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser

from titans_ds.errors import ConfigError, TitansError
from titans_ds.memory import registry
from titans_ds.training.settings import TrainConfig
from titans_ds.validation import describe, fits, require
from titans_ds.yaml_files import option_value, parse_yaml, read_yaml

_FREE_FORM = ("model.architecture",)  # keys below these are transformers' own
_MEMORY = "graft.memory"  # whose settings depend on the preset: titans_ds.memory.registry types them


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
    values, text = checked_values(make_parser(), TrainConfig, _with_run_dir(arguments))
    config = TrainConfig(**values)
    # In a shell, an unquoted ~ behind a = is YAML's null.
    require(config.run.dir is not None, "run.dir is null; give the folder of the run")
    return config, text


def checked_values(parser: ArgumentParser, cls: Any, arguments: Sequence[str]) -> tuple[dict[str, Any], str]:
    """The fields of a configuration, and all of it as YAML.

    Args:
        parser: with the fields of `cls` as its arguments, and --config.
        cls: dataclass of the configuration.
        arguments: of the command line.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing file, or settings that can't work.
    """
    types = setting_types(cls)
    _check_options(arguments, types)
    files = [_checked_file(path, types) for path in _config_files(arguments)]
    arguments = _with_memory(arguments, files)
    try:
        namespace = parser.parse_args(list(arguments))
        text = parser.dump(namespace, skip_none=False)  # null is a value: of deepspeed not the default
        values = vars(parser.instantiate(namespace))
    except TitansError:
        raise
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_one_line(str(error))) from error
    values.pop("config", None)
    return values, text


def _with_memory(arguments: Sequence[str], files: Sequence[dict[str, Any]]) -> list[str]:
    """The arguments with all --graft.memory.NAME VALUE as one --graft.memory, over what the `files` hold.

    The names depend on the preset, so that the parser can't know them.

    Raises:
        ConfigError: an option without a value, or a value that is no YAML.
    """
    rest: list[str] = []
    place = 0  # behind all files and these options, and before a --graft null that follows them
    found: dict[str, Any] = {}
    waiting = iter(arguments)
    for argument in waiting:
        name, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not (name == _MEMORY or name.startswith(f"{_MEMORY}.")):
            rest.append(argument)
            if name == "config":
                rest += [] if separator else [next(waiting, "")]
                place = len(rest)
            continue
        parsed = _yaml_value(name, value if separator else next(waiting, ""))
        keys = name.removeprefix(_MEMORY).split(".")[1:]
        for key in reversed(keys):
            parsed = {key: parsed}
        found, place = _merged(found, parsed), len(rest)
    if not found:
        return rest
    settings: dict[str, Any] = {}
    for values in files:
        settings = _merged(settings, (values.get("graft") or {}).get("memory") or {})
    return [*rest[:place], f"--{_MEMORY}={json.dumps(_merged(settings, found))}", *rest[place:]]


def _yaml_value(name: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{name} is {text!r}, which is no YAML value: {_one_line(str(error))}") from error


def _merged(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `values`, group by group. Another preset starts anew."""
    if "preset" in changes and changes["preset"] != values.get("preset"):
        values = {}
    both = {key for key, value in changes.items() if isinstance(value, dict) and isinstance(values.get(key), dict)}
    return {**values, **changes, **{key: _merged(values[key], changes[key]) for key in both}}


def _full_name(argument: str) -> str:
    """--resume is short for --run.resume."""
    return "--run." + argument[2:] if argument == "--resume" or argument.startswith("--resume=") else argument


def _with_run_dir(arguments: list[str]) -> list[str]:
    """runs/NAME of the last config file, before anything else, so that it may be overridden."""
    files = _config_files(arguments)
    name = Path(files[-1]).stem if files else "train"
    return [f"--run.dir=runs/{name}", *arguments]


def setting_types(cls: Any = TrainConfig) -> dict[str, Any]:
    """Type hint of every setting and section by its dotted name, as `graft.memory.dim`."""
    memory = {f"{_MEMORY}.{name}": hint for name, hint in registry.setting_types().items()}
    return dict(_walk(cls, "")) | (memory if cls is TrainConfig else {})


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


def _check_options(arguments: Sequence[str], types: dict[str, Any]) -> None:
    """Every option, with its value where it has one: after "=", or as the next argument."""
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            key, equals, inline = argument[2:].partition("=")
            if key in ("config", "help", "print_config") or key.endswith(".help"):
                continue
            _check_key(key, types, "option --")
            text = inline if equals else after
            if equals or not after.startswith("--"):
                _check_value(key, option_value(text), types, "", text)


def _config_files(arguments: Sequence[str]) -> list[str]:
    inline = [a.split("=", 1)[1] for a in arguments if a.startswith("--config=")]
    return inline + [b for a, b in itertools.pairwise(arguments) if a == "--config"]


def _checked_file(path: str, types: dict[str, Any]) -> dict[str, Any]:
    """What a configuration file holds."""
    if not os.path.isfile(path):
        raise ConfigError(f"the configuration file {path} does not exist; see launch/configs/ for those that ship")
    values = read_yaml(Path(path), "sections (model, data, graft, …), one mapping each")
    _check_section(values, "", types, f"{path}: ")
    return values


def _check_section(values: dict[str, Any], prefix: str, types: dict[str, Any], where: str) -> None:
    for key, value in values.items():
        name = f"{prefix}{key}"
        _check_key(name, types, f"{where}key ")
        _check_value(name, value, types, where)


def _check_value(name: str, value: Any, types: dict[str, Any], where: str, text: str | None = None) -> None:
    """Refuse a value of the wrong type before jsonargparse sees it: that would take text in place of a section, or a
    class_path anywhere, for the name of a class, import it, and make one.

    Args:
        name: of the setting.
        value: as YAML.
        types: of all settings.
        where: it was found, as the message begins.
        text: of the option, which a setting of type str takes as it is.
    """
    if _is_free_form(name):
        _refuse_classes(name, value, where)
    hint = types.get(name, Any)
    choices = get_args(hint) or (hint,)
    if any(map(is_dataclass, choices)) or name == _MEMORY:
        if isinstance(value, dict):
            _check_section(value, f"{name}.", types, where)
        elif value is not None or type(None) not in choices:
            more = ", or null" if type(None) in choices else ", as {preset: delta}" if name == _MEMORY else ""
            raise ConfigError(
                f"{where}{name} is {_shown(value)}; expected a section, a mapping of its settings by name{more}"
            )
        return
    # YAML in quotes is text, which jsonargparse reads as the number that it spells.
    forms = [value, *([] if text is None else [text]), *([option_value(value)] if isinstance(value, str) else [])]
    forms = [tuple(form) if isinstance(form, list) and get_origin(hint) is tuple else form for form in forms]
    if not any(fits(form, hint) for form in forms):
        shown = _shown(value if text is None else text)
        raise ConfigError(f"{where}{name} is {shown}; expected {describe(hint)}")


def _is_free_form(name: str) -> bool:
    return any(name == free or name.startswith(f"{free}.") for free in _FREE_FORM)


def _refuse_classes(name: str, value: Any, where: str) -> None:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if key in ("class_path", "init_args"):
            raise ConfigError(f"{where}{name} has the key {key}, which would make an object of a class; take it out")
        _refuse_classes(f"{name}.{key}", inner, where)


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else text[:60] + "…"


def _check_key(key: str, known: Iterable[str], where: str) -> None:
    if key in known or _is_free_form(key):
        if key.rsplit(".", 1)[-1] in ("class_path", "init_args"):
            raise ConfigError(f"{where}{key} would make an object of a class; take it out")
        return
    near = _nearest(key, known)
    hint = f"did you mean {near}?" if near else "launch/train.py --help lists all"
    raise ConfigError(f"{where}{key} is unknown; {hint}")


def _nearest(key: str, known: Iterable[str]) -> str | None:
    """A setting of that very name in another section, or else the one spelt most like it."""
    by_name = {name.rsplit(".", 1)[-1]: name for name in known}
    last = key.rsplit(".", 1)[-1]
    whole, part = difflib.get_close_matches(key, known, n=1), difflib.get_close_matches(last, by_name, n=1)
    return by_name.get(last) or next(iter(whole), None) or (by_name[part[0]] if part else None)


def _one_line(message: str) -> str:
    """What jsonargparse says of settings that don't go together. It puts the reason into a list of all types that an
    optional section could have been."""
    reasons = re.findall(r"^\s*- (?!Expected an? )(.+)$", message, re.MULTILINE)
    return re.sub(r"\s+", " ", reasons[0] if "Union subtypes" in message and reasons else message).strip()
