"""How a study stands: a table, one HTML page with Optuna's figures, and the best trial as a configuration."""

from __future__ import annotations

import html
import io
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.sweeping.parameters import SweepError
from launch.sweeping.space import show
from launch.sweeping.study import Row, Study
from titans_ds.files import write_text

_COLOURS = {"complete": "green", "running": "cyan", "waiting": "yellow", "pruned": "blue"}
_COLUMNS = ("trial", "state", "attempts", "step", "value", "where", "point or reason")
_PAGE = """<!doctype html><meta charset="utf-8"><title>{title}</title>
<style>body {{ max-width: 74rem; font: 15px/1.5 sans-serif; }} svg {{ max-width: 100%; height: auto; }}</style>
<h1>{title}</h1><p>{totals}</p>
{figures}
<h2>Trials</h2><pre>{trials}</pre>
<h2>Space</h2><pre>{space}</pre><p>Commit {commit}.</p>
"""


def best_of(study: Study) -> Row | None:
    """The best of the complete trials, the first of equals; None where none is complete."""
    sign = 1 if study.space.metric.direction == "minimize" else -1
    complete = [row for row in study.rows() if row.value is not None]
    return min(complete, key=lambda row: (sign * float(row.value or 0.0), row.index), default=None)


def totals(study: Study) -> str:
    """A line: how many trials are in which state, and the best."""
    rows, best = study.rows(), best_of(study)
    counts = Counter(row.state for row in rows)
    line = f"{len(rows)} trials: " + ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    return line if best is None else f"{line}; best {study.space.metric.name} {best.value:.6g} (trial {best.index})"


def status_table(study: Study) -> Table:
    """Every trial: those that run first, then those that wait, then the others."""
    table = Table(*_COLUMNS, title=f"{study.path.name}: {study.space.metric.name} ({study.space.metric.direction})")
    order = {"running": 0, "waiting": 1}
    for row in sorted(study.rows(), key=lambda row: (order.get(row.state, 2), row.index)):
        value = "" if row.value is None else f"{row.value:.5g}"
        point = f"{row.reason} ({show(row.params)})" if row.reason else show(row.params)
        cells = (str(row.index), row.state, str(row.attempts), str(row.step), value, row.place, point)
        table.add_row(*(Text(cell, style=_COLOURS.get(cell, ""), overflow="fold") for cell in cells))
    return table


def export_best(study: Study, path: Path | None) -> str:
    """Describe the best trial in a few lines, and write its whole configuration, for launch/train.py.

    Raises:
        SweepError: no trial is complete, or the file is there already.
    """
    row = best_of(study)
    if row is None:
        raise SweepError(f"no trial of {study.path} is complete yet ({totals(study)})")
    head = f"trial {row.index}: {study.space.metric.name} {row.value:.6g} ({study.space.metric.direction})"
    if path is not None:
        if path.exists():
            raise SweepError(f"{path} exists; choose another file")
        config = (row.folder / "config.yaml").read_text(encoding="utf-8")
        write_text(path, f"# Sweep {study.path.name}, {head}\n# {show(row.params)}\n{config}")
    return "\n".join([head, *(f"  {name}: {value}" for name, value in row.params.items())])


def write_report(study: Study, path: Path) -> None:
    """Write one page, which loads nothing from anywhere: Optuna's figures, and all trials."""
    figures = [f"<h2>{title}</h2>\n{svg}" for title, svg in _figures(study).items()]
    text = Console(file=io.StringIO(), width=160)
    text.print(status_table(study))
    parts = {
        "title": f"Sweep {study.path.name}",
        "totals": totals(study),
        "trials": text.file.getvalue(),
        "space": yaml.safe_dump(study.meta["space"], sort_keys=False),
        "commit": str(study.meta["git_commit"]),
    }
    escaped = {name: html.escape(part) for name, part in parts.items()}
    write_text(path, _PAGE.format(figures="\n".join(figures), **escaped))


def _figures(study: Study) -> dict[str, str]:
    """Title -> SVG, as far as there is something to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from optuna.visualization import matplotlib as figures

    done = study.optuna.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    if not done:
        return {}
    drawn: dict[str, Any] = {
        "The metric by step": lambda: figures.plot_intermediate_values(study.optuna),
        "The metric by trial": lambda: figures.plot_optimization_history(study.optuna),
        "The metric by parameter": lambda: figures.plot_slice(study.optuna),
    }
    if len(study.space.parameters) > 1:
        drawn["Parallel coordinates"] = lambda: figures.plot_parallel_coordinate(study.optuna)
    if len({trial.value for trial in done}) > 1:
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        drawn["Importance"] = lambda: figures.plot_param_importances(study.optuna, evaluator=evaluator)
    found = {}
    for title, draw in drawn.items():
        draw()
        buffer = io.StringIO()
        matplotlib.pyplot.gcf().savefig(buffer, format="svg", bbox_inches="tight")
        matplotlib.pyplot.close("all")
        found[title] = buffer.getvalue().partition("<svg")[2]
    return {title: f"<svg{rest}" for title, rest in found.items()}
