"""One control from settings to table: every seed trained, measured, saved."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import models
from .episodes import Task
from .measure import measure
from .report import Report
from .results import SeedResult
from .settings import ControlConfig
from .tasks import make_task
from .training import ControlTrainer


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
    task = make_task(config.task, config.task_options)
    report = Report(dataclasses.asdict(config), _machine(device), folder)
    for seed in seeds:
        result = SeedResult(seed)
        report.seeds.append(result)
        _train_and_measure("memory", config, task, report, result, device)
        if full_context:
            _train_and_measure("full_context", config, task, report, result, device)
    report.show()
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
