"""The demo itself, as small as it goes: real corpus, real base, real launcher, two ranks, few steps and samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.demo_stages import SHIPPED, trained_on
from launch.verdict import last_evaluation

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--packages", "14", "--steps", "2", "--samples", "2"]


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.demo", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_demo_runs_and_goes_on_from_what_is_done(tmp_path: Path) -> None:
    first = demo(tmp_path, *SMALL)
    assert first.returncode == 0, first.stdout + first.stderr
    evaluation = last_evaluation(tmp_path / "memory")
    assert set(evaluation.losses) == {"memory", "ablated", "wrong"}
    assert len(evaluation.repositories) >= 2
    assert f"{evaluation.losses['ablated'].mean:.4f}" in first.stdout
    assert "adapter_model.safetensors" in [path.name for path in (tmp_path / "memory/adapter").iterdir()]
    check_corpus(tmp_path / "corpus")
    check_completions(tmp_path / "evaluation", first.stdout)

    again = demo(tmp_path, *SMALL)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done already") == 6
    assert f"{evaluation.losses['ablated'].mean:.4f}" in again.stdout


def check_corpus(corpus: Path) -> None:
    """The base has seen none of the demo's packages."""
    chosen = {entry["repo"] for entry in json.loads((corpus / "manifest.json").read_text())["repositories"]}
    known = trained_on(str(SHIPPED))
    assert known is not None
    assert "pytest" in known  # which is installed here
    assert chosen
    assert not chosen & set(known)


def check_completions(folder: Path, printed: str) -> None:
    """Every mode has its samples and its row, the untouched base agrees with the ablation, and the report is there."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    modes = ["memory", "none", "ablation", "memory_wrong", "concat", "vanilla"]
    assert {mode: sum(row["mode"] == mode for row in rows) for mode in modes} == dict.fromkeys(modes, 2)
    texts = {(row["mode"], row["task_id"]): row["prediction"] for row in rows}
    assert all(texts["ablation", task] == texts["vanilla", task] for _, task in texts)
    assert all(f" {mode} " in printed for mode in modes)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
    assert f"report: {folder / 'report.html'}" in printed


def test_demo_trains_a_tiny_base_from_random_weights(tmp_path: Path) -> None:
    done = demo(tmp_path, *SMALL, "--samples", "0", "--base", "scratch", "--base-steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "base/model/model.safetensors").is_file()
    assert json.loads((tmp_path / "memory/adapter/adapter_config.json").read_text())
    assert len(last_evaluation(tmp_path / "memory").repositories) >= 2
    assert "tiny base trained for minutes" in done.stdout
    assert "report:" not in done.stdout


@pytest.mark.parametrize(("option", "message"), [("--steps", "--steps is 0"), ("--samples", "--samples is -1")])
def test_demo_says_what_is_wrong_without_a_traceback(tmp_path: Path, option: str, message: str) -> None:
    wrong = demo(tmp_path, f"{option}={message.split()[-1]}")
    assert wrong.returncode == 2
    assert message in wrong.stderr
    assert "Traceback" not in wrong.stderr
