"""Rows that decode together in slots of fixed buffers, a step of fixed shapes at a time: fast on a GPU.

Everything that a step reads and writes stays where it is: the cache, the memories, the tokens, the lengths. So a step
is captured once as a CUDA graph for each (slots, positions) and replayed; elsewhere the same function runs as it is. A
row that has finished leaves a dead slot, which computes something that nobody reads until another row takes it. Once
half the slots would do, the rows move together and the step is that for half as many.

The host tells the step tokens and lengths, and gets the most likely tokens back: one small transfer each way.

Shapes: R slots, C positions, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titans_ds.cuda_graphs.capture import CudaCapture
from titans_ds.cuda_graphs.replay import StaticFunction

from .jobs import Batch, Forward, Row
from .static_cache import StaticBuffers, obstacle

_LOG = logging.getLogger(__name__)
_ALIGNMENT = 64  # positions; attention kernels want the mask's rows aligned
_LEAST_CAPACITY = 256


class StaticRows:
    """Slots, and the rows in them.

    Args:
        forward: the model.
        like: rows that were read, of which only the shapes are taken.
        num_slots: the most rows at a time.
        capacity: the most positions that a row comes to hold.
        max_new_tokens: of a row, beside what it writes again of its prompt.
    """

    takes_rows = True

    def __init__(self, forward: Forward, like: Batch, num_slots: int, capacity: int, max_new_tokens: int) -> None:
        device = like.logits.device
        self.rows: list[Row] = []
        self._slots: list[int] = []
        self._forward, self._max_new_tokens = forward, max_new_tokens
        self._slot_sizes = _halvings(num_slots, 1, 1)
        self._capacities = _halvings(capacity, _ALIGNMENT, _LEAST_CAPACITY)
        self._cache = StaticBuffers(like.cache, num_slots, self._capacities[-1])
        self._memory = None if like.memory is None else _empty_memory(forward.reading_copy(like.memory), num_slots)
        self._columns = torch.arange(self._capacities[-1], device=device)
        self._given = torch.zeros(2, num_slots, dtype=torch.long, device=device)  # tokens, and lengths before them
        self._staged = torch.zeros(2, num_slots, dtype=torch.long, pin_memory=device.type == "cuda")
        self._logits = like.logits.new_zeros(num_slots, like.logits.shape[-1])
        self._best = torch.zeros(num_slots, dtype=torch.long, device=device)
        self._capture = CudaCapture(device, "decode steps") if device.type == "cuda" else None
        self._steps: dict[tuple[int, int], StaticFunction] = {}

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Slots and positions of the steps made so far."""
        return list(self._steps)

    # --- rows in and out ---------------------------------------------------------------------------------------------

    def enter(self, batch: Batch) -> None:
        """Copy rows into free slots, lowest first."""
        slots = [slot for slot in range(self._slot_sizes[-1]) if slot not in self._slots][: len(batch.rows)]
        lengths = [row.num_read for row in batch.rows]
        self._cache.put(slots, lengths, batch.cache)
        index = torch.tensor(slots, device=self._logits.device)
        if self._memory is not None:
            for mine, theirs in _pairs(self._memory, self._forward.reading_copy(batch.memory)):
                mine[index] = theirs
        self._logits[index] = batch.logits
        self._best[index] = batch.logits.argmax(dim=-1)
        self.rows += batch.rows
        self._slots += slots

    def keep(self, left: list[int]) -> None:
        """Let go of all rows but these; where fewer slots would do, move the rest together."""
        self.rows, self._slots = [self.rows[i] for i in left], [self._slots[i] for i in left]
        size = _least(self._slot_sizes, len(self.rows))
        free = [slot for slot in range(size) if slot not in self._slots]
        for row, slot in enumerate(self._slots):
            if slot >= size:
                self._slots[row] = self._move(row, slot, free.pop(0))

    def _move(self, row: int, source: int, target: int) -> int:
        self._cache.move(source, target, self._length(self.rows[row]))
        for tensor in (self._logits, self._best, *_tensors(self._memory)):
            tensor[target] = tensor[source]
        return target

    # --- a step ------------------------------------------------------------------------------------------------------

    def best(self) -> list[int]:
        """The most likely next token of each row."""
        best = self._best.tolist()
        return [best[slot] for slot in self._slots]

    def logits(self, row: int) -> Tensor:
        """Logits of a row's next token, [V]; until the next step."""
        return self._logits[self._slots[row]]

    def read(self, tokens: list[int]) -> None:
        """Read one token a row, the last of its tokens."""
        num_slots = _least(self._slot_sizes, max(self._slots) + 1)
        capacity = _least(self._capacities, max(r.job.most_positions(self._max_new_tokens) for r in self.rows))
        given = [[0] * self._staged.shape[1] for _ in range(2)]
        for row, slot, token in zip(self.rows, self._slots, tokens, strict=True):
            given[0][slot], given[1][slot] = token, self._length(row)
        self._staged.copy_(torch.tensor(given))
        self._given.copy_(self._staged, non_blocking=True)
        self._step(num_slots, capacity)()

    def _length(self, row: Row) -> int:
        """Positions that a row has taken: its prompt, and the tokens chosen but for the last."""
        return row.num_read + len(row.tokens) - 1

    def _step(self, num_slots: int, capacity: int) -> StaticFunction:
        if (num_slots, capacity) not in self._steps:
            _LOG.debug("decode step for %d rows of up to %d positions", num_slots, capacity)
            self._steps[num_slots, capacity] = StaticFunction(self._function(num_slots, capacity), self._capture)
        return self._steps[num_slots, capacity]

    def _function(self, num_slots: int, capacity: int) -> Any:
        """The step on the first slots and positions. Nothing in it may wait for the device.

        It holds the tensors, not these rows, which would hold each other then and outlive their last user.
        """
        ids, lengths = self._given[0, :num_slots], self._given[1, :num_slots]
        cache = self._cache.view(num_slots, capacity, lengths)
        memory = None if self._memory is None else self._memory.map(lambda t: t[:num_slots])
        forward, columns = self._forward, self._columns[:capacity]
        last, best = self._logits[:num_slots], self._best[:num_slots]

        def step() -> None:
            seen = columns <= lengths[:, None]
            mask = forward.attention_mask(seen[:, None, None])
            logits, _, moved = forward(ids[:, None], mask, lengths[:, None], cache, memory, last_only=True)
            last.copy_(logits[:, -1])
            torch.argmax(last, dim=-1, out=best)
            for mine, new in _pairs(memory, moved):
                if new is not mine:  # the tokens that convolved queries look back at
                    mine.copy_(new)

        return step


def reason_against(forward: Forward, cache: Any) -> str | None:
    """Why rows of this model cannot decode in fixed shapes; None where they can."""
    return forward.fixed_shape_obstacle() or obstacle(cache)


def _halvings(most: int, multiple: int, least: int) -> list[int]:
    """`most`, its half, its quarter, … rounded up to a multiple, down to `least`; ascending."""
    sizes = {-(-most // multiple) * multiple}
    while (most := -(-most // 2)) >= least and most not in sizes:
        sizes.add(-(-most // multiple) * multiple)
    return sorted(sizes)


def _least(sizes: list[int], wanted: int) -> int:
    """The smallest size that holds `wanted`."""
    return next(size for size in sizes if size >= wanted)


def _tensors(memory: Any) -> list[Tensor]:
    return [] if memory is None else [tensor for layer in memory.layers.values() for tensor in layer.values()]


def _empty_memory(like: Any, num_slots: int) -> Any:
    return like.map(lambda t: t.new_zeros(num_slots, *t.shape[1:]))


def _pairs(first: Any, second: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The tensors of two memories by layer and name."""
    for index, layer in ({} if first is None else first.layers).items():
        for name, tensor in layer.items():
            yield tensor, second.layers[index][name]
