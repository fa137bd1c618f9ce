"""The README's example runs as printed, offline, with the base that comes with this project."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ASSETS = "titans_ds/assets"


def example() -> str:
    """The first Python block of the README."""
    text = (ROOT / "README.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[0]


def test_example_is_short() -> None:
    assert len([line for line in example().splitlines() if line.strip()]) <= 14


def test_example_prints_something(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    exec(compile(example(), "README.md", "exec"), {})
    summary, completion = capsys.readouterr().out.split("\n", 1)
    assert summary.startswith("delta memory on layers [7, 11]: 1 head of 256")
    assert "print(area(" in completion


def test_the_table_is_that_of_the_memory_that_comes_along() -> None:
    """Losses and differences, rounded, as the adapter's own file has them."""
    told = json.loads((ROOT / ASSETS / "memory_hybrid" / "titans_config.json").read_text())["provenance"]
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (?:the package|another|an empty|no memory).*", text, re.MULTILINE)
    assert len(rows) == 4
    assert f"| {told['losses']['memory']['mean']:.3f} |" in rows[0]
    for row, mode in zip(rows[1:], ("wrong", "empty", "ablated"), strict=True):
        mean, error = told["minus_memory"][mode]["mean"], told["minus_memory"][mode]["standard_error"]
        assert f"| {told['losses'][mode]['mean']:.3f} | {mean:.3f} ± {error:.3f} |" in row
        assert mean > 3 * error
