"""benchmarks/memory_layer*.py run, fail row by row, and show that the fast paths launch less than the loop."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(module: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{module}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def test_rows_are_measured_and_an_error_is_a_row(tmp_path) -> None:
    out = tmp_path / "figures.json"
    wrong = tmp_path / "ttt_operation.py"
    wrong.write_text("raise RuntimeError('not the file that you think')\n")
    options = ("--tiny", "--seconds", "0.01", "--rows", "large chunks", "--lact", str(wrong), "--out", str(out))
    done = run("memory_layer", *options)
    assert done.returncode == 0, done.stderr
    results = {row["name"]: row for row in json.loads(out.read_text())["results"]}
    assert min(results["titans-ds"]["both_ms"], results["titans-ds"]["forward_ms"]) > 0
    assert results["LaCT"]["error"] == "RuntimeError: not the file that you think"
    assert "| titans-ds |" in done.stdout
    assert "| LaCT | RuntimeError" in done.stdout


def test_a_peers_layer_is_measured_beside_ours(tmp_path) -> None:
    """By a file that has the names of ttt-lm-pytorch's, and does nothing of what it does."""
    out, peer = tmp_path / "figures.json", tmp_path / "ttt.py"
    peer.write_text(
        "from torch import nn\n"
        "TTTConfig = dict\n"
        "class TTTLinear(nn.Linear):\n"
        "    def __init__(self, config, layer_idx):\n"
        "        super().__init__(config['hidden_size'], config['hidden_size'])\n"
        "    def forward(self, x, position_ids):\n"
        "        assert position_ids.shape == x.shape[:2]\n"
        "        return super().forward(x)\n"
    )
    options = ("--tiny", "--seconds", "0.01", "--rows", "layer, TTT-Linear", "--ttt-lm", str(peer), "--out", str(out))
    done = run("memory_layer", *options)
    assert done.returncode == 0, done.stderr
    results = {row["name"]: row for row in json.loads(out.read_text())["results"]}
    assert list(results) == ["titans-ds", "titans-ds graphs", "ttt-lm-pytorch"]
    assert all(min(row["both_ms"], row["forward_ms"]) > 0 for row in results.values()), results


@pytest.mark.parametrize("option", ["--lact", "--ttt-lm"])
def test_what_is_not_there_is_said(option: str, tmp_path) -> None:
    done = run("memory_layer", "--tiny", option, str(tmp_path / "nothing.py"))
    assert done.returncode == 2
    assert f"{option} {tmp_path / 'nothing.py'} is not a file" in done.stderr
    assert "Traceback" not in done.stderr


def test_launches() -> None:
    pytest.importorskip("titans_pytorch", reason="titans-pytorch is not installed; it comes with the extra `dev`")
    done = run("memory_layer_count", "--tiny")
    assert done.returncode == 0, done.stderr
    layers, calls = (part.splitlines()[2:] for part in done.stdout.strip().split("\n\n"))
    cells = [line.split("|")[2:5] for line in layers]
    launches = {name.strip(): int(count.replace(",", "")) for name, count, _ in cells}
    assert launches["span, triton"] < launches["span, loop"] / 2
    assert launches["chunk, triton"] < launches["chunk, loop"] / 8
    of_gradients = [int(line.split("|")[2].replace(",", "")) for line in calls]
    assert all(
        closed < differentiated for closed, differentiated in zip(of_gradients[::2], of_gradients[1::2], strict=True)
    )
