"""How much gradient a gate gets: memory as context (MAC) against additive injection, from the metrics of two runs.

    python benchmarks/gate_gradients.py --corpus PACKED --work DIR [--base MODEL] [--lora 32] [--steps 20] [--out FILE]

Trains both through launch/train.py on plain torch: the same base model, tokens, seed, memory and settings, but for
graft.injection. The norms of the gates' gradients are those in metrics.jsonl, before clipping. Prints, by layer and for
all gates, the median over steps of each, and of their ratio step by step. "Parametric Memory Cannot Replace Retrieval"
reports about 1,000 times more gradient for additive gates.

A gate's gradient is proportional to what the memory gives back, so that the ratio is of these settings: --set overrides
any of launch/train.py, for both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.program import save
from launch.train import main as train

ROOT = Path(__file__).resolve().parent.parent
INJECTIONS = ("additive", "mac")
OVERALL = "all"


@dataclass(frozen=True)
class Row:
    """Medians over steps of one layer's gate (or of all gates together); `ratio` is additive over MAC, step by step.

    `never`: steps at which the MAC gate got no gradient at all; they have no ratio.
    """

    layer: str
    additive: float
    mac: float
    ratio: float
    smallest: float
    largest: float
    never: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Train both, compare, print; returns 0, or the exit code of a run that failed."""
    options = _options(arguments)
    for injection in INJECTIONS:
        code = train(_settings(options, injection))
        if code:
            return code
    rows = compare(*(options.work / injection for injection in INJECTIONS))
    _show(rows, options.steps)
    save([asdict(row) for row in rows], options.out)
    return 0


def compare(additive: Path, mac: Path) -> list[Row]:
    """Gate gradients of two run folders with the same steps: a row for each layer, and one for all gates together."""
    theirs, ours = _gradients(additive), _gradients(mac)
    layers = sorted(theirs[0], key=lambda name: (name == OVERALL, int(name) if name != OVERALL else 0))
    return [_row(layer, [g[layer] for g in theirs], [g[layer] for g in ours]) for layer in layers]


def _gradients(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{**v["gate_gradient"], OVERALL: v["gate_gradient_norm"]} for v in lines if v["kind"] == "train"]


def _row(layer: str, additive: list[float], mac: list[float]) -> Row:
    ratios = [a / m for a, m in zip(additive, mac, strict=True) if m > 0] or [float("inf")]
    middle = statistics.median
    never = sum(m == 0 for m in mac)
    return Row(layer, middle(additive), middle(mac), middle(ratios), min(ratios), max(ratios), never)


def _show(rows: list[Row], steps: int) -> None:
    print(f"gate gradient norms, medians over {steps} steps; ratio additive / MAC by step")
    print(f"{'layer':>6} {'additive':>12} {'MAC':>12} {'ratio':>10} {'smallest':>10} {'largest':>10}")
    for row in rows:
        numbers = f"{row.ratio:10.1f} {row.smallest:10.1f} {row.largest:10.1f}"
        note = f"  (MAC: none at {row.never} steps)" if row.never else ""
        print(f"{row.layer:>6} {row.additive:12.3e} {row.mac:12.3e} {numbers}{note}")


def _settings(options: argparse.Namespace, injection: str) -> list[str]:
    values = {
        "model.base": options.base,
        "data.corpus": options.corpus,
        "data.num_lanes": options.lanes,
        "graft.injection": injection,
        "graft.segment_tokens": options.segment_tokens,
        "graft.memory.dim": options.dim,
        "training.steps": options.steps,
        "training.seed": options.seed,
        "optimizer.warmup_steps": 0,
        "evaluation.interval": 0,
        "checkpoint.interval": 0,
        "deepspeed": "null",
        "run.dir": options.work / injection,
        "run.overwrite": "true",
        "run.tensorboard": "false",
    }
    if options.lora:
        values["lora.rank"] = options.lora
    return [f"--{name}={value}" for name, value in values.items()] + [f"--{item}" for item in options.set]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="packed with the base model's tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder of the two runs")
    parser.add_argument("--base", default=str(ROOT / "titans_ds/assets/base_hybrid"), help="model, default %(default)s")
    parser.add_argument("--lora", type=int, default=0, help="rank of LoRA beside the memory; 0 freezes the base")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--segment-tokens", type=int, default=128)
    parser.add_argument("--dim", type=int, default=64, help="of the memory (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="for both runs")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
