"""What second order costs: step time and peak memory of every way to do it, over first order, in one run.

    python -m benchmarks.second_order --out second_order.json       # Qwen3.5-9B, random weights; on the CPU a tiny one
    python -m benchmarks.second_order --rows first two_phase through_base_offload

A step is a window of files, one optimizer step at the end. Steps of all rows alternate, so that what else the machine
does falls on all of them. A row that does not fit is marked so, and left out from then on. The report is written after
every round. Needs no deepspeed.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # rows of many shapes share the memory

import torch
from torch import nn

from benchmarks.program import run, save
from benchmarks.train_step import LEARNED, RandomLanes, device_name, make_engine, model_settings, now, peak, reset_peak
from titans_ds.config import GraftConfig, MemoryConfig
from titans_ds.memory_config import named_memory
from titans_ds.training import build
from titans_ds.training.engine import TorchEngine
from titans_ds.training.module import Mode, detach, run_segment
from titans_ds.training.run_folder import versions
from titans_ds.training.settings import DataSettings, TrainConfig, TrainingSettings
from titans_ds.training.step import Carried, Passes, commit, run_passes

SECOND = {"order": "second"}
RECOMPUTE = {"checkpointing": True}
OFFLOAD = {"offload_activations": True}
# By name: settings of training, and the row it is compared to: first order, activations recomputed (or kept) as there.
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "first": (RECOMPUTE, "first"),
    "first_one_backward": (RECOMPUTE, "first"),
    "two_phase": (SECOND | RECOMPUTE, "first"),
    "two_phase_autograd": (SECOND | RECOMPUTE | {"write_backward": "autograd"}, "first"),
    "two_phase_offload": (SECOND | RECOMPUTE | OFFLOAD, "first"),
    "window": (SECOND | RECOMPUTE | {"second_order": "window"}, "first"),
    "window_autograd": (SECOND | RECOMPUTE | {"second_order": "window", "write_backward": "autograd"}, "first"),
    "through_base": (SECOND | RECOMPUTE | {"second_order": "through_base"}, "first"),
    "through_base_offload": (SECOND | RECOMPUTE | OFFLOAD | {"second_order": "through_base"}, "first"),
    "first_kept": ({}, "first_kept"),
    "two_phase_kept": (SECOND, "first_kept"),
    "two_phase_kept_offload": (SECOND | OFFLOAD, "first_kept"),
    "window_kept": (SECOND | {"second_order": "window"}, "first_kept"),
    "window_kept_offload": (SECOND | OFFLOAD | {"second_order": "window"}, "first_kept"),
}
# Kept activations of a 9B are many gigabytes a file, all of them in pinned host memory: these only where asked for.
LARGE = ("two_phase_kept_offload", "window_kept_offload")


@dataclass
class Row:
    """One way to take a step, and what it took."""

    name: str
    settings: TrainingSettings
    baseline: str
    carried: Carried = field(default_factory=Carried)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    failure: str | None = None

    def figures(self, tokens: int) -> dict[str, Any]:
        """For the report."""
        if self.failure is not None or not self.seconds:
            return {"row": self.name, "baseline": self.baseline, "failure": self.failure or "not measured yet"}
        median = statistics.median(self.seconds)
        return {
            "row": self.name,
            "baseline": self.baseline,
            "median_seconds": median,
            "seconds": self.seconds,
            "tokens_per_second": tokens / median,
            "peak_gib": self.peak_bytes / 2**30,
        }


def main() -> int:
    """Run the program; returns its exit code."""
    return run(measure, table, _arguments())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Rounds of one step of every row; the report, written after each."""
    start = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    rows = [Row(name, _settings(name, arguments.window), ROWS[name][1]) for name in arguments.rows]
    config = _config(arguments, device)
    engine = make_engine(config, device)
    lanes = RandomLanes(arguments.lanes, arguments.tokens, build.vocabulary_of(engine.module.model.base_model))
    report: dict[str, Any] = {}
    for number in range(arguments.warmup + arguments.steps):
        for row in rows:
            if row.failure is None and time.perf_counter() - start < arguments.most_seconds:
                take_step(engine, lanes, row, device, counts=number >= arguments.warmup)
        report = _report(arguments, config, engine.module, rows, device, time.perf_counter() - start)
        save(report, arguments.out)
    return report


def take_step(engine: TorchEngine, lanes: RandomLanes, row: Row, device: torch.device, counts: bool) -> None:
    """One step of one row; where memory runs out once more after all that is free was given back, it fails."""
    for attempt in range(2):
        if _attempt(engine, lanes, row, device, counts):
            return
        engine.module.zero_grad()
        engine.optimizer.zero_grad()
        row.carried = Carried()
        gc.collect()
        torch.cuda.empty_cache()
        row.failure = "out of memory" if attempt else None


def _attempt(engine: TorchEngine, lanes: RandomLanes, row: Row, device: torch.device, counts: bool) -> bool:
    gc.collect()
    set_checkpointing(engine.module.model.base_model, row.settings.checkpointing)
    reset_peak(device)
    start = now(device)
    try:
        passes = _PASSES.get(row.name, run_passes)(engine, lanes, row.carried, row.settings, 1, Mode())
        commit(passes, row.carried)
        engine.step(1e-4, skip=False)
    except torch.OutOfMemoryError:
        return False  # what the error's frames hold is free once this function is left
    seconds = now(device) - start
    if counts:
        row.seconds.append(seconds)
        row.peak_bytes = max(row.peak_bytes, peak(device))
    return True


def _one_backward(
    engine: TorchEngine, lanes: RandomLanes, carried: Carried, settings: TrainingSettings, world_size: int, mode: Mode
) -> Passes:
    """First order with the losses of all files added up before the one backward pass."""
    window = [lanes.next() for _ in range(settings.window)]
    targets = sum(step.total_targets for step in window)
    loss, state = torch.zeros((), device=engine.device), carried.state
    for step in window:
        outputs = run_segment(engine, step.batch, state, mode)
        loss, state = loss + outputs.loss_sum, detach(outputs.state)
    engine.backward(loss * (world_size / targets), last=True)
    return Passes(loss.detach(), targets, detach(state or {}))


_PASSES: dict[str, Callable[..., Passes]] = {"first_one_backward": _one_backward}


def set_checkpointing(base: nn.Module, wanted: bool) -> None:
    """Switch the base model's activation checkpointing."""
    if wanted:
        build.enable_checkpointing(base)
        return
    newer = getattr(base, "activation_checkpointing_disable", None)  # its name in newer transformers
    (newer or base.gradient_checkpointing_disable)()  # type: ignore[operator]


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [f"{report['model']}, {report['device']}, {report['setting']}", ""]
    lines += ["| | step (s) | / first order | peak (GiB) | / first order | tokens/s |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        if "failure" in row:
            lines.append(f"| {row['row']} | {row['failure']} | | | | |")
            continue
        time_ratio, memory_ratio = (f"{r:.3f}" if r else "" for r in (row["time_ratio"], row["memory_ratio"]))
        figures = f"{row['median_seconds']:.3f} | {time_ratio} | {row['peak_gib']:.2f} | {memory_ratio}"
        lines.append(f"| {row['row']} | {figures} | {row['tokens_per_second']:,.0f} |")
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_order", description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available() and "--cpu" not in sys.argv
    add = parser.add_argument
    add("--base", default="qwen3.5-9b-random" if gpu else "tiny", help="tiny, qwen3.5-9b-random, or a path or hub id")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    add(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=[r for r in ROWS if r not in LARGE],
        metavar="ROW",
        help=f"of {', '.join(ROWS)} (default: all but {' and '.join(LARGE)})",
    )
    add("--memory", choices=("learned", "titans"), default="learned", help="learned projections and steps, or Titans'")
    add("--lanes", type=int, default=1, help="files side by side (default: 1)")
    add("--tokens", type=int, default=2048 if gpu else 128, help="tokens of a file")
    add("--window", type=int, default=4, help="files in a window (default: 4)")
    add("--dim", type=int, default=None, help="memory dim (default: 512, or 64 for tiny)")
    add("--steps", type=int, default=3, help="steps of each row that count (default: 3)")
    add("--warmup", type=int, default=1, help="steps of each row before them (default: 1)")
    add("--most-seconds", type=float, default=400.0, help="take no further step after this long (default: 400)")
    add("--cpu", action="store_true", help="leave a GPU alone")
    add("--out", type=Path, help="write the report as JSON, too")
    return parser.parse_args()


def _settings(name: str, window: int) -> TrainingSettings:
    return TrainingSettings(window=window, loss_chunk_tokens=2048, **ROWS[name][0])


def _config(arguments: argparse.Namespace, device: torch.device) -> TrainConfig:
    dim = arguments.dim or (64 if arguments.base == "tiny" else 512)
    memory = MemoryConfig(dim=dim, **LEARNED) if arguments.memory == "learned" else named_memory("titans", dim=dim)
    return TrainConfig(
        model=model_settings(arguments.base, arguments.dtype),
        data=DataSettings(corpus="random tokens"),
        graft=GraftConfig(segment_tokens=arguments.tokens, memory=memory),
        training=TrainingSettings(order="second", window=max(arguments.window, 2), loss_chunk_tokens=2048),
        deepspeed=None,
    )


def _report(
    arguments: argparse.Namespace,
    config: TrainConfig,
    module: nn.Module,
    rows: Iterable[Row],
    device: torch.device,
    seconds: float,
) -> dict[str, Any]:
    figures = [row.figures(arguments.lanes * arguments.tokens * arguments.window) for row in rows]
    by_name = {row["row"]: row for row in figures}
    for row in figures:
        other = by_name.get(row["baseline"], {})
        for ratio, value in (("time_ratio", "median_seconds"), ("memory_ratio", "peak_gib")):
            row[ratio] = row[value] / other[value] if value in row and value in other else None
    parameters = [
        sum(p.numel() for p in module.parameters() if p.requires_grad >= trained) for trained in (False, True)
    ]
    shape = f"{arguments.lanes} x {arguments.tokens} tokens x {arguments.window} files"
    return {
        "model": f"{arguments.base} ({parameters[0] / 1e6:,.1f}M parameters, {parameters[1] / 1e6:,.2f}M trained)",
        "device": device_name(device),
        "setting": f"{arguments.dtype}, {shape}, {arguments.memory} memory of dim {_dim(config)}",
        "rows": figures,
        "fla": importlib.util.find_spec("fla") is not None,
        "seconds": seconds,
        "command": " ".join(["python -m benchmarks.second_order", *sys.argv[1:]]),
        "versions": versions(),
    }


def _dim(config: TrainConfig) -> int:
    return config.graft.memory.dim if config.graft else 0


if __name__ == "__main__":
    sys.exit(main())
