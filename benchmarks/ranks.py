"""What two ranks bring: the frozen base with memory at ZeRO 1, 2 and 3, against one rank, in one table.

    python -m benchmarks.ranks --out ranks.json                                   # tiny, on the CPU (gloo) or the GPUs
    python -m benchmarks.ranks --base qwen3.5-9b-random --dtype bfloat16 --tokens 4096 --checkpointing --out ranks.json

Every row is a launch of its own through `deepspeed`; one that fails says so in the table. `one` has one lane on one
rank, what a second GPU's speed is held against; `same` has all lanes on one rank, what the losses are held against.
Rows named 4lanes have four lanes a rank.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the launcher runs this file as a script

import torch

from benchmarks.program import kill_tree, many, new_report, now, peak, reset_peak, save
from benchmarks.program import table as markdown
from benchmarks.train_step import RandomLanes, add_base, load_base, model_settings
from launch.stages.demo import launcher
from titans_ds import preset
from titans_ds.config import GraftConfig, LoraSettings
from titans_ds.memory.registry import PRESETS
from titans_ds.program import program
from titans_ds.training import build, ranks
from titans_ds.training.data.lanes import Step
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import DataSettings, OptimizerSettings, TrainConfig, TrainingSettings
from titans_ds.training.step import Carried, commit, run_passes
from titans_ds.zero.config import complete_config
from titans_ds.zero.engine import DeepSpeedEngine, local_device, start_ranks
from titans_ds.zero.leaving import leave, stop_ranks

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Case:
    """One row: a ZeRO stage, how many ranks and lanes, and what is trained how."""

    stage: int
    ranks: int = 2
    lanes: int = 2
    order: str = "first"
    offload: bool = False
    lora: bool = False


_SECOND = Case(2, order="second")
CASES = {
    "one": Case(0, ranks=1, lanes=1),
    "same": Case(0, ranks=1),
    "zero1": Case(1),
    "zero2": Case(2),
    "zero3": Case(3),
    "one-second": replace(_SECOND, stage=0, ranks=1, lanes=1),
    "same-second": replace(_SECOND, stage=0, ranks=1),
    "one-zero2-second": replace(_SECOND, ranks=1, lanes=1),
    "one-zero2-second-offload": replace(_SECOND, ranks=1, lanes=1, offload=True),
    "zero2-second": _SECOND,
    "zero2-second-offload": replace(_SECOND, offload=True),
    "zero3-second-offload": replace(_SECOND, stage=3, offload=True),
    "one-lora": Case(0, ranks=1, lanes=1, lora=True),
    "same-lora": Case(0, ranks=1, lora=True),
    "zero3-lora": Case(3, lora=True),
    "one-4lanes": Case(0, ranks=1, lanes=4),
    "same-4lanes": Case(0, ranks=1, lanes=8),
    "zero2-4lanes": Case(2, lanes=8),
    "zero3-4lanes": Case(3, lanes=8),
}


@program("--out has the rows that were measured")
def main(argv: list[str]) -> None:
    """Run the program, or as one of its ranks one row; returns the exit code."""
    options = _options(argv)
    if options.case:
        measure(options)
    else:
        print(table(collect(options, argv)))


def collect(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Every row, in a launch of its own; the report is saved after each."""
    report = new_report("ranks", argv, torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.out)
    for name in options.rows or CASES:
        report["rows"][name] = launch(name, options.row_seconds, argv)
        print(name, report["rows"][name], file=sys.stderr, flush=True)
        save(report, options.out)
    return report


def launch(name: str, row_seconds: float, argv: list[str]) -> dict[str, Any]:
    """The row that rank 0 writes; where there is none, the end of what its ranks said."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [*launcher(CASES[name].ranks), str(Path(__file__).resolve()), *argv, "--case", name]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*command, "--row-file", str(out)], cwd=ROOT, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        try:
            said, _ = process.communicate(timeout=row_seconds)
        except subprocess.TimeoutExpired:
            said = f"gave up: no row within {row_seconds} s"
        finally:  # the launcher, and all its ranks
            kill_tree(process.pid)
            process.wait()
        row: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {"error": said.strip()[-2000:]}
        return row


def measure(options: argparse.Namespace) -> None:
    """As one rank: train a few steps; rank 0 writes the row."""
    start_ranks()
    row = measure_case(options, CASES[options.case], local_device())
    if ranks.rank() == 0:
        save(row, options.row_file)
    stop_ranks()


def measure_case(options: argparse.Namespace, case: Case, device: torch.device) -> dict[str, Any]:
    """The row, on every rank."""
    engine, config = make_engine(options, case, device)
    lanes = RankLanes(case.lanes, options.tokens, build.vocabulary_of(engine.module.model.base_model))
    carried, seconds, losses, world = Carried(), [], [], ranks.world_size()
    for step in range(options.warmup + options.steps):
        if step == options.warmup:
            reset_peak(device)
        start = now(device)
        passes = run_passes(engine, lanes, carried, config.training, world)
        commit(passes, carried)
        engine.step(options.lr, skip=False)
        seconds += [now(device) - start] * (step >= options.warmup)
        losses.append(sum(ranks.gather(float(passes.loss_sum))) / passes.targets)
    row = {
        "losses": losses,
        "seconds": seconds,
        "tokens_per_second": case.lanes * options.tokens * options.window / statistics.median(seconds),
        "peak_gib": max(ranks.gather(peak(device))) / 2**30,
        "optimizer_bytes": ranks.gather(engine.optimizer_state_bytes()),
        "parameter_bytes": ranks.gather(parameter_bytes(engine)),
        "communication_share": communication_share(engine, lanes, carried, config, device),
    }
    engine.close()
    return row


class RankLanes:
    """This rank's rows of RandomLanes' segments."""

    def __init__(self, lanes: int, tokens: int, vocab_size: int) -> None:
        self._all, own = RandomLanes(lanes, tokens, vocab_size), lanes // ranks.world_size()
        self._rows = slice(ranks.rank() * own, (ranks.rank() + 1) * own)

    def next(self) -> Step:
        """The next batch of this rank, with the number of targets of all."""
        step = self._all.next()
        batch = replace(step.batch, **{n: value[self._rows] for n, value in vars(step.batch).items()})
        return Step(batch, step.total_targets)


def make_engine(
    options: argparse.Namespace, case: Case, device: torch.device
) -> tuple[DeepSpeedEngine[Any], TrainConfig]:
    """The row's engine; random weights are drawn on the device, the same on every rank."""
    config = _config(options, case)
    with device:
        base = load_base(config.model)
    module = build.make_module(base.to(device), config)
    settings = complete_config(
        {"zero_optimization": {"stage": case.stage}},
        rows=case.lanes // ranks.world_size(),
        backwards_per_step=config.backwards_per_step,
        world_size=ranks.world_size(),
        clip=1.0,
        bf16=options.dtype == "bfloat16",
        recomputed=options.checkpointing,
    )
    return DeepSpeedEngine(module, make_optimizer(module, OptimizerSettings()), settings, device), config


def parameter_bytes(engine: DeepSpeedEngine[Any]) -> int:
    """Bytes of parameters on this rank: its partition at ZeRO-3."""
    held = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    return sum(p.numel() * p.element_size() for p in held)


def communication_share(
    engine: DeepSpeedEngine[Any], lanes: RankLanes, carried: Carried, config: TrainConfig, device: torch.device
) -> float | None:
    """Share of one step's time in which an NCCL kernel ran, seen by the profiler; None without a GPU."""
    if device.type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        start = now(device)
        passes = run_passes(engine, lanes, carried, config.training, ranks.world_size())
        commit(passes, carried)
        engine.step(1e-4, skip=False)
        seconds = now(device) - start
    nccl = sum(event.device_time_total for event in profile.key_averages() if "nccl" in event.key.lower())
    return nccl / 1e6 / seconds


def _config(options: argparse.Namespace, case: Case) -> TrainConfig:
    training = TrainingSettings(
        order=case.order,  # type: ignore[arg-type]
        window=options.window,
        checkpointing=options.checkpointing,
        offload_activations=case.offload,
        loss_chunk_tokens=options.loss_chunk_tokens,
    )
    return TrainConfig(
        model=model_settings(options.base, options.dtype),
        data=DataSettings(corpus="random tokens", num_lanes=case.lanes),
        graft=GraftConfig(segment_tokens=options.tokens, memory=preset(options.preset)),
        lora=LoraSettings(rank=64) if case.lora else None,
        training=training,
    )


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: losses against `same`, speed against `one`, of the same kind of training."""
    rows, lines = report["rows"], []
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, f"failed: {(row['error'].splitlines() or ['?'])[-1][:80]}"])
            continue
        kind = next((f"-{k}" for k in ("second", "lora", "4lanes") if k in name), "")
        same, one = rows.get(f"same{kind}", {}), rows.get(f"one{kind}", {})
        off = [abs(a - b) for a, b in zip(row["losses"], same.get("losses", []), strict=False)]
        speed = row["tokens_per_second"]
        cells = [f"{max(off):.2e}" if off and not name.startswith("one") else "-", f"{speed:,.0f}"]
        cells += [f"{speed / one['tokens_per_second']:.3f}" if "tokens_per_second" in one else "-"]
        cells += [f"{row['peak_gib']:.2f}", f"{max(row['optimizer_bytes']) / 2**20:.2f}"]
        share = row["communication_share"]
        cells += [f"{max(row['parameter_bytes']) / 2**30:.3f}", "-" if share is None else f"{share:.1%}"]
        lines.append([name, *cells])
    columns = ("row", "loss off by", "tokens/s", "x one rank", "peak GiB", "optimizer MiB", "parameters GiB")
    return f"{report['gpus']} x {report['device']}\n\n" + markdown((*columns, "communication"), lines)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_base(parser)
    parser.add_argument("--preset", choices=list(PRESETS), default="delta", help="of the memory (default: delta)")
    parser.add_argument("--tokens", type=many, default=128, help="of a segment")
    parser.add_argument("--loss-chunk-tokens", type=many, default=2048, help="see training.loss_chunk_tokens")
    parser.add_argument("--window", type=many, default=4, help="segments of every lane in a step")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=many, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=sorted(CASES), metavar="ROW", help=f"of {', '.join(CASES)}")
    parser.add_argument("--row-seconds", type=float, default=240, help="give a row up after this")
    parser.add_argument("--case", choices=sorted(CASES), help=argparse.SUPPRESS)  # as one rank of this row
    parser.add_argument("--row-file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    leave(main())
