"""How fast a step on a frozen base is: each way to speed it up over plain PyTorch, and memory on over memory off.

    python -m benchmarks.frozen_step                                                   # a tiny hybrid
    python -m benchmarks.frozen_step --base qwen3.5-9b-random --dtype bfloat16 --lanes 1 --tokens 4096 --out FILE.json

Off is the same graft with the same trainable parameters, reading the fixed initial weights and writing nothing. Within
a row, steps of both kinds alternate; rows follow one another, since a large model fits once, and `plain` comes again
at the end. The floor is the time that the matrix products of the plain step, counted by PyTorch, take at the rate of a
large product measured in the same run. `issued` is the part of a step after which the host had given the device all its
passes: where it comes near 1, the processor is the limit, and a busy one is slow. Written after every row. Needs no
deepspeed.
"""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_layer import matmul_rate
from benchmarks.program import run, save
from benchmarks.train_step import RandomLanes, add_base, alternate, count, figures, make_engine, model_settings
from titans_ds.config import GraftConfig, LoraSettings, MemoryConfig
from titans_ds.training import build
from titans_ds.training.module import Mode
from titans_ds.training.run_folder import versions
from titans_ds.training.settings import DataSettings, TrainConfig, TrainingSettings

LORA = "lora"
MODES = {"memory_on": Mode(), "memory_off": Mode(write=False)}
# By name: settings of training; `lora`: rank 64 on attention, beside the memory.
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"loss_kernel": "chunked"},
    "loss": {},
    "mlp": {"compile": "mlp"},
    "layers": {"compile": "layers"},
    "graphs": {"memory_graphs": "on"},
    "mlp_graphs": {"compile": "mlp", "memory_graphs": "on"},
    "mlp_layer_graphs": {"compile": "mlp", "layer_graphs": True},
    "lora": {LORA: True},
    "lora_mlp": {LORA: True, "compile": "mlp"},
    "lora_layers": {LORA: True, "compile": "layers"},
    "plain_again": {"loss_kernel": "chunked"},
}


def main() -> int:
    """Run the program; returns its exit code."""
    return run(measure, table, _options())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every row, and the floor."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    report: dict[str, Any] = {
        "base": options.base,
        "setting": f"{options.dtype}, {options.lanes} x {options.tokens} tokens, memory dim {options.dim}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "matmul_flops_per_second": matmul_rate(device, getattr(torch, options.dtype)),
        "command": " ".join(["python -m benchmarks.frozen_step", *sys.argv[1:]]),
        "versions": versions(),
        "rows": {},
    }
    for name in options.rows:
        report["rows"][name] = measure_row(options, ROWS[name], device, report)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(name, _short(report["rows"][name]), file=sys.stderr, flush=True)
        save(report, options.out)
    return report


def measure_row(
    options: argparse.Namespace, given: dict[str, Any], device: torch.device, report: dict[str, Any]
) -> dict[str, Any]:
    """One row; the first of them counts the products of a step."""
    config = _config(options, given)
    torch.compiler.reset()  # or shapes of the rows before would count as shapes that vary
    try:
        engine = make_engine(config, device)
        lanes = RandomLanes(options.lanes, options.tokens, build.vocabulary_of(engine.module.model.base_model))
        if "flops_per_token" not in report and not given.get("compile"):
            report["flops_per_token"] = count(engine, lanes, config.training, device) / (options.lanes * options.tokens)
        measured = alternate(engine, lanes, config.training, options.warmup, options.steps, device, MODES)
    except torch.OutOfMemoryError as error:
        return {"failure": str(error).splitlines()[0]}
    return {name: figures(costs, options.lanes * options.tokens) for name, costs in measured.items()}


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    floor = report["matmul_flops_per_second"] / report["flops_per_token"] if "flops_per_token" in report else None
    plain = report["rows"].get("plain", {}).get("memory_off", {}).get("tokens_per_second")
    lines = [f"{report['base']}, {report['device']}, {report['setting']}", ""]
    if floor:
        lines += [f"floor {floor:,.0f} tokens/s: {report['flops_per_token'] / 1e9:.3g} GFLOP a token", ""]
    lines += [
        "| | off, tokens/s | over plain | share of floor | on, tokens/s | on / off | issued, off / on | peak GiB |",
        "|" + "---|" * 8,
    ]
    for name, row in report["rows"].items():
        if "failure" in row:
            lines.append(f"| {name} | {row['failure']} |" + " |" * 6)
            continue
        on, off = row["memory_on"], row["memory_off"]
        speed = off["tokens_per_second"]
        cells = [f"{speed:,.0f}", f"{speed / plain:.3f}" if plain else "-", f"{speed / floor:.3f}" if floor else "-"]
        cells += [f"{on['tokens_per_second']:,.0f}", f"{on['tokens_per_second'] / speed:.3f}"]
        cells += [f"{off['issued']:.2f} / {on['issued']:.2f}", f"{on['peak_gib']:.2f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _short(row: dict[str, Any]) -> str:
    if "failure" in row:
        return str(row["failure"])
    return ", ".join(f"{k}: {v['tokens_per_second']:,.0f} tokens/s" for k, v in row.items())


def _config(options: argparse.Namespace, given: dict[str, Any]) -> TrainConfig:
    chosen = {k: v for k, v in given.items() if k != LORA}
    training = TrainingSettings(checkpointing=options.checkpointing, loss_chunk_tokens=2048, **chosen)
    return TrainConfig(
        model=model_settings(options.base, options.dtype),
        data=DataSettings(corpus="random tokens"),
        graft=GraftConfig(segment_tokens=options.tokens, memory=MemoryConfig(dim=options.dim)),
        lora=LoraSettings(rank=64) if given.get(LORA) else None,
        training=training,
        deepspeed=None,
    )


def _possible() -> list[str]:
    """The rows that this machine can run: CUDA graphs need a GPU."""
    gpu = torch.cuda.is_available() and "--cpu" not in sys.argv
    needs_gpu = {
        name for name, given in ROWS.items() if given.get("memory_graphs") == "on" or given.get("layer_graphs")
    }
    return [name for name in ROWS if gpu or name not in needs_gpu]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_base(parser)
    parser.add_argument("--lanes", type=int, default=2, help="segments side by side (default: 2)")
    parser.add_argument("--tokens", type=int, default=256, help="tokens of a segment (default: 256)")
    parser.add_argument("--dim", type=int, default=None, help="memory dim (default: 512, or 64 for tiny)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations in backward")
    parser.add_argument(
        "--rows", nargs="+", choices=list(ROWS), default=_possible(), metavar="ROW", help=", ".join(ROWS)
    )
    parser.add_argument("--steps", type=int, default=8, help="steps of each kind that count (default: 8)")
    parser.add_argument("--warmup", type=int, default=3, help="steps of each kind before them (default: 3)")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    parser.add_argument("--out", type=Path, help="write the report as JSON after every row")
    options = parser.parse_args()
    options.dim = options.dim or (64 if options.base == "tiny" else 512)
    return options


if __name__ == "__main__":
    sys.exit(main())
