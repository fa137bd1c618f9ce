"""Held-out evaluation: the same segments with their repository's own memory, with another's, with an empty one, and
with memory ablated; and, where LoRA is trained beside the memory, with the base model before training.

The first three differ in the state that a segment starts from, and in nothing else: each writes inside the segment as
training does (or none does, with `evaluation.segment_writes` false). So `wrong - memory` is what it is worth to have
read this repository and not another, and `empty - memory` what it is worth to have read anything before.

Repositories are read in groups, row by row through time. The wrong memory of a row is the state of another row of its
group after as many segments; groups are made of repositories with about as many segments, so states are length-matched.
Only segments that take a memory over from the one before count (not a repository's first, nor a file's first where
memories start anew at each). Groups do not depend on the number of ranks, and every rank makes the same number of
forward passes with the same shapes, as ZeRO-3 needs.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch

from titans_ds.errors import DataError
from titans_ds.memory import READ, MemoryState, Pass
from titans_ds.training import ranks
from titans_ds.training.data.packed import Integers
from titans_ds.training.data.segments import IGNORED, Batch, RepositoryReader, Segment, collate
from titans_ds.training.engine import Engine
from titans_ds.training.module import Outputs, States, run_segment
from titans_ds.training.settings import EvaluationSettings

MODES = ("memory", "wrong", "empty", "ablated")
BEFORE = "before"  # without memory and without LoRA: the base model before training
PLAIN = ("base",)  # of a model without memory


@dataclass(frozen=True)
class Group:
    """Repositories read side by side. Row r's wrong memory is row donors[r]'s."""

    repos: list[int]
    donors: Integers


@dataclass(frozen=True)
class Estimate:
    """A mean over repositories and its standard error."""

    mean: float
    standard_error: float

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite where that is no number."""
        return math.exp(self.mean) if self.mean < 700.0 else math.inf


@dataclass(frozen=True)
class RepositoryLosses:
    """One repository: target tokens counted, and the mean loss (nats a token) in each mode."""

    repo: str
    tokens: int
    losses: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """Mean losses over repositories, and the paired differences `MODE - memory`: above 0 where the memory helps.

    `forgetting` is `ablated - before`, paired: above 0 where training has made the base model worse on these tokens.
    """

    repositories: list[RepositoryLosses]
    losses: dict[str, Estimate] = field(default_factory=dict)
    differences: dict[str, Estimate] = field(default_factory=dict)
    forgetting: Estimate | None = None


class Evaluator:
    """Evaluates on the repositories of one split.

    Args:
        reader: of the held-out split.
        settings: see EvaluationSettings.
        seed: of the choice of repositories and of wrong memories.
        with_memory: false where the model has none; then only its loss is measured, on all segments.
        before: the model has LoRA: measure it without, too. (Where the base itself is trained: see `recall`.)

    Raises:
        DataError: fewer than two repositories have two segments of one memory.
    """

    def __init__(
        self,
        reader: RepositoryReader,
        settings: EvaluationSettings,
        seed: int,
        with_memory: bool,
        before: bool = False,
    ) -> None:
        self._reader, self._settings, self._with_memory = reader, settings, with_memory
        self._first = 1 if with_memory else 0
        self._before, self._modes = before, (MODES if with_memory else PLAIN) + ((BEFORE,) if before else ())
        self._recalled: dict[str, float] | None = None
        self.groups = self._make_groups(np.random.default_rng([seed, 1]))

    def recall(self, before: dict[str, float]) -> None:
        """Compare from now on with these losses of the base model before training, by repository."""
        self._recalled = before
        self._modes = (*MODES, BEFORE)

    def _make_groups(self, rng: np.random.Generator) -> list[Group]:
        eligible = [r for r in range(self._reader.split.num_repos) if self._counted(r) > 0]
        if len(eligible) < 1 + self._first:
            where = "within one file" if self._reader.reset == "file" else "over all files"
            raise DataError(
                f"split {self._reader.split.name!r} has {len(eligible)} repositories of two segments or more "
                f"(of {self._reader.segment_tokens} tokens, {where}); evaluation needs two. Add repositories, make "
                "segments shorter, or set evaluation.interval to 0"
            )
        chosen = sorted(rng.permutation(eligible)[: self._settings.repositories], key=lambda r: (self._length(r), r))
        number = max(len(chosen) // self._settings.group_size, 1)
        return [Group([int(r) for r in part], _donors(len(part), rng)) for part in np.array_split(chosen, number)]

    def _counted(self, repo: int) -> int:
        limit = self._settings.max_segments
        return self._reader.num_carried(repo, limit) if self._with_memory else self._reader.num_segments(repo)

    def _length(self, repo: int) -> int:
        return min(self._reader.num_segments(repo), self._settings.max_segments)

    def run(self, engine: Engine) -> Evaluation:
        """Evaluate on all ranks; every rank gets the whole result."""
        rows, world = max(len(g.repos) for g in self.groups), ranks.world_size()
        sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        engine.set_training(False)
        with torch.no_grad():
            for start in range(0, len(self.groups), world):
                together = self.groups[start : start + world]
                mine = start + ranks.rank() if ranks.distributed() else start
                group = self.groups[mine] if mine < len(self.groups) else None
                self._run_group(engine, together, group, rows, sums)
        engine.set_training(True)
        return self._summarise(ranks.gather({repo: dict(values) for repo, values in sums.items()}))

    def _run_group(
        self,
        engine: Engine,
        together: list[Group],
        group: Group | None,
        rows: int,
        sums: dict[int, dict[str, float]],
    ) -> None:
        """One group on this rank, while the other ranks run theirs (`together`); None passes empty rows."""
        state: States | None = None
        for time in range(max(self._length(r) for g in together for r in g.repos)):
            length = max(s.labels.size for g in together for s in self._segments(g, time) if s is not None)
            segments = [] if group is None else self._segments(group, time)
            batch = collate(segments + [None] * (rows - len(segments)), length)
            counted = time >= self._first
            after = run_segment(engine, batch, state, Pass(write=self._with_memory))
            if self._with_memory:
                batch = dataclasses.replace(batch, repos=np.where(batch.reset, -1, batch.repos))
            if counted:
                _count(sums, batch)
                for mode, losses in self._row_losses(engine, batch, state, group, after).items():
                    _add(sums, batch, mode, losses)
            if counted and self._before:
                with engine.module.ablated(lora=True):
                    original = run_segment(engine, batch, None, READ)
                _add(sums, batch, BEFORE, original.row_losses)
            state = after.state or None

    def _row_losses(
        self, engine: Engine, batch: Batch, state: States | None, group: Group | None, after: Outputs
    ) -> dict[str, torch.Tensor]:
        """The losses [B] of one segment in each mode; `after` is the pass with the own state that writes."""
        if not self._with_memory:
            return {self._modes[0]: after.row_losses}
        own, plan = after, Pass(write=self._settings.segment_writes)
        if not plan.write:
            own = run_segment(engine, batch, state, plan)
        wrong = _swap(state, group, len(batch.repos), engine.device)
        passes = {
            "memory": own,
            "wrong": run_segment(engine, batch, wrong, plan),
            "empty": run_segment(engine, batch, None, plan),
        }
        with engine.module.ablated():
            passes["ablated"] = run_segment(engine, batch, state, READ)
        return {name: outputs.row_losses for name, outputs in passes.items()}

    def _segments(self, group: Group, time: int) -> list[Segment | None]:
        return [self._reader.segment(r, time) if time < self._length(r) else None for r in group.repos]

    def _summarise(self, parts: list[dict[int, dict[str, float]]]) -> Evaluation:
        sums = {repo: values for part in parts for repo, values in part.items()}
        modes = self._modes
        repositories = [self._repository(repo, values) for repo, values in sorted(sums.items())]
        losses = {mode: estimate([r.losses[mode] for r in repositories]) for mode in modes}
        differences = {m: estimate([r.losses[m] - r.losses[modes[0]] for r in repositories]) for m in modes[1:]}
        return Evaluation(repositories, losses, differences, _forgetting(repositories) if BEFORE in modes else None)

    def _repository(self, repo: int, values: dict[str, float]) -> RepositoryLosses:
        name, tokens = self._reader.split.repo_names[repo], values["tokens"]
        recalled = {} if self._recalled is None else {BEFORE: self._recalled[name]}
        measured = {mode: values[mode] / tokens for mode in self._modes if mode not in recalled}
        return RepositoryLosses(name, int(tokens), {**measured, **recalled})


def estimate(values: list[float]) -> Estimate:
    """Mean and standard error of values by repository; the error of a single one is NaN."""
    n = len(values)
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else float("nan")
    return Estimate(float(np.mean(values)), error)


def _forgetting(repositories: list[RepositoryLosses]) -> Estimate:
    return estimate([r.losses["ablated"] - r.losses[BEFORE] for r in repositories])


def _donors(size: int, rng: np.random.Generator) -> Integers:
    """A random cycle through the group, so that nobody gets its own."""
    order, donors = rng.permutation(size), np.zeros(size, dtype=np.int64)
    donors[order] = np.roll(order, 1)
    return donors


def _swap(state: States | None, group: Group | None, rows: int, device: torch.device) -> States | None:
    if state is None:
        return None
    donors = np.arange(rows)
    if group is not None:
        donors[: len(group.repos)] = group.donors
    return MemoryState(state).select(torch.from_numpy(donors).to(device)).layers


def _add(sums: dict[int, dict[str, float]], batch: Batch, mode: str, row_losses: torch.Tensor) -> None:
    for repo, loss in zip(batch.repos, row_losses.tolist(), strict=True):
        if repo >= 0:
            sums[int(repo)][mode] += loss


def _count(sums: dict[int, dict[str, float]], batch: Batch) -> None:
    for repo, targets in zip(batch.repos, (batch.labels != IGNORED).sum(axis=1), strict=True):
        if repo >= 0:
            sums[int(repo)]["tokens"] += float(targets)
