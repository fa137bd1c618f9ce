"""How a study stands: a table, live in a terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launch.sweeping.points import show
from launch.sweeping.results import Result, best_of, read_results
from launch.sweeping.study import Study

_COLOURS = {"complete": "green", "running": "cyan", "waiting": "yellow", "pruned": "blue"}
_PERIOD = 2.0  # seconds
_ACTIVE = ("running", "waiting")


def show_status(study: Study, console: Console, once: bool, rows: int) -> None:
    """Print the table; live, until Ctrl-C or the end of the study."""
    results = read_results(study)
    if once:
        console.print(status_table(study, results, rows))
        return
    with Live(status_table(study, results, rows), console=console, auto_refresh=False) as live:
        try:
            while sum(r.state not in _ACTIVE for r in results) < study.size:
                time.sleep(_PERIOD)
                results = read_results(study)
                live.update(status_table(study, results, rows), refresh=True)
        except KeyboardInterrupt:
            return


def status_table(study: Study, results: Sequence[Result], rows: int) -> Group:
    """What runs first, then what ended last, and a line of totals."""
    table = Table(title=f"{study.path.name}: {study.space.metric.name} ({study.space.metric.direction})")
    for name in ("trial", "state", "attempt", "step", "value", "where", "point or reason"):
        table.add_column(name, overflow="fold", justify="left" if name in ("state", "where") else "right")
    table.columns[-1].justify = "left"
    ordered = sorted(results, key=lambda r: (r.state not in _ACTIVE, -r.trial.number))
    best = best_of(results, study.space.metric)
    for result in ordered[:rows]:
        table.add_row(*_cells(result, best is result))
    hidden = len(results) - rows
    return Group(table, Text(_totals(study, results, best) + (f"; {hidden} trials not shown" if hidden > 0 else "")))


def _cells(result: Result, is_best: bool) -> list[Text]:
    state = Text(result.state, style=_COLOURS.get(result.state, "red"))
    if result.silence is not None and result.silence > 60:
        state.append(f" silent {result.silence:.0f} s", style="red")
    value = "" if result.value is None else f"{result.value:.5g}"
    point = show(result.trial.point)
    text = point if result.state in ("complete", "running") or not result.reason else f"{result.reason} ({point})"
    cells = [Text(str(result.trial.number)), state, Text(str(result.attempts)), Text(str(result.run.step))]
    return [*cells, Text(value, style="bold green" if is_best else ""), Text(result.place), Text(text)]


def _totals(study: Study, results: Sequence[Result], best: Result | None) -> str:
    counts = Counter(result.state for result in results)
    parts = [f"{count} {state}" for state, count in sorted(counts.items())]
    unborn = study.size - len(results)
    line = f"{study.size} trials: " + ", ".join(parts + ([f"{unborn} not begun"] if unborn else []))
    return line if best is None else f"{line}; best {best.value:.6g} (trial {best.trial.number})"
