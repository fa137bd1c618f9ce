"""Two panels for eval.capacity: recall and effective rank against the number of pairs written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib

from .reporting.figures import COLOURS, STYLE, as_svg

if TYPE_CHECKING:
    from .capacity import Measurement, Setting


def capacity_figure(measurements: Sequence[Measurement]) -> str:
    """Return an SVG element; one curve for each dimension, write mode, number of steps and of calls."""
    from matplotlib import pyplot

    curves: dict[str, list[Measurement]] = {}
    for measurement in measurements:
        curves.setdefault(_name(measurement.setting), []).append(measurement)
    with matplotlib.rc_context(STYLE):
        figure, (recall, rank) = pyplot.subplots(1, 2, figsize=(10, 3.8))
        for index, (name, points) in enumerate(curves.items()):
            colour, pairs = COLOURS[index % len(COLOURS)], [m.setting.num_pairs for m in points]
            style = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 1.3, "label": name}
            recall.plot(pairs, [100 * m.recall for m in points], **style)
            rank.plot(pairs, [m.effective_rank for m in points], **style)
        for axes, label in ((recall, "recall (%)"), (rank, "effective rank of the write")):
            axes.set_xscale("log", base=2)
            axes.set_xlabel("pairs written")
            axes.set_ylabel(label)
        rank.legend(frameon=False, fontsize=7)
        return as_svg(figure)


def _name(setting: Setting) -> str:
    calls = f", {setting.num_calls} calls" if setting.num_calls > 1 else ""
    return f"dim {setting.dim}, {setting.write}, {setting.inner_steps} steps{calls}"
