"""Every JSON and JSONL file that a program of this project reads, checked against a schema.

A schema is a type that pydantic knows, most often a TypedDict decorated with `strict_record`. An error names the file,
the line, the field, what stands there and what was expected. Loads no torch: data_prep uses it, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict

from titans_ds.errors import DataError

# Of a TypedDict: no conversions (a text "5" is no number), finite numbers, and further keys are kept.
strict_record = with_config(ConfigDict(extra="allow", strict=True, allow_inf_nan=False))
_SHOWN = 60


@lru_cache(maxsize=64)
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def checked(value: Any, schema: Any, where: str, remedy: str) -> Any:
    """Return a parsed value where it fits the schema.

    Args:
        value: made of dicts, lists, texts, numbers, booleans and None.
        schema: a type.
        where: the file, and the line in it; the message begins so.
        remedy: a sentence; the message ends so.

    Raises:
        DataError: it does not fit; the message names the field.
    """
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise DataError(f"{where}: {field} is missing. {remedy}") from None
        expected = first["msg"].replace("Input should be ", "expected ").replace("dictionary", "JSON object")
        shown = repr(first["input"])
        shown = shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "…"
        raise DataError(f"{where}: {field or 'all of it'} is {shown}; {expected}. {remedy}") from None


def parsed(text: bytes, where: str, remedy: str) -> Any:
    """Return the value of a JSON text, with or without a byte-order mark.

    Raises DataError where it is no JSON, not UTF-8, nested too deep, or spells half of a surrogate pair.
    """
    try:
        return from_json(text.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}). {remedy}") from None


def read_bytes(path: str | Path, remedy: str) -> bytes:
    """Return a file's content; DataError where there is none that can be read."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. {remedy}") from error


def read_json(path: str | Path, schema: Any, remedy: str = "Make it again with the command that wrote it.") -> Any:
    """Return a JSON file that fits the schema; DataError where it is missing, no JSON, or does not fit."""
    return checked(parsed(read_bytes(path, remedy), str(path), remedy), schema, str(path), remedy)


def read_settings(path: str | Path, remedy: str) -> dict[str, Any]:
    """Return a JSON object that a person wrote; DataError also where one of its objects has a key twice."""
    settings: dict[str, Any] = read_json(path, dict[str, Any], remedy)
    try:
        json.loads(read_bytes(path, remedy), object_pairs_hook=_without_doubles)
    except ValueError as error:
        raise DataError(f"{path}: {error}. {remedy}") from None
    return settings


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands twice in one object; take one out")
        found[name] = value
    return found


def read_jsonl(path: str | Path, schema: Any, remedy: str) -> Iterator[tuple[Any, str]]:
    """Yield (record, "FILE, line N") for every line that is not blank; DataError at the first that does not fit."""
    for number, line in enumerate(read_bytes(path, remedy).split(b"\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield checked(parsed(line, where, remedy), schema, where, remedy), where


@strict_record
class Metric(TypedDict):
    """One line of a run's metrics.jsonl."""

    kind: str
    step: int


def metric(line: bytes) -> dict[str, Any] | None:
    """Return the record of a line of metrics.jsonl; None for one that a killed process left torn."""
    try:
        return dict(checked(parsed(line, "", ""), Metric, "", ""))
    except DataError:
        return None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the records of a run folder's metrics.jsonl, torn lines left out; DataError where it has none."""
    lines = read_bytes(run / "metrics.jsonl", "Expected a run folder of launch/train.py.").split(b"\n")
    return [found for line in lines if (found := metric(line)) is not None]
