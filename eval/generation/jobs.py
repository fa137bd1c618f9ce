"""What is asked of a decoder, what it answers, and the rows in between.

Shapes: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .likelihood import ScoredTarget


class Memory(Protocol):
    """What the decoder asks of a batch of memory states (`titans_ds.MemoryState`)."""

    def select(self, indices: Tensor) -> Memory: ...

    def map(self, function: Callable[[Tensor], Tensor]) -> Memory: ...

    @property
    def layers(self) -> dict[int, dict[str, Tensor]]: ...


class Forward(Protocol):
    """One forward pass: ids [B, T'], mask [B, T], positions [B, T'], cache, memory -> logits [B, T' or 1, V], and the
    cache and memory to go on with (a memory may carry the last tokens read, beside what was written).

    In a step of fixed shapes the mask is the attention's own, [B, 1, T', T], as `attention_mask` makes it.
    """

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, memory: Any, last_only: bool
    ) -> tuple[Tensor, Any, Any]: ...

    def memory_for(self, primings: Sequence[tuple[str, ...]]) -> Any:
        """Return the memories of a batch, each after reading its texts; None on a path without memory."""

    def join_memory(self, first: Any, second: Any) -> Any:
        """Return one batch of memories out of two."""

    def fixed_shape_obstacle(self) -> str | None:
        """Why this model cannot decode in steps of fixed shapes; None where it can."""

    def reading_copy(self, memory: Any) -> Any:
        """Return of a memory what reads need, in the type they need it in."""

    def attention_mask(self, seen: Tensor) -> Tensor:
        """Return `seen`, bool [B, 1, T', T], as the model's attention takes it."""


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

    def most_positions(self, max_new_tokens: int) -> int:
        """How many tokens a row of this job can come to hold: each that heals writes a byte or more."""
        return len(self.prefix) + max(len(self.removed), len(self.healed_text)) + max_new_tokens


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
class Row:
    """A job under one boundary, while it is decoded."""

    job: Job
    boundary: str
    missing: bytes
    nats: list[float] | None
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    num_new: int = 0
    finish_reason: str = ""

    @property
    def num_read(self) -> int:
        """Tokens of its prompt that were read before the first one was chosen."""
        return len(self.job.prefix) + (len(self.job.removed) if self.boundary == "plain" else 0)


@dataclass
class Batch:
    """Rows that were read together: their cache, mask [B, T], logits of the next token [B, V], memory of B rows."""

    rows: list[Row]
    cache: Any
    mask: Tensor
    logits: Tensor
    memory: Any


class Decoding(Protocol):
    """Rows that decode together."""

    rows: list[Row]

    @property
    def takes_rows(self) -> bool:
        """Whether rows can enter while others are being decoded."""

    def enter(self, batch: Batch) -> None:
        """Take rows in."""

    def keep(self, left: list[int]) -> None:
        """Let go of all rows but these, by their places in `rows`."""

    def best(self) -> list[int]:
        """The most likely next token of each row."""

    def logits(self, row: int) -> Tensor:
        """Logits of a row's next token, [V]."""

    def read(self, tokens: list[int]) -> None:
        """Read one token a row."""


def new_row(job: Job, missing: bytes, nats: list[float] | None, boundary: str) -> Row:
    """A row with a generator of its own."""
    generator = torch.Generator()
    generator.manual_seed(job.seed)
    return Row(job, boundary, missing, nats, generator)


def padded(sequences: list[list[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
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


def positions_of(mask: Tensor) -> Tensor:
    """Positions that count real tokens, [B, T]."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
