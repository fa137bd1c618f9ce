"""Fast weights over a long stream of real code: their norm after 65,536 tokens over that after 4,096, in bfloat16.

    python -m benchmarks.stability                              # this project's hybrid, the standard library's source
    python -m benchmarks.stability --base FOLDER_OR_HUB_ID --layers 3,7 --source FOLDER

Every known rule (titans_ds.named_memory) at its default settings and the paper's with each token written, untrained, on
the base model's own hidden states. A row that is not finite is a row of the table.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from benchmarks.program import run
from titans_ds import GraftConfig, attach
from titans_ds.errors import DataError
from titans_ds.memory_config import MemoryConfig, named_memory
from titans_ds.training import build
from titans_ds.training.run_folder import versions
from titans_ds.training.settings import ModelSettings

SHIPPED = Path(str(files("titans_ds"))) / "assets" / "base_hybrid"
SHORT = 4096


def main() -> int:
    """Run the program; returns its exit code."""
    return run(measure, table, _options())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every rule on the same stream."""
    settings = ModelSettings(base=options.base, dtype="bfloat16")
    ids = stream(options.source, build.load_tokenizer(settings), options.tokens)
    rows = {}
    for name, memory in rules(options.dim).items():
        base = build.load_base(settings, 0, 0).to(_device()).eval().requires_grad_(False)
        layers: Any = [int(layer) for layer in options.layers.split(",")] if options.layers else "attention"
        model = attach(base, GraftConfig(layers=layers, segment_tokens=options.segment, memory=memory))
        for module in model.grafted_modules().values():
            module.to(torch.bfloat16)
        rows[name] = norms(model, ids, options.segment)
        print(f"{name}: {rows[name]}", file=sys.stderr, flush=True)
    return {"rows": rows, "settings": {k: str(v) for k, v in vars(options).items()}, "versions": versions()}


def rules(dim: int) -> dict[str, MemoryConfig]:
    """The known rules, and the paper's with a write of every token."""
    known = {name: named_memory(name, dim=dim) for name in ("titans", "delta_rule", "ttt_linear", "paper")}
    return known | {"paper, token writes": MemoryConfig(dim=dim, write="token")}


@torch.no_grad()
def norms(model: Any, ids: torch.Tensor, segment: int) -> dict[str, Any]:
    """Norm of all fast weights after SHORT tokens and at the end, and the largest share that one layer grew."""
    state, marks = None, {}
    for start in range(0, ids.shape[1], segment):
        state = model.read_write(ids[:, start : start + segment].to(_device()), state=state).state
        if start + segment in (SHORT, ids.shape[1]):
            marks[start + segment] = [_norm(layer) for layer in state.values()]
    first, last = marks[SHORT], marks[ids.shape[1]]
    ratios = [b / a for a, b in zip(first, last, strict=True)]
    finite = all(torch.isfinite(t).all().item() for layer in state.values() for t in layer.values())
    return {"first": first, "last": last, "largest_ratio": max(ratios), "finite": finite}


def _norm(layer: dict[str, torch.Tensor]) -> float:
    weights = [value.float().flatten() for name, value in layer.items() if name[0] == "w" and name[1:].isdigit()]
    return torch.cat(weights).norm().item()


def stream(source: Path, tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first `tokens` tokens of a folder's Python files, one after another, [1, tokens]."""
    ids: list[int] = []
    for text in _sources(source):
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])
    raise DataError(f"{source} holds {len(ids)} tokens of Python; {tokens} are needed. Give a larger --source")


def _sources(folder: Path) -> Iterator[str]:
    for path in sorted(folder.rglob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["| rule | largest growth of a layer's norm | finite |", "|---|---|---|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | {row['largest_ratio']:.3f} | {row['finite']} |")
    return "\n".join(lines)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(SHIPPED))
    parser.add_argument("--layers", help="indices, separated by commas (default: all attention layers)")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--segment", type=int, default=2048, help="tokens of a segment; a divisor of 4096")
    parser.add_argument("--tokens", type=int, default=65536, help="of the stream; a multiple of the segment")
    parser.add_argument("--source", type=Path, default=Path(sysconfig.get_paths()["stdlib"]))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if SHORT % options.segment or options.tokens % options.segment or options.tokens <= SHORT:
        parser.error("--segment must divide 4096 and --tokens, and --tokens must be above 4096")
    return options


if __name__ == "__main__":
    sys.exit(main())
