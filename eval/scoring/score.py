"""Score any predictions file: separate from generation, so that one run can be scored under every rule.

python -m eval.crosscodeeval score --predictions F --data F --out F
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from .metrics import SampleScore, score_pair
from .postprocess import postprocess

METRICS = ("em", "es", "id_em", "id_precision", "id_recall", "id_f1")
_PERCENT = {"em": 100.0, "es": 1.0, "id_em": 100.0, "id_precision": 100.0, "id_recall": 100.0, "id_f1": 100.0}


class Row(Protocol):
    """What scoring reads of a benchmark row (`data_prep.crosscodeeval.CrossCodeEvalRow` has more)."""

    @property
    def task_id(self) -> str: ...
    @property
    def repository(self) -> str: ...
    @property
    def prompt(self) -> str: ...
    @property
    def groundtruth(self) -> str: ...
    @property
    def language(self) -> str: ...


@dataclass(frozen=True)
class ScoredSample:
    """One sample of one arm: the post-processed texts and every metric in percent."""

    task_id: str
    repository: str
    prediction: str
    target: str
    em: float
    es: float
    id_em: float
    id_precision: float
    id_recall: float
    id_f1: float

    def to_json(self) -> dict[str, Any]:
        """Return the sample as a JSON object."""
        return asdict(self)


def score_sample(row: Row, completion: str, rule: str, es_backend: str) -> ScoredSample:
    """Post-process one completion and score it against the row's ground truth."""
    pair = postprocess(rule, row.prompt, completion, row.groundtruth, row.language)
    score = score_pair(pair.prediction, pair.target, row.language, es_backend)
    return ScoredSample(row.task_id, row.repository, pair.prediction, pair.target, **_in_percent(score))


def _in_percent(score: SampleScore) -> dict[str, float]:
    return {name: _PERCENT[name] * getattr(score, name) for name in METRICS}


def score_arm(
    rows: Mapping[str, Row], completions: Mapping[str, str], rule: str, es_backend: str
) -> list[ScoredSample]:
    """Score {task_id: completion}, in the order of `rows`, for the tasks that both have."""
    return [
        score_sample(row, completions[task_id], rule, es_backend)
        for task_id, row in rows.items()
        if task_id in completions
    ]


def summarise(samples: Sequence[ScoredSample], es_backend: str) -> dict[str, Any]:
    """Return the means in percent, the edit similarity's backend and the number of samples."""
    total = len(samples)
    means = {name: round(sum(getattr(s, name) for s in samples) / total, 4) if total else 0.0 for name in METRICS}
    return (
        {"em": means["em"], "es": means["es"], "es_backend": es_backend}
        | {name: means[name] for name in METRICS[2:]}
        | {"total": total}
    )
