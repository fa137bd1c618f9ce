"""What a memory can hold, measured: rank and norm of writes, recall of written keys, cost; beside the paper's own
counts.

    python -m eval.capacity --dims 128,512 --steps 1,5 --pairs 1,8,32,128 --out DIR

For each dimension, write mode and number of inner steps, N random key-value pairs are written into a fresh memory, in
one call or in several (`--calls`). Then every written key is asked for again. Reported:
  rank             of W - W_0: singular values above 1e-4 of the largest, over all matrices (the largest one's)
  effective rank   exp of the entropy of the normalised singular values (Roy and Vetterli 2007)
  relative norm    |W - W_0| / |W_0|
  recall           share of keys whose read lies nearest (cosine) to their own value among all N
  explained        1 - |read - value|^2 / |value|^2, mean over pairs
  FLOPs per token  of the write, counted as it ran (torch's counter), beside 6 x weights x steps and the paper's dim^2
  x steps scalars          the paper's bound calls x dim, beside the degrees of freedom of a change of that rank
Recall depends on the step size, which the best of `--step-sizes` is taken of: an upper bound for this rule, untrained.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from titans_ds.files import Kind, check_folder, write_json, write_text
from titans_ds.memory import Controls, LayerState, Pass
from titans_ds.memory.mlp import MLPConfig, MLPMemory
from titans_ds.program import program, real_number, whole_number

from .errors import EvalError
from .reporting.tables import Table

_RANK_TOLERANCE = 1e-4
_READ = Pass(write=False, controls=Controls(query="key"))


@dataclass(frozen=True)
class Setting:
    """One memory and one amount of text: N pairs in a number of calls."""

    dim: int
    depth: int
    write: str
    inner_steps: int
    num_pairs: int
    num_calls: int


@dataclass(frozen=True)
class Measurement:
    """What was measured for one setting; see the module's text."""

    setting: Setting
    step_size: float
    rank: int
    effective_rank: float
    relative_norm: float
    recall: float
    explained: float
    flops_per_token: float
    analytic_flops_per_token: float
    paper_flops_per_token: float
    paper_scalars: int
    degrees_of_freedom: int


@torch.no_grad()
def measure(setting: Setting, step_sizes: Sequence[float], seed: int = 0) -> Measurement:
    """Measure one setting, at the step size with the best recall (then the most explained).

    Raises:
        EvalError: no step size, more calls than pairs, or a memory that diverges at every step size.
    """
    if not step_sizes or setting.num_calls > setting.num_pairs:
        raise EvalError("Expected one step size or more, and no more calls than pairs.")
    found = [m for step_size in step_sizes if (m := _measure_at(setting, step_size, seed)) is not None]
    if not found:
        raise EvalError(f"Every step size made the memory diverge at {setting}. Give smaller --step-sizes.")
    return max(found, key=lambda m: (m.recall, m.explained))


def _measure_at(setting: Setting, step_size: float, seed: int) -> Measurement | None:
    """None where the memory diverged."""
    memory = _memory(setting, step_size, seed)
    hidden = torch.randn(1, setting.num_pairs, setting.dim, generator=torch.Generator().manual_seed(seed))  # [1, N, D]
    initial = memory.initial_state(1, hidden)
    counter = FlopCounterMode(display=False)
    with counter:
        written = _write(memory, hidden, initial, setting.num_calls)
    with FlopCounterMode(display=False) as reading:
        memory(hidden, initial, plan=_READ)
    # A write's forward pass also projects and reads; only what the write adds is its cost.
    extra = counter.get_total_flops() - reading.get_total_flops()
    changes = [written[name][0] - initial[name][0] for name in _matrices(initial)]
    recall, explained = _recall(memory, hidden, written)
    if not math.isfinite(explained) or not all(math.isfinite(change.norm()) for change in changes):
        return None
    spectra = [torch.linalg.svdvals(change.double()) for change in changes]
    ranks = [int((s > _RANK_TOLERANCE * s[0].clamp(min=1e-30)).sum()) if s[0] > 0 else 0 for s in spectra]
    weights = sum(change.numel() for change in changes)
    start = torch.cat([initial[name].flatten() for name in _matrices(initial)]).norm()
    return Measurement(
        setting=setting,
        step_size=step_size,
        rank=max(ranks),
        effective_rank=max(map(_effective_rank, spectra)),
        relative_norm=float(torch.cat([change.flatten() for change in changes]).norm() / start),
        recall=recall,
        explained=explained,
        flops_per_token=extra / setting.num_pairs,
        analytic_flops_per_token=6.0 * weights * setting.inner_steps,
        paper_flops_per_token=float(setting.dim**2 * setting.inner_steps),
        paper_scalars=setting.num_calls * setting.dim,
        degrees_of_freedom=sum(rank * (sum(c.shape) - rank) for rank, c in zip(ranks, changes, strict=True)),
    )


def _memory(setting: Setting, step_size: float, seed: int) -> MLPMemory:
    config = MLPConfig(
        dim=setting.dim,
        depth=setting.depth,
        write=setting.write,  # type: ignore[arg-type]
        inner_steps=setting.inner_steps,
        step_size=step_size,
        query_projection="tied",
        seed=seed,
    )
    return MLPMemory(setting.dim, config, 0).eval()


def _write(memory: MLPMemory, hidden: Tensor, state: LayerState, num_calls: int) -> LayerState:
    for part in hidden.tensor_split(num_calls, dim=1):
        state = memory(part, state, plan=Pass())[1]
    return state


def _matrices(state: LayerState) -> list[str]:
    """Names of the fast weights: w0, w1, …"""
    return sorted(name for name in state if name[0] == "w" and name[1:].isdecimal())


def _recall(memory: MLPMemory, hidden: Tensor, state: LayerState) -> tuple[float, float]:
    """Ask for every key; recall and explained share, in the model's width, where P_o turns values back."""
    read = memory(hidden, state, plan=_READ)[0][0]
    values = memory.key_projection.transposed(memory.value_projection(hidden))[0]
    cosine = torch.nn.functional.normalize(read, dim=-1) @ torch.nn.functional.normalize(values, dim=-1).mT
    recall = (cosine.argmax(dim=1) == torch.arange(len(values))).float().mean()
    error = (read - values).square().sum(dim=-1) / values.square().sum(dim=-1)
    return float(recall), float((1 - error).mean())


def _effective_rank(singular_values: Tensor) -> float:
    total = singular_values.sum()
    if total <= 0:
        return 0.0
    shares = singular_values / total
    shares = shares[shares > 0]
    return float(torch.exp(-(shares * shares.log()).sum()))


def sweep(options: argparse.Namespace) -> Iterator[Measurement]:
    """Measure every combination, smallest first."""
    combinations = itertools.product(options.dims, options.writes, options.steps, options.pairs, options.calls)
    for dim, write, steps, pairs, calls in combinations:
        if calls <= pairs:
            yield measure(Setting(dim, options.depth, write, steps, pairs, calls), options.step_sizes, options.seed)


def as_table(measurements: Sequence[Measurement]) -> Table:
    """Return one row a measurement."""
    columns = ["dim", "write", "inner steps", "pairs", "calls", "recall", "explained", "rank", "effective rank"]
    columns += ["relative norm", "scalars: paper", "degrees of freedom", "FLOPs/token: measured", "6 x weights x steps"]
    columns += ["paper", "step size"]
    depth = measurements[0].setting.depth
    note = f"Depth {depth}; recall and explained at the best step size; chance recall is 1 / pairs."
    return Table("Capacity", note, columns, [_cells(m) for m in measurements])


def _cells(m: Measurement) -> list[str]:
    s = m.setting
    counts = [str(s.dim), s.write, str(s.inner_steps), str(s.num_pairs), str(s.num_calls)]
    held = [f"{m.recall:.1%}", f"{m.explained:.3f}", str(m.rank), f"{m.effective_rank:.1f}", f"{m.relative_norm:.3f}"]
    costs = [f"{m.flops_per_token:.3g}", f"{m.analytic_flops_per_token:.3g}", f"{m.paper_flops_per_token:.3g}"]
    return [*counts, *held, str(m.paper_scalars), str(m.degrees_of_freedom), *costs, f"{m.step_size:g}"]


@program("run the same command again; nothing was written")
def main(arguments: list[str]) -> None:
    """Measure, print the table, and write capacity.json, capacity.md and capacity.svg; return the exit code."""
    options = _parser().parse_args(arguments)
    check_folder(options.out, Kind("results of this program", "capacity.json", rb"\A\[\s*\{"))
    measurements = list(sweep(options))
    if not measurements:
        raise EvalError("Nothing to measure: every --calls is larger than every --pairs.")
    table = as_table(measurements).to_markdown()
    print(table)
    write_json(options.out / "capacity.json", [asdict(m) for m in measurements])
    write_text(options.out / "capacity.md", table)
    from .capacity_figure import capacity_figure

    write_text(options.out / "capacity.svg", capacity_figure(measurements))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m eval.capacity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dims", type=_numbers, default=[128, 512], help="memory widths (default 128,512)")
    add("--depth", type=whole_number(1, 64), default=2, help="matrices of f_W (default 2)")
    add("--writes", type=lambda text: text.split(","), default=["pooled", "token"], help="default pooled,token")
    add("--steps", type=_numbers, default=[1, 5], help="inner steps (default 1,5)")
    add("--pairs", type=_numbers, default=[1, 8, 32, 128, 512], help="pairs written (default 1,8,32,128,512)")
    add("--calls", type=_numbers, default=[1], help="calls that they are spread over (default 1)")
    add("--step-sizes", type=_floats, default=[0.003, 0.01, 0.03, 0.1, 0.3, 1.0], help="tried, the best is taken")
    add("--seed", type=whole_number(0, 2**62), default=0)
    add("--out", type=Path, required=True, help="folder for capacity.json, .md and .svg")
    return parser


def _numbers(text: str) -> list[int]:
    return [whole_number(1, 10**6)(part) for part in text.split(",")]


def _floats(text: str) -> list[float]:
    return [real_number(0, math.inf, above=True)(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
