"""The demo's chain of commands: skips what is done, repeats what changed, and says what a comparison means."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from launch.stages.chain import Stage, StageError, run_stages
from launch.verdict import sentence
from titans_ds.training.evaluation import Estimate, Evaluation

APPEND = (
    "import os, sys; os.makedirs(sys.argv[1]); open(sys.argv[1] + '/x', 'w').write(os.environ['WORD'] + sys.argv[2])"
)
TOUCH = "import os, sys; assert not os.path.exists(sys.argv[1]); open(sys.argv[1], 'w').write('made')"


def make_stage(folder: Path, name: str, text: str, **changes: object) -> Stage:
    product = folder / name
    return replace(Stage(name, [sys.executable, "-c", APPEND], [str(product), text], product), **changes)


def run_all(folder: Path, stages: list[Stage], word: str = "w") -> list[str]:
    """Titles of the stages that ran."""
    return [s.title for s in run_stages(stages, folder / "stamps", folder, {"WORD": word}, lambda line: None)]


def test_done_stages_are_skipped_and_a_change_repeats_the_rest(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, name, "1") for name in "abc"]
    assert run_all(tmp_path, stages) == ["a", "b", "c"]
    assert run_all(tmp_path, stages) == []
    stages[1] = make_stage(tmp_path, "b", "2")
    assert run_all(tmp_path, stages) == ["b", "c"]
    assert (tmp_path / "b/x").read_text() == "w2"


def test_a_stage_has_variables_of_its_own(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, "a", "1", environment={"WORD": "own"}), make_stage(tmp_path, "b", "1")]
    run_all(tmp_path, stages)
    assert [(tmp_path / name / "x").read_text() for name in "ab"] == ["own1", "w1"]


def test_a_missing_product_is_made_again(tmp_path: Path) -> None:
    stages = [make_stage(tmp_path, name, "1") for name in "ab"]
    run_all(tmp_path, stages)
    (tmp_path / "a/x").unlink()
    (tmp_path / "a").rmdir()
    assert run_all(tmp_path, stages) == ["a"]


def test_a_product_can_be_a_file_in_another_product(tmp_path: Path) -> None:
    """As the report in the evaluation's folder: made again where the folder is, and alone where it is missing."""
    product = tmp_path / "a" / "f"
    stages = [make_stage(tmp_path, "a", "1"), Stage("f", [sys.executable, "-c", TOUCH], [str(product)], product)]
    assert run_all(tmp_path, stages) == ["a", "f"]
    assert run_all(tmp_path, stages) == []
    product.unlink()
    assert run_all(tmp_path, stages) == ["f"]
    assert run_all(tmp_path, [make_stage(tmp_path, "a", "2"), stages[1]]) == ["a", "f"]
    assert product.read_text() == "made"


def test_another_program_makes_the_same_product_and_another_settings_file_does_not(tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text("one")
    stage = make_stage(tmp_path, "a", "1", settings=[settings])
    run_all(tmp_path, [stage])
    assert run_all(tmp_path, [replace(stage, program=[sys.executable, "-s", "-c", APPEND])]) == []
    settings.write_text("two")
    assert run_all(tmp_path, [stage]) == ["a"]


def test_a_failed_stage_says_so_and_is_not_done(tmp_path: Path) -> None:
    good, bad = (
        make_stage(tmp_path, "a", "1"),
        make_stage(tmp_path, "b", "1", program=[sys.executable, "-c", "exit(3)"]),
    )
    with pytest.raises(StageError, match="exit code 3"):
        run_all(tmp_path, [good, bad])
    assert run_all(tmp_path, [good, replace(bad, program=good.program)]) == ["b"]


@pytest.mark.parametrize(
    ("wrong", "empty", "ablated", "begins", "ends"),
    [
        (0.5, 0.4, 0.3, "Verdict: it remembers.", "and than no memory by 0.3000."),
        (0.5, 0.4, 0.01, "Verdict: it remembers.", "and as good as no memory within the error."),
        (0.5, 0.4, -0.3, "Verdict: it remembers.", "by 0.3000, so that it disturbs more than it helps."),
        (0.01, 0.4, 0.3, "Verdict: a package's own memory is not measurably better", "what helps is the added path."),
        (0.5, 0.0, 0.0, "Verdict: a package's own memory is not measurably better", "nothing of use was remembered."),
    ],
)
def test_sentence(wrong: float, empty: float, ablated: float, begins: str, ends: str) -> None:
    losses = {"memory": Estimate(1.0, 0.1)}
    means = {"wrong": wrong, "empty": empty, "ablated": ablated}
    found = sentence(Evaluation([], losses, {name: Estimate(mean, 0.1) for name, mean in means.items()}))
    assert found.startswith(begins)
    assert found.endswith(ends)
