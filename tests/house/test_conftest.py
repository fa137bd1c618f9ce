"""The log of a run shows why a test was tried again, and no test sees variables that another has set."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import LINES
from tests.support.clean_environment import without_ranks

TESTS = """
import os, pytest

attempts = []

@pytest.mark.flaky(reruns=2)
def test_third_time_lucky():
    os.environ["RANK"] = "3"
    del os.environ["KEPT"]
    attempts.append(1)
    print("\\n".join(f"printed {n}" for n in range(100)), f"in attempt {len(attempts)}")
    assert len(attempts) == 3, f"the reason of attempt {len(attempts)}"

def test_after_it():
    assert "RANK" not in os.environ and os.environ["KEPT"] == "1"
"""


def test_attempts_that_failed_are_shown_and_variables_undone(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-n", "1", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=without_ranks(KEPT="1"), capture_output=True, text=True)
    assert "2 passed, 2 rerun" in done.stdout, done.stdout + done.stderr
    for number in (1, 2):
        _, _, shown = done.stdout.partition(f"attempt {number} at test_it.py::test_third_time_lucky failed (call)")
        shown = shown.partition(" at test_it.py")[0]
        assert f"AssertionError: the reason of attempt {number}" in shown
        assert f"printed 99 in attempt {number}" in shown
        assert shown.count("\nprinted ") == LINES
