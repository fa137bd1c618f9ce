"""Predictions files: lines of {task_id, mode, prediction, …}, and what must hold before they are scored.

`mode` may be absent (predictions of another program), and `pred` stand for `prediction`, as CrossCodeEval's own program
writes it; `boundary` is there where this package made them. An arm is one mode under one boundary: the unit that is
scored and compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typing_extensions import NotRequired, TypedDict

from titans_ds.reading import checked, read_jsonl, strict_record

from ..errors import PredictionsError

REMEDY = "Expected jsonl, one object a line with task_id and prediction."


@strict_record
class _Likelihood(TypedDict):
    target_nats: NotRequired[float | None]
    target_tokens: NotRequired[int | None]
    target_bytes: NotRequired[int | None]
    identifiers_nats: NotRequired[float | None]
    identifiers_tokens: NotRequired[int | None]
    identifiers_bytes: NotRequired[int | None]
    missing_nats: NotRequired[float | None]
    missing_tokens: NotRequired[int | None]


@strict_record
class Line(TypedDict):
    """One line of a predictions file."""

    task_id: str
    mode: NotRequired[str | None]
    boundary: NotRequired[str | None]
    likelihood: NotRequired[_Likelihood | None]
    context: NotRequired[str | None]
    memory: NotRequired[list[str] | None]


@strict_record
class _Written(TypedDict):
    prediction: str


@dataclass(frozen=True)
class Prediction:
    """One line of a predictions file; `record` is the whole line."""

    task_id: str
    arm: str
    text: str
    record: dict[str, Any]


def load_predictions(path: str | Path) -> dict[str, dict[str, Prediction]]:
    """Return {arm: {task_id: Prediction}} in the file's order.

    The arm is the mode, with "@boundary" after it where the file has more than one boundary. DataError names file, line
    and field of what is malformed, PredictionsError what is there twice.
    """
    records = list(read_jsonl(path, Line, REMEDY))
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


def _parse(record: dict[str, Any], where: str, name_boundary: bool) -> Prediction:
    text = checked({"prediction": record.get("prediction", record.get("pred"))}, _Written, where, REMEDY)["prediction"]
    mode = record.get("mode") or "predictions"
    arm = f"{mode}@{record.get('boundary')}" if name_boundary else str(mode)
    return Prediction(record["task_id"], arm, text, record)


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
