"""Training a control: fresh episodes, a curriculum of levels, a budget of time or steps.

Every optimizer step is `titans_ds.training.step.run_passes` on a TorchEngine, as in launch/train.py: one window holds
the segments of the context and that of the questions, and every window starts from the initial memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from titans_ds.errors import TrainingError
from titans_ds.training.engine import TorchEngine
from titans_ds.training.module import PlainModel
from titans_ds.training.optimizer import lr_at
from titans_ds.training.settings import TrainingSettings
from titans_ds.training.step import Carried, run_passes

from .episodes import Episode, EpisodeStream, Task, segments, whole
from .measure import check
from .settings import ControlConfig

_BAD_LIMIT = 20  # steps in a row without an update


@dataclass
class History:
    """How a training went.

    Args:
        checks: step, level, seconds, processor seconds, loss, em (percent, on fresh episodes of this level).
        reached: level -> step and seconds at which it was promoted from.
        steps, seconds: at the end.
        skipped: steps that a gradient which was not finite left without an update.
    """

    checks: list[dict[str, float]] = field(default_factory=list)
    reached: dict[int, dict[str, float]] = field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Budget:
    """Time or steps of one training.

    Args:
        minutes, steps: one of them.
    """

    def __init__(self, minutes: float | None, steps: int | None) -> None:
        self._seconds, self._steps = (minutes or 0.0) * 60, steps
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def spent(self, step: int) -> bool:
        """Whether `step` steps are all."""
        return step >= self._steps if self._steps is not None else self.seconds >= self._seconds

    def total_steps(self, step: int) -> int:
        """How many it will have been, as far as can be told after `step` of them: for the learning rate's cosine."""
        if self._steps is not None:
            return self._steps
        share = min(max(self.seconds / self._seconds, 1e-6), 1.0)
        return max(round(step / share), step + 1)


class ControlTrainer:
    """Trains one model, with memory or without.

    Args:
        engine: around the model.
        task: gives the episodes.
        config: of the control.
        seed: of the episodes.
        progress: called at every check.
    """

    def __init__(
        self,
        engine: TorchEngine,
        task: Task,
        config: ControlConfig,
        seed: int,
        progress: Callable[[History], None] = lambda history: None,
    ) -> None:
        self.engine, self.task, self.config, self.progress = engine, task, config, progress
        self.history = History()
        self._rng = np.random.default_rng([seed, 1])
        self._check_rng = np.random.default_rng([seed, 2])
        self._stream, self._place, self._bad = EpisodeStream(), 0, 0
        self._processor_start = 0.0

    @property
    def level(self) -> int:
        """The hardest level so far: the one that is checked."""
        curriculum = self.config.curriculum
        return curriculum.levels[self._place if curriculum.promote_at is not None else -1]

    def run(self) -> History:
        """Train until the budget is spent. Raises TrainingError where gradients stay non-finite."""
        budget, self._processor_start = Budget(self.config.minutes, self.config.steps), time.process_time()
        while not budget.spent(self.history.steps):
            loss = self._step(lr_at(self.history.steps, budget.total_steps(self.history.steps), self.config.optimizer))
            self.history.steps += 1
            self.history.seconds = budget.seconds
            if self.history.steps % self.config.curriculum.check_every == 0:
                self._check(loss)
        return self.history

    def _step(self, lr: float) -> float:
        level = self.level
        if self.config.curriculum.promote_at is None:
            level = int(self._rng.choice(self.config.curriculum.levels))
        window = self._queue(self.task.episode(self._rng, level, self.config.curriculum.batch))
        order = "first" if window == 1 else self.config.order
        settings = TrainingSettings(order=order, second_order=self.config.second_order, window=window)  # type: ignore[arg-type]
        passes = run_passes(self.engine, self._stream, Carried(), settings, 1)
        _, applied = self.engine.step(lr, skip=False)
        self._bad = 0 if applied else self._bad + 1
        self.history.skipped += not applied
        if self._bad >= _BAD_LIMIT:
            raise TrainingError(
                f"gradients were not finite for {_BAD_LIMIT} steps in a row; lower optimizer.lr or memory step sizes"
            )
        return float(passes.loss_sum) / passes.targets

    def _queue(self, episode: Episode) -> int:
        """Segments of one step; how many they are."""
        batches = [whole(episode)]
        if not isinstance(self.engine.module.model, PlainModel):
            convolved = self.config.graft.convolves
            batches = segments(episode, self.config.graft.segment_tokens, convolved)
        self._stream.add(batches)
        return len(batches)

    def _check(self, loss: float) -> None:
        curriculum = self.config.curriculum
        answers = check(self.engine, self.task.episode(self._check_rng, self.level, curriculum.check_episodes))
        processor_seconds = time.process_time() - self._processor_start
        seconds = {"seconds": self.history.seconds, "processor_seconds": processor_seconds}
        found = {"step": self.history.steps, "level": self.level, "loss": loss, "em": answers.em, **seconds}
        self.history.checks.append(found)
        if curriculum.promote_at is not None and answers.em >= curriculum.promote_at:
            self.history.reached.setdefault(self.level, {"step": self.history.steps, "seconds": self.history.seconds})
            self._place = min(self._place + 1, len(curriculum.levels) - 1)
        self.progress(self.history)
