"""Speed and memory of the memory layer beside other implementations, all in one run; or whether its results are right.

    python -m benchmarks.memory_layer --ttt-lm PATH/ttt.py --out memory_layer.json    # everything, on a GPU
    python -m benchmarks.memory_layer --rows '1x512' 'core'                           # rows that contain one of these
    python -m benchmarks.memory_layer --check                                         # errors beside the loop in fp64
    python -m benchmarks.memory_layer --tiny                                          # on a CPU: does everything run

A core is the recurrence alone, from keys, values and queries; a layer goes from hidden states to hidden states. Each
is timed forward, and forward + backward (gradients of all inputs and of all that is learned, through the writes),
kernel by kernel and as CUDA graphs, fla's kernels in the same way as ours. Peaks are of a call after warm-up, beyond
what was there before the row, with what graphs keep. Ratios are over fla's core of the delta rule at the same shape, or
over the chunkwise core where fla can't (heads above 256, no GPU, not installed). titans-pytorch and
flash-linear-attention come from pip, ttt-lm-pytorch's ttt.py is the user's copy.

Legend of shape suffixes: B batch, T tokens, N heads, D width of a head, R chunks of C tokens.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.program import first_line, many, median_seconds, new_report, peak, reset_peak, save
from benchmarks.program import table as markdown
from titans_ds import preset
from titans_ds.cuda_graphs.capture import capture_of
from titans_ds.cuda_graphs.replay import Graphs, Result, Tensors
from titans_ds.errors import ConfigError, TitansError
from titans_ds.memory import Pass
from titans_ds.memory.delta import DeltaConfig, backends
from titans_ds.memory.graphs import MemoryGraphs
from titans_ds.memory.mlp import kernels
from titans_ds.memory.registry import make_memory
from titans_ds.program import program


class Place(NamedTuple):
    """Where a row's tensors are made, and in which precision."""

    device: torch.device
    dtype: torch.dtype


Shape = tuple[int, int]  # heads, and the width of one
Step = Callable[[bool], None]  # forward, and backward if asked
SHAPES: list[Shape] = [(8, 64), (2, 256), (1, 512), (1, 896), (1, 1024)]
TINY: list[Shape] = [(2, 8), (1, 16)]
CHECKED = (64, 256, 512, 896)
TITANS_CHUNK = 64
WRITE = Pass(graph=True)


@program("--out has the rows that were measured")
def main(argv: list[str]) -> int:
    """Run the program; returns its exit code, 1 where a backend's results are wrong."""
    options = _options(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    report = new_report("memory_layer", argv, device, options.out)
    if options.check:
        rows = report["rows"] = check(options, device)
        save(report, options.out)
        columns = ("width", "rule", "backend", "relative error", "of the loop", "")
        print(markdown(columns, ([*name.split(), *cells] for name, cells in rows.items())))
        return int(any("WRONG" in cells for cells in rows.values()))
    for name, make in rows_of(options, Place(device, options.dtype)):
        if options.rows and not any(wanted in name for wanted in options.rows):
            continue
        report["rows"][name] = measure(make, name.endswith("graphs"), device, options.seconds)
        print(name, report["rows"][name], file=sys.stderr, flush=True)
        save(report, options.out)
    if not report["rows"]:
        raise ConfigError(f"no row contains any of {options.rows}; rows are named as '8x64 core delta fla graphs'")
    print(f"{report['device']}, {options.batch} x {options.tokens} tokens\n\n{table(report)}")
    return 0


def rows_of(options: argparse.Namespace, at: Place) -> Iterator[tuple[str, Callable[[], Step]]]:
    """Every row's name, and what builds its step on the device."""
    for heads, width in TINY if options.tiny else SHAPES:
        size = (options.batch, options.tokens, heads, width)
        for graphs in (False, True) if at.device.type == "cuda" else (False,):
            end = " graphs" if graphs else ""
            for rule in ("delta", "gated_delta"):
                for backend in ("fla", "chunkwise"):
                    make = functools.partial(delta_core, rule == "gated_delta", backend, size, graphs, at)
                    yield f"{heads}x{width} core {rule} {backend}{end}", make
            for name in ("delta", "gated_delta", "titans"):
                yield f"{heads}x{width} layer {name}{end}", functools.partial(layer, name, size, graphs, at)
        yield f"{heads}x{width} layer titans-pytorch", functools.partial(titans_pytorch, size, at)
        if options.ttt_lm is not None:
            yield f"{heads}x{width} layer ttt-lm-pytorch", functools.partial(ttt_lm, options.ttt_lm, size, at)


def random(*shape: int, at: Place, dtype: torch.dtype | None = None, unit: bool = False) -> Tensor:
    """Random numbers that gradients are asked for, the same in every run; with `unit` rows of norm 1."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    drawn = F.normalize(drawn, dim=-1) if unit else drawn
    return drawn.to(at.device, dtype or at.dtype).requires_grad_()


def stepper(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Step:
    """Forward, and with `backward` the gradients of the inputs and of what is learned."""

    def step(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            out = forward()
        if backward:
            out.backward(torch.ones_like(out))
            for leaf in leaves:
                leaf.grad = None

    return step


def replayed(run: Callable[[Tensors, Tensors], Result], given: Tensors, graphs: bool, device: torch.device) -> Step:
    """The step of a core: as it is, or as the CUDA graphs that memories are replayed with."""
    owner, where = Graphs(), capture_of(device) if graphs else None

    def forward() -> Tensor:
        found = None if where is None else owner.call(where, "core", run, given, {})
        return (found or run(given, {}).outputs)["reads"]

    return stepper(forward, list(given.values()))


def delta_inputs(gated: bool, size: tuple[int, ...], at: Place) -> dict[str, Tensor | None]:
    """Arguments of naive.delta_rule by name, in its order."""
    batch, tokens, heads, width = size
    wide = torch.float32
    step = torch.sigmoid(random(batch, tokens, heads, at=at, dtype=wide)).detach().requires_grad_()
    keep = F.logsigmoid(5 + random(batch, tokens, heads, at=at, dtype=wide)).detach().requires_grad_()
    return {
        "queries": random(*size, at=at, unit=True),
        "keys": random(*size[:-1], width, at=at, unit=True),
        "values": random(*size, at=at),
        "step": step,
        "log_keep": keep if gated else None,
        "state": random(batch, heads, width, width, at=at, dtype=wide),
    }


def delta_core(gated: bool, backend: str, size: tuple[int, ...], graphs: bool, at: Place) -> Step:
    """The (gated) delta rule by one backend. Raises ConfigError where fla can't."""
    config = DeltaConfig(dim=size[2] * size[3], heads=size[2], backend=backend)  # type: ignore[arg-type]
    given = {name: t for name, t in delta_inputs(gated, size, at).items() if t is not None}
    backends.choose(config, given["queries"])

    def run(given: Tensors, _: Tensors) -> Result:
        arguments = (given["queries"], given["keys"], given["values"], given["step"], given.get("log_keep"))
        return Result({"reads": backends.delta_rule(config, *arguments, given["state"])[0]})

    return replayed(run, given, graphs, at.device)


def layer(name: str, size: tuple[int, ...], graphs: bool, at: Place) -> Step:
    """A preset's memory of one layer, as wide as its model, at second order."""
    batch, tokens, heads, width = size
    memory = make_memory(heads * width, preset(name, dim=heads * width, heads=heads), 0).to(at.device)
    memory.graphs = MemoryGraphs("on" if graphs else "off")
    hidden = random(batch, tokens, heads * width, at=at)
    return stepper(lambda: memory(hidden, None, None, None, WRITE)[0], [hidden, *memory.parameters()])


class SiluMlp(nn.Module):
    """f_W of this project as a memory model of titans-pytorch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.w0, self.w1 = (nn.Parameter(torch.randn(width, width) / width**0.5) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return F.silu(x @ self.w0.mT) @ self.w1.mT


def titans_pytorch(size: tuple[int, ...], at: Place) -> Step:
    """titans-pytorch's NeuralMemory with the same MLP, activation, gates and momentum."""
    from titans_pytorch import NeuralMemory

    batch, tokens, heads, width = size
    memory = NeuralMemory(
        heads * width,
        chunk_size=min(TITANS_CHUNK, tokens),
        heads=heads,
        dim_head=width,
        model=SiluMlp(width),
        pre_rmsnorm=False,
        qk_rmsnorm=True,
        activation=nn.SiLU(),
        mem_model_norm_add_residual=False,
        default_step_transform_max_lr=0.1,
    ).to(at.device, at.dtype)
    hidden = random(batch, tokens, heads * width, at=at)
    return stepper(lambda: memory(hidden)[0], [hidden, *memory.parameters()])


def ttt_lm(path: Path, size: tuple[int, ...], at: Place) -> Step:
    """`TTTLinear` of a user's copy of ttt-lm-pytorch's ttt.py: the layer, projections to output."""
    spec = importlib.util.spec_from_file_location("ttt_lm_pytorch", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look
    spec.loader.exec_module(module)
    batch, tokens, heads, width = size
    config = module.TTTConfig(
        hidden_size=heads * width,
        num_attention_heads=heads,
        mini_batch_size=16,
        intermediate_size=2 * heads * width,
        num_hidden_layers=1,
    )
    theirs = module.TTTLinear(config, layer_idx=0).to(at.device, at.dtype)
    hidden = random(batch, tokens, heads * width, at=at)
    places = torch.arange(tokens, device=at.device).expand(batch, -1)
    return stepper(lambda: theirs(hidden, position_ids=places), [hidden, *theirs.parameters()])


def measure(make: Callable[[], Step], graphs: bool, device: torch.device, seconds: float) -> dict[str, Any]:
    """Milliseconds and peak bytes of one row, or why there are none."""
    gc.collect()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated() if cuda else 0
    where = capture_of(device) if graphs else None  # held: all of a row's graphs share it
    row: dict[str, Any] = {}
    try:
        step = make()
        for name, backward in (("forward", False), ("both", True)):
            row[f"{name}_ms"] = 1e3 * median_seconds(functools.partial(step, backward), device, seconds)
            reset_peak(device)
            step(backward)
            row[f"{name}_peak_bytes"] = peak(device) - before if cuda else None
        if where is not None and where.failed:
            return {"error": "it can't be captured as CUDA graphs"}
    except (
        Exception
    ) as error:  # of any kind: others' code, kernels that don't compile, memory; it is a row of the table
        return {"error": first_line(error)}
    return row


def table(report: dict[str, Any]) -> str:
    """Times, peaks, and each row over its shape's core of the delta rule, with or without graphs as the row itself."""
    rows = report["rows"]
    lines = []
    for name, row in rows.items():
        if "error" in row:
            lines.append([name, row["error"]])
            continue
        base = baseline(rows, name)
        cells = [name, f"{row['forward_ms']:.3f}", f"{row['both_ms']:.3f}"]
        cells += [f"{row[key] / base[key]:.2f}" if base else "-" for key in ("forward_ms", "both_ms")]
        bytes_ = row["both_peak_bytes"]
        lines.append([*cells, "-" if bytes_ is None else f"{bytes_ / 2**20:,.0f}"])
    return markdown(("row", "fwd ms", "fwd+bwd ms", "fwd, x core", "fwd+bwd, x core", "peak MiB"), lines)


def baseline(rows: dict[str, Any], name: str) -> dict[str, Any] | None:
    """fla's core of the delta rule where it was measured, else the chunkwise one, at the shape of a row."""
    end = " graphs" if name.endswith(" graphs") else ""
    for backend in ("fla", "chunkwise"):
        found: dict[str, Any] = rows.get(f"{name.split()[0]} core delta {backend}{end}", {"error": ""})
        if "error" not in found:
            return found
    return None


def check(options: argparse.Namespace, device: torch.device) -> dict[str, list[str]]:
    """Reads, states and gradients of every backend against the plain loop in fp64: |x - exact| / |exact|, the worst.

    Beside it stands the error of the loop in the backend's own precision. A backend that is more than three times as
    far off is WRONG.
    """
    rows: dict[str, list[str]] = {}
    for width in (8, 16) if options.tiny else CHECKED:
        for rule in ("delta", "gated_delta", "titans"):
            results = _titans_results if rule == "titans" else functools.partial(_delta_results, rule == "gated_delta")
            outcome = functools.partial(results, (2, options.tokens, 1, width), device)
            first, *others = ("loop", "torch", "triton") if rule == "titans" else ("naive", "chunkwise", "fla")
            exact = outcome(first, torch.float64)
            loop = _error(outcome(first, options.dtype), exact)
            rows[f"{width} {rule} {first}"] = [f"{loop:.1e}", f"{loop:.1e}"]
            for backend in others:
                try:
                    error = _error(outcome(backend, options.dtype), exact)
                except TitansError as reason:  # not for this width, device or dtype
                    rows[f"{width} {rule} {backend}"] = [f"can't: {first_line(reason)}"]
                    continue
                verdict = "right" if error <= 3 * loop + 1e-3 else "WRONG"
                rows[f"{width} {rule} {backend}"] = [f"{error:.1e}", f"{loop:.1e}", verdict]
    return rows


def _delta_results(
    gated: bool, size: tuple[int, ...], device: torch.device, backend: str, dtype: torch.dtype
) -> list[Tensor]:
    config = DeltaConfig(dim=size[3], backend=backend)  # type: ignore[arg-type]
    given = []
    for name, value in delta_inputs(gated, size, Place(torch.device("cpu"), torch.float32)).items():
        wide = torch.promote_types(dtype, torch.float32) if name in ("step", "log_keep", "state") else dtype
        given.append(None if value is None else value.detach().to(device, wide).requires_grad_())
    reads, state = backends.delta_rule(config, *given)  # type: ignore[arg-type]
    return _with_gradients([reads, state], [t for t in given if t is not None])


def _titans_results(size: tuple[int, ...], device: torch.device, backend: str, dtype: torch.dtype) -> list[Tensor]:
    memory = make_memory(size[3], preset("titans", dim=size[3]), 0)
    memory = memory.to(device, torch.promote_types(dtype, torch.float32))
    hidden = (
        random(*size[:2], size[3], at=Place(torch.device("cpu"), torch.float32))
        .detach()
        .to(device, dtype)
        .requires_grad_()
    )
    with kernels.choice(backend):
        read, state, _ = memory(hidden, None, None, None, WRITE)
        matrices = [state[name] for name in sorted(state) if name[0] in "ws"]
        return _with_gradients([read, *matrices], [hidden, *memory.parameters()])


def _with_gradients(made: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """What was made, and the gradients of a sum that weighs its numbers differently; all in fp64."""
    total = sum((t * torch.linspace(0, 1, t.shape[-1], dtype=t.dtype, device=t.device)).sum().double() for t in made)
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [t.detach().double() for t in (*made, *gradients) if t is not None]


def _error(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, exact, strict=True))


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory_layer", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", nargs="+", default=[], metavar="TEXT", help="rows whose name contains one of these")
    parser.add_argument("--check", action="store_true", help="results against the loop in fp64, in place of times")
    parser.add_argument("--batch", type=many, help="samples of a call (default: 4)")
    parser.add_argument("--tokens", type=many, help="of a sample (default: 4096; with --check 512)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--ttt-lm", type=Path, metavar="FILE", help="a copy of ttt-lm-pytorch's ttt.py")
    parser.add_argument("--seconds", type=float, default=0.3, help="to repeat a measurement for (default: 0.3)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--out", type=Path, help="write the report as JSON after every row")
    options = parser.parse_args(argv)
    options.batch = options.batch or (2 if options.tiny else 4)
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if torch.cuda.is_available() else "float32"))
    options.tokens = options.tokens or (2 * TITANS_CHUNK if options.tiny else 512 if options.check else 4096)
    if options.tokens % min(TITANS_CHUNK, options.tokens):
        parser.error(f"--tokens is {options.tokens}; it must be a multiple of {TITANS_CHUNK}, or below it")
    if options.ttt_lm is not None and not options.ttt_lm.is_file():
        parser.error(f"--ttt-lm {options.ttt_lm} is not a file; expected ttt-lm-pytorch's ttt.py")
    return options


if __name__ == "__main__":
    sys.exit(main())
