"""An arm: one mode under one boundary, scored, with its likelihoods: what tables, tests and figures are made from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .predictions import Prediction
from .score import METRICS, ScoredSample, score_arm

if TYPE_CHECKING:
    from data_prep.crosscodeeval import CrossCodeEvalRow

# The measures of likelihood: nats per byte of the target and of its identifiers, and the nats of the first identifier
# that the prompt does not hold. Lower is better.
LIKELIHOODS = ("nll_target", "nll_identifiers", "nll_missing")
MEASURES = METRICS + LIKELIHOODS


@dataclass(frozen=True)
class Arm:
    """Scores by task id. `values[measure]` holds only the tasks for which the measure exists."""

    name: str
    samples: dict[str, ScoredSample]
    records: dict[str, dict[str, Any]]
    values: dict[str, dict[str, float]]
    repositories: dict[str, str]

    def renamed(self, name: str) -> Arm:
        """Return the same arm under another name."""
        return replace(self, name=name)

    def paired(self, other: Arm, measure: str) -> tuple[list[float], list[str]]:
        """Return the differences self - other on the tasks both have, and their repositories."""
        mine, theirs = self.values[measure], other.values[measure]
        tasks = [task for task in mine if task in theirs]
        return [mine[task] - theirs[task] for task in tasks], [self.repositories[task] for task in tasks]


def build_arms(
    rows: Mapping[str, CrossCodeEvalRow],
    predictions: Mapping[str, Mapping[str, Prediction]],
    rule: str,
    es_backend: str,
) -> dict[str, Arm]:
    """Score every arm of a predictions file under one rule and one edit-similarity backend."""
    return {name: _build_arm(name, rows, tasks, rule, es_backend) for name, tasks in predictions.items()}


def _build_arm(
    name: str,
    rows: Mapping[str, CrossCodeEvalRow],
    tasks: Mapping[str, Prediction],
    rule: str,
    es_backend: str,
) -> Arm:
    scored = score_arm(rows, {task: prediction.text for task, prediction in tasks.items()}, rule, es_backend)
    samples = {sample.task_id: sample for sample in scored}
    records = {task: tasks[task].record for task in samples}
    values: dict[str, dict[str, float]] = {m: {s.task_id: getattr(s, m) for s in scored} for m in METRICS}
    for measure in LIKELIHOODS:
        values[measure] = {
            task: value for task, record in records.items() if (value := _likelihood(record, measure)) is not None
        }
    return Arm(name, samples, records, values, {task: rows[task].repository for task in samples})


def _likelihood(record: Mapping[str, Any], measure: str) -> float | None:
    """Nats per byte, or of one identifier; None where there is none (say, all identifiers stand in the prompt).

    Per byte, not per token: healing splits the same target into other tokens.
    """
    likelihood = record.get("likelihood") or {}
    part = measure.removeprefix("nll_")
    nats, tokens = likelihood.get(f"{part}_nats"), likelihood.get(f"{part}_tokens")
    if nats is None or not tokens:
        return None
    if part == "missing":
        return float(nats)
    size = likelihood.get(f"{part}_bytes")
    return float(nats / size) if size else None
