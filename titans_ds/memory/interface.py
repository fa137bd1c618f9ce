"""What is passed to a layer's memory.

Second order in two phases: what the first phase of a segment leaves for the second.

Phase one, segment after segment: a read uses fast weights cut off from the writes, and its loss goes back through the
base model at once, up to the reads: g = dL / d f_W(q). The base model's graph is then free.
Phase two, at the end of a window: the writes are done again from the same (detached) hidden states, now with their
graph, and sum <f_W(q), g> goes back through them, at constant q and g. Its gradient is the one that the first phase
left out: the reads' part in W, to the last chunk that was read in the segment that wrote it.

Both together are the gradient of one graph over the window, since W enters the loss through the reads alone and the
writes see detached hidden states. Only one segment's base graph is alive at a time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from titans_ds.errors import ConfigError
from titans_ds.memory.state import LayerState


@dataclass(frozen=True)
class Controls:
    """Changes to the rule at inference, for control experiments.

    Args:
        sign: 1 descends, -1 ascends (the `sign flip` control), 0 takes no gradient (forgetting goes on).
        inner_steps: gradient steps instead of the configured number; 0 writes nothing.
        query: `key` reads with the key projection instead of the query's.
    """

    sign: float = 1.0
    inner_steps: int | None = None
    query: Literal["trained", "key"] = "trained"

    def __post_init__(self) -> None:
        if self.inner_steps is not None and self.inner_steps < 0:
            raise ConfigError(f"controls: inner_steps is {self.inner_steps}; it must be 0 or more")
        if self.query not in ("trained", "key"):
            raise ConfigError(f"controls: query is {self.query!r}; expected 'trained' or 'key'")


UNCHANGED = Controls()  # the rule as it is


@dataclass(frozen=True)
class Pass:
    """What one forward pass does with the memories, beside reading: made where the pass is planned, the same for all.

    Args:
        write: compute the state after the segment; a chunked memory then reads what earlier chunks of it wrote.
        graph: keep the autograd graph of the write (second order).
        through_base: with `graph`, writes see the hidden states attached to the graph that made them.
        derived: with `graph`, take the hand-derived backward of the write, where there is one.
        stats: report inner losses, the write's norm and the gate.
        controls: changes for control experiments.
    """

    write: bool = True
    graph: bool = False
    through_base: bool = False
    derived: bool = True
    stats: bool = False
    controls: Controls = UNCHANGED

    def writing(self) -> contextlib.AbstractContextManager[None]:
        """The context that writes run in: with autograd at second order, without it otherwise."""
        return contextlib.nullcontext() if self.graph else torch.no_grad()


READ = Pass(write=False)
WRITE = Pass()


@dataclass
class LayerTrace:
    """What one layer needs to write a segment again.

    Args:
        hidden: its hidden states [B, T, H], detached.
        queries: what was asked, [B, T, D] (or [B, N, D]), detached.
        read_gradient: g, as the reads [N, T, d]; None until the loss has gone back.
        after: the state that the segment left; None where it is not kept.
        again: second phase: the segment is written again, and the answer is the surrogate <f_W(q), g> in place of the
            reads. First phase: reads are cut off from the writes, and leave their gradient here.
    """

    hidden: Tensor
    queries: Tensor | None = None
    read_gradient: Tensor | None = None
    after: LayerState | None = None
    again: bool = False

    def __post_init__(self) -> None:
        self.device = self.hidden.device

    def trace_read(self, queries: Tensor, read: Tensor) -> Tensor:
        """The read, which leaves its gradient here in the backward pass."""
        self.queries = queries.detach()
        if not read.requires_grad:  # nothing before it learns
            read = read.detach().requires_grad_()
        read.register_hook(self.set_read_gradient)  # type: ignore[no-untyped-call]
        return read

    def set_read_gradient(self, gradient: Tensor) -> None:
        """Keep g, the gradient of the loss in the reads, cut off from its graph."""
        self.read_gradient = gradient.detach()

    def rewriting(self) -> LayerTrace:
        """The trace, from now on of the second phase."""
        self.again = True
        return self

    def surrogate(self, read: Tensor) -> Tensor:
        """The surrogate loss <f_W(q), g> over everything, [1], at least fp32; 0 where no loss came back."""
        dtype = torch.promote_types(read.dtype, torch.float32)
        if self.read_gradient is None:
            return torch.zeros(1, dtype=dtype, device=read.device)
        return (read.to(dtype) * self.read_gradient.to(read.device, dtype)).sum().view(1)

    def to_host(self) -> None:
        """Wait in host memory for the second phase, which then makes the state anew."""
        self.after = None
        self.hidden = to_host(self.hidden)
        self.queries = None if self.queries is None else to_host(self.queries)
        self.read_gradient = None if self.read_gradient is None else to_host(self.read_gradient)


@dataclass
class SegmentTrace:
    """What phase one leaves of one segment.

    Args:
        layers: by layer index.
        mask, reset: as the segment's forward pass was given them.
    """

    layers: dict[int, LayerTrace] = field(default_factory=dict)
    mask: Tensor | None = None
    reset: Tensor | None = None

    def new_layer(self, index: int, hidden: Tensor) -> LayerTrace:
        """A trace of a layer's call. That of a recomputation (activation checkpointing) is not kept, but the first."""
        fresh = LayerTrace(hidden.detach())
        self.layers.setdefault(index, fresh)
        return fresh

    def to_host(self) -> None:
        """Let all layers' traces wait in host memory."""
        for layer in self.layers.values():
            layer.to_host()


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory, of the same strides; from a GPU into pinned memory, in the order of its stream."""
    gpu = tensor.device.type == "cuda"
    copy = torch.empty_like(tensor, device="cpu", pin_memory=gpu)
    copy.copy_(tensor.detach(), non_blocking=gpu)
    return copy
