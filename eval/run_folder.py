"""A run folder: what is in it, and how it is read again.

config.json        every setting of the run, the versions, the git commit, the data's path and digest
predictions.jsonl  one line for each task, mode and boundary, appended as it is made
texts.jsonl        the context and priming texts that predictions.jsonl names by digest
scores.json        {mode: {em, es, …}}
comparison.json    means with intervals, paired tests
per_sample.jsonl   the samples where modes differ
results_*.json     the results in lm-evaluation-harness' shape
report.html, report.md
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arms import Arm, build_arms
from .benchmark import file_digest, load_benchmark
from .errors import EvalError
from .predictions import Prediction, check_complete, load_predictions, read_jsonl

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow

CONFIG, PREDICTIONS, TEXTS = "config.json", "predictions.jsonl", "texts.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """What a finished, or still growing, run holds."""

    path: Path
    config: dict[str, Any]
    rows: dict[str, CrossCodeEvalRow]
    predictions: dict[str, dict[str, Prediction]]
    texts: dict[str, str]

    def arms(self, rule: str, es_backend: str) -> dict[str, Arm]:
        """Score every arm."""
        return build_arms(self.rows, self.predictions, rule, es_backend)


def read_run(folder: str | Path, data: str | Path | None = None, partial: bool = False) -> RunFolder:
    """Read a run folder; `data` where the benchmark file has moved. EvalError where it is none, or the data changed.

    Unfinished runs are refused unless `partial`, which keeps the tasks that every arm has.
    """
    folder = Path(folder)
    config = read_config(folder)
    rows = _rows_of(config, data)
    predictions = load_predictions(folder / PREDICTIONS)
    check_complete(predictions, set(rows), partial)
    texts = folder / TEXTS
    stored = {record["digest"]: record["text"] for record, _ in read_jsonl(texts)} if texts.exists() else {}
    return RunFolder(folder, config, rows, predictions, stored)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json; EvalError where the folder has none or it is damaged."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise EvalError(
            f"{folder} is no run folder ({CONFIG}: {error}). "
            "Expected what `python -m eval.crosscodeeval run --out` wrote."
        ) from error
    if not isinstance(config, dict) or "task_ids" not in config:
        raise EvalError(f"{folder / CONFIG} does not look like a run's configuration; expected task_ids in it.")
    return config


def _rows_of(config: dict[str, Any], data: str | Path | None) -> dict[str, CrossCodeEvalRow]:
    path = Path(data or config["data"])
    if not path.is_file():
        raise EvalError(f"The run's data {path} is not there. Give its new place with --data.")
    if file_digest(path) != config["data_sha256"]:
        raise EvalError(f"{path} is not the run's data (its SHA-256 differs). Give the right file with --data.")
    rows = load_benchmark(path, config.get("language"))
    return {task: rows[task] for task in config["task_ids"]}
