"""Speed and memory of the memory layer, against others and against the chip, measured in one run.

    python -m benchmarks.memory_layer --out memory_layer.json     # everything, on a GPU
    python -m benchmarks.memory_layer --rows 'span*titans-ds'     # rows that one of these patterns is found in
    python -m benchmarks.memory_layer --tiny                      # on a CPU: does everything run

Every row is forward, and forward + backward (gradients of the input and of all that is learned, through the writes),
medians. The floor is the counted operations (recomputation not counted) over the rate of a bf16 matrix product measured
first. Peak memory is what a row's third call holds at most beyond what was there before the row, with what CUDA graphs
keep: compilation and capture are over then. Ratios are taken against the group's fastest row of this project that does
the whole work. Rows run in a process of their own that is started again after a row that breaks it or runs out of time:
an error is a row. Peers: titans-pytorch (pip install titans-pytorch), fla (pip install flash-linear-attention), LaCT
(--lact PATH of its ttt_operation.py), ttt-lm-pytorch (--ttt-lm PATH of its ttt.py).
"""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import gc
import io
import itertools
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # pools of graphs without gaps

import torch

from benchmarks.memory_layer_cases import Case, Shape, core, gradient, layer, named_layer
from benchmarks.memory_layer_peers import Files, lact, titans_pytorch, ttt_linear, ttt_lm
from benchmarks.program import save

_LACT_HIDDEN = 256


def cases(tiny: bool, files: Files) -> list[Case]:
    """All rows, this project's first in every group."""
    size = (2, 64, 32) if tiny else (4, 4096, 512)
    heads = (1, 2) if tiny else (8, 1)
    rows: list[Case] = []
    for count in heads:
        rows += _span(Shape(*size, count, 4 if tiny else 64))
    if not tiny:
        rows += _span(Shape(2, 2048, 512, 8, 64))
    for count in heads if tiny else (8, 4, 2, 1):
        rows += _chunk(Shape(*size, count, 4 if tiny else 64), loop=tiny or count in (8, 1))
    for count in heads:
        rows += _titans(Shape(*size, count, 4 if tiny else 64))
    rows += _large(Shape(*size, 2, size[1] // 2), files.lact, size[2] // 2 if tiny else _LACT_HIDDEN)
    rows += _ttt(Shape(*size, 2 if tiny else 8, 16), files.ttt_lm)
    for dim in (8, 16) if tiny else (64, 128, 256, 512):
        rows += _gradients(dim, 4 if tiny else 256, 16 if tiny else 64)
    return rows


def _both(shape: Shape) -> tuple[float, float]:
    return shape.layer_flops(False), shape.layer_flops(True)


def _span(shape: Shape) -> list[Case]:
    group, flops = f"layer, span, {shape.label}", _both(shape)
    rows = [
        Case(group, "titans-ds", shape.label, layer(shape, "auto", "span"), flops, ours=True),
        Case(group, "titans-ds graphs", shape.label, layer(shape, "auto", "span", graphs=True), flops, ours=True),
        Case(
            group, "titans-ds graphs, halves", shape.label, layer(shape, "auto", "span", graphs=True, slices=2), flops
        ),
        Case(group, "titans-ds first order", shape.label, layer(shape, "auto", "span", graph=False), flops),
        Case(group, "titans-ds loop", shape.label, layer(shape, "loop", "span"), flops),
    ]
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        peer = titans_pytorch(shape, dtype, compiled=False)
        rows.append(Case(group, f"titans-pytorch {name}", shape.label, peer, flops))
    compiled = titans_pytorch(shape, torch.bfloat16, compiled=True)
    return [*rows, Case(group, "titans-pytorch bf16 compiled", shape.label, compiled, flops)]


def _chunk(shape: Shape, loop: bool) -> list[Case]:
    group, flops = f"layer, chunk, {shape.label}", _both(shape)
    rows = [
        Case(group, "titans-ds", shape.label, layer(shape, "auto", "chunk"), flops, ours=True),
        Case(group, "titans-ds graphs", shape.label, layer(shape, "auto", "chunk", graphs=True), flops, ours=True),
        Case(group, "titans-ds first order", shape.label, layer(shape, "auto", "chunk", graph=False), flops),
    ]
    if loop:
        rows.append(Case(group, "titans-ds loop", shape.label, layer(shape, "loop", "chunk"), flops))
    if 64 <= shape.head_dim <= 128:  # the Triton kernel's
        for warps in (4, 8, 16):
            make = layer(shape, "auto", "chunk", warps=warps)
            rows.append(Case(group, f"titans-ds {warps} warps", shape.label, make, flops))
    return rows


def _titans(shape: Shape) -> list[Case]:
    """The shipped rule: gates by token, so that S has sums of its own (not counted), and a limit on the norm."""
    return _named(f"layer, titans as shipped, {shape.label}", shape, "titans", _both(shape))


def _named(group: str, shape: Shape, name: str, flops: tuple[float, float]) -> list[Case]:
    """A memory of a known name, with and without graphs."""
    return [
        Case(group, row, shape.label, named_layer(shape, name, graphs), flops, ours=True)
        for row, graphs in (("titans-ds", False), ("titans-ds graphs", True))
    ]


def _large(shape: Shape, lact_path: Path | None, hidden: int) -> list[Case]:
    """LaCT's three products of D x hidden a read and six a write are fourteen of ours at 9/7 of the hidden width."""
    ours = round(hidden * 9 / 7 / 8) * 8
    forward = 7 * shape.product(ours)
    group = f"core, large chunks, {shape.label}"
    flops = (forward, 3 * forward)
    rows = [
        Case(group, "titans-ds", shape.label, core(shape, "auto", ours), flops, ours=True),
        Case(group, "titans-ds graphs", shape.label, core(shape, "auto", ours, graphs=True), flops, ours=True),
    ]
    written = (shape.tokens // shape.chunk - 1) / (shape.tokens // shape.chunk)
    theirs = (3 + 6 * written) * shape.product(hidden)
    for muon in (False, True) if lact_path else ():
        name = "LaCT, Muon" if muon else "LaCT"
        rows.append(Case(group, name, shape.label, lact(lact_path, shape, hidden, muon), (theirs, 3 * theirs)))
    return rows


def _ttt(shape: Shape, ttt_lm_path: Path | None) -> list[Case]:
    """Depth 1: two products to the loss and the gradient, one read; and four projections."""
    products = 3 * shape.product()
    group, flops = f"core, TTT-Linear, {shape.label}", (products, 3 * products)
    rows = [Case(group, "fla TTT-Linear", shape.label, ttt_linear(shape), flops)]
    whole = products + 4 * 2.0 * shape.batch * shape.tokens * shape.dim**2
    group, flops = f"layer, TTT-Linear, {shape.label}", (whole, 3 * whole)
    rows += _named(group, shape, "ttt_linear", flops)
    if ttt_lm_path is not None:
        rows.append(Case(group, "ttt-lm-pytorch", shape.label, ttt_lm(ttt_lm_path, shape), flops))
    return rows


def _gradients(dim: int, rows: int, tokens: int) -> list[Case]:
    label = f"{rows} memories, {tokens} tokens, D{dim}"
    flops = 5 * 2.0 * rows * tokens * dim**2
    ways = ("closed form", "closed form compiled", "vmap(grad)", "vmap(grad) compiled")
    make = [Case(f"inner gradient, {label}", w, label, gradient(rows, tokens, dim, w), (flops, flops)) for w in ways]
    return [Case(**{**vars(make[0]), "ours": True}), *make[1:]]


def matmul_rate(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a large matrix product on random numbers."""
    n = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2.0 * n**3 / (_median(lambda: a @ b, device, 0.5) / 1e3)


def _median(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Milliseconds of one call: the median of at least three, after two to warm up."""
    for _ in range(2):
        run()
    times: list[float] = []
    start = time.monotonic()
    while len(times) < 3 or (time.monotonic() - start < seconds and len(times) < 50):
        times.append(_timed(run, device))
    return statistics.median(times)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds and peak bytes of one row."""
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated() if cuda else 0
    step = case.make(device)
    result: dict[str, Any] = {}
    for name, backward in (("forward", False), ("both", True)):
        if backward and case.flops[1] == case.flops[0]:
            break
        start = time.monotonic()
        step(backward)
        if cuda:
            torch.cuda.synchronize()
        result[f"{name}_first_s"] = time.monotonic() - start
        step(backward)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            step(backward)
            result[f"{name}_peak_bytes"] = torch.cuda.max_memory_allocated() - before + graph_bytes()
        result[f"{name}_ms"] = _median(lambda b=backward: step(b), device, seconds)  # type: ignore[misc]
    return result


def graph_bytes() -> int:
    """What CUDA graphs keep for themselves between replays, which no count of living tensors shows."""
    segments = torch.cuda.memory_snapshot()
    pools = [s for s in segments if tuple(s.get("segment_pool_id", (0, 0))) != (0, 0)]
    return sum(s["total_size"] - s["allocated_size"] for s in pools)


def worker(channel: Connection, tiny: bool, files: Files, seconds: float) -> None:
    """Rows by number, until None."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    rows = cases(tiny, files)
    channel.send({"rate": matmul_rate(device), "device": _name(device), "torch": torch.__version__})
    while (index := channel.recv()) is not None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                channel.send(measure(rows[index], device, seconds))
        except Exception as error:
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0][:150]
            channel.send({"error": text, "broken": device.type == "cuda" and "CUDA error" in str(error)})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()


class Runner:
    """A worker process, started again where it broke or took too long."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.process: Any = None
        self.machine: dict[str, Any] = {}

    def run(self, index: int) -> dict[str, Any]:
        """One row, whatever happens."""
        if self.process is None:
            self._start()
        try:
            self.channel.send(index)
            if not self.channel.poll(self.options.row_seconds):
                return self._stop(f"not done after {self.options.row_seconds} s")
            result: dict[str, Any] = self.channel.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return self._stop("the process ended")
        if result.get("broken"):
            self._stop("")
        return result

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.channel, there = context.Pipe()
        arguments = (there, self.options.tiny, self.options.files, self.options.seconds)
        self.process = context.Process(target=worker, args=arguments, daemon=True)
        self.process.start()
        there.close()
        machine = self.channel.recv()  # said by every process: left unread, it would pass for the next row
        self.machine = self.machine or machine

    def _stop(self, error: str) -> dict[str, Any]:
        self.process.kill()
        self.process.join()
        self.process = None
        return {"error": error}


def table(results: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """Markdown: times, share of the floor, peak, and each row against the fastest of this project's in its group."""
    lines = [f"{machine['device']}, torch {machine['torch']}: {machine['rate'] / 1e12:,.1f} TFLOP/s in a bf16 product"]
    for group, rows in itertools.groupby(results, lambda row: str(row["group"])):
        members = list(rows)
        ours = _fastest(members)
        lines += ["", f"{group}; x: of {ours['name']}"]
        lines += [
            "| row | fwd ms | fwd+bwd ms | of floor | peak MiB | time x | peak x |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_line(row, ours, machine["rate"]) for row in members]
    return "\n".join(lines)


def _fastest(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """This project's fastest row; the first, where none of them was measured."""
    own = [row for row in rows if row.get("ours") and "error" not in row]
    return min(own, key=lambda row: float(row.get("both_ms", row["forward_ms"])), default=rows[0])


def _line(row: dict[str, Any], ours: dict[str, Any], rate: float) -> str:
    if "error" in row:
        return f"| {row['name']} | {row['error']} | | | | | |"
    kind = "both" if "both_ms" in row else "forward"
    share = row["flops"][kind == "both"] / rate / (row[f"{kind}_ms"] / 1e3)
    peak = row.get(f"{kind}_peak_bytes")
    cells = [row["name"], f"{row['forward_ms']:.3f}", f"{row['both_ms']:.3f}" if kind == "both" else ""]
    cells += [f"{share:.1%}", "" if peak is None else f"{peak / 2**20:,.0f}"]
    cells.append(f"{row[f'{kind}_ms'] / ours[f'{kind}_ms']:.2f}" if f"{kind}_ms" in ours else "")
    known = peak is not None and f"{kind}_peak_bytes" in ours
    cells.append(f"{peak / max(ours[f'{kind}_peak_bytes'], 1):.2f}" if known else "")
    return f"| {' | '.join(cells)} |"


def wanted(case: Case, patterns: list[str]) -> bool:
    """Whether a row is asked for: group and name together contain one of the patterns."""
    text = f"{case.group}; {case.name}"
    return not patterns or any(fnmatch.fnmatch(text, f"*{p}*") for p in patterns)


def main() -> None:
    """Run the rows, print the table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", default=[], help="patterns of rows to run; all where not given")
    parser.add_argument("--skip", nargs="+", default=[], help="patterns of rows to leave out")
    parser.add_argument("--lact", type=Path, help="a copy of LaCT's ttt_operation.py")
    parser.add_argument("--ttt-lm", type=Path, help="a copy of ttt-lm-pytorch's ttt.py")
    parser.add_argument("--seconds", type=float, default=0.3, help="time to repeat a measurement for")
    parser.add_argument("--row-seconds", type=float, default=120, help="give a row up after this time")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a test")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    options.files = Files(options.lact, options.ttt_lm)
    expected = {"lact": "LaCT's lact_llm/lact_model/ttt_operation.py", "ttt_lm": "ttt-lm-pytorch's ttt.py"}
    for name, what in expected.items():
        path = getattr(options, name)
        if path is not None and not path.is_file():
            print(f"--{name.replace('_', '-')} {path} is not a file; expected {what}", file=sys.stderr)
            raise SystemExit(2)
    runner, results = Runner(options), []
    for index, case in enumerate(cases(options.tiny, options.files)):
        if wanted(case, options.rows) and not (options.skip and wanted(case, options.skip)):
            row = {"group": case.group, "name": case.name, "flops": case.flops, "ours": case.ours}
            results.append(row | runner.run(index))
            print(f"{case.group}; {case.name}: {_brief(results[-1])}", file=sys.stderr, flush=True)
    if not results:
        print(f"no row matches {options.rows}; rows are matched by group and name", file=sys.stderr)
        raise SystemExit(2)
    print(table(results, runner.machine))
    save({"machine": runner.machine, "results": results}, options.out)


def _brief(row: dict[str, Any]) -> str:
    return str(row.get("error") or ", ".join(f"{k} {v:.3f}" for k, v in row.items() if k.endswith(("_ms", "_s"))))


if __name__ == "__main__":
    main()
