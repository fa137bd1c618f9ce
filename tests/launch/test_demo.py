"""The demo itself, as small as it goes: real corpus, real base, real launcher, two ranks, few steps and samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.stages.demo import SHIPPED, trained_on
from launch.verdict import last_evaluation

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--packages", "14", "--steps", "2", "--samples", "2"]


def demo(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.demo", "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_demo_runs_and_goes_on_from_what_is_done(tmp_path: Path) -> None:
    first = demo(tmp_path, *SMALL)
    assert first.returncode == 0, first.stdout + first.stderr
    evaluation = last_evaluation(tmp_path / "memory")
    assert set(evaluation.losses) == {"memory", "wrong", "empty", "ablated"}
    assert len(evaluation.repositories) >= 2
    assert f"{evaluation.losses['ablated'].mean:.4f}" in first.stdout
    assert "titans_memory.safetensors" in [path.name for path in (tmp_path / "memory/adapter").iterdir()]
    check_corpus(tmp_path / "corpus")
    check_example(tmp_path / "example.json", first.stdout)
    assert (tmp_path / "losses.svg").read_text().startswith("<?xml")
    assert "Verdict: " in first.stdout

    again = demo(tmp_path, *SMALL)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done already") == 4
    assert f"{evaluation.losses['ablated'].mean:.4f}" in again.stdout


def check_corpus(corpus: Path) -> None:
    """The base has seen none of the demo's packages."""
    chosen = {entry["repo"] for entry in json.loads((corpus / "manifest.json").read_text())["repositories"]}
    known = trained_on(str(SHIPPED))
    assert known is not None
    assert "pytest" in known  # which is installed here
    assert chosen
    assert not chosen & set(known)


def check_example(path: Path, printed: str) -> None:
    """The sample that own memory helps most, completed in three ways; the name is not in its prompt."""
    found = json.loads(path.read_text())
    assert found["samples"] == 2
    assert found["package"] != found["wrong_package"]
    assert found["truth"].startswith(found["name"]) or found["name"] in found["truth"]
    assert found["name"] not in found["prompt"]
    assert found["wrong_minus_own"] == pytest.approx(found["losses"]["wrong"] - found["losses"]["own"])
    assert set(found["completions"]) == {"own", "wrong", "ablated"}
    assert f"Example: {found['package']}, the place among 2" in printed


@pytest.mark.long
def test_demo_trains_a_tiny_base_from_random_weights(tmp_path: Path) -> None:
    done = demo(tmp_path, *SMALL, "--samples", "0", "--base", "scratch", "--base-steps", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "base/model/model.safetensors").is_file()
    assert json.loads((tmp_path / "memory/adapter/titans_config.json").read_text())
    assert len(last_evaluation(tmp_path / "memory").repositories) >= 2
    assert "tiny base trained for minutes" in done.stdout
    assert "Example:" not in done.stdout


@pytest.mark.parametrize(("option", "value", "least"), [("--steps", "0", 1), ("--samples", "-1", 0)])
def test_demo_says_what_is_wrong_without_a_traceback(tmp_path: Path, option: str, value: str, least: int) -> None:
    wrong = demo(tmp_path, f"{option}={value}")
    assert wrong.returncode == 2
    assert f"argument {option}: '{value}'; expected a whole number from {least} to" in wrong.stderr
    assert "Traceback" not in wrong.stderr
