"""Results of a control over seeds: JSON that grows as it goes, and one table.

Intervals are 95%: with two seeds or more Student's t over the seeds' means, with one Wilson's over its episodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import StringConstraints
from typing_extensions import TypedDict

from titans_ds.reading import read_json, strict_record

from ..reporting.significance import Interval, clustered_interval, proportion_interval
from .measure import ARMS, Answers

_ORDER = (*ARMS, "full_context")
Levels = dict[int, dict[str, dict[str, Any]]]


@strict_record
class _Answers(TypedDict):
    em: float
    nll: float


@strict_record
class _Seed(TypedDict):
    seed: int
    levels: dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], dict[str, _Answers]]
    training: dict[str, Any]


@strict_record
class _Results(TypedDict):
    task: str
    config: dict[str, Any]
    machine: dict[str, Any]
    seeds: list[_Seed]


def read_results(folder: Path) -> dict[str, Any]:
    """Return results.json of a control's folder; DataError where there is none that is whole."""
    return dict(read_json(folder / "results.json", _Results, "Expected a folder that this program wrote."))


def summary_of(answers: Answers) -> dict[str, Any]:
    """One arm at one level of one seed, as it stands in the JSON."""
    clusters = [row for row in range(answers.right.shape[0]) for _ in range(answers.right.shape[1])]
    low, high = proportion_interval(answers.right.ravel().astype(float).tolist(), clusters)
    return {
        "em": answers.em,
        "em_interval": [100 * low, 100 * high],
        "nll": answers.loss,
        "questions": int(answers.right.size),
    }


@dataclass
class SeedResult:
    """One seed.

    Args:
        seed: of weights and episodes.
        levels: level -> arm -> em (percent), em_interval, nll, questions.
        training: History of the model with memory, by arm name; the full-context model's beside it.
    """

    seed: int
    levels: Levels = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    def add(self, level: int, arms: dict[str, Answers]) -> None:
        """Note the arms of one level."""
        self.levels.setdefault(level, {}).update({arm: summary_of(answers) for arm, answers in arms.items()})

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        levels = {str(level): arms for level, arms in self.levels.items()}
        return {"seed": self.seed, "levels": levels, "training": self.training}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SeedResult:
        """The inverse of `to_json`."""
        return cls(values["seed"], {int(k): v for k, v in values["levels"].items()}, values["training"])


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean over seeds with Student's interval; infinite for one seed."""
    return clustered_interval(list(values), range(len(values)))


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and 95% interval over seeds, as they stand in JSON; no interval for one seed."""
    found = over_seeds(values)
    return {"mean": found.mean, "interval": [_finite(found.low), _finite(found.high)]}


def summarise(seeds: Sequence[SeedResult]) -> dict[str, Any]:
    """By level: every arm's mean and interval, and memory minus each of the others."""
    finished = [seed for seed in seeds if seed.levels]
    levels = list(finished[0].levels) if finished else []
    return {str(level): _level([seed.levels[level] for seed in finished if level in seed.levels]) for level in levels}


def _level(seeds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    arms = [arm for arm in _ORDER if all(arm in seed for seed in seeds)]
    means = {arm: {measure: _mean(seeds, arm, measure) for measure in ("em", "nll")} for arm in arms}
    against = {arm: _differences(seeds, arm) for arm in arms if arm != "memory"}
    return {"arms": means, "memory_minus": against}


def _mean(seeds: Sequence[dict[str, dict[str, Any]]], arm: str, measure: str) -> dict[str, Any]:
    found = over_seeds([seed[arm][measure] for seed in seeds])
    interval = [found.low, found.high]
    if measure == "em":
        interval = [max(found.low, 0.0), min(found.high, 100.0)]
    if len(seeds) == 1:
        interval = seeds[0][arm]["em_interval"] if measure == "em" else [math.nan, math.nan]
    return {"mean": found.mean, "interval": [_finite(x) for x in interval], "seeds": len(seeds)}


def _differences(seeds: Sequence[dict[str, dict[str, Any]]], arm: str) -> dict[str, Any]:
    differences = {}
    for measure in ("em", "nll"):
        differences[measure] = spread([seed["memory"][measure] - seed[arm][measure] for seed in seeds])
    return differences


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON has no infinity


def table(task: str, summary: dict[str, Any], unit: str, measure: str = "em") -> str:
    """Arms by levels, in Markdown: percent of questions right, or nats per token."""
    levels = list(summary)
    arms = [arm for arm in _ORDER if any(arm in summary[level]["arms"] for level in levels)]
    head = [f"{task}: {'EM %' if measure == 'em' else 'nats per token'}", *(f"{unit} {level}" for level in levels)]
    rows = [[arm, *(_cell(summary[level]["arms"].get(arm), measure) for level in levels)] for arm in arms]
    for arm in [arm for arm in arms if arm in ("ablation", "wrong")]:
        cells = [_difference(summary[level]["memory_minus"].get(arm), measure) for level in levels]
        rows.append([f"memory - {arm}", *cells])
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def _cell(arm: dict[str, Any] | None, measure: str) -> str:
    return "" if arm is None else _text(arm[measure], measure)


def _difference(found: dict[str, Any] | None, measure: str) -> str:
    return "" if found is None else _text(found[measure], measure, sign="+")


def _text(found: dict[str, Any], measure: str, sign: str = "") -> str:
    digits = 1 if measure == "em" else 3
    low, high = found["interval"]
    bounds = "" if low is None or high is None else f" [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"
    return f"{found['mean']:{sign}.{digits}f}{bounds}"


def speed_table(seeds: Sequence[SeedResult]) -> str:
    """Steps and seconds to every level of the curriculum, by seed."""
    lines = []
    for seed in seeds:
        for arm, history in seed.training.items():
            passed = [
                f"{level}: step {r['step']:.0f} ({r['seconds']:.0f} s)" for level, r in history["reached"].items()
            ]
            told = (
                f"{history['steps']} steps in {history['seconds']:.0f} s; levels passed: {', '.join(passed) or 'none'}"
            )
            lines.append(f"seed {seed.seed}, {arm}: {told}")
    return "\n".join(lines)


def is_better(summary: dict[str, Any], level: str, measure: str = "em") -> dict[str, bool | None]:
    """Whether memory beats ablation and wrong memory at a level: the interval of the difference lies on that side of 0.

    None where one seed gives no interval.
    """
    words: dict[str, bool | None] = {}
    for arm in ("ablation", "wrong"):
        low, high = summary[level]["memory_minus"][arm][measure]["interval"]
        words[arm] = None if low is None else bool(low > 0 if measure == "em" else high < 0)
    return words


def verdict(summary: dict[str, Any], unit: str, measure: str = "em") -> str:
    """One line: at which levels memory beats both ablation and wrong memory."""
    found = {level: is_better(summary, level, measure).values() for level in summary}
    if any(word is None for words in found.values() for word in words):
        return "One seed says nothing about the spread between seeds: give --seeds 3 for a verdict."
    told = [f"{unit} {level} {'yes' if all(words) else 'no'}" for level, words in found.items()]
    return f"memory beats ablation and wrong memory (95%, {measure}): {', '.join(told)}"
