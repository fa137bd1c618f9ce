"""Real CrossCodeEval rows with a real small model: completions in four languages, truncation against the plain rule.

Rows: TITANS_CCE_DIR. Model: TITANS_EVAL_MODEL, a Hugging Face folder (say SmolLM2-135M). Without either the tests skip.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from eval import crosscodeeval
from eval.data.benchmark import load_benchmark
from eval.scoring.postprocess import truncate_statement
from tests.eval.test_scoring import CCE_DIR, reference_truncation

MODEL = Path(os.environ.get("TITANS_EVAL_MODEL", Path.home() / ".cache" / "titans-models" / "smollm2-135m"))
OFFICIAL = "line_completion_rg1_openai_cosine_sim.jsonl"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not CCE_DIR.is_dir(), reason=f"no CrossCodeEval rows at {CCE_DIR} (TITANS_CCE_DIR)"),
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason=f"no model at {MODEL} (TITANS_EVAL_MODEL)"),
]


def _run(data: Path, out: Path, modes: str, *options: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    arguments = ["run", "--base", str(MODEL), "--data", str(data), "--modes", modes, "--out", str(out)]
    assert crosscodeeval.main([*arguments, "--device", "cpu", "--max-length", "320", *options]) == 0
    lines = map(json.loads, (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    return {(line["task_id"], line["mode"], line["boundary"]): line for line in lines}


@pytest.mark.parametrize("language", ["python", "java", "typescript", "csharp"])
def test_uncut_completions_are_truncated_as_the_rule_is_worded(language: str, tmp_path: Path) -> None:
    data = CCE_DIR / language / OFFICIAL
    options = ["--limit", "1", "--stop", "none", "--max-new-tokens", "40", "--no-report", "--boundary", "both"]
    found = _run(data, tmp_path / "r", "vanilla", *options)
    rows = load_benchmark(data)
    assert len(found) == 2
    for (task, _, _), line in found.items():
        prompt, text = rows[task].prompt, line["prediction"]
        assert line["finish_reason"] in ("length", "eos")
        assert truncate_statement(prompt, text, language) == reference_truncation(prompt, text, language)


def test_a_small_run_with_both_boundaries_and_context_ends_in_a_report(tmp_path: Path) -> None:
    data = CCE_DIR / "python" / "line_completion_rg1_bm25.jsonl"
    options = ["--limit", "2", "--subset", "random", "--boundary", "both", "--context-tokens", "128"]
    found = _run(data, tmp_path / "r", "vanilla,vanilla_concat", *options)
    assert len(found) == 8
    for line in found.values():
        assert line["likelihood"]["target_nats"] > 0
        assert line["healed_text"] == ("." if line["boundary"] == "heal" else "")
    # What stands before the prompt changes how likely the target is.
    for task in {task for task, _, _ in found}:
        with_context, without = found[task, "vanilla_concat", "heal"], found[task, "vanilla", "heal"]
        assert with_context["likelihood"]["target_nats"] != without["likelihood"]["target_nats"]
    scores = json.loads((tmp_path / "r" / "scores.json").read_text())
    assert {arm["total"] for arm in scores.values()} == {2}
    assert "<svg" in (tmp_path / "r" / "report.html").read_text()
