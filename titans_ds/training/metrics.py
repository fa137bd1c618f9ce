"""What a run records: metrics.jsonl, trackers, and the sums over ranks they are made of."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titans_ds.training import ranks
from titans_ds.training.settings import RunSettings
from titans_ds.training.step import Passes
from titans_ds.training.trackers import Trackers

_AVERAGED = ("inner_loss_before", "inner_loss_after", "write_norm")


class MetricsWriter:
    """Appends to metrics.jsonl, one line at a time, and to the run's trackers. Only rank 0 has one.

    Args:
        folder: of the run.
        settings: of the run: its trackers.
        resumed: the step that the run goes on from; see titans_ds.training.trackers.

    Raises:
        ConfigError: a tracker can't start.
    """

    def __init__(self, folder: Path, settings: RunSettings, resumed: int | None = None) -> None:
        self._trackers = Trackers(settings.trackers, settings.project, folder, resumed)
        self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Record values of a step; kind is `train` or `evaluation`. What is not finite becomes null (JSON)."""
        self._file.write(json.dumps({"kind": kind, "step": step, **_finite(values)}, allow_nan=False) + "\n")
        self._file.flush()
        self._trackers.log(dict(_flat(values, f"{kind}/")), step)

    def close(self) -> None:
        """Write what is still in buffers, and close the files."""
        self._file.close()
        self._trackers.close()


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _finite_value(value) for name, value in values.items()}


def _finite_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _finite(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            pairs.append((prefix + name, float(value)))
    return pairs


def memory_stats(passes: Passes, device: torch.device) -> dict[str, dict[str, float]]:
    """Gate of every layer; mean inner losses and write norm of every layer over the rows written on all ranks."""
    if not passes.stats:
        return {}
    layers = sorted(passes.stats[0])
    table = torch.zeros(len(_AVERAGED), len(layers), dtype=torch.float64)
    for stats, written_B in zip(passes.stats, passes.written, strict=True):
        for column, layer in enumerate(layers):
            for row, name in enumerate(_AVERAGED):
                table[row, column] += stats[layer][name].detach().cpu().double()[written_B].sum()
    rows = float(sum(int(w.sum()) for w in passes.written))
    total = ranks.sum_over(torch.cat([table.flatten(), torch.tensor([rows], dtype=torch.float64)]).float().to(device))
    means = (total[:-1] / total[-1].clamp(min=1)).view(len(_AVERAGED), len(layers)).tolist()
    gates = {str(layer): float(passes.stats[-1][layer]["gate"][0]) for layer in layers}
    averages = {name: dict(zip(map(str, layers), row, strict=True)) for name, row in zip(_AVERAGED, means, strict=True)}
    return {"gate": gates, **averages}


def gradient_norms(gradients: dict[str, Tensor | None]) -> dict[str, float]:
    """The norm of each gradient; 0 where there is none."""
    return {name: 0.0 if g is None else float(g.detach().float().norm()) for name, g in gradients.items()}


def peak_host_bytes() -> int:
    """The most host memory this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held on its accelerator, or on the host where there is none."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_host_bytes()
