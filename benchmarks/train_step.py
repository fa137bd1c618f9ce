"""What each kind of training costs: a step with memory on, of second order, and of LoRA, over one with memory off.

    python -m benchmarks.train_step                                 # a tiny hybrid, on the CPU or the GPU there is
    python -m benchmarks.train_step --base qwen3.5-9b-random --dtype bfloat16 --lanes 1 --tokens 4096 --compile mlp
    python -m benchmarks.train_step --base PATH_OR_HUB_ID --rows memory_off second_order

Off is the same graft with the same trainable parameters, reading its start state and writing nothing. Steps of one
model alternate, so that what else the machine does falls on both; the other rows follow, each with a model of its own,
since a large one fits once. The floor is the time that the matrix products of a step with memory
off, counted by PyTorch, take at the rate of a large product measured in the same run. The report is written after every
row. Needs no deepspeed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import statistics
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.program import many, matmul_rate, new_report, now, peak, reset_peak, save
from benchmarks.program import table as markdown
from titans_ds import preset
from titans_ds.config import GraftConfig, LoraSettings
from titans_ds.memory import READ, Pass
from titans_ds.program import program
from titans_ds.training import build
from titans_ds.training.data.lanes import Step
from titans_ds.training.data.segments import Batch
from titans_ds.training.engine import TorchEngine
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import (
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    SecondOrder,
    TrainConfig,
    TrainingSettings,
)
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


Plans = dict[str, Pass | None]  # what the passes of a row do with the memories: None skips them
# By name: which model, and its plan. Models: a memory at first order, at second order, and LoRA's alone.
ROWS: dict[str, tuple[str, Pass | None]] = {
    "memory_off": ("first", READ),
    "first_order": ("first", Pass()),
    "second_order": ("second", Pass()),
    "lora": ("lora", None),
}
LORA_RANK = 64


@program("--out has the rows that were measured")
def main(argv: list[str]) -> None:
    """Run the program; returns its exit code."""
    print(table(measure(_arguments(argv), argv)))


def measure(arguments: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Every row, those of one model by turns; ratios over memory off."""
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    report = new_report("train_step", argv, device, arguments.out) | {"base": arguments.base}
    report["setting"] = _setting(arguments)
    report["matmul_flops_per_second"] = matmul_rate(device, getattr(torch, arguments.dtype))
    for model in dict.fromkeys(ROWS[name][0] for name in arguments.rows):
        plans = {name: ROWS[name][1] for name in arguments.rows if ROWS[name][0] == model}
        report["rows"] |= measure_model(arguments, model, plans, device, report)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        _add_ratios(report)
        save(report, arguments.out)
    return report


def measure_model(
    arguments: argparse.Namespace, name: str, plans: Plans, device: torch.device, report: dict[str, Any]
) -> dict[str, Any]:
    """The rows of one model; with memory off, the products of a token as well."""
    config = _config(arguments, name)
    tokens = arguments.lanes * arguments.tokens * config.training.window
    torch.compiler.reset()  # or shapes of the rows before would count as shapes that vary
    try:
        engine = make_engine(config, device)
        lanes = RandomLanes(arguments.lanes, arguments.tokens, build.vocabulary_of(engine.module.model.base_model))
        if "memory_off" in plans:
            once = dataclasses.replace(config.training, window=1)  # a second segment would be replayed
            report["flops_per_token"] = count(engine, lanes, once, device) / (arguments.lanes * arguments.tokens)
        costs = alternate(engine, lanes, config.training, arguments.warmup, arguments.steps, device, plans)
    except torch.OutOfMemoryError as error:
        return {row: {"failure": str(error).splitlines()[0]} for row in plans}
    trained = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    return {row: figures(found, tokens) | {"trained_parameters": trained} for row, found in costs.items()}


def alternate(
    engine: TorchEngine,
    lanes: RandomLanes,
    settings: TrainingSettings,
    warmup: int,
    steps: int,
    device: torch.device,
    plans: Plans,
) -> dict[str, list[Cost]]:
    """Steps of every kind, by turns; those of the warm-up don't count."""
    carried = {name: Carried() for name in plans}
    measured: dict[str, list[Cost]] = {name: [] for name in plans}
    for step in range(warmup + steps):
        for name, plan in plans.items():
            cost = one_step(engine, lanes, carried[name], settings, plan, device)
            measured[name] += [cost] * (step >= warmup)
    return measured


def one_step(
    engine: TorchEngine,
    lanes: RandomLanes,
    carried: Carried,
    settings: TrainingSettings,
    plan: Pass | None,
    device: torch.device,
) -> Cost:
    """One optimizer step."""
    gc.collect()
    reset_peak(device)
    start = now(device)
    with contextlib.nullcontext() if plan else engine.module.ablated():
        passes = run_passes(engine, lanes, carried, settings, 1, plan or READ)
    issued = time.perf_counter() - start
    commit(passes, carried)
    bool(torch.isfinite(passes.loss_sum))  # as the training loop asks, with memory on and off
    engine.step(1e-4, skip=False)
    return Cost(now(device) - start, issued, peak(device))


def count(engine: TorchEngine, lanes: RandomLanes, settings: TrainingSettings, device: torch.device) -> int:
    """Floating-point operations of the matrix products and attention of one step with memory off.

    Of a model's first segment, before its layers are replayed. Compiled parts run as they are, since PyTorch can't look
    into its own kernels; others', such as DeltaNet's, count nothing.
    """
    eager = torch.compiler.set_stance("force_eager")
    with eager, FlopCounterMode(display=False, custom_mapping=attention_flops()) as counter:
        one_step(engine, lanes, Carried(), settings, READ, device)
    return int(counter.get_total_flops())


def attention_flops() -> dict[Any, Callable[..., int]]:
    """Of PyTorch's attention, also where queries have more heads than keys, which its own count refuses."""

    def forward(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
        return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])

    def backward(_: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *__: Any, **___: Any) -> int:
        return 5 * forward(query, key, value) // 2  # scores once more, then four products

    aten, found = torch.ops.aten, {}
    for kind in ("flash", "efficient", "cudnn"):
        name = f"_scaled_dot_product_{kind}_attention"
        found |= {getattr(aten, name): forward, getattr(aten, f"{name}_backward"): backward}
    return found


def _add_ratios(report: dict[str, Any]) -> None:
    """To every row its speed and peak over those with memory off, and its share of the floor."""
    rows, off = report["rows"], report["rows"].get("memory_off", {})
    flops = report.get("flops_per_token")
    for row in rows.values():
        for name in ("tokens_per_second", "peak_gib"):
            if name in row and name in off:
                row[f"{name}_over_off"] = row[name] / off[name]
        if flops and "tokens_per_second" in row:
            row["share_of_floor"] = row["tokens_per_second"] * flops / report["matmul_flops_per_second"]


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    lines = [f"{report['base']}, {report['device']}, {report['setting']}", ""]
    if flops := report.get("flops_per_token"):
        floor = report["matmul_flops_per_second"] / flops
        lines += [f"floor {floor:,.0f} tokens/s: {flops / 1e9:.3g} GFLOP a token with memory off", ""]
    rows = []
    for name, row in report["rows"].items():
        if "failure" in row:
            rows.append([name, row["failure"]])
            continue
        speed, share, memory = (
            f"{row[key]:.3f}" if key in row else "-"
            for key in ("tokens_per_second_over_off", "share_of_floor", "peak_gib_over_off")
        )
        cells = [name, f"{row['median_seconds']:.4f}", f"{row['tokens_per_second']:,.0f}", speed, share]
        rows.append([*cells, f"{row['issued']:.2f}", f"{row['peak_gib']:.2f}", memory])
    columns = ("row", "step, median (s)", "tokens/s", "over off", "share of floor", "issued", "peak GiB", "over off")
    return "\n".join([*lines, markdown(columns, rows)])


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__.splitlines()[0])
    add_base(parser)
    parser.add_argument("--lanes", type=many, default=2, help="segments side by side (default: 2)")
    parser.add_argument("--tokens", type=many, default=256, help="tokens of a segment (default: 256)")
    parser.add_argument("--preset", default="delta", help="of the memory, sized for the base (default: delta)")
    parser.add_argument("--layers", default="auto", help="that have a memory: auto, attention, or indices as 8,12,16")
    parser.add_argument("--offload-activations", action="store_true", help="activations wait in host memory")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), metavar="ROW", help=f"(default: {', '.join(ROWS)})")
    parser.add_argument("--window", type=many, default=2, help="segments of every lane in a step (default: 2)")
    parser.add_argument("--compile", choices=("none", "mlp", "layers"), default="none", help="parts of the base")
    parser.add_argument(
        "--loss-kernel", choices=("auto", "liger", "chunked"), default="auto", help="see training.loss_kernel"
    )
    parser.add_argument("--second-order", choices=typing.get_args(SecondOrder), default="auto", help="way of that row")
    parser.add_argument("--layer-graphs", action="store_true", help="replay frozen layers as CUDA graphs")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument("--steps", type=many, default=10, help="steps of each row that count (default: 10)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each row before them (default: 3)")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--out", type=Path, help="write the report as JSON after every row")
    arguments = parser.parse_args(argv)
    possible = [name for name in ROWS if name != "second_order" or arguments.window >= 2]
    arguments.rows = arguments.rows or possible
    if not set(arguments.rows) <= set(possible):
        parser.error(f"--window is {arguments.window}, and row second_order needs 2 segments or more")
    return arguments


def _config(arguments: argparse.Namespace, name: str) -> TrainConfig:
    """Of one model."""
    layers = [int(i) for i in arguments.layers.split(",")] if arguments.layers[0].isdigit() else arguments.layers
    training = TrainingSettings(
        order="second" if name == "second" else "first",
        second_order=arguments.second_order if name == "second" else "auto",
        loss_kernel=arguments.loss_kernel,
        offload_activations=arguments.offload_activations,
        window=arguments.window,
        checkpointing=arguments.checkpointing,
        compile=arguments.compile,
        layer_graphs=arguments.layer_graphs,
        loss_chunk_tokens=2048,
    )
    return TrainConfig(
        model=model_settings(arguments.base, arguments.dtype),
        data=DataSettings(corpus="random tokens"),
        graft=GraftConfig(layers=layers, segment_tokens=arguments.tokens, memory=preset(arguments.preset)),
        lora=LoraSettings(rank=LORA_RANK) if name == "lora" else None,
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
    with device:
        base = load_base(config.model)
    module = build.make_module(base.to(device), config).to(device)
    return TorchEngine(module, make_optimizer(module, OptimizerSettings()), 1.0, device)


def load_base(model: ModelSettings) -> nn.Module:
    """The base model; of random weights with the vocabulary of its architecture."""
    vocab_size = 0
    if model.architecture is not None:
        from transformers import AutoConfig

        vocab_size = AutoConfig.for_model(**model.architecture).vocab_size
    return build.load_base(model, 0, vocab_size)


def _setting(arguments: argparse.Namespace) -> str:
    shape = f"{arguments.lanes} lanes x {arguments.tokens} tokens x {arguments.window} segments"
    ways = [f"compile {arguments.compile}", f"loss {arguments.loss_kernel}"] + [
        "frozen layers as graphs"
    ] * arguments.layer_graphs
    ways += ["with recompute" if arguments.checkpointing else "no recompute"]
    return f"{arguments.dtype}, {shape}, {arguments.preset} on layers {arguments.layers}, {', '.join(ways)}"


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


if __name__ == "__main__":
    sys.exit(main())
