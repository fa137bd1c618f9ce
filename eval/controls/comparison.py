"""Several configurations of one control in one table: the memory of each, and each minus the first.

The differences are paired by seed: a seed has the same episodes in every configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from titans_ds.files import write_json, write_text

from ..errors import EvalError
from .results import SeedResult, markdown, over_seeds, read_results, spread

ARM_NAMES = ("memory", "ablation", "wrong")


def compare(folders: Sequence[Path], out: Path) -> str:
    """One table of runs of one task that differ in their settings; printed, and saved as comparison.json and .md.

    Args:
        folders: of runs, each named as its row is to be; the first is what the others are compared with.
        out: folder of the table.

    Raises:
        EvalError: a folder without results, another task, or other seeds than the first has.
    """
    runs = {folder.name: _read(folder) for folder in folders}
    if len(runs) < len(folders):
        raise EvalError("two of the folders have the same name; each names its row, so give them different ones.")
    first = next(iter(runs))
    for name, run in runs.items():
        for what in ("task", "seeds"):
            if run[what] != runs[first][what]:
                raise EvalError(f"{name} has {what} {run[what]}, {first} has {runs[first][what]}; they must be equal.")
    summary = {name: _against(run["results"], runs[first]["results"]) for name, run in runs.items()}
    text = _text(runs[first]["task"], summary, first)
    write_json(out / "comparison.json", {"task": runs[first]["task"], "first": first, "runs": summary})
    write_text(out / "comparison.md", text + "\n")
    print(f"\n{text}\n\nresults: {out / 'comparison.json'}", flush=True)
    return text


def _read(folder: Path) -> dict[str, Any]:
    run = read_results(folder)
    results = sorted((SeedResult.from_json(s) for s in run["seeds"]), key=lambda s: s.seed)
    results = [seed for seed in results if seed.levels]
    if not results:
        raise EvalError(f"{folder} has no seed that was measured; let the run end.")
    return {"task": run["task"], "seeds": [seed.seed for seed in results], "results": results}


def _against(seeds: Sequence[SeedResult], first: Sequence[SeedResult]) -> dict[str, Any]:
    """By level: EM of the arms over seeds, and the memory's minus the first configuration's; the training's length."""
    levels = [level for level in first[0].levels if all(level in seed.levels for seed in seeds)]
    table: dict[str, Any] = {}
    for level in levels:
        arms = {arm: [seed.levels[level][arm]["em"] for seed in seeds] for arm in ARM_NAMES}
        there = [seed.levels[level]["memory"]["em"] for seed in first]
        table[str(level)] = {arm: spread(values) for arm, values in arms.items()}
        table[str(level)]["memory_minus_first"] = spread([a - b for a, b in zip(arms["memory"], there, strict=True)])
    steps = over_seeds([seed.training["memory"]["steps"] for seed in seeds]).mean
    return {"levels": table, "steps": steps}


def _text(task: str, summary: dict[str, Any], first: str) -> str:
    levels = list(summary[first]["levels"])
    rows = [[name, *(_cell(run["levels"].get(level), "memory") for level in levels)] for name, run in summary.items()]
    rows += [
        [f"{name} - {first}", *(_cell(run["levels"].get(level), "memory_minus_first", "+") for level in levels)]
        for name, run in summary.items()
        if name != first
    ]
    worst = max(
        cell[arm]["mean"] for run in summary.values() for cell in run["levels"].values() for arm in ARM_NAMES[1:]
    )
    steps = ", ".join(f"{name} {run['steps']:.0f}" for name, run in summary.items())
    below = f"Ablation and wrong memory: at most {worst:.1f} anywhere. Steps: {steps}."
    return markdown([f"{task}: EM % of the memory", *levels], rows) + "\n\n" + below


def _cell(level: dict[str, Any] | None, name: str, sign: str = "") -> str:
    if level is None:
        return ""
    low, high = level[name]["interval"]
    bounds = "" if low is None else f" [{low:{sign}.1f}, {high:{sign}.1f}]"
    return f"{level[name]['mean']:{sign}.1f}{bounds}"
