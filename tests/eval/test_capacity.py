"""Capacity: what is measured on memories whose capacity is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval import capacity
from eval.capacity import Setting, measure

SIZES = [0.01, 0.03, 0.1, 0.3]


def test_a_pooled_write_has_rank_one_and_a_token_write_the_rank_of_its_tokens() -> None:
    pooled = measure(Setting(32, 2, "pooled", 1, 8, 1), SIZES)
    assert pooled.rank == 1
    assert pooled.effective_rank == pytest.approx(1.0, abs=1e-3)
    token = measure(Setting(32, 2, "token", 1, 8, 1), SIZES)
    assert token.rank == 8
    assert 4 < token.effective_rank <= 8
    assert measure(Setting(32, 2, "token", 1, 100, 1), SIZES).rank == 32
    # Pooled writes, one pair a call: the paper's bound of one rank a call.
    several = measure(Setting(32, 2, "pooled", 1, 5, 5), SIZES)
    assert several.rank == 5
    assert several.paper_scalars == 5 * 32


def test_recall_falls_with_the_number_of_pairs_and_rises_with_steps_and_width() -> None:
    few, many = (measure(Setting(16, 2, "token", 1, pairs, 1), SIZES) for pairs in (2, 200))
    assert few.recall == 1.0
    assert many.recall < 0.7
    assert measure(Setting(64, 2, "token", 1, 200, 1), SIZES).recall > many.recall
    assert measure(Setting(16, 2, "token", 5, 200, 1), SIZES).recall > many.recall
    # A pooled write of many pairs holds their mean: barely better than chance.
    assert measure(Setting(32, 2, "pooled", 1, 100, 1), SIZES).recall < 0.1


def test_measured_cost_is_near_the_analytic_one_and_far_from_the_papers() -> None:
    found = measure(Setting(128, 2, "token", 1, 64, 1), SIZES)
    assert found.flops_per_token == pytest.approx(found.analytic_flops_per_token, rel=0.35)
    assert found.flops_per_token > 5 * found.paper_flops_per_token


def test_the_command_writes_table_figure_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dims", "16", "--steps", "1", "--pairs", "2,8", "--writes", "token", "--out", str(tmp_path)]
    assert capacity.main(arguments) == 0
    assert "| 16 | token | 1 | 8 |" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "capacity.json").read_text())) == 2
    assert (tmp_path / "capacity.svg").read_text().startswith("<svg")
    assert capacity.main([*arguments, "--calls", "50"]) == 2
    assert capacity.main([*arguments, "--step-sizes", "9e18"]) == 2
    assert "diverge" in capsys.readouterr().err
