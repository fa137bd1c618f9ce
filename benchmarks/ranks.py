"""What two ranks bring: the frozen base with memory at ZeRO 1, 2 and 3, against one rank, in one table.

    python -m benchmarks.ranks --out ranks.json                                   # tiny, on the CPU (gloo) or the GPUs
    python -m benchmarks.ranks --base qwen3.5-9b-random --dtype bfloat16 --tokens 4096 --checkpointing --out ranks.json

Rows with as many ranks share a launch through `deepspeed`, one engine after the other; a row that fails there is tried
once more in a launch of its own, and where it fails again it is a row of the table that says so. `one` has one lane on
one rank, what a second GPU's speed is held against; `same` has all lanes on one rank, what the losses are held against.
Rows named 4lanes have four lanes a rank.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the launcher runs this file as a script

import torch

from benchmarks.program import save
from benchmarks.train_step import RandomLanes, add_base, load_base, model_settings, now, peak, reset_peak
from launch.demo_stages import launcher
from launch.sweeping.processes import kill_tree
from titans_ds.config import GraftConfig, LoraSettings, MemoryConfig
from titans_ds.errors import TitansError
from titans_ds.training import build, ranks
from titans_ds.training.lanes import Step
from titans_ds.training.module import Mode
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.run_folder import versions
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


def main() -> int:
    """Run the program, or as one of its ranks one row; returns the exit code."""
    options = _options()
    try:
        if options.cases:
            measure(options)
        else:
            print(table(collect(options)))
    except TitansError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Launch the rows, those with as many ranks together; what is there is saved after each launch."""
    rows = {} if options.known is None else known_rows(options.known)
    report = {"rows": rows, "command": " ".join(["python -m benchmarks.ranks", *sys.argv[1:]]), "versions": versions()}
    pending = [name for name in options.rows or CASES if name not in rows]
    while pending:
        group = [name for name in pending if CASES[name].ranks == CASES[pending[0]].ranks]
        found, failed = launch(group, options)
        if not found:  # alone in a fresh process, or the first of one: it is not for want of room
            found = {group[0]: {"error": failed}}
        rows |= found
        pending = [name for name in pending if name not in found]
        save(report, options.out)
    report["rows"] = {name: rows[name] for name in CASES if name in rows}  # in their order
    save(report, options.out)
    return report


def known_rows(path: Path) -> dict[str, Any]:
    """The rows of a report. Raises TitansError where the file is none."""
    try:
        rows: dict[str, Any] = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TitansError(
            f"--known {path} is no report of benchmarks.ranks ({error}); give what --out wrote"
        ) from error
    return {name: row for name, row in rows.items() if name in CASES}


def launch(names: list[str], options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The rows of one launch, as far as it came, and the end of what it said."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        command = [*launcher(CASES[names[0]].ranks), str(Path(__file__).resolve()), *sys.argv[1:]]
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "--cases", *names, "--folder", text], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )
            found = _await_rows(process, folder, names, options.row_seconds)
        said = (folder / "log").read_bytes().decode(errors="replace").strip()[-2000:]
    if process.returncode == -signal.SIGKILL:
        said += f"\ngave up: no row within {options.row_seconds} s"
    return found, said


def _await_rows(process: subprocess.Popen[bytes], folder: Path, names: list[str], row_seconds: float) -> dict[str, Any]:
    """Rows as they come; a launch that makes none for too long is ended, with all its ranks."""
    found: dict[str, Any] = {}
    last = time.monotonic()
    try:
        while process.poll() is None and time.monotonic() - last < row_seconds:
            time.sleep(0.2)
            if _new_rows(folder, names, found):
                last = time.monotonic()
    finally:
        kill_tree(process.pid)
        process.wait()
    _new_rows(folder, names, found)
    return found


def _new_rows(folder: Path, names: list[str], found: dict[str, Any]) -> bool:
    new = [name for name in names if name not in found and (folder / f"{name}.json").is_file()]
    for name in new:
        found[name] = json.loads((folder / f"{name}.json").read_text())
        print(name, {k: v for k, v in found[name].items() if k != "losses"}, file=sys.stderr, flush=True)
    return bool(new)


def measure(options: argparse.Namespace) -> None:
    """As one rank: the rows of this launch, each written by rank 0."""
    start_ranks()
    for name in options.cases:
        row = measure_case(options, CASES[name], local_device())
        if ranks.rank() == 0:
            save(row, options.folder / f"{name}.json")
        gc.collect()  # engine and model refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    stop_ranks()


def measure_case(options: argparse.Namespace, case: Case, device: torch.device) -> dict[str, Any]:
    """Train a few steps; the row, on every rank."""
    engine, config = make_engine(options, case, device)
    lanes = RankLanes(case.lanes, options.tokens, build.vocabulary_of(engine.module.model.base_model))
    carried, seconds, losses, world = Carried(), [], [], ranks.world_size()
    for step in range(options.warmup + options.steps):
        if step == options.warmup:
            reset_peak(device)
        start = now(device)
        passes = run_passes(engine, lanes, carried, config.training, world, Mode(write=True))
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
        "communication_share": communication_share(engine, lanes, carried, config, device, options.profile),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
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
        base = load_base(config, int((config.model.architecture or {}).get("vocab_size", 0)))
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
    engine: DeepSpeedEngine[Any],
    lanes: RankLanes,
    carried: Carried,
    config: TrainConfig,
    device: torch.device,
    table: Path | None,
) -> float | None:
    """Share of one step's time in which an NCCL kernel ran, seen by the profiler; None without a GPU.

    What the profiler saw is added to the file `table`, by kernel.
    """
    if device.type != "cuda":
        return None
    with _profiler() as profile:
        start = now(device)
        passes = run_passes(engine, lanes, carried, config.training, ranks.world_size(), Mode(write=True))
        commit(passes, carried)
        engine.step(1e-4, skip=False)
        seconds = now(device) - start
    if table is not None and ranks.rank() == 0:
        with table.open("a") as file:
            print(f"{seconds:.3f} s a step\n{profile.key_averages().table('self_device_time_total', 50)}", file=file)
    nccl = sum(event.device_time_total for event in profile.key_averages() if "nccl" in event.key.lower())
    return nccl / 1e6 / seconds


@contextmanager
def _profiler() -> Iterator[torch.profiler.profile]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield profile


def _config(options: argparse.Namespace, case: Case) -> TrainConfig:
    tiny = options.base == "tiny"
    second: dict[str, Any] = {"learn_step_size": True, "key_projection": "learned", "value_projection": "learned"}
    memory = MemoryConfig(dim=64 if tiny else 512, **(second if case.order == "second" else {}))
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
        graft=GraftConfig(segment_tokens=options.tokens, memory=memory),
        lora=LoraSettings(rank=64) if case.lora else None,
        training=training,
    )


def table(report: dict[str, Any]) -> str:
    """The report as Markdown: losses against `same`, speed against `one`, of the same kind of training."""
    lines = [
        "| row | loss off by | tokens/s | x one rank | peak GiB | optimizer MiB | parameters GiB | communication |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|")
    rows = report["rows"]
    for name, row in rows.items():
        if "error" in row:
            lines.append(
                f"| {name} | failed: {row['error'].splitlines()[-1][:80] if row['error'] else '?'} |" + " |" * 6
            )
            continue
        kind = next((f"-{k}" for k in ("second", "lora", "4lanes") if k in name), "")
        same, one = rows.get(f"same{kind}", {}), rows.get(f"one{kind}", {})
        off = [abs(a - b) for a, b in zip(row["losses"], same.get("losses", []), strict=False)]
        speed = row["tokens_per_second"]
        ratio = f"{speed / one['tokens_per_second']:.3f}" if "tokens_per_second" in one else "-"
        share = "-" if row["communication_share"] is None else f"{row['communication_share']:.1%}"
        cells = [f"{max(off):.2e}" if off and not name.startswith("one") else "-", f"{speed:,.0f}", ratio]
        cells += [f"{row['peak_gib']:.2f}", f"{max(row['optimizer_bytes']) / 2**20:.2f}"]
        cells += [f"{max(row['parameter_bytes']) / 2**30:.3f}", share]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_base(parser)
    parser.add_argument("--tokens", type=int, default=128, help="of a segment")
    parser.add_argument("--loss-chunk-tokens", type=int, default=2048, help="see training.loss_chunk_tokens")
    parser.add_argument("--window", type=int, default=4, help="segments of every lane in a step")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rows", nargs="+", choices=sorted(CASES), metavar="ROW", help=f"of {', '.join(CASES)}")
    parser.add_argument("--known", type=Path, help="a report of other rows, made on this machine: take them from there")
    parser.add_argument("--row-seconds", type=float, default=240, help="give a row up after this")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="add what the profiler saw of a step of every row")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    leave(main())
