"""benchmarks/: each program runs at its small sizes on a CPU, and its ratios are those of the figures beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import eval_throughput, memory_layer, rank_checks, ranks, train_step
from titans_ds.memory.delta import backends

PEER = """
from torch import nn
TTTConfig = dict
class TTTLinear(nn.Linear):
    def __init__(self, config, layer_idx):
        super().__init__(config["hidden_size"], config["hidden_size"])
    def forward(self, x, position_ids):
        assert position_ids.shape == x.shape[:2]
        return super().forward(x)
"""


def report_of(path: Path) -> dict[str, Any]:
    """What a program saved, which says where and how it was made."""
    report: dict[str, Any] = json.loads(path.read_text())
    assert {"device", "command", "versions", "rows"} <= report.keys()
    assert report["versions"]["packages"]["torch"]
    return report


def test_the_memory_layer_is_timed_beside_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ttt-lm-pytorch by a file with the names of its own; fla, which needs a GPU, is a row that says so."""
    out, peer = tmp_path / "report.json", tmp_path / "ttt.py"
    peer.write_text(PEER)
    assert memory_layer.main(["--tiny", "--seconds", "0.01", "--ttt-lm", str(peer), "--out", str(out)]) == 0
    rows, shown = report_of(out)["rows"], capsys.readouterr().out
    core, layer = rows["1x16 core delta chunkwise"], rows["1x16 layer ttt-lm-pytorch"]
    assert min(core["forward_ms"], core["both_ms"], layer["both_ms"]) > 0
    if not torch.cuda.is_available():
        assert "its kernels need a GPU" in rows["1x16 core delta fla"]["error"]
        assert f"{layer['both_ms'] / core['both_ms']:.2f}" in shown
    for name in ("layer delta", "layer gated_delta", "layer titans", "layer titans-pytorch"):
        assert rows[f"2x8 {name}"]["both_ms"] > 0, rows[f"2x8 {name}"]


def test_the_check_of_the_memory_layer_finds_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert memory_layer.main(["--tiny", "--check"]) == 0
    assert "| right |" in capsys.readouterr().out
    right = backends.chunkwise.delta_rule

    def wrong(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        reads, state = right(*given)
        return reads * 1.01, state

    monkeypatch.setattr(backends.chunkwise, "delta_rule", wrong)
    assert memory_layer.main(["--tiny", "--check"]) == 1
    assert "| WRONG |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--ttt-lm", "nothing.py"], "nothing.py is not a file"),
        (["--tokens", "100"], "must be a multiple of 64"),
        (["--tiny", "--rows", "nothing"], "no row contains any of ['nothing']"),
    ],
)
def test_what_the_memory_layer_cannot_do_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert memory_layer.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_kind_of_training_step_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    small = ["--cpu", "--lanes", "1", "--tokens", "16", "--steps", "1", "--warmup", "1"]
    assert train_step.main([*small, "--out", str(out)]) == 0
    report, shown = report_of(out), capsys.readouterr().out
    rows = report["rows"]
    assert list(rows) == ["memory_off", "first_order", "second_order", "lora"]
    off = rows["memory_off"]
    floor = report["matmul_flops_per_second"] / report["flops_per_token"]
    for name, row in rows.items():
        assert row["tokens_per_second_over_off"] == pytest.approx(row["tokens_per_second"] / off["tokens_per_second"])
        assert row["share_of_floor"] == pytest.approx(row["tokens_per_second"] / floor)
        assert f"| {name} |" in shown
    assert off["trained_parameters"] == rows["first_order"]["trained_parameters"]
    assert rows["second_order"]["trained_parameters"] > off["trained_parameters"]  # the value projection learns, too
    assert rows["lora"]["trained_parameters"] > off["trained_parameters"]
    assert train_step.main([*small, "--window", "1", "--rows", "memory_off", "second_order"]) == 2
    assert "needs 2 segments or more" in capsys.readouterr().err


def test_every_way_of_evaluation_makes_as_many_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "report.json"
    assert eval_throughput.main(["--device", "cpu", "--compile", "none", "--out", str(out)]) == 0
    report, shown = report_of(out), capsys.readouterr().out
    ways = {"generate@2", "growing@2", *(f"{way}@{size}" for way in ("fixed", "concat", "memory") for size in (2, 4))}
    assert report["rows"].keys() == ways
    speeds = {name: row["samples_per_second"] for name, row in report["rows"].items()}
    assert report["rows"]["fixed@4"]["over_generate"] == pytest.approx(speeds["fixed@4"] / speeds["generate@2"])
    assert report["rows"]["memory@4"]["over_concat"] == pytest.approx(speeds["memory@4"] / speeds["concat@4"])
    assert f"{report['priming_over_forward']:.3f} times a plain forward pass" in shown
    assert eval_throughput.main(["--context-tokens", "64"]) == 2
    assert "must be below --prompt-tokens" in capsys.readouterr().err


@pytest.mark.parametrize("program", [memory_layer, train_step, eval_throughput, ranks])
def test_sizes_out_of_range_are_refused(program: Any, capsys: pytest.CaptureFixture[str]) -> None:
    option = "--prompt-tokens" if program is eval_throughput else "--tokens"
    for size in ("0", "-1", "nan", "1" + "0" * 20):
        assert program.main([option, size]) == 2
        assert f"argument {option}: '{size}'" in capsys.readouterr().err


@pytest.mark.long
def test_two_ranks_have_the_losses_of_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over gloo, in launches of their own."""
    out = tmp_path / "report.json"
    small = ["--steps", "1", "--warmup", "1", "--tokens", "32", "--window", "2"]
    assert ranks.main([*small, "--rows", "same", "zero2", "--out", str(out)]) == 0
    rows = report_of(out)["rows"]
    assert rows["zero2"].get("losses") == pytest.approx(rows["same"].get("losses"), abs=1e-4), rows
    assert len(rows["zero2"]["optimizer_bytes"]) == 2
    assert "| zero2 |" in capsys.readouterr().out


def test_a_corpus_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rank_checks.main(["--corpus", str(tmp_path / "none"), "--work", str(tmp_path / "work")]) == 2
    assert "none" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
