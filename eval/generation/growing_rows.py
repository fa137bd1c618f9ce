"""Rows that decode together in a cache that grows by a position a step: any model, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import row_cache
from .jobs import Batch, Forward, Row, positions_of


class GrowingRows:
    """Left-padded rows; those that finish are cut out, those that enter are padded to the longest.

    Args:
        forward: the model.
        batch: the first rows.
    """

    def __init__(self, forward: Forward, batch: Batch) -> None:
        self._forward = forward
        self._batch = batch

    @property
    def rows(self) -> list[Row]:
        """Who decodes."""
        return self._batch.rows

    @property
    def takes_rows(self) -> bool:
        """Whether this kind of cache can take rows in."""
        return row_cache.can_join(self._batch.cache)

    def enter(self, batch: Batch) -> None:
        """Take rows in."""
        self._batch = joined(self._forward, self._batch, batch)

    def keep(self, left: list[int]) -> None:
        """Let go of all rows but these, and of the columns that are padding for all of them."""
        if not left:
            self._batch.rows = []
            return
        batch, index = self._batch, torch.tensor(left, device=self._batch.mask.device)
        row_cache.select_rows(batch.cache, index)
        mask = batch.mask[index]
        if row_cache.can_join(batch.cache):
            longest = int(mask.sum(dim=1).max())
            row_cache.keep_last(batch.cache, longest)
            mask = mask[:, -longest:]
        memory = None if batch.memory is None else batch.memory.select(index)
        self._batch = Batch([batch.rows[i] for i in left], batch.cache, mask, batch.logits[index], memory)

    def best(self) -> list[int]:
        """The most likely next token of each row."""
        return self._batch.logits.argmax(dim=-1).tolist()

    def logits(self, row: int) -> Tensor:
        """Logits of a row's next token, [V]."""
        return self._batch.logits[row]

    def read(self, tokens: list[int]) -> None:
        """Read one token a row."""
        ids = torch.tensor([[token] for token in tokens], device=self._batch.mask.device)
        self._batch = extended(self._forward, self._batch, ids)


def extended(forward: Forward, batch: Batch, ids: Tensor) -> Batch:
    """Read ids [B, n] after what the cache holds."""
    mask = torch.cat([batch.mask, torch.ones_like(ids)], dim=1)
    positions = positions_of(mask)[:, -ids.shape[1] :]
    logits, cache, memory = forward(ids, mask, positions, batch.cache, batch.memory, last_only=True)
    return Batch(batch.rows, cache, mask, logits[:, -1], memory)


def joined(forward: Forward, first: Batch, second: Batch) -> Batch:
    """One batch out of two, left-padded to the longer."""
    length = max(first.mask.shape[1], second.mask.shape[1])
    masks = [torch.nn.functional.pad(b.mask, (length - b.mask.shape[1], 0)) for b in (first, second)]
    cache = row_cache.join(first.cache, second.cache, length)
    memory = None if first.memory is None else forward.join_memory(first.memory, second.memory)
    logits = torch.cat([first.logits, second.logits])
    return Batch(first.rows + second.rows, cache, torch.cat(masks), logits, memory)
