"""benchmarks/gate_gradients.py: ratios from logged runs, and a real pair of runs on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.gate_gradients import compare, main
from tests.packed_corpora import random_repos, write_packed
from tests.tiny_models import tiny_base


def write_run(folder: Path, gradients: list[float]) -> Path:
    """A run folder whose two gates got these gradients."""
    folder.mkdir()
    lines = [{"kind": "train", "gate_gradient": {"9": g, "10": 2 * g}, "gate_gradient_norm": 3 * g} for g in gradients]
    lines.append({"kind": "evaluation"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_ratio_is_the_median_of_the_steps_ratios(tmp_path: Path) -> None:
    """By layer in their order, then overall; a step without a MAC gradient is counted apart."""
    additive, mac = write_run(tmp_path / "a", [8.0, 9.0, 10.0, 1.0]), write_run(tmp_path / "m", [4.0, 1.0, 2.0, 0.0])
    rows = compare(additive, mac)
    assert [row.layer for row in rows] == ["9", "10", "all"]
    for row in rows:
        assert (row.ratio, row.smallest, row.largest, row.never) == (5.0, 2.0, 9.0, 1)
    assert (rows[0].additive, rows[0].mac) == (8.5, 1.5)


def test_both_injections_train_and_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through launch/train.py with LoRA; the figures are of the runs' own metrics."""
    tiny_base("qwen3_5").save_pretrained(tmp_path / "base")
    corpus = write_packed(tmp_path / "corpus", {"train": random_repos(4, seed=1)})
    options = ["--base", str(tmp_path / "base"), "--corpus", str(corpus), "--work", str(tmp_path / "runs")]
    sizes = ["--steps", "3", "--segment-tokens", "8", "--dim", "8", "--lora", "2", "--out", str(tmp_path / "out.json")]
    assert main([*options, *sizes]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())
    assert [row["layer"] for row in rows] == ["1", "3", "all"]
    assert all(row["additive"] > 0 and row["mac"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert "medians over 3 steps" in shown
    for injection in ("additive", "mac"):
        assert (tmp_path / "runs" / injection / "adapter" / "lora").is_dir()
        assert (
            f'"injection": "{injection}"' in (tmp_path / "runs" / injection / "adapter/adapter_config.json").read_text()
        )
    assert main([*options, *sizes, "--set", "training.stpes=1"]) == 2
    assert "did you mean training.steps?" in capsys.readouterr().err
