"""The report of a control: progress while it runs, results.json and results.md, and runs put together."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_ds.files import write_json, write_text

from ..errors import EvalError
from .results import SeedResult, read_results, speed_table, summarise, table, verdict
from .training import History

_UNITS = {"kv_recall": "N =", "mqar": "N =", "needle": "distance", "induction": "length", "style": "files"}
_PROGRESS_SECONDS = 5.0


class Report:
    """Prints progress, and keeps results.json and results.md of a run up to date.

    Args:
        config: of the control, as plain values.
        machine: that it runs on.
        folder: where the files go.
    """

    def __init__(self, config: dict[str, Any], machine: dict[str, Any], folder: Path) -> None:
        self.config, self.machine, self.folder = config, machine, folder
        self.seeds: list[SeedResult] = []
        self._printed = 0.0

    def progress(self, result: SeedResult, arm: str, history: History) -> None:
        """After a check of a training."""
        result.training[arm] = history.to_json()
        last = history.checks[-1]
        if time.monotonic() - self._printed >= _PROGRESS_SECONDS:
            self._printed = time.monotonic()
            print(
                f"seed {result.seed} {arm}: {history.seconds:5.0f} s  step {history.steps}  level {last['level']}  "
                f"loss {last['loss']:.3f}  EM {last['em']:.1f}",
                flush=True,
            )
            self.save()

    def save(self) -> None:
        """Write what there is."""
        measured = [seed for seed in self.seeds if seed.levels]
        summary = summarise(measured)
        values = {
            "task": self.config["task"],
            "config": self.config,
            "machine": self.machine,
            "seeds": [seed.to_json() for seed in self.seeds],
            "summary": summary,
        }
        write_json(self.folder / "results.json", values)
        if measured:
            write_text(self.folder / "results.md", self.text() + "\n")

    def text(self) -> str:
        """The tables."""
        summary, unit = summarise([seed for seed in self.seeds if seed.levels]), _UNITS[self.config["task"]]
        tables = [table(self.config["task"], summary, unit, measure_) for measure_ in ("em", "nll")]
        measure_ = "nll" if self.config["task"] == "style" else "em"
        return "\n\n".join([*tables, verdict(summary, unit, measure_), speed_table(self.seeds)])

    def show(self) -> None:
        """Print the tables."""
        print(f"\n{self.text()}\n\nresults: {self.folder / 'results.json'}", flush=True)


def merge(folders: Sequence[Path], out: Path) -> Report:
    """One report of several runs with the same settings and different seeds; saved and printed.

    Raises:
        EvalError: a folder without results, other settings, or a seed that is there twice.
    """
    runs = [read_results(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if run["config"] != runs[0]["config"]:
            raise EvalError(
                f"{folder} was run with other settings than {folders[0]}; merge runs that differ in seeds only."
            )
    report = Report(runs[0]["config"], runs[0]["machine"], out)
    report.seeds = sorted((SeedResult.from_json(s) for run in runs for s in run["seeds"]), key=lambda s: s.seed)
    numbers = [result.seed for result in report.seeds]
    if len(set(numbers)) < len(numbers):
        raise EvalError(f"the runs have the seeds {numbers}: give each with another --first-seed.")
    report.save()
    report.show()
    return report
