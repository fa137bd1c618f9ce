"""The report's figures as inline SVG: exact match by mode, training losses, gates, edit similarity by mode.

Losses and gates come from a training run's metrics.jsonl; without one those two figures are left out.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from titans_ds.reading import read_metrics

from ..scoring.arms import Arm

COLOURS = ("#2563a8", "#c2571a", "#2f8f5b", "#8a4fa3", "#b23a48", "#5c6b73", "#a38a00", "#3aa0a0")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "titans-ds",  # the same data gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#d9dde2",
    "axes.axisbelow": True,
}


def exact_match_figure(comparison: Mapping[str, Any]) -> str:
    """Figure 1: EM of every arm with its interval."""
    arms = comparison["arms"]
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(len(arms))
        places = range(len(arms))
        means = [arm["em"]["mean"] for arm in arms.values()]
        reach = [[m - a["em"]["low"] for m, a in zip(means, arms.values(), strict=True)]]
        reach.append([a["em"]["high"] - m for m, a in zip(means, arms.values(), strict=True)])
        axes.bar(places, means, color=_colours(len(arms)), width=0.6)
        axes.errorbar(places, means, yerr=reach, fmt="none", ecolor="#222", elinewidth=1.2, capsize=4)
        axes.set_ylabel("exact match (%)")
        _name_places(axes, list(arms))
        return as_svg(figure)


def edit_similarity_figure(arms: Mapping[str, Arm]) -> str:
    """Figure 4: every sample's edit similarity by arm, with quartiles and the mean."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(len(arms))
        values = [list(arm.values["es"].values()) for arm in arms.values()]
        boxes = axes.boxplot(values, positions=range(len(arms)), widths=0.55, showmeans=True, patch_artist=True)
        for box, colour in zip(boxes["boxes"], _colours(len(arms)), strict=True):
            box.set(facecolor=colour, alpha=0.45)
        axes.set_ylabel("edit similarity")
        axes.set_ylim(-3, 103)
        _name_places(axes, list(arms))
        return as_svg(figure)


def likelihood_figure(comparison: Mapping[str, Any]) -> str | None:
    """Mean negative log-likelihood by arm with intervals; None where no arm has one."""
    arms = {name: arm for name, arm in comparison["arms"].items() if "nll_target" in arm}
    if not arms:
        return None
    panels = (("nll_target", "target, nats per byte"), ("nll_missing", "new identifier, nats"))
    with matplotlib.rc_context(STYLE):
        figure, both = pyplot.subplots(2, 1, figsize=(_width(len(arms)), 5.2), sharex=True)
        for index, (axes, (measure, label)) in enumerate(zip(both, panels, strict=True)):
            _draw_intervals(axes, [arm.get(measure) for arm in arms.values()], COLOURS[index])
            axes.set_ylabel(label)
        _name_places(both[1], list(arms))
        figure.tight_layout()
        return as_svg(figure)


def _draw_intervals(axes: Axes, entries: Sequence[Mapping[str, Any] | None], colour: str) -> None:
    """A point and its interval for every arm that has the measure."""
    for place, entry in enumerate(entries):
        if entry is not None:
            mean = entry["mean"]
            low, high = (mean if entry[key] is None else entry[key] for key in ("low", "high"))
            reach = [[max(0.0, mean - low)], [max(0.0, high - mean)]]
            axes.errorbar([place], [mean], yerr=reach, fmt="o", color=colour, capsize=4)


def training_figures(folder: str | Path) -> dict[str, str]:
    """Figures 2 and 3 from a training run: losses and gates over steps. DataError where the folder has no metrics.

    Every key with "loss" in it is a curve of figure 2, every key with "gate" (but not its gradient) one of figure 3.
    """
    records = [_flatten(record) for record in read_metrics(Path(folder))]
    figures = {}
    for title, wanted in (("losses", _is_loss), ("gates", _is_gate)):
        curves = _curves(records, wanted)
        if curves:
            figures[title] = _curves_figure(curves, title)
    return figures


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _is_loss(key: str) -> bool:
    return "loss" in key and "inner" not in key


def _is_gate(key: str) -> bool:
    return "gate" in key and "grad" not in key


def _curves(records: Sequence[Mapping[str, Any]], wanted: Any) -> dict[str, list[tuple[float, float]]]:
    curves: dict[str, list[tuple[float, float]]] = {}
    for number, record in enumerate(records):
        for key, value in record.items():
            if wanted(key) and isinstance(value, (int, float)) and not isinstance(value, bool):
                curves.setdefault(key, []).append((record.get("step", number), value))
    return {key: points for key, points in curves.items() if len(points) > 1}


def _curves_figure(curves: Mapping[str, list[tuple[float, float]]], label: str) -> str:
    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7.2, 3.2))
        for colour, (name, points) in zip(_colours(len(curves)), curves.items(), strict=True):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=colour, label=name, linewidth=1.3)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.legend(frameon=False, fontsize=8, ncols=2)
        return as_svg(figure)


def _new_figure(num_places: int) -> tuple[Figure, Axes]:
    return pyplot.subplots(figsize=(_width(num_places), 3.4))


def _width(num_places: int) -> float:
    return max(4.5, 1.6 + 0.95 * num_places)


def _name_places(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xticks(
        range(len(names)), names, rotation=30 if len(names) > 3 else 0, ha="right" if len(names) > 3 else "center"
    )


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def as_svg(figure: Figure) -> str:
    """The figure as an <svg> element that scales with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'role="img"', svg, count=1)
