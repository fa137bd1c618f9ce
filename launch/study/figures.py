"""The two figures of a study as SVG files: held-out losses and gates over training, and the paired differences."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.reporting.figures import COLOURS, STYLE

_LINES = (("memory", "-"), ("wrong", ":"))
_LEAST_ROWS = 30


def training_figure(
    held_out: Mapping[str, list[dict[str, Any]]], gates: Mapping[str, list[tuple[int, list[float]]]]
) -> str:
    """Every arm: held-out loss minus the ablated one, with memory and with the wrong one, and the gates' mean."""
    with matplotlib.rc_context(STYLE):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(7.5, 5.4), sharex=True)
        for index, (arm, records) in enumerate(held_out.items()):
            colour = COLOURS[index % len(COLOURS)]
            _draw_losses(above, arm, records, colour)
            steps = [step for step, _ in gates[arm]]
            below.plot(steps, [sum(g) / len(g) for _, g in gates[arm]], color=colour, label=arm)
        above.axhline(0, color="#222", linewidth=0.8)
        above.set_ylabel("held-out loss minus ablated\n(nats a token)")
        below.set_ylabel("gate, mean of layers")
        below.set_xlabel("optimizer step")
        above.legend(fontsize=8, frameon=False)
        return _as_file(figure)


def _draw_losses(axes: Axes, arm: str, records: Sequence[Mapping[str, Any]], colour: str) -> None:
    steps = [record["step"] for record in records]
    for mode, style in _LINES:
        values = [r["losses"][mode]["mean"] - r["losses"]["ablated"]["mean"] for r in records]
        label = f"{arm}: {'memory' if mode == 'memory' else 'wrong memory'}"
        axes.plot(steps, values, style, color=colour, marker="o", markersize=3, label=label)


def differences_figure(
    compared: Mapping[tuple[str, str], Mapping[str, Any]], contrasts: Sequence[tuple[str, str]]
) -> str:
    """The target's negative log-likelihood, paired differences with 95% intervals; healed where there is a choice.

    Benchmarks of fewer rows than _LEAST_ROWS are in the tables alone: their intervals would fill the figure.
    """
    rows = []
    for (arm, benchmark), comparison in compared.items():
        if next(iter(comparison["arms"].values()))["total"] < _LEAST_ROWS:
            continue
        for contrast in comparison["contrasts"]:
            mode, _, boundary = contrast["arm"].partition("@")
            pair = (mode, contrast["against"].split("@")[0])
            if pair in contrasts and boundary in ("", "heal") and "nll_target" in contrast:
                label = f"{arm}, {benchmark}: {pair[0]} − {pair[1]}"
                rows.append((label, contrast["nll_target"], COLOURS[contrasts.index(pair)]))
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 1 + 0.24 * max(len(rows), 1)))
        for place, (_, test, colour) in enumerate(rows):
            low, high = (test["difference"] if test[key] is None else test[key] for key in ("low", "high"))
            reach = [[test["difference"] - low], [high - test["difference"]]]
            axes.errorbar([test["difference"]], [place], xerr=reach, fmt="o", color=colour, capsize=3)
        axes.axvline(0, color="#222", linewidth=0.8)
        axes.set_yticks(range(len(rows)), [label for label, _, _ in rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel("difference in the target's loss, nats a byte (left of 0: better)")
        return _as_file(figure)


def _as_file(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    return buffer.getvalue()
