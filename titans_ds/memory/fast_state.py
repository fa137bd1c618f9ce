"""Between a layer's state (a dict of tensors with a leading batch dimension) and what the write rule works on.

Legend of shape suffixes: B batch, N batch x heads, C tokens of a chunk, D memory dim, H model width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_ds.config import MemoryConfig
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.state import LayerState

_GROUPS = {"weights": "w", "momentum": "s", "second": "v"}


def first_state(
    initial_weights: list[Tensor], batch_size: int, like_BTH: Tensor, config: MemoryConfig, tail_length: int
) -> LayerState:
    """The state of an unwritten memory: see titans_ds.memory.state for its entries.

    Args:
        initial_weights: W_0 of each matrix.
        batch_size: number of samples.
        like_BTH: hidden states, for device, dtype and width.
        config: of the memory.
        tail_length: written tokens that the convolutions look back.
    """
    state: LayerState = {}
    for level, weight in enumerate(initial_weights):
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        state[f"w{level}"] = wide.expand(batch_size, *wide.shape)
        for letter in ("s" * config.rule.has_momentum, "v" * (config.rule.optimizer == "adamw")):
            if letter:
                own = batch_size if config.heads > 1 else 1  # with several heads `unpack` would copy them anyway
                state[f"{letter}{level}"] = wide.new_zeros(own, *wide.shape).expand(batch_size, *wide.shape)
    numbers = torch.zeros(batch_size, dtype=state["w0"].dtype, device=like_BTH.device)
    if config.rule.optimizer == "adamw":
        state["inner_step"] = numbers
    width = like_BTH.shape[-1]
    if config.token_shift:
        state["last_hidden"] = like_BTH.new_zeros(batch_size, width)
        state["has_last"] = torch.zeros(batch_size, device=like_BTH.device)
    if tail_length:
        state["tail_hidden"] = like_BTH.new_zeros(batch_size, tail_length, width)
    if config.rule.chunk_size is not None:
        state |= _no_pending(batch_size, like_BTH, config, numbers)
    return state


def _no_pending(batch_size: int, like_BTH: Tensor, config: MemoryConfig, numbers: Tensor) -> LayerState:
    held = (config.rule.chunk_size or 1) - 1
    gates = len(config.rule.token_gates) * config.heads
    return {
        "pending_keys": like_BTH.new_zeros(batch_size, held, config.dim),
        "pending_values": like_BTH.new_zeros(batch_size, held, config.dim),
        "pending_gates": numbers.new_zeros(batch_size, held, gates),
        "pending_paired": numbers.new_zeros(batch_size, held, 1),
        "pending_count": numbers,
    }


def unpack(state: LayerState, config: MemoryConfig) -> Fast:
    """The part of a state that writes change, heads beside the batch."""

    def group(letter: str) -> tuple[Tensor, ...]:
        tensors = [state[f"{letter}{level}"] for level in range(config.depth) if f"{letter}{level}" in state]
        return tuple(t if config.heads == 1 else t.flatten(0, 1) for t in tensors)

    steps = state.get("inner_step")
    if steps is not None:
        steps = steps.repeat_interleave(config.heads)
    return Fast(group("w"), group("s"), group("v"), steps)


def pack(fast: Fast, config: MemoryConfig) -> LayerState:
    """The inverse of `unpack`."""
    state: LayerState = {}
    for name, letter in _GROUPS.items():
        for level, tensor in enumerate(getattr(fast, name)):
            state[f"{letter}{level}"] = tensor if config.heads == 1 else torch.unflatten(tensor, 0, (-1, config.heads))
    if fast.steps is not None:
        state["inner_step"] = fast.steps[:: config.heads]
    return state
