"""A small control learns to recall from memory, and from nothing else. Under a minute on one core."""

from __future__ import annotations

import pytest
import torch

from eval.controls import models
from eval.controls.measure import Answers, measure
from eval.controls.settings import load_control
from eval.controls.tasks import make_task
from eval.controls.training import ControlTrainer

pytestmark = pytest.mark.long
CHANGES = {"minutes": None, "steps": 60, "curriculum.levels": [4], "optimizer.warmup_steps": 20}


def trained(changes: dict[str, object]) -> dict[str, Answers]:
    config = load_control("kv_recall", {**CHANGES, **changes})
    task = make_task("kv_recall", config.task_options)
    engine = models.with_memory(config, task.vocab_size, 0, torch.device("cpu"))
    ControlTrainer(engine, task, config, seed=0).run()
    return measure(engine, task, 4, 64, seed=0)


@pytest.fixture(scope="module")
def answers() -> dict[str, Answers]:
    return trained({})


def test_pairs_that_were_written_are_recalled(answers: dict[str, Answers]) -> None:
    assert answers["memory"].em >= 90.0


@pytest.mark.parametrize("arm", ["ablation", "wrong", "unwritten", "permuted"])
def test_nothing_else_answers_the_questions(answers: dict[str, Answers], arm: str) -> None:
    """Chance is 0.03% of 256 questions; 2% is five of them."""
    assert answers[arm].em <= 2.0


def test_a_memory_that_takes_no_step_learns_nothing() -> None:
    """The same training with the write switched off: what the memory test sees is the write's doing."""
    assert trained({"graft.memory.inner_steps": 1, "graft.memory.rule.step_sizes": [1e-9, 1e-9]})["memory"].em <= 2.0
