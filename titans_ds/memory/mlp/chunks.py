"""Chunks inside and across calls: a stream of written tokens per sample, cut every chunk_size tokens.

A sample's stream is the tokens of its unfinished chunk (carried in the state), then the tokens that this call writes,
padding left out. A token reads the fast weights after the last chunk that was finished before its own chunk; one that
is not written reads those that the call started with. Chunks are finished where the stream says so, never at the end of
a call: so a text may be cut into calls anywhere.

Legend of shape suffixes: B batch, T tokens, S slots of the stream = R chunks of C, D any width, N batch x heads.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.memory.mlp import kernels, network
from titans_ds.memory.mlp.gates import Coefficients
from titans_ds.memory.mlp.kernels.chunkwise import run_chunk
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.mlp.rule import Inner, Pairs, choose, write_chunk
from titans_ds.memory.positions import Positions, take


@dataclass(frozen=True)
class Stream:
    """The layout of one call's tokens in chunks.

    Args:
        positions: which tokens are written.
        chunk_size: C.
        count_B: tokens carried of each sample's unfinished chunk, 0 to C - 1, in any dtype.
        fresh: nothing is carried by any sample, known without asking the device.
    """

    positions: Positions
    chunk_size: int
    count_B: Tensor
    fresh: bool = False

    @functools.cached_property
    def pending_B(self) -> Tensor:
        """Tokens carried, as an index."""
        return self.count_B.long()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.positions.num_tokens

    @property
    def aligned(self) -> bool:
        """Whether slot and position are the same: nothing is carried, and every token is written."""
        return self.fresh and self.positions.all_written

    @property
    def full(self) -> bool:
        """Whether, beside that, the last chunk ends where the call does: every slot is taken, every chunk finished."""
        return self.aligned and self.num_tokens % self.chunk_size == 0

    @property
    def num_reads(self) -> int:
        """Chunks R that a token of this call can be in, whatever is pending (known without asking the device)."""
        if self.fresh:
            return self.num_writes
        return (self.num_tokens + self.chunk_size - 2) // self.chunk_size + 1

    @property
    def num_writes(self) -> int:
        """Chunks that can be finished in this call."""
        return (self.num_tokens + self.chunk_size - 1) // self.chunk_size

    @property
    def num_certain(self) -> int:
        """Chunks that every sample finishes, as far as is known without asking the device."""
        return self.num_tokens // self.chunk_size if self.positions.all_written else 0

    @property
    def total_B(self) -> Tensor:
        """Tokens of the stream."""
        return self.pending_B + self.positions.count_B

    @property
    def valid_BS(self) -> Tensor:
        """True where a slot holds a token."""
        return self._slots() < self.total_B.unsqueeze(1)

    @property
    def finished_BR(self) -> Tensor:
        """True where a chunk is finished in this call."""
        ends = (torch.arange(self.num_reads, device=self.pending_B.device) + 1) * self.chunk_size
        return ends <= self.total_B.unsqueeze(1)

    def lay_out(self, pending: Tensor | None, new_BTD: Tensor) -> Tensor:
        """Carried tokens (zeros where None) and new ones by slot, [B, S, D]; zeros where there is none.

        New ones by head, [B, T, heads, d], stay so where slot and position are the same and no slot is empty.
        """
        if self.full:
            return new_BTD
        new_BTD = new_BTD.flatten(2)
        if self.aligned:
            return _padded(new_BTD, self.num_reads * self.chunk_size)
        if pending is None:
            pending = new_BTD.new_zeros(new_BTD.shape[0], self.chunk_size - 1, new_BTD.shape[-1])
        slots = self._slots()
        carried = slots < self.pending_B.unsqueeze(1)
        place = (slots - self.pending_B.unsqueeze(1)).clamp(0, self.num_tokens - 1)
        index = torch.where(carried, slots, self.chunk_size - 1 + self.positions.order_BT.gather(1, place))
        laid = take(torch.cat([pending.to(new_BTD.dtype), new_BTD], dim=1), index)
        return laid.masked_fill(~self.valid_BS.unsqueeze(-1), 0)

    def left_over(self, laid_BSD: Tensor) -> Tensor:
        """The unfinished chunk's tokens after this call, [B, C - 1, D], zeros where there is none."""
        if self.aligned:
            start = self.num_tokens // self.chunk_size * self.chunk_size
            return _padded(laid_BSD[:, start : self.num_tokens].flatten(2), self.chunk_size - 1)
        start_B = self.total_B // self.chunk_size * self.chunk_size
        index = start_B.unsqueeze(1) + torch.arange(self.chunk_size - 1, device=start_B.device)
        kept = take(laid_BSD, index.clamp(max=laid_BSD.shape[1] - 1))
        return kept.masked_fill(~(index < self.total_B.unsqueeze(1)).unsqueeze(-1), 0)

    def gather(self, laid_BSD: Tensor) -> Tensor:
        """By slot back to by position: [B, T, D]; meaningless where a token is not written."""
        if self.aligned:
            return laid_BSD[:, : self.num_tokens]
        index = self.pending_B.unsqueeze(1) + self.positions.before_BT
        return take(laid_BSD, index.clamp(max=laid_BSD.shape[1] - 1))

    def _slots(self) -> Tensor:
        size = self.num_reads * self.chunk_size
        return torch.arange(size, device=self.pending_B.device).expand(self.pending_B.shape[0], -1)


def _padded(x_BTD: Tensor, length: int) -> Tensor:
    return F.pad(x_BTD, (0, 0, 0, length - x_BTD.shape[1])) if length > x_BTD.shape[1] else x_BTD


@dataclass(frozen=True)
class Work:
    """What the chunks of a call hold, [N, R, C, …]; without chunks the whole call is one (R = 1).

    Args:
        pairs: keys and values.
        active_NRC: true where there is a pair to store; None: everywhere.
        coefficients: of all chunks.
        finished_NR: true where a chunk is finished and has something to write; None: everywhere.
        num_writes: chunks that can be finished.
        num_certain: chunks at the start that are, for every sample.
    """

    pairs: Pairs
    active_NRC: Tensor | None
    coefficients: Coefficients
    finished_NR: Tensor | None
    num_writes: int
    num_certain: int

    def chunk(self, index: int) -> Pairs:
        """Keys and values of one chunk, [N, C, D]."""
        return Pairs(self.pairs.keys[:, index], self.pairs.values[:, index])


def run(
    fast: Fast,
    work: Work,
    inner: Inner,
    queries_NRCD: Tensor | None,
    writing: Callable[[], contextlib.AbstractContextManager[None]],
) -> tuple[Tensor | None, Fast]:
    """Chunk after chunk: read with the weights so far, then write.

    Args:
        fast: at the start.
        work: the chunks.
        inner: the inner problem.
        queries_NRCD: by chunk; None reads nothing.
        writing: context of the writes; `torch.no_grad` in first order.

    Returns:
        reads [N, R, C, D] (or None), and the fast weights after the last finished chunk.
    """
    backend = kernels.backend(fast, inner, work.pairs.keys)
    if backend != "loop":
        with writing():
            graph = torch.is_grad_enabled()
        given = (fast, work.pairs, work.coefficients, work.finished_NR, inner, queries_NRCD, graph)
        return run_chunk(*given, triton=backend == "triton")
    reads: list[Tensor] = []
    for index in range(work.num_writes if queries_NRCD is None else queries_NRCD.shape[1]):
        if queries_NRCD is not None:
            reads.append(network.forward(fast.weights, queries_NRCD[:, index], inner.form))
        if index < work.num_writes and inner.inner_steps > 0:
            with writing():
                new = write_chunk(fast, work.chunk(index), work.coefficients.chunk(index), inner)
                if index >= work.num_certain and work.finished_NR is not None:
                    new = choose(work.finished_NR[:, index], new, fast)
                fast = new
    return (torch.stack(reads, dim=1) if reads else None), fast
