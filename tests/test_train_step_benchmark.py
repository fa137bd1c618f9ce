"""benchmarks/train_step.py measures every row, and reports ratios over memory off and shares of the floor."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.test_memory_layer_benchmark import run as run_benchmark

SMALL = ("--cpu", "--lanes", "1", "--tokens", "16", "--dim", "8", "--steps", "1", "--warmup", "1")


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return run_benchmark("train_step", *SMALL, *options)


def test_every_row_is_measured(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = run("--out", str(out))
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    rows = report["rows"]
    assert list(rows) == ["memory_off", "memory_on", "second_order", "lora"]
    off = rows["memory_off"]
    for name, row in rows.items():
        assert row["tokens_per_second_over_off"] == pytest.approx(row["tokens_per_second"] / off["tokens_per_second"])
        floor = report["matmul_flops_per_second"] / report["flops_per_token"]
        assert row["share_of_floor"] == pytest.approx(row["tokens_per_second"] / floor)
        assert f"| {name} |" in done.stdout
    assert off["trained_parameters"] == rows["memory_on"]["trained_parameters"]
    assert rows["second_order"]["trained_parameters"] > off["trained_parameters"]  # projections and step sizes learn
    assert rows["lora"]["trained_parameters"] > off["trained_parameters"]


def test_second_order_of_one_segment_is_left_out_or_refused(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    assert run("--window", "1", "--out", str(out)).returncode == 0
    assert list(json.loads(out.read_text())["rows"]) == ["memory_off", "memory_on", "lora"]
    done = run("--window", "1", "--rows", "memory_off", "second_order")
    assert done.returncode == 2
    assert "needs 2 segments or more" in done.stderr
