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

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import NotRequired, TypedDict

from titans_ds.errors import DataError
from titans_ds.files import Kind, sha256_of
from titans_ds.reading import read_json, read_jsonl, strict_record

from .data.benchmark import load_benchmark
from .errors import EvalError
from .scoring.arms import Arm, build_arms
from .scoring.predictions import Prediction, check_complete, load_predictions

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow

CONFIG, PREDICTIONS, TEXTS = "config.json", "predictions.jsonl", "texts.jsonl"
RUN = Kind("a run of this program", CONFIG, rb'"config_hash"|"modes"\s*:')


@strict_record
class _Mode(TypedDict):
    name: str
    description: str


@strict_record
class _Config(TypedDict):
    config_hash: str
    task_ids: list[str]
    data: str
    data_sha256: str
    base: str
    adapter: NotRequired[str | None]
    language: NotRequired[str | None]
    num_rows: int
    mode_list: list[_Mode]
    versions: dict[str, str | None]
    batch_size: int
    device: str
    limit: int | None
    temperature: float
    max_new_tokens: int
    seed: int


@strict_record
class Text(TypedDict):
    """A line of texts.jsonl."""

    digest: str
    text: str


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
    lines = read_jsonl(texts, Text, "Make the run again.") if texts.exists() else ()
    stored = {record["digest"]: record["text"] for record, _ in lines}
    return RunFolder(folder, config, rows, predictions, stored)


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json; EvalError where the folder has none or it is damaged."""
    remedy = "Expected what `python -m eval.crosscodeeval run --out` wrote."
    try:
        return dict(read_json(folder / CONFIG, _Config, remedy))
    except DataError as error:
        raise EvalError(f"{folder} is no run folder: {error}") from error


def _rows_of(config: dict[str, Any], data: str | Path | None) -> dict[str, CrossCodeEvalRow]:
    path = Path(data or config["data"])
    if not path.is_file():
        raise EvalError(f"The run's data {path} is not there. Give its new place with --data.")
    if sha256_of(path) != config["data_sha256"]:
        raise EvalError(f"{path} is not the run's data (its SHA-256 differs). Give the right file with --data.")
    rows = load_benchmark(path, config.get("language"))
    unknown = [task for task in config["task_ids"] if task not in rows]
    if unknown:
        raise EvalError(f"{CONFIG} names the task {unknown[0]!r}, which {path} does not have. Give the run's own data.")
    return {task: rows[task] for task in config["task_ids"]}
