"""Ten kinds of input, damaged at random, by tests/support/generated_inputs.py, whose table stands in docs/faults.md."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_damaged_input_is_read_or_named_and_nothing_is_lost() -> None:
    command = [sys.executable, "-m", "tests.support.generated_inputs"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    table = "\n".join(line for line in done.stdout.splitlines() if line.startswith("|"))
    assert table in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8"), table
