"""SIGKILL at random moments, also while a checkpoint is written: the resumed run is the one that nobody killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.clean_environment import without_ranks

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_a_run_killed_six_times_ends_the_same(tmp_path: Path) -> None:
    """Three of the six while it saves. tests/support/kill_and_resume.py alone does 20 of 20, also on two ranks."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "kill_and_resume.py"), str(tmp_path), "--trials", "1"]
    environment = without_ranks(OMP_NUM_THREADS="1")
    done = subprocess.run([*command, "--kills", "6"], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "killed 6 times" in done.stdout
    assert "1 of 1 trials equal" in done.stdout
