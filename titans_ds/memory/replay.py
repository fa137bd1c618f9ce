"""Second order in two phases: what the first phase of a segment leaves for the second.

Phase one, segment after segment: a read uses fast weights cut off from the writes, and its loss goes back through the
base model at once, up to the reads: g = dL / d f_W(q). The base model's graph is then free.
Phase two, at the end of a window: the writes are done again from the same (detached) hidden states, now with their
graph, and sum <f_W(q), g> goes back through them, at constant q and g. Its gradient is the one that the first phase
left out: the reads' part in W, to the last chunk that was read in the segment that wrote it.

Both together are the gradient of one graph over the window, since W enters the loss through the reads alone and the
writes see detached hidden states. Only one segment's base graph is alive at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Record:
    """What one layer needs to do a segment again.

    Args:
        hidden: its hidden states [B, T, H], detached.
        queries: what was asked, [B, T, D] (or [B, N, D]), detached.
        read_gradient: g, as the reads [N, T, d]; None until the loss has gone back.
    """

    hidden: Tensor
    queries: Tensor | None = None
    read_gradient: Tensor | None = None

    def __post_init__(self) -> None:
        self.device = self.hidden.device

    def listen(self, queries: Tensor, read: Tensor) -> Tensor:
        """The read, which leaves its gradient here in the backward pass."""
        self.queries = queries.detach()
        if not read.requires_grad:  # nothing before it learns
            read = read.detach().requires_grad_()
        read.register_hook(self.hear)  # type: ignore[no-untyped-call]
        return read

    def answer(self, read: Tensor) -> Tensor:
        """<f_W(q), g> over everything, [1], at least fp32; 0 where no loss came back."""
        dtype = torch.promote_types(read.dtype, torch.float32)
        if self.read_gradient is None:
            return torch.zeros(1, dtype=dtype, device=read.device)
        return (read.to(dtype) * self.read_gradient.to(read.device, dtype)).sum().view(1)

    def to_host(self) -> None:
        """Wait in host memory for the second phase."""
        self.hidden = to_host(self.hidden)
        self.queries = None if self.queries is None else to_host(self.queries)
        self.read_gradient = None if self.read_gradient is None else to_host(self.read_gradient)

    def hear(self, gradient: Tensor) -> None:
        """Take g."""
        self.read_gradient = gradient.detach()


@dataclass
class Tape:
    """What phase one leaves of one segment.

    Args:
        records: by layer index.
        mask, reset: as the segment's forward pass was given them.
    """

    records: dict[int, Record] = field(default_factory=dict)
    mask: Tensor | None = None
    reset: Tensor | None = None

    def record(self, index: int, hidden: Tensor) -> Record:
        """A layer's record. One of a recomputation (activation checkpointing) is not kept: the first one listens."""
        fresh = Record(hidden.detach())
        self.records.setdefault(index, fresh)
        return fresh

    def to_host(self) -> None:
        """Let all records wait in host memory."""
        for record in self.records.values():
            record.to_host()


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, of the same strides; from a GPU into pinned memory, in the order of its stream."""
    gpu = tensor.device.type == "cuda"
    copy = torch.empty_like(tensor, device="cpu", pin_memory=gpu)
    copy.copy_(tensor.detach(), non_blocking=gpu)
    return copy
