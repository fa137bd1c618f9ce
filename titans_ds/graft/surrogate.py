"""The second phase of second-order training, for one layer: see titans_ds.memory.interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titans_ds.graft.injection import GraftedMemory
from titans_ds.memory import Answer, LayerState, LayerTrace, Pass, SegmentTrace


def layer_surrogate(
    grafted: GraftedMemory,
    index: int,
    traces: Sequence[SegmentTrace],
    state: dict[int, LayerState] | None,
    plan: Pass,
    checkpointing: bool,
) -> Tensor:
    """<f_W(q), g> summed over a window's segments, [1], with the graph of the writes.

    Args:
        grafted: the layer's memory.
        index: of the layer.
        traces: of the segments.
        state: by layer, before the first segment; None for W_0.
        plan: of the window's passes.
        checkpointing: write each segment a third time in the backward pass, instead of keeping its graph; not where
            that is little more than what it wrote, and a third time takes longer than it is worth.
    """
    checkpointing = checkpointing and not grafted.memory.keeps_little(plan)
    chunked = grafted.memory.reads_own_writes
    losses, layer = [], None if state is None else dict(state[index])
    for number, trace in enumerate(traces):
        # Without chunks no read follows the last write.
        write = chunked or number < len(traces) - 1
        own = trace.layers[index].rewriting()
        inputs = (own, layer, trace.mask, trace.reset, replace(plan, write=write))
        if checkpointing:
            loss, layer = checkpoint(_recomputed, grafted, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            loss, layer = _write(grafted, *inputs)
        losses.append(loss)
        layer = dict(layer)
    return torch.cat(losses)


def _write(
    grafted: GraftedMemory,
    trace: LayerTrace,
    state: LayerState | None,
    mask: Tensor | None,
    reset: Tensor | None,
    plan: Pass,
) -> tuple[Tensor, LayerState]:
    """A layer's surrogate, and the state after it. The hidden states may wait in host memory."""
    hidden = trace.hidden.to(trace.device, non_blocking=True)
    answer: Answer = grafted(hidden, state, mask, reset, plan, trace)[0]
    return answer.read, answer.state


def _recomputed(grafted: GraftedMemory, *inputs: Any) -> tuple[Tensor, LayerState]:
    """What is done again in the backward pass, as soon as a tensor is missing: at once, for the product needs one.

    Under ZeRO-3 a backward pass that is inside the memory's modules already would lose the parameters it gathered for
    them, when the same modules' forward passes are done a second time and let go of them.
    """
    loss, layer = _write(grafted, *inputs)
    return loss * torch.ones_like(loss), layer
