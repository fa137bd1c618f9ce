"""Batched generation and target likelihood with continuous refill: one prefill of a prompt serves all that is asked
of it.

A job is one prompt. Its prefix (the healed prompt) is read once, left-padded beside others; from that cache come the
target's likelihood under each boundary and the first token of each boundary's completion. Rows decode together; where
rows have finished, the next jobs take their places. A row's result does not depend on its neighbours: padding is
masked, positions count real tokens, and sampling draws from the row's own generator.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from . import row_cache
from .errors import EvalError
from .healing import still_missing
from .likelihood import ScoredTarget, token_nats
from .token_bytes import TokenBytes

_MAY_SETTLE = (b"\n", b";", b"{", b"}")


class Memory(Protocol):
    """What the decoder asks of a batch of memory states (`titans_ds.MemoryState`)."""

    def select(self, indices: Tensor) -> Memory: ...


class Forward(Protocol):
    """One forward pass: ids [B, T'], mask [B, T], positions [B, T'], cache, memory -> logits [B, T' or 1, V], cache."""

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, memory: Any, last_only: bool
    ) -> tuple[Tensor, Any]: ...

    def memory_for(self, primings: Sequence[tuple[str, ...]]) -> Any:
        """Return the memories of a batch, each after reading its texts; None on a path without memory."""

    def join_memory(self, first: Any, second: Any) -> Any:
        """Return one batch of memories out of two."""


@dataclass(frozen=True)
class DecodeSettings:
    """`batch_size` is in rows; temperature 0 is greedy."""

    batch_size: int
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    eos_tokens: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Job:
    """One prompt. `prefix` + `removed` is the plain prompt; `removed` writes the bytes `healed_text`.

    `boundaries`: which of heal and plain to generate. `targets`: what to score under each boundary. `priming`: the
    texts that its memory has read. `stop` says of a text whether what follows it matters. `seed` is for sampling.
    """

    key: str
    prefix: list[int]
    removed: list[int]
    healed_text: bytes
    boundaries: tuple[str, ...]
    targets: dict[str, ScoredTarget] = field(default_factory=dict)
    priming: tuple[str, ...] = ()
    stop: Callable[[str], bool] | None = None
    seed: int = 0


@dataclass(frozen=True)
class Completion:
    """What one job gave under one boundary; `nats` one number a target token, None where no target was asked for."""

    key: str
    boundary: str
    text: str
    tokens: list[int]
    finish_reason: str
    nats: list[float] | None


@dataclass
class _Row:
    job: Job
    boundary: str
    missing: bytes
    nats: list[float] | None
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    num_new: int = 0
    finish_reason: str = ""


@dataclass
class _Batch:
    """Rows that decode together: their cache, mask [B, T], logits of the next token [B, V], memory of B rows."""

    rows: list[_Row]
    cache: Any
    mask: Tensor
    logits: Tensor
    memory: Any


class Decoder:
    """Runs jobs through a model; see the module's text."""

    def __init__(
        self, forward: Forward, vocabulary: TokenBytes, settings: DecodeSettings, device: torch.device | str = "cpu"
    ) -> None:
        self._forward = forward
        self._vocabulary = vocabulary
        self._settings = settings
        self._device = torch.device(device)
        self.batch_size = settings.batch_size
        self.num_prefills = 0
        self.num_steps = 0

    @torch.no_grad()
    def run(self, jobs: Iterable[Job]) -> Iterator[Completion]:
        """Yield a completion for every job and boundary, as they finish. Out of memory halves the batch and goes on.

        Raises:
            EvalError: out of memory at one row.
        """
        pending = deque(sorted(jobs, key=lambda job: -len(job.prefix)))
        active: _Batch | None = None
        ready: deque[_Batch] = deque()  # read, but of a kind of cache that cannot join others
        in_flight: dict[str, Job] = {}
        done: set[tuple[str, str]] = set()
        while pending or ready or active:
            finished: list[_Row] = []
            try:
                admitted = [] if ready else self._take(pending, active)
                in_flight |= {job.key: job for job in admitted}
                if admitted:
                    ready.extend(self._admit(admitted, done))
                if ready and (active is None or row_cache.can_join(active.cache)):
                    active = self._join(active, ready.popleft())
                finished, active = self._step(active)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                self._halve(error)
                pending.extendleft(in_flight.values())
                active, in_flight = None, {}
                ready.clear()
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

    def _take(self, pending: deque[Job], active: _Batch | None) -> list[Job]:
        """The jobs that enter now: those that fit, once a quarter of the rows is free."""
        free = self.batch_size - (len(active.rows) if active else 0)
        if active and (free < max(1, self.batch_size // 4) or not row_cache.can_join(active.cache)):
            return []
        taken: list[Job] = []
        while pending and (len(pending[0].boundaries) <= free or not (active or taken)):
            free -= len(pending[0].boundaries)
            taken.append(pending.popleft())
        return taken

    # --- entering ----------------------------------------------------------------------------------------------------

    def _admit(self, jobs: list[Job], done: set[tuple[str, str]]) -> list[_Batch]:
        """Read the prefixes, score the targets, and return one row for each boundary not done yet.

        All in one batch, or in several where the cache cannot join them.
        """
        ids, mask = _pad(([job.prefix for job in jobs]), self._device, left=True)
        memory = self._forward.memory_for([job.priming for job in jobs])
        logits, cache = self._forward(ids, mask, _positions(mask), None, memory, last_only=True)
        self.num_prefills += 1
        read = _Batch([], cache, mask, logits[:, -1], memory)
        batches: list[_Batch] = []
        for boundary, removed in _groups(jobs):
            rows = [i for i, job in enumerate(jobs) if _member(job, boundary, removed, done)]
            if rows:
                part = self._branch(read, rows, [jobs[i] for i in rows], boundary, removed)
                batches.append(self._join(batches.pop(), part) if batches and row_cache.can_join(cache) else part)
        return batches

    def _branch(self, read: _Batch, rows: list[int], jobs: list[Job], boundary: str, num_removed: int) -> _Batch:
        index = torch.tensor(rows, device=self._device)
        cache = row_cache.fork(read.cache)
        row_cache.select_rows(cache, index)
        memory = None if read.memory is None else read.memory.select(index)
        part = _Batch([], cache, read.mask[index], read.logits[index], memory)
        if boundary == "plain" and num_removed:
            ids = torch.tensor([job.removed for job in jobs], device=self._device)
            part = self._extend(part, ids)
        nats = self._score(part, [job.targets.get(boundary) for job in jobs])
        missing = [job.healed_text if boundary == "heal" else b"" for job in jobs]
        part.rows = [_new_row(*entry, boundary) for entry in zip(jobs, missing, nats, strict=True)]
        return part

    def _extend(self, batch: _Batch, ids: Tensor) -> _Batch:
        """Read ids [B, n] after what the cache holds."""
        mask = torch.cat([batch.mask, torch.ones_like(ids)], dim=1)
        positions = _positions(mask)[:, -ids.shape[1] :]
        logits, cache = self._forward(ids, mask, positions, batch.cache, batch.memory, last_only=True)
        return _Batch(batch.rows, cache, mask, logits[:, -1], batch.memory)

    def _score(self, batch: _Batch, targets: list[ScoredTarget | None]) -> list[list[float] | None]:
        """Teacher-forced nats of each target's tokens, on a copy of the cache."""
        if not any(targets):
            return [None] * len(targets)
        ids, new_mask = _pad([target.tokens if target else [] for target in targets], self._device, left=False)
        logits = batch.logits[:, None]
        if ids.shape[1] > 1:
            mask = torch.cat([batch.mask, new_mask[:, :-1]], dim=1)
            positions = _positions(mask)[:, batch.mask.shape[1] :]
            cache = row_cache.fork(batch.cache)
            following, _ = self._forward(ids[:, :-1], mask, positions, cache, batch.memory, last_only=False)
            logits = torch.cat([logits, following], dim=1)
        return [token_nats(logits[i], target, self._vocabulary) if target else None for i, target in enumerate(targets)]

    def _join(self, first: _Batch | None, second: _Batch) -> _Batch:
        if first is None:
            return second
        length = max(first.mask.shape[1], second.mask.shape[1])
        masks = [torch.nn.functional.pad(b.mask, (length - b.mask.shape[1], 0)) for b in (first, second)]
        cache = row_cache.join(first.cache, second.cache, length)
        memory = None if first.memory is None else self._forward.join_memory(first.memory, second.memory)
        logits = torch.cat([first.logits, second.logits])
        return _Batch(first.rows + second.rows, cache, torch.cat(masks), logits, memory)

    # --- decoding ----------------------------------------------------------------------------------------------------

    def _step(self, batch: _Batch | None) -> tuple[list[_Row], _Batch | None]:
        """Choose one token for every row, let finished rows go, and read the tokens of the others."""
        if batch is None:
            return [], None
        chosen = self._choose(batch)
        for row, token in zip(batch.rows, chosen, strict=True):
            self._append(row, token)
        finished = [row for row in batch.rows if row.finish_reason]
        left = [i for i, row in enumerate(batch.rows) if not row.finish_reason]
        if not left:
            return finished, None
        if finished:
            batch = self._shrink(batch, left)
        self.num_steps += 1
        ids = torch.tensor([[row.tokens[-1]] for row in batch.rows], device=self._device)
        return finished, self._extend(batch, ids)

    def _shrink(self, batch: _Batch, left: list[int]) -> _Batch:
        index = torch.tensor(left, device=self._device)
        row_cache.select_rows(batch.cache, index)
        mask = batch.mask[index]
        if row_cache.can_join(batch.cache):
            longest = int(mask.sum(dim=1).max())
            row_cache.keep_last(batch.cache, longest)
            mask = mask[:, -longest:]
        memory = None if batch.memory is None else batch.memory.select(index)
        return _Batch([batch.rows[i] for i in left], batch.cache, mask, batch.logits[index], memory)

    def _choose(self, batch: _Batch) -> list[int]:
        best = batch.logits.argmax(dim=-1).tolist()
        free_greedy = self._settings.temperature == 0
        return [
            best[i] if free_greedy and not row.missing else self._choose_row(batch.logits[i], row)
            for i, row in enumerate(batch.rows)
        ]

    def _choose_row(self, logits: Tensor, row: _Row) -> int:
        if not row.missing:
            return _sample(logits, self._settings, row.generator)
        allowed = torch.tensor(self._vocabulary.spelling(row.missing), device=logits.device)
        if self._settings.temperature == 0:
            return int(allowed[logits[allowed].argmax()])
        return int(allowed[_sample(logits[allowed], self._settings, row.generator)])

    def _append(self, row: _Row, token: int) -> None:
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

    def _text(self, row: _Row) -> str:
        skip = len(row.job.healed_text) if row.boundary == "heal" else 0
        return self._vocabulary.join(row.tokens)[skip:].decode("utf-8", "replace")

    def _completion(self, row: _Row) -> Completion:
        return Completion(row.job.key, row.boundary, self._text(row), row.tokens, row.finish_reason, row.nats)


def _new_row(job: Job, missing: bytes, nats: list[float] | None, boundary: str) -> _Row:
    generator = torch.Generator()
    generator.manual_seed(job.seed)
    return _Row(job, boundary, missing, nats, generator)


def _groups(jobs: list[Job]) -> list[tuple[str, int]]:
    """The branches of a read batch: heal, and plain by the number of tokens that must be read again."""
    return [("heal", 0)] + [("plain", count) for count in sorted({len(job.removed) for job in jobs})]


def _member(job: Job, boundary: str, num_removed: int, done: set[tuple[str, str]]) -> bool:
    if boundary not in job.boundaries or (job.key, boundary) in done:
        return False
    return boundary == "heal" or len(job.removed) == num_removed


def _pad(sequences: list[list[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and mask, [B, T], padded with 0 on one side."""
    length = max(map(len, sequences))
    ids, mask = (
        torch.zeros(len(sequences), length, dtype=torch.long),
        torch.zeros(len(sequences), length, dtype=torch.long),
    )
    for i, sequence in enumerate(sequences):
        place = slice(length - len(sequence), length) if left else slice(0, len(sequence))
        ids[i, place] = torch.tensor(sequence, dtype=torch.long)
        mask[i, place] = 1
    return ids.to(device), mask.to(device)


def _positions(mask: Tensor) -> Tensor:
    """Positions that count real tokens, [B, T]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _sample(logits: Tensor, settings: DecodeSettings, generator: torch.Generator) -> int:
    """Draw one index of logits [V]: the smallest set of most likely tokens with mass top_p, renormalised."""
    values, order = torch.sort(torch.softmax(logits.float() / settings.temperature, dim=-1), descending=True)
    cumulative = values.cumsum(dim=0)
    count = max(1, int((cumulative - values < settings.top_p).sum()))
    cumulative = cumulative[:count].cpu()
    draw = torch.rand((), generator=generator) * cumulative[-1]
    return int(order[min(int(torch.searchsorted(cumulative, draw, right=True)), count - 1)])
