"""Episodes: a context to write, and questions about it in a segment of their own.

Legend of shape suffixes: B episodes, T tokens of the context, Q tokens of the questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from titans_ds.training.data.lanes import Step
from titans_ds.training.data.segments import IGNORED, Batch

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Episode:
    """A batch of them.

    Args:
        context_BT: token ids to write; no padding.
        question_BQ: token ids of the questions, each with its answer, for the answer's later tokens.
        labels_BQ: already shifted: the answers, IGNORED elsewhere. Every row has as many.
        answer_length: tokens of an answer, which is right where all of them are.
        permuted_BT: the context with its values dealt to other keys; None where a task has no such control.
    """

    context_BT: Integers
    question_BQ: Integers
    labels_BQ: Integers
    answer_length: int
    permuted_BT: Integers | None = None

    @property
    def batch_size(self) -> int:
        """B."""
        return len(self.context_BT)


class Task(Protocol):
    """What a control asks."""

    @property
    def vocab_size(self) -> int:
        """Every token is below this."""

    def episode(self, rng: np.random.Generator, level: int, batch: int) -> Episode:
        """Fresh episodes of one level of difficulty."""


def ignored(*shape: int) -> Integers:
    """Labels without a target."""
    return np.full(shape, IGNORED, dtype=np.int64)


def segments(episode: Episode, segment_tokens: int, convolved: bool) -> list[Batch]:
    """The forward passes of training with a memory: the context, segment by segment, then the questions.

    Args:
        episode: to cut.
        segment_tokens: tokens of a segment.
        convolved: the questions' tokens count as written, since a convolution sees only those.
    """
    batches = []
    for start in range(0, episode.context_BT.shape[1], segment_tokens):
        ids = episode.context_BT[:, start : start + segment_tokens]
        batches.append(_batch(ids, ignored(*ids.shape), written=True, reset=start == 0))
    return [*batches, _batch(episode.question_BQ, episode.labels_BQ, written=convolved, reset=False)]


def whole(episode: Episode) -> Batch:
    """Context and questions as one segment: what a model with everything in its window sees."""
    ids = np.concatenate([episode.context_BT, episode.question_BQ], axis=1)
    labels = np.concatenate([ignored(*episode.context_BT.shape), episode.labels_BQ], axis=1)
    return _batch(ids, labels, written=False, reset=True)


def _batch(ids: Integers, labels: Integers, written: bool, reset: bool) -> Batch:
    rows = len(ids)
    return Batch(ids, labels, np.full(ids.shape, written), np.full(rows, reset), np.arange(rows))


class EpisodeStream:
    """Hands queued segments to `titans_ds.training.step.run_passes`, as lanes do."""

    def __init__(self) -> None:
        self._waiting: list[Step] = []

    def add(self, batches: list[Batch]) -> None:
        """Queue the forward passes of one optimizer step."""
        self._waiting += [Step(batch, batch.num_targets) for batch in batches]

    def next(self) -> Step:
        """The next segment."""
        return self._waiting.pop(0)
