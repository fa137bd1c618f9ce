"""The demo itself, as small as it goes: real corpus, real launcher, two ranks, three steps."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from launch.verdict import last_evaluation

ROOT = Path(__file__).resolve().parents[1]


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.demo", "--out", str(out), "--packages", "12", "--base-steps", "3"]
    return subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_demo_runs_and_goes_on_from_what_is_done(tmp_path: Path) -> None:
    first = demo(tmp_path, "--steps", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    evaluation = last_evaluation(tmp_path / "memory")
    assert set(evaluation.losses) == {"memory", "ablated", "wrong"}
    assert len(evaluation.repositories) >= 2
    assert f"{evaluation.losses['ablated'].mean:.4f}" in first.stdout
    assert "adapter_model.safetensors" in [path.name for path in (tmp_path / "memory/adapter").iterdir()]

    start = time.perf_counter()
    again = demo(tmp_path, "--steps", "2")
    assert again.returncode == 0
    assert again.stdout.count("done already") == 5
    assert f"{evaluation.losses['ablated'].mean:.4f}" in again.stdout
    assert time.perf_counter() - start < 30


def test_demo_says_what_is_wrong_without_a_traceback(tmp_path: Path) -> None:
    missing = demo(tmp_path, "--steps", "0")
    assert missing.returncode == 2
    assert "--steps is 0" in missing.stderr
    assert "Traceback" not in missing.stderr
