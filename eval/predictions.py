"""Predictions files: lines of {task_id, mode, prediction, …}, and what must hold before they are scored.

`mode` may be absent (predictions of another program); `boundary` is there where this package made them. An arm is one
mode under one boundary: the unit that is scored and compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PredictionsError


@dataclass(frozen=True)
class Prediction:
    """One line of a predictions file; `record` is the whole line."""

    task_id: str
    arm: str
    text: str
    record: dict[str, Any]


def load_predictions(path: str | Path) -> dict[str, dict[str, Prediction]]:
    """Return {arm: {task_id: Prediction}} in the file's order.

    The arm is the mode, with "@boundary" after it where the file has more than one boundary. PredictionsError names
    file and line of what is malformed or there twice.
    """
    path = Path(path)
    records = list(read_jsonl(path))
    boundaries = {record.get("boundary") for record, _ in records}
    arms: dict[str, dict[str, Prediction]] = {}
    for record, where in records:
        prediction = _parse(record, where, len(boundaries) > 1)
        tasks = arms.setdefault(prediction.arm, {})
        if prediction.task_id in tasks:
            raise PredictionsError(
                f"{where}: task {prediction.task_id!r} is there twice for mode {prediction.arm!r}. Expected one "
                "prediction for each task and mode; split the file or remove one."
            )
        tasks[prediction.task_id] = prediction
    if not arms:
        raise PredictionsError(f"{path} has no predictions. Expected jsonl lines of task_id, mode, prediction.")
    return arms


def read_jsonl(path: Path) -> Iterable[tuple[dict[str, Any], str]]:
    """Yield (record, "FILE, line N"); PredictionsError where a line is no JSON object or the file cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise PredictionsError(f"Cannot read {path}: {error}. Expected a UTF-8 jsonl file.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise PredictionsError(f"{where}: not JSON ({error}). Expected one object a line.") from error
        if not isinstance(record, dict):
            raise PredictionsError(f"{where}: expected a JSON object, found {type(record).__name__}.")
        yield record, where


def _parse(record: dict[str, Any], where: str, name_boundary: bool) -> Prediction:
    for name in ("task_id", "prediction"):
        if not isinstance(record.get(name), str):
            raise PredictionsError(
                f"{where}: {name!r} is {record.get(name)!r}; expected text. A line needs task_id and prediction."
            )
    mode = record.get("mode") or "predictions"
    arm = f"{mode}@{record.get('boundary')}" if name_boundary else str(mode)
    return Prediction(record["task_id"], arm, record["prediction"], record)


def check_complete(predictions: dict[str, dict[str, Any]], task_ids: set[str], partial: bool) -> dict[str, int]:
    """Return {arm: number of missing tasks}.

    PredictionsError for unknown tasks, and for missing ones unless `partial`.
    """
    missing = {}
    for arm, tasks in predictions.items():
        unknown = sorted(set(tasks) - task_ids)
        missing[arm] = len(task_ids - set(tasks))
        if (unknown or missing[arm]) and not partial:
            example = f" (for example {unknown[0]!r})" if unknown else ""
            raise PredictionsError(
                f"Mode {arm!r}: {len(unknown)} predictions for tasks that the data does not have{example}, "
                f"{missing[arm]} of {len(task_ids)} tasks without a prediction. Give the data that the predictions "
                "were made from, or --partial to score the tasks that both have."
            )
    return missing
