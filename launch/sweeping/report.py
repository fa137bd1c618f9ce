"""The report of a study: one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from launch.sweeping.errors import SweepError
from launch.sweeping.points import show_value
from launch.sweeping.results import Result, ranked, read_results
from launch.sweeping.study import Study

_BEST_ROWS, _OTHER_ROWS = 20, 60


@dataclass(frozen=True)
class Table:
    """Head and rows of plain text."""

    head: list[str]
    rows: list[list[str]]


def write_report(study: Study, path: Path) -> Path:
    """Write the page of a study, finished or not.

    Raises:
        SweepError: there are no trials yet, or what draws the page is not installed.
    """
    results = read_results(study)
    if not results:
        raise SweepError(f"{study.path} has no trials yet")
    page = _render(study, results)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".part")
    partial.write_text(page, encoding="utf-8")
    os.replace(partial, path)
    return path


def _render(study: Study, results: Sequence[Result]) -> str:
    try:
        import jinja2
        from markupsafe import Markup

        from launch.sweeping.figures import curves_figure, importance_figure, parallel_coordinates, slices_figure
    except ImportError as error:
        raise SweepError(f"the report needs {error.name}; install it with pip install 'titans-ds[sweep]'") from error
    drawn = {
        "Parallel coordinates: a line for each completed trial, the best one orange": parallel_coordinates,
        "The metric against each parameter; lines join medians": slices_figure,
        "Importance": importance_figure,
        "The metric in training: the best trials in colour, pruned ones dashed": curves_figure,
    }
    figures = {title: Markup(svg) for title, draw in drawn.items() if (svg := draw(study, results)) is not None}
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("sweep.html.j2").render(
        title=f"Sweep {study.path.name}",
        summary=_summary(study, results),
        figures=figures,
        best=_best_table(study, results),
        others=_other_table(study, results),
        best_is_cut=sum(r.state == "complete" for r in results) > _BEST_ROWS,
        space=yaml.safe_dump(study.meta["space"], sort_keys=False),
        commit=study.meta["git_commit"] or "unknown",
        shares_note="Importance" in figures,
    )


def _summary(study: Study, results: Sequence[Result]) -> list[str]:
    search, metric = study.space.search, study.space.metric
    counts = Counter(r.state for r in results)
    states = ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in counts.most_common())
    lines = [f"{study.size} trials, {search.method} search with seed {search.seed}; {len(results)} begun: {states}."]
    best = ranked(results, metric)
    if best:
        chosen = ", ".join(f"{name} {show_value(value)}" for name, value in best[0].trial.point.items())
        lines.append(
            f"Best {metric.name} ({metric.direction}): {best[0].value:.6g}, trial {best[0].trial.number}: {chosen}."
        )
    again = sum(r.attempts > 1 for r in results)
    if again:
        what = "1 trial was" if again == 1 else f"{again} trials were"
        lines.append(f"{what} run more than once, after being stopped, killed, or failing.")
    return lines


def _best_table(study: Study, results: Sequence[Result]) -> Table:
    names = [p.name for p in study.space.parameters]
    head = ["rank", "trial", "value", *names, "steps", "attempts"]
    rows = [
        [str(rank), str(r.trial.number), f"{r.value:.6g}", *_point(r, names), str(r.run.step), str(r.attempts)]
        for rank, r in enumerate(ranked(results, study.space.metric)[:_BEST_ROWS], start=1)
    ]
    return Table(head, rows)


def _other_table(study: Study, results: Sequence[Result]) -> Table:
    names = [p.name for p in study.space.parameters]
    others = [r for r in results if r.state != "complete"][:_OTHER_ROWS]
    rows = [[str(r.trial.number), r.state, *_point(r, names), str(r.run.step), r.reason] for r in others]
    return Table(["trial", "state", *names, "steps", "reason"], rows)


def _point(result: Result, names: Sequence[str]) -> list[str]:
    return [show_value(result.trial.point[name]) if name in result.trial.point else "–" for name in names]
