"""Batched generation and target likelihood with continuous refill: one prefill of a prompt serves all that is asked
of it.

A job is one prompt. Its prefix (the healed prompt) is read once, left-padded beside others; from that cache come the
target's likelihood under each boundary and the first token of each boundary's completion. Rows decode together; where
rows have finished, the next jobs take their places. A row's result does not depend on its neighbours: padding is
masked, positions count real tokens, and sampling draws from the row's own generator.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import EvalError
from . import row_cache
from .choosing import Chooser
from .growing_rows import GrowingRows, extended, joined
from .healing import still_missing
from .jobs import Batch, Completion, Decoding, Forward, Job, Row, new_row, padded, positions_of
from .likelihood import ScoredTarget, token_nats
from .static_rows import StaticRows, reason_against
from .token_bytes import TokenBytes

_LOG = logging.getLogger(__name__)
_MAY_SETTLE = (b"\n", b";", b"{", b"}")


@dataclass(frozen=True)
class DecodeSettings:
    """`batch_size` is in rows; temperature 0 is greedy.

    `fixed_shapes`: decode in steps of fixed shapes (`static_rows`) where the model can; on a GPU, as CUDA graphs.
    `read_tokens`: about how many tokens of prompts, padding included, are read in one pass.
    """

    batch_size: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    eos_tokens: frozenset[int] = frozenset()
    fixed_shapes: bool = False
    read_tokens: int = 65536


class Decoder:
    """Runs jobs through a model; see the module's text."""

    def __init__(
        self, forward: Forward, vocabulary: TokenBytes, settings: DecodeSettings, device: torch.device | str = "cpu"
    ) -> None:
        self._forward = forward
        self._vocabulary = vocabulary
        self._settings = settings
        self._device = torch.device(device)
        self._chooser = Chooser(vocabulary, settings.temperature, settings.top_p)
        self._fixed_shapes = settings.fixed_shapes
        self._slots: StaticRows | None = None  # outlive a batch, with their captured steps
        self._most_positions = self._most_boundaries = 0
        self.batch_size = settings.batch_size
        self.num_prefills = 0
        self.num_steps = 0

    @property
    def step_shapes(self) -> list[tuple[int, int]]:
        """Slots and positions of the last run's steps of fixed shapes; none where it took growing ones."""
        return [] if self._slots is None else self._slots.shapes

    @torch.no_grad()
    def run(self, jobs: Iterable[Job]) -> Iterator[Completion]:
        """Yield a completion for every job and boundary, as they finish. Out of memory halves the batch and goes on.

        Raises:
            EvalError: out of memory at one row.
        """
        pending = deque(sorted(jobs, key=lambda job: -len(job.prefix)))
        self._most_positions = max((j.most_positions(self._settings.max_new_tokens) for j in pending), default=0)
        self._most_boundaries = max((len(job.boundaries) for job in pending), default=0)
        self._slots = None
        active: Decoding | None = None
        ready: deque[Batch] = deque()  # read, but of a kind of cache that cannot join others
        in_flight: dict[str, Job] = {}
        done: set[tuple[str, str]] = set()
        while pending or ready or active:
            finished: list[Row] = []
            try:
                admitted = [] if ready else self._take(pending, active)
                in_flight |= {job.key: job for job in admitted}
                for together in self._read_together(admitted):
                    ready.extend(self._admit(together, done))
                    active = self._enter(active, ready)
                active = self._enter(active, ready)
                finished, active = self._step(active)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                active = self._slots = None
                ready.clear()
                self._halve(error)
                pending.extendleft(in_flight.values())
                in_flight = {}
            for row in finished:
                done.add((row.job.key, row.boundary))
                if all((row.job.key, boundary) in done for boundary in row.job.boundaries):
                    in_flight.pop(row.job.key)
                yield self._completion(row)

    def _halve(self, error: RuntimeError) -> None:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise error
        if self.batch_size == 1:
            raise EvalError(
                "Out of memory with one row. Give less: --max-length, --context-tokens, or --dtype bfloat16."
            ) from error
        self.batch_size //= 2
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _take(self, pending: deque[Job], active: Decoding | None) -> list[Job]:
        """The jobs that enter now: those that fit, once a quarter of the rows is free."""
        free = self.batch_size - (len(active.rows) if active else 0)
        if active and (free < max(1, self.batch_size // 4) or not active.takes_rows):
            return []
        taken: list[Job] = []
        while pending and (len(pending[0].boundaries) <= free or not (active or taken)):
            free -= len(pending[0].boundaries)
            taken.append(pending.popleft())
        return taken

    def _read_together(self, jobs: list[Job]) -> Iterator[list[Job]]:
        """Cut a batch where reading all of it at once would take more room than decoding it."""
        if not jobs:
            return
        count = max(1, self._settings.read_tokens // max(len(job.prefix) for job in jobs))
        for start in range(0, len(jobs), count):
            yield jobs[start : start + count]

    # --- entering ----------------------------------------------------------------------------------------------------

    def _admit(self, jobs: list[Job], done: set[tuple[str, str]]) -> list[Batch]:
        """Read the prefixes, score the targets, and return one row for each boundary not done yet.

        All in one batch, or in several where the cache cannot join them, or slots take them one after the other.
        """
        ids, mask = padded(([job.prefix for job in jobs]), self._device, left=True)
        memory = self._forward.memory_for([job.priming for job in jobs])
        logits, cache, memory = self._forward(ids, mask, positions_of(mask), None, memory, last_only=True)
        self.num_prefills += 1
        join = not self._in_slots(cache) and row_cache.can_join(cache)
        read = Batch([], cache, mask, logits[:, -1], memory)
        branches = [
            (b, removed, [i for i, j in enumerate(jobs) if _member(j, b, removed, done)])
            for b, removed in _groups(jobs)
        ]
        branches = [branch for branch in branches if branch[2]]
        batches: list[Batch] = []
        for number, (boundary, removed, rows) in enumerate(branches):
            part = self._branch(read, rows, number + 1 < len(branches))
            part = self._begun(part, [jobs[i] for i in rows], boundary, removed)
            batches.append(joined(self._forward, batches.pop(), part) if batches and join else part)
        return batches

    def _branch(self, read: Batch, rows: list[int], again: bool) -> Batch:
        """Some rows of what was read; on a copy where it is wanted `again`."""
        cache = row_cache.fork(read.cache) if again else read.cache
        if rows == list(range(len(read.mask))):
            return Batch([], cache, read.mask, read.logits, read.memory)
        index = torch.tensor(rows, device=self._device)
        row_cache.select_rows(cache, index)
        memory = None if read.memory is None else read.memory.select(index)
        return Batch([], cache, read.mask[index], read.logits[index], memory)

    def _begun(self, part: Batch, jobs: list[Job], boundary: str, num_removed: int) -> Batch:
        """The rows of one boundary, read up to it and scored."""
        if boundary == "plain" and num_removed:
            ids = torch.tensor([job.removed for job in jobs], device=self._device)
            part = extended(self._forward, part, ids)
        nats = self._score(part, [job.targets.get(boundary) for job in jobs])
        missing = [job.healed_text if boundary == "heal" else b"" for job in jobs]
        part.rows = [new_row(*entry, boundary) for entry in zip(jobs, missing, nats, strict=True)]
        return part

    def _score(self, batch: Batch, targets: list[ScoredTarget | None]) -> list[list[float] | None]:
        """Teacher-forced nats of each target's tokens, on a copy of the cache."""
        if not any(targets):
            return [None] * len(targets)
        ids, new_mask = padded([target.tokens if target else [] for target in targets], self._device, left=False)
        logits = batch.logits[:, None]
        if ids.shape[1] > 1:
            mask = torch.cat([batch.mask, new_mask[:, :-1]], dim=1)
            positions = positions_of(mask)[:, batch.mask.shape[1] :]
            cache = row_cache.fork(batch.cache)
            following, *_ = self._forward(ids[:, :-1], mask, positions, cache, batch.memory, last_only=False)
            logits = torch.cat([logits, following], dim=1)
        return [token_nats(logits[i], target, self._vocabulary) if target else None for i, target in enumerate(targets)]

    def _enter(self, active: Decoding | None, ready: deque[Batch]) -> Decoding | None:
        """Let what is ready join the rows that decode, as far as their cache allows."""
        while ready and (active is None or active.takes_rows):
            batch = ready.popleft()
            if active is not None:
                active.enter(batch)
            elif self._in_slots(batch.cache):
                active = self._slots = self._slots or self._make_slots(batch)
                active.enter(batch)
            else:
                active = GrowingRows(self._forward, batch)
        return active

    def _in_slots(self, cache: Any) -> bool:
        """Whether rows decode in steps of fixed shapes; says so once where they should, and cannot."""
        reason = reason_against(self._forward, cache) if self._fixed_shapes else None
        if reason is not None:
            _LOG.warning("This model decodes in steps of growing shapes, without CUDA graphs: %s.", reason)
            self._fixed_shapes = False
        return self._fixed_shapes

    def _make_slots(self, like: Batch) -> StaticRows:
        num_slots = max(self.batch_size, self._most_boundaries)
        return StaticRows(self._forward, like, num_slots, self._most_positions, self._settings.max_new_tokens)

    # --- decoding ----------------------------------------------------------------------------------------------------

    def _step(self, active: Decoding | None) -> tuple[list[Row], Decoding | None]:
        """Choose one token for every row, let finished rows go, and read the tokens of the others."""
        if active is None:
            return [], None
        chosen = self._chooser.choose(active)
        for row, token in zip(active.rows, chosen, strict=True):
            self._append(row, token)
        finished = [row for row in active.rows if row.finish_reason]
        if finished:
            active.keep([i for i, row in enumerate(active.rows) if not row.finish_reason])
        if not active.rows:
            return finished, None
        self.num_steps += 1
        active.read([row.tokens[-1] for row in active.rows])
        return finished, active

    def _append(self, row: Row, token: int) -> None:
        if token in self._settings.eos_tokens and not row.missing:
            row.finish_reason = "eos"
            return
        row.tokens.append(token)
        row.missing = still_missing(row.missing, token, self._vocabulary) if row.missing else b""
        if row.missing:  # tokens that only write the removed text again do not count
            return
        row.num_new += 1
        piece = self._vocabulary.of(token) or b""
        if row.job.stop and any(mark in piece for mark in _MAY_SETTLE) and row.job.stop(self._text(row)):
            row.finish_reason = "statement"
        elif row.num_new >= self._settings.max_new_tokens:
            row.finish_reason = "length"

    def _text(self, row: Row) -> str:
        skip = len(row.job.healed_text) if row.boundary == "heal" else 0
        return self._vocabulary.join(row.tokens)[skip:].decode("utf-8", "replace")

    def _completion(self, row: Row) -> Completion:
        return Completion(row.job.key, row.boundary, self._text(row), row.tokens, row.finish_reason, row.nats)


def _groups(jobs: list[Job]) -> list[tuple[str, int]]:
    """The branches of a read batch: heal, and plain by the number of tokens that must be read again."""
    return [("heal", 0)] + [("plain", count) for count in sorted({len(job.removed) for job in jobs})]


def _member(job: Job, boundary: str, num_removed: int, done: set[tuple[str, str]]) -> bool:
    if boundary not in job.boundaries or (job.key, boundary) in done:
        return False
    return boundary == "heal" or len(job.removed) == num_removed
