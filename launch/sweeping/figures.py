"""The report's figures, as inline SVG: parallel coordinates, slices by parameter, importance, curves."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from launch.sweeping.importance import importances
from launch.sweeping.parameters import Parameter
from launch.sweeping.results import Result, ranked
from launch.sweeping.space import Metric
from launch.sweeping.study import Study

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "titans-ds",  # the same data gives the same file
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
_BEST, _OTHER = "#c2571a", "#9aa6b2"
_ABSENT = "–"
_SHOWN = 5  # best trials that curves name


@dataclass(frozen=True)
class Axis:
    """Where the values of a parameter stand, between 0 and 1; the lowest place is for trials that have none."""

    parameter: Parameter
    values: list[Any]
    absent: bool

    def place(self, value: Any) -> float:
        """Of a value, or of None."""
        if value is None:
            return 0.0
        least = 0.12 if self.absent else 0.0
        return least + (1 - least) * self._share(value)

    def _share(self, value: Any) -> float:
        interval = self.parameter.interval
        if interval is None:
            return self.values.index(value) / max(len(self.values) - 1, 1)
        scale = math.log if interval.log else float
        low, high = scale(interval.low), scale(interval.high)
        return (scale(value) - low) / (high - low)

    def ticks(self) -> list[tuple[float, str]]:
        """Places and their names."""
        interval = self.parameter.interval
        shown = self.values if interval is None else [interval.at(n / 4) for n in range(5)]
        named = [(self.place(v), _short(v)) for v in dict.fromkeys(shown)]
        return ([(0.0, _ABSENT)] if self.absent else []) + named


def parallel_coordinates(study: Study, results: Sequence[Result]) -> str | None:
    """A line for each completed trial, over an axis for each parameter and one for the metric."""
    done = ranked(results, study.space.metric)
    if not done:
        return None
    axes_of = [_axis(parameter, done) for parameter in study.space.parameters]
    values = [float(r.value or 0.0) for r in done]
    norm = Normalize(min(values), max(values) if max(values) > min(values) else min(values) + 1)
    colours = matplotlib.colormaps["viridis" if study.space.metric.sign > 0 else "viridis_r"]
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(max(5.0, 1.6 * (len(axes_of) + 1)), 3.6))
        for rank, result in reversed(list(enumerate(done))):
            heights = [axis.place(result.trial.point.get(axis.parameter.name)) for axis in axes_of]
            heights.append(float(norm(float(result.value or 0.0))))
            style = {"linewidth": 2.4, "zorder": 3, "color": _BEST} if rank == 0 else {"linewidth": 1.0, "alpha": 0.75}
            axes.plot(range(len(heights)), heights, **{"color": colours(heights[-1]), **style})
        _draw_axes(axes, axes_of, study.space.metric, norm)
        return _svg(figure)


def _axis(parameter: Parameter, done: Sequence[Result]) -> Axis:
    absent = any(parameter.name not in r.trial.point for r in done)
    return Axis(parameter, parameter.labels or [], absent)


def _draw_axes(axes: Axes, axes_of: Sequence[Axis], metric: Metric, norm: Normalize) -> None:
    ends = [(share, f"{norm.vmin + share * (norm.vmax - norm.vmin):.4g}") for share in (0.0, 0.5, 1.0)]
    for x, ticks in enumerate([*(axis.ticks() for axis in axes_of), ends]):
        axes.axvline(x, color="#5a6672", linewidth=0.8, zorder=2)
        for y, name in ticks:
            axes.annotate(
                name, (x, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8, zorder=4,
                bbox={"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )  # fmt: skip
    names = [axis.parameter.name.rsplit(".", 1)[-1] for axis in axes_of]
    axes.set_xticks(range(len(names) + 1), [*names, metric.name.replace(".", "\n", 1)])
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.1, len(names) + 0.45)


def importance_figure(study: Study, results: Sequence[Result]) -> str | None:
    """Bars; None where too few trials have completed to say anything."""
    shares = importances(study, results)
    if not shares:
        return None
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(5.6, 0.9 + 0.34 * len(shares)))
        names = [name.rsplit(".", 1)[-1] for name in shares][::-1]
        bars = axes.barh(names, list(shares.values())[::-1], color="#2563a8", height=0.6)
        axes.bar_label(bars, fmt="%.2f", padding=3)
        axes.set_xlim(0, 1.1)
        axes.set_xlabel("share of the metric's variation (PED-ANOVA)")
        return _svg(figure)


def curves_figure(study: Study, results: Sequence[Result]) -> str | None:
    """The metric over training steps: the best trials named, the others grey, pruned ones dashed."""
    best = {r.trial.number: rank for rank, r in enumerate(ranked(results, study.space.metric)[:_SHOWN])}
    drawn = [r for r in results if len(r.run.values) > 0]
    if not drawn:
        return None
    colours = matplotlib.colormaps["tab10"]
    with matplotlib.rc_context(_STYLE):
        figure, axes = pyplot.subplots(figsize=(7.0, 3.6))
        for result in drawn:
            rank = best.get(result.trial.number)
            steps, values = zip(*sorted(result.run.values.items()), strict=True)
            named = (
                {"color": colours(rank), "zorder": 3, "label": f"trial {result.trial.number}"}
                if rank is not None
                else {}
            )
            dashes = "--" if result.state == "pruned" else "-"
            style = {"color": _OTHER, "linewidth": 1.2, "linestyle": dashes, "marker": ".", "markersize": 4}
            axes.plot(steps, values, **{**style, **named})
        axes.set_xlabel("training step")
        axes.set_ylabel(study.space.metric.name)
        if best:
            handles, labels = axes.get_legend_handles_labels()
            order = sorted(range(len(labels)), key=lambda n: best[int(labels[n].split()[1])])
            axes.legend(
                [handles[n] for n in order],
                [labels[n] for n in order],
                frameon=False,
                fontsize=8,
                loc="upper left",
                bbox_to_anchor=(1.0, 1.0),
            )
        return _svg(figure)


def slices_figure(study: Study, results: Sequence[Result]) -> str | None:
    """A panel for each parameter: every completed trial's metric against its value, and the median by value."""
    done = ranked(results, study.space.metric)
    if not done:
        return None
    parameters = study.space.parameters
    columns = min(3, len(parameters))
    rows = math.ceil(len(parameters) / columns)
    with matplotlib.rc_context(_STYLE):
        figure, grid = pyplot.subplots(rows, columns, figsize=(3.1 * columns, 2.6 * rows), squeeze=False, sharey=True)
        for axes, parameter in zip(grid.flat, parameters, strict=False):
            _draw_slice(axes, parameter, [r for r in done if parameter.name in r.trial.point], done[0])
        for axes in list(grid.flat)[len(parameters) :]:
            axes.set_visible(False)
        figure.supylabel(study.space.metric.name, fontsize=9)
        figure.tight_layout()
        return _svg(figure)


def _draw_slice(axes: Axes, parameter: Parameter, done: Sequence[Result], best: Result) -> None:
    numeric = parameter.interval is not None or all(_is_number(v) for v in parameter.labels or [])
    labels = parameter.labels or []
    places = {id(r): r.trial.point[parameter.name] for r in done}
    if not numeric:
        places = {key: labels.index(value) for key, value in places.items()}
        axes.set_xticks(range(len(labels)), [_short(v) for v in labels])
        axes.set_xlim(-0.5, len(labels) - 0.5)
    elif _is_logarithmic(parameter, labels):
        axes.set_xscale("log")
    if numeric and 0 < len(labels) <= 6:
        axes.set_xticks(labels, [_short(v) for v in labels])
        axes.minorticks_off()
    values = [float(r.value or 0.0) for r in done]
    axes.scatter([places[id(r)] for r in done], values, s=14, color="#2563a8", alpha=0.65)
    if best in done:
        axes.scatter([places[id(best)]], [float(best.value or 0.0)], s=40, color=_BEST, zorder=3)
    if parameter.interval is None and labels:
        _draw_medians(axes, places, done)
    axes.set_xlabel(parameter.name.rsplit(".", 1)[-1])


def _draw_medians(axes: Axes, places: dict[int, Any], done: Sequence[Result]) -> None:
    by_place: dict[Any, list[float]] = {}
    for result in done:
        by_place.setdefault(places[id(result)], []).append(float(result.value or 0.0))
    middle = [(place, statistics.median(values)) for place, values in sorted(by_place.items())]
    axes.plot(*zip(*middle, strict=True), color="#5a6672", linewidth=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_logarithmic(parameter: Parameter, labels: Sequence[Any]) -> bool:
    if parameter.interval is not None:
        return parameter.interval.log
    return len(labels) > 2 and min(labels) > 0 and max(labels) / min(labels) >= 8


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:18]


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return re.sub(r"^.*?(?=<svg)", "", buffer.getvalue(), flags=re.DOTALL)
