"""Compare arms, paired by task: the numbers behind every table.

    python -m eval.crosscodeeval compare DIR_A DIR_B

Contrasts within a run are the questions of the method: does the memory help (memory against ablation), does it help
because of what was written (against none, against another repository's memory), does text in the prompt (concat)? Exact
match is tested by McNemar, everything else by the clustered bootstrap; Holm's correction runs over the contrasts of one
measure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import EvalError
from ..scoring.arms import MEASURES, Arm
from . import paired_proportions, significance

# (arm, against): those whose two modes were run are tested. Modes outside the list are tested against the first of
# _REFERENCES that was run.
_CONTRASTS = (
    ("memory", "ablation"),
    ("memory", "none"),
    ("memory", "memory_wrong"),
    ("memory", "memory_signflip"),
    ("memory", "memory_query_key"),
    ("memory", "concat"),
    ("memory", "vanilla"),
    ("memory_plus_concat", "concat"),
    ("none", "ablation"),
    ("concat", "ablation"),
    ("vanilla_concat", "vanilla"),
    ("ablation", "vanilla"),
)
_REFERENCES = ("ablation", "vanilla", "none")


@dataclass(frozen=True)
class Settings:
    """Levels and margins. A margin is the largest difference that counts as none, in the measure's own unit."""

    alpha: float = 0.05
    power: float = 0.8
    num_resamples: int = significance.DEFAULT_RESAMPLES
    seed: int = 0
    margins: Mapping[str, float] = field(
        default_factory=lambda: {
            "em": 1.0,
            "es": 1.0,
            "id_em": 1.0,
            "id_precision": 1.0,
            "id_recall": 1.0,
            "id_f1": 1.0,
            "nll_target": 0.01,
            "nll_identifiers": 0.02,
            "nll_missing": 0.1,
        }
    )


def compare_arms(
    arms: Mapping[str, Arm], settings: Settings, contrasts: Sequence[tuple[str, str]] | None = None
) -> dict[str, Any]:
    """Return {"arms": means with intervals, "contrasts": paired tests, "settings"}.

    JSON-ready, infinite numbers as None.
    """
    pairs = list(contrasts) if contrasts is not None else choose_contrasts(list(arms))
    tests = [_compare_pair(arms[a], arms[b], settings) for a, b in pairs]
    _correct(tests)
    result = {
        "settings": {"alpha": settings.alpha, "power": settings.power, "margins": dict(settings.margins)}
        | {"num_resamples": settings.num_resamples, "seed": settings.seed},
        "arms": {name: _describe(arm, settings) for name, arm in arms.items()},
        "contrasts": tests,
    }
    return _finite(result)


def choose_contrasts(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the contrasts that these arms allow: within each boundary, and heal against plain for each mode."""
    pairs: list[tuple[str, str]] = []
    for boundary in dict.fromkeys(name.partition("@")[2] for name in names):
        modes = [name.partition("@")[0] for name in names if name.partition("@")[2] == boundary]
        suffix = f"@{boundary}" if boundary else ""
        pairs += [(a + suffix, b + suffix) for a, b in _mode_contrasts(modes)]
    for name in names:
        mode, _, boundary = name.partition("@")
        if boundary == "heal" and f"{mode}@plain" in names:
            pairs.append((name, f"{mode}@plain"))
    return pairs


def _mode_contrasts(modes: Sequence[str]) -> list[tuple[str, str]]:
    pairs = [(a, b) for a, b in _CONTRASTS if a in modes and b in modes]
    covered = {a for a, _ in pairs} | {b for _, b in pairs}
    reference = next((mode for mode in _REFERENCES if mode in modes), modes[0])
    return pairs + [(mode, reference) for mode in modes if mode not in covered and mode != reference]


def _describe(arm: Arm, settings: Settings) -> dict[str, Any]:
    described: dict[str, Any] = {"total": len(arm.samples), "repositories": len(set(arm.repositories.values()))}
    for measure in MEASURES:
        tasks = arm.values[measure]
        if tasks:
            described[measure] = _mean_with_interval(
                measure, list(tasks.values()), [arm.repositories[task] for task in tasks], settings
            )
    return described


def _mean_with_interval(measure: str, values: list[float], clusters: list[str], settings: Settings) -> dict[str, Any]:
    level = 1 - settings.alpha
    described: dict[str, Any] = {"mean": sum(values) / len(values), "n": len(values)}
    described["standard_error"] = significance.clustered_standard_error(values, clusters)
    if measure in ("em", "id_em"):
        low, high = significance.proportion_interval([value / 100 for value in values], clusters, level)
        return described | {"low": 100 * low, "high": 100 * high}
    found = significance.clustered_interval(values, clusters, level, settings.num_resamples, settings.seed)
    highest = math.inf if measure.startswith("nll") else 100.0
    return described | {"low": max(found.low, 0.0), "high": min(found.high, highest)}


def _compare_pair(first: Arm, second: Arm, settings: Settings) -> dict[str, Any]:
    tasks = [task for task in first.samples if task in second.samples]
    if not tasks:
        raise EvalError(f"{first.name!r} and {second.name!r} share no task; expected runs over the same data.")
    test: dict[str, Any] = {"arm": first.name, "against": second.name, "n": len(tasks)}
    test["identical_share"] = significance.identical_share(
        [first.records[task]["prediction"] for task in tasks], [second.records[task]["prediction"] for task in tasks]
    )
    for measure in MEASURES:
        differences, clusters = first.paired(second, measure)
        if differences:
            test[measure] = _test_measure(measure, differences, clusters, settings)
    return test


def _test_measure(measure: str, differences: list[float], clusters: list[str], settings: Settings) -> dict[str, Any]:
    found = significance.clustered_interval(
        differences, clusters, 1 - settings.alpha, settings.num_resamples, settings.seed
    )
    test: dict[str, Any] = {"difference": found.mean, "n": found.num_samples, "repositories": found.num_clusters}
    test["margin"] = settings.margins[measure]
    if measure == "em":
        return test | _test_exact_match(differences, found, settings)
    value_range = None if measure.startswith("nll") else 100.0
    equivalence = significance.tost(differences, clusters, settings.margins[measure], settings.alpha, value_range)
    detectable = significance.minimum_detectable_difference(differences, clusters, settings.alpha, settings.power)
    test |= {"low": found.low, "high": found.high, "p": found.p_value, "test": "clustered bootstrap"}
    return test | {
        "equivalence_p": equivalence.p_value,
        "equivalent": equivalence.equivalent,
        "detectable": detectable,
    }


def _test_exact_match(differences: list[float], found: significance.Interval, settings: Settings) -> dict[str, Any]:
    """McNemar's exact test; interval and equivalence by Tango's score method on counts divided by the design effect."""
    won, lost, total = sum(d > 0 for d in differences), sum(d < 0 for d in differences), len(differences)
    effect = paired_proportions.design_effect(found.standard_error / 100, won, lost, total)
    counts = (won / effect, lost / effect, total / effect)
    low, high = paired_proportions.score_interval(*counts, 1 - settings.alpha)
    equivalence = paired_proportions.equivalence_p(*counts, settings.margins["em"] / 100)
    test = {"low": 100 * low, "high": 100 * high, "p": significance.mcnemar_exact(won, lost), "test": "McNemar exact"}
    test |= {"won": won, "lost": lost, "design_effect": effect, "equivalence_p": equivalence}
    test["equivalent"] = equivalence < settings.alpha
    test["detectable"] = significance.minimum_detectable_em(total, won + lost, settings.alpha, settings.power)
    return test


def _correct(tests: list[dict[str, Any]]) -> None:
    """Add Holm's adjusted p to every measure; the family is all contrasts of that measure."""
    for measure in MEASURES:
        family = [test[measure] for test in tests if measure in test]
        for entry, adjusted in zip(family, significance.holm([entry["p"] for entry in family]), strict=True):
            entry["p_holm"] = adjusted


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
