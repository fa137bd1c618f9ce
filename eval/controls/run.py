"""One control from settings to table: every seed trained, measured, saved."""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..files import write_json, write_text
from . import models
from .episodes import Task
from .measure import measure
from .results import SeedResult, speed_table, summarise, table, verdict
from .settings import ControlConfig
from .tasks import make_task
from .training import ControlTrainer, History

_UNITS = {"kv_recall": "N =", "mqar": "N =", "needle": "distance", "induction": "length", "style": "files"}
_PROGRESS_SECONDS = 5.0


class Report:
    """Prints progress, and keeps results.json and results.md of a run up to date.

    Args:
        config: of the control.
        device: that it runs on.
        folder: where the files go.
    """

    def __init__(self, config: ControlConfig, device: torch.device, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.seeds: list[SeedResult] = []
        self._machine = _machine(device)
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
            "task": self.config.task,
            "config": dataclasses.asdict(self.config),
            "machine": self._machine,
            "seeds": [seed.to_json() for seed in self.seeds],
            "summary": summary,
        }
        write_json(self.folder / "results.json", values)
        if measured:
            write_text(self.folder / "results.md", self.text() + "\n")

    def text(self) -> str:
        """The tables."""
        summary, unit = summarise([seed for seed in self.seeds if seed.levels]), _UNITS[self.config.task]
        tables = [table(self.config.task, summary, unit, measure_) for measure_ in ("em", "nll")]
        measure_ = "nll" if self.config.task == "style" else "em"
        return "\n\n".join([*tables, verdict(summary, unit, measure_), speed_table(self.seeds)])


def run_control(
    config: ControlConfig, seeds: Iterable[int], device: torch.device, folder: Path, full_context: bool
) -> Report:
    """Train and measure every seed; print and save one table.

    Args:
        config: of the control.
        seeds: of weights and episodes.
        device: to train on.
        folder: for results.json and results.md.
        full_context: train the model that has the whole context in its window, too.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    task, report = make_task(config.task, config.task_options), Report(config, device, folder)
    for seed in seeds:
        result = SeedResult(seed)
        report.seeds.append(result)
        _train_and_measure("memory", config, task, report, result, device)
        if full_context:
            _train_and_measure("full_context", config, task, report, result, device)
    print(f"\n{report.text()}\n\nresults: {folder / 'results.json'}", flush=True)
    return report


def _train_and_measure(
    arm: str, config: ControlConfig, task: Task, report: Report, result: SeedResult, device: torch.device
) -> None:
    make = models.with_memory if arm == "memory" else models.with_full_context
    engine = make(config, task.vocab_size, result.seed, device)
    trainer = ControlTrainer(engine, task, config, result.seed, lambda history: report.progress(result, arm, history))
    result.training[arm] = trainer.run().to_json()
    for level in config.measure.levels:
        result.add(level, measure(engine, task, level, config.measure.episodes, result.seed))
    report.save()


def _machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": str(device), "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
