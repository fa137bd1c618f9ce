"""Comparison results as tables of text: the same rows for the terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..scoring.arms import MEASURES
from .markdown import plain

LABELS = {
    "em": "EM %",
    "es": "ES",
    "id_em": "ID-EM %",
    "id_precision": "ID-P %",
    "id_recall": "ID-R %",
    "id_f1": "ID-F1 %",
    "nll_target": "NLL target",
    "nll_identifiers": "NLL identifiers",
    "nll_missing": "NLL new identifier",
}
UNITS = dict.fromkeys(MEASURES, "points") | {
    "nll_target": "nats per byte",
    "nll_identifiers": "nats per byte",
    "nll_missing": "nats",
}
_SHOWN = ("em", "es", "nll_target", "nll_identifiers", "nll_missing", "id_em", "id_f1", "id_precision", "id_recall")
_TESTED = ("em", "es", "id_f1", "nll_target", "nll_identifiers", "nll_missing")


@dataclass(frozen=True)
class Table:
    """A title, a line of explanation, column heads, and rows of text."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]

    def to_markdown(self) -> str:
        """Return the table as GitHub Markdown."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        body = "\n".join("| " + " | ".join(map(plain, line)) + " |" for line in lines)
        return f"### {plain(self.title)}\n\n{self.note}\n\n{body}\n"


def means_table(comparison: Mapping[str, Any], es_backend: str, rule: str) -> Table:
    """Return each arm's means with their intervals."""
    arms = comparison["arms"]
    measures = [measure for measure in _SHOWN if any(measure in arm for arm in arms.values())]
    level = round(100 * (1 - comparison["settings"]["alpha"]))
    rows = [
        [name, str(arm["total"]), *(_mean_cell(measure, arm.get(measure)) for measure in measures)]
        for name, arm in arms.items()
    ]
    note = (
        f"Post-processing {rule}, edit similarity by {es_backend}. In brackets {level}% intervals, clustered by "
        "repository. NLL: nats per byte of the target and of its identifiers; nats of the first identifier that the "
        "prompt does not hold."
    )
    return Table("Means", note, ["mode", "n", *(LABELS[measure] for measure in measures)], rows)


def contrast_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Return one table of paired tests for each measure that was tested."""
    contrasts, settings = comparison["contrasts"], comparison["settings"]
    return [
        _contrast_table(measure, contrasts, settings)
        for measure in _TESTED
        if any(measure in contrast for contrast in contrasts)
    ]


def _contrast_table(measure: str, contrasts: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> Table:
    margin = settings["margins"][measure]
    better = "lower is better" if measure.startswith("nll") else "higher is better"
    tests = (
        "McNemar's exact test; interval and equivalence by Tango's score method"
        if measure == "em"
        else ("bootstrap-t over repositories; equivalence by two t-tests")
    )
    note = (
        f"Paired differences in {UNITS[measure]}, {better}; {tests}, margin ±{margin:g}. Detectable: "
        f"the smallest true difference that this sample finds with {settings['power']:.0%} power."
    )
    rows = [_contrast_row(measure, c, settings["alpha"]) for c in contrasts if measure in c]
    columns = ["contrast", "reading", "difference", "p", "p (Holm)", "p equivalent", "detectable", "same text", "n"]
    return Table(f"{LABELS[measure]}: paired differences", note, columns, rows)


def _contrast_row(measure: str, contrast: Mapping[str, Any], alpha: float) -> list[str]:
    test = contrast[measure]
    difference = f"{_signed(test['difference'])} [{_signed(test['low'])}, {_signed(test['high'])}]"
    if "won" in test:
        difference += f" (+{test['won']} -{test['lost']})"
    return [
        f"{contrast['arm']} - {contrast['against']}",
        reading(test, alpha),
        difference,
        _p_value(test["p"]),
        _p_value(test["p_holm"]),
        _p_value(test["equivalence_p"]),
        "n/a" if test["detectable"] is None else f"{test['detectable']:.3g}",
        f"{contrast['identical_share']:.0%}",
        str(test["n"]),
    ]


def reading(test: Mapping[str, Any], alpha: float) -> str:
    """Say in words what a test shows: a difference, none within the margin, the same on all samples, or nothing."""
    if test["p_holm"] < alpha:
        return "higher" if test["difference"] > 0 else "lower"
    if test["equivalent"]:
        return f"no difference (within ±{test['margin']:g})"
    if test["difference"] == 0 and test["low"] == 0 == test["high"]:
        return f"equal on these {test['n']}, too few to say more"
    return "inconclusive"


def _mean_cell(measure: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    digits = 3 if measure.startswith("nll") else 1
    low, high = (("-" if found[key] is None else f"{found[key]:.{digits}f}") for key in ("low", "high"))
    count = f" (n={found['n']})" if measure in ("nll_identifiers", "nll_missing") else ""
    return f"{found['mean']:.{digits}f} [{low}, {high}]{count}"


def _signed(value: float | None) -> str:
    return "∞" if value is None else f"{value:+.3g}"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"
