"""The second phase of second-order training, for one layer: see titans_ds.memory.replay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from titans_ds.graft.injection import GraftedMemory
from titans_ds.memory import Access, LayerState, NeuralMemory, Tape, write_function


def replay(
    grafted: GraftedMemory,
    index: int,
    tapes: Sequence[Tape],
    state: dict[int, LayerState] | None,
    access: Access,
    checkpointing: bool,
) -> Tensor:
    """<f_W(q), g> summed over a window's segments, [1], with the graph of the writes.

    Args:
        grafted: the layer's memory.
        index: of the layer.
        tapes: of the segments.
        state: by layer, before the first segment; None for W_0.
        access: what every segment's call has in common.
        checkpointing: write each segment a third time in the backward pass, instead of keeping its graph; not where
            that is little more than what it wrote, and a third time takes longer than it is worth.
    """
    checkpointing = checkpointing and not _keeps_little(grafted.memory, access)
    chunked = grafted.memory.config.rule.chunk_size is not None
    answers, layer = [], None if state is None else dict(state[index])
    for number, tape in enumerate(tapes):
        # Without chunks no read follows the last write.
        write = chunked or number < len(tapes) - 1
        record = tape.records[index]
        inputs = (record.hidden, layer, tape.mask, tape.reset, replace(access, write=write, replay=record))
        if checkpointing:
            answer, layer = checkpoint(_recomputed, grafted, *inputs, use_reentrant=False, preserve_rng_state=False)
        else:
            answer, layer = _write(grafted, *inputs)
        answers.append(answer)
        layer = dict(layer)
    return torch.cat(answers)


def _keeps_little(memory: NeuralMemory, access: Access) -> bool:
    """Whether a write's graph is its keys, values and what it wrote: one chunk a segment, and back by hand."""
    config, rule = memory.config, memory.config.rule
    if not access.derived or rule.chunk_size is not None or config.residual_norm:
        return False  # without a look at a norm's parameters, which ZeRO-3 gathers inside the memory alone
    return write_function.covers(rule, memory.form(1))


def _write(grafted: GraftedMemory, hidden: Tensor, *inputs: Any) -> tuple[Tensor, LayerState]:
    """A record's answer, and the state after it. The hidden states may wait in host memory."""
    access: Access = inputs[-1]
    device = hidden.device if access.replay is None else access.replay.device
    answer, _, layer, _ = grafted(hidden.to(device, non_blocking=True), *inputs)
    return answer, layer


def _recomputed(grafted: GraftedMemory, *inputs: Any) -> tuple[Tensor, LayerState]:
    """What is done again in the backward pass, as soon as a tensor is missing: at once, for the product needs one.

    Under ZeRO-3 a backward pass that is inside the memory's modules already would lose the parameters it gathered for
    them, when the same modules' forward passes are done a second time and let go of them.
    """
    answer, layer = _write(grafted, *inputs)
    return answer * torch.ones_like(answer), layer
