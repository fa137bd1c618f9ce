"""The examples run as they stand, offline, with what comes along, and print what they promise."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def module(name: str) -> dict[str, Any]:
    """Its names, without running it."""
    return runpy.run_path(str(EXAMPLES / name))


def test_all_are_short_and_tested() -> None:
    assert {p.name for p in EXAMPLES.iterdir() if p.is_file()} == {
        "remember.py", "four_losses.py", "train_memory.py", "remember.ipynb",
    }  # fmt: skip
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 60


def test_remember(capsys: pytest.CaptureFixture[str]) -> None:
    module("remember.py")["main"]()
    parts = capsys.readouterr().out.split("--- ")
    assert parts[0].startswith("delta memory on layers [7, 11]")
    completions = [part.split("\n", 1)[1] for part in parts[1:]]
    assert len(completions) == 3
    assert len(set(completions)) > 1  # a memory changes what follows


def test_four_losses_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, word in (("own", "rectangle"), ("other", "planet")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.py").write_text(f"def {word}_area(a, b):\n    return a * b\n" * 8)
    text = tmp_path / "own" / "text.py"
    text.write_text("print(rectangle_area(2, 3))\n" * 4)
    module("four_losses.py")["main"]([str(tmp_path / "own"), str(tmp_path / "other"), str(text)])
    losses = {line[:10].strip(): float(line[10:].split()[0]) for line in capsys.readouterr().out.splitlines()}
    assert losses["own"] < losses["another's"]
    assert losses["empty"] == pytest.approx(losses["off"], abs=1e-4)


def test_train_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module("train_memory.py")["main"](tmp_path / "out", 4)
    said = capsys.readouterr().out
    assert "held out: " in said
    assert (tmp_path / "out" / "adapter" / "titans_config.json").is_file()


def test_the_notebook(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((EXAMPLES / "remember.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # figures in it would be nobody's
            exec("".join(cell["source"]), names)
    assert "own " in capsys.readouterr().out
    assert names["losses"].own < names["losses"].wrong
