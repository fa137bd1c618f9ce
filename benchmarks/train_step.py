"""What writing costs: a training step with memory on over one with memory off, in one run.

    python -m benchmarks.train_step                                 # a tiny hybrid, on the CPU or the GPU there is
    python -m benchmarks.train_step --base qwen3.5-9b-random --dtype bfloat16 --tokens 2048 --checkpointing
    python -m benchmarks.train_step --base PATH_OR_HUB_ID

Off is the same graft with the same trainable parameters, reading the fixed initial weights and writing nothing. Steps
of both kinds alternate, so that what else the machine does falls on both. Needs no deepspeed.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.program import run
from titans_ds.config import GraftConfig, MemoryConfig
from titans_ds.training import build
from titans_ds.training.engine import TorchEngine
from titans_ds.training.lanes import Step
from titans_ds.training.module import Mode
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.run_folder import versions
from titans_ds.training.segments import Batch
from titans_ds.training.settings import DataSettings, ModelSettings, OptimizerSettings, TrainConfig, TrainingSettings
from titans_ds.training.step import Carried, commit, run_passes

TINY = {
    "model_type": "qwen3_5_text",
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
NINE_BILLION = {"model_type": "qwen3_5_text"}  # transformers' own defaults are the 9B sizes
RANDOM_BASES: dict[str, dict[str, Any]] = {"tiny": TINY, "qwen3.5-9b-random": NINE_BILLION}


class RandomLanes:
    """Full segments of random tokens; every fourth segment starts a repository.

    Args:
        lanes: rows of a batch.
        tokens: of a segment.
        vocab_size: tokens are below it.
    """

    def __init__(self, lanes: int, tokens: int, vocab_size: int) -> None:
        self._rng, self._shape, self._vocab, self._count = np.random.default_rng(0), (lanes, tokens), vocab_size, 0

    def next(self) -> Step:
        """The next batch."""
        ids = self._rng.integers(0, self._vocab, self._shape)
        reset = np.full(self._shape[0], self._count % 4 == 0)
        self._count += 1
        batch = Batch(ids, ids, np.ones(self._shape, dtype=bool), reset, np.zeros(self._shape[0], dtype=np.int64))
        return Step(batch, batch.num_targets)


@dataclass(frozen=True)
class Cost:
    """Of one step: its seconds; those of them after which the host had given the device all its passes; peak memory."""

    seconds: float
    issued: float
    peak_bytes: int


def main() -> int:
    """Run the program; returns its exit code."""
    return run(measure, table, _arguments())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both kinds of step, alternating; the ratio of medians and of peaks."""
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    config = _config(arguments)
    engine = make_engine(config, device)
    lanes = RandomLanes(arguments.lanes, arguments.tokens, build.vocabulary_of(engine.module.model.base_model))
    measured = alternate(engine, lanes, config.training, arguments.warmup, arguments.steps, device)
    return _report(arguments, engine.module, measured, device)


def alternate(
    engine: TorchEngine,
    lanes: RandomLanes,
    settings: TrainingSettings,
    warmup: int,
    steps: int,
    device: torch.device,
) -> dict[bool, list[Cost]]:
    """Steps with memory on (True) and off, by turns; those of the warm-up don't count."""
    carried = {True: Carried(), False: Carried()}
    measured: dict[bool, list[Cost]] = {True: [], False: []}
    for step in range(warmup + steps):
        for write in (True, False):
            cost = one_step(engine, lanes, carried[write], settings, write, device)
            measured[write] += [cost] * (step >= warmup)
    return measured


def one_step(
    engine: TorchEngine,
    lanes: RandomLanes,
    carried: Carried,
    settings: TrainingSettings,
    write: bool,
    device: torch.device,
) -> Cost:
    """One optimizer step."""
    gc.collect()
    reset_peak(device)
    start = now(device)
    passes = run_passes(engine, lanes, carried, settings, 1, Mode(write=write))
    issued = time.perf_counter() - start
    commit(passes, carried)
    bool(torch.isfinite(passes.loss_sum))  # as the training loop asks, with memory on and off
    engine.step(1e-4, skip=False)
    return Cost(now(device) - start, issued, peak(device))


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    on, off, ratio = report["memory_on"], report["memory_off"], report["ratio"]
    rows = [
        ("step time, median (s)", f"{on['median_seconds']:.4f}", f"{off['median_seconds']:.4f}", ratio["step_time"]),
        ("peak memory (GiB)", f"{on['peak_gib']:.3f}", f"{off['peak_gib']:.3f}", ratio["peak_memory"]),
        ("tokens/s", f"{on['tokens_per_second']:,.0f}", f"{off['tokens_per_second']:,.0f}", ratio["tokens_per_second"]),
    ]
    lines = [f"{report['model']}, {report['device']}, {report['setting']}", "", "| | on | off | on / off |"]
    lines += ["|---|---|---|---|", *(f"| {name} | {a} | {b} | {r:.3f} |" for name, a, b, r in rows)]
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    add_base(parser)
    parser.add_argument("--lanes", type=int, default=2, help="segments side by side (default: 2)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a segment (default: 256)")
    parser.add_argument("--dim", type=int, default=None, help="memory dim (default: 512, or 64 for tiny)")
    parser.add_argument("--memory-write", choices=("pooled", "token"), default="pooled")
    parser.add_argument("--order", choices=("first", "second"), default="first")
    parser.add_argument("--window", type=int, default=2, help="segments of every lane in a step (default: 2)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--steps", type=int, default=10, help="steps of each kind that count (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each kind before them (default: 3)")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--out", type=Path, help="write the report as JSON, too")
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> TrainConfig:
    dim = arguments.dim or (64 if arguments.base == "tiny" else 512)
    training = TrainingSettings(
        order=arguments.order, window=arguments.window, checkpointing=arguments.checkpointing, loss_chunk_tokens=2048
    )
    memory = MemoryConfig(dim=dim, write=arguments.memory_write)
    return TrainConfig(
        model=model_settings(arguments.base, arguments.dtype),
        data=DataSettings(corpus="random tokens"),
        graft=GraftConfig(segment_tokens=arguments.tokens, memory=memory),
        training=training,
        deepspeed=None,
    )


def model_settings(base: str, dtype: Any) -> ModelSettings:
    """Of one of RANDOM_BASES by its name, or of a path or hub id."""
    random = RANDOM_BASES.get(base)
    return ModelSettings(base=None if random else base, architecture=random, dtype=dtype)


def add_base(parser: argparse.ArgumentParser) -> None:
    """Options --base and --dtype."""
    names = ", ".join(RANDOM_BASES)
    parser.add_argument("--base", default="tiny", help=f"{names}, or a path or hub id (default: tiny)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")


def make_engine(config: TrainConfig, device: torch.device) -> TorchEngine:
    """Base, graft and optimizer on a device; random weights are drawn there."""
    vocab_size = int((config.model.architecture or {}).get("vocab_size", 0))
    with device:
        base = load_base(config, vocab_size)
    module = build.make_module(base.to(device), config).to(device)
    return TorchEngine(module, make_optimizer(module, OptimizerSettings()), 1.0, device)


def load_base(config: TrainConfig, vocab_size: int) -> nn.Module:
    """The base model; of random weights with the vocabulary of its architecture where 0 is given."""
    if vocab_size or config.model.base:
        return build.load_base(config.model, 0, vocab_size)
    from transformers import AutoConfig

    architecture = AutoConfig.for_model(**(config.model.architecture or {}))
    return build.load_base(config.model, 0, architecture.vocab_size)


def _report(
    arguments: argparse.Namespace, module: nn.Module, measured: dict[bool, list[Cost]], device: torch.device
) -> dict[str, Any]:
    tokens = arguments.lanes * arguments.tokens * arguments.window
    on, off = (figures(measured[write], tokens) for write in (True, False))
    ratio = {
        "step_time": on["median_seconds"] / off["median_seconds"],
        "peak_memory": on["peak_gib"] / off["peak_gib"],
        "tokens_per_second": on["tokens_per_second"] / off["tokens_per_second"],
    }
    parameters = sum(p.numel() for p in module.parameters())
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "model": f"{arguments.base} ({parameters / 1e6:,.1f}M parameters, {trained / 1e6:,.2f}M trained)",
        "device": device_name or f"CPU, {torch.get_num_threads()} threads",
        "setting": _setting(arguments),
        "memory_on": on,
        "memory_off": off,
        "ratio": ratio,
        "command": " ".join(["python -m benchmarks.train_step", *sys.argv[1:]]),
        "versions": versions(),
    }


def _setting(arguments: argparse.Namespace) -> str:
    shape = f"{arguments.lanes} lanes x {arguments.tokens} tokens x {arguments.window} segments"
    checkpointing = "with recompute" if arguments.checkpointing else "no recompute"
    return f"{arguments.dtype}, {shape}, {arguments.order} order, {arguments.memory_write} write, {checkpointing}"


def figures(costs: list[Cost], tokens: int) -> dict[str, Any]:
    """For a report: the median step of `tokens` tokens, and the peak of memory."""
    median = statistics.median(c.seconds for c in costs)
    return {
        "median_seconds": median,
        "seconds": [c.seconds for c in costs],
        "issued": statistics.median(c.issued / c.seconds for c in costs),
        "tokens_per_second": tokens / median,
        "peak_gib": max(c.peak_bytes for c in costs) / 2**30,
    }


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reset_peak(device: torch.device) -> None:
    """Forget the most memory held so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of this process's memory


def peak(device: torch.device) -> int:
    """The most memory held since `reset_peak`, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        from titans_ds.training.metrics import peak_host_bytes

        return peak_host_bytes()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
