"""A cache of fixed shapes: what a step needs to be captured once and replayed.

Built on transformers' own layers. `LinearAttentionLayer` (DeltaNet) updates its states in place already and is taken as
it is. `StaticLayer` (attention) has one length for all rows; here every row has its own, so that a row can leave and
another take its slot at any time, without moving what the others hold.

All buffers are allocated once, for the most rows and the longest row. A step for fewer or shorter rows works on views
of them, so steps of several sizes share one memory.

Shapes: R slots, C positions, H key-value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionLayer, StaticLayer


class RowsLayer(StaticLayer):
    """Keys and values where each row writes at a position of its own.

    Args:
        keys, values: buffers [R, H, C, D].
        lengths: positions taken so far, [R]; whoever runs the step keeps them.
    """

    def __init__(self, keys: Tensor, values: Tensor, lengths: Tensor) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values, self.cumulative_length = keys, values, lengths
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._rows = torch.arange(keys.shape[0], device=keys.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token a row, [R, H, 1, D], in place; returns all keys and values."""
        self.keys[self._rows, :, self.cumulative_length] = key_states.squeeze(2)
        self.values[self._rows, :, self.cumulative_length] = value_states.squeeze(2)
        return self.keys, self.values


def obstacle(cache: Any) -> str | None:
    """Why a cache that was filled by a prefill cannot be made static; None where it can."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return f"its cache is a {type(cache).__name__} without layers"
    other = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, LinearAttentionLayer)}
    if other:
        return f"its cache has layers of the kind {', '.join(sorted(other))}"
    return None


class StaticBuffers:
    """The buffers of a cache, for up to R rows of up to C positions.

    Args:
        like: a cache filled by a prefill, whose layers tell the shapes.
        num_slots, capacity: R and C.
    """

    def __init__(self, like: Any, num_slots: int, capacity: int) -> None:
        self._layers = [_LayerBuffers(layer, num_slots, capacity) for layer in like.layers]

    def view(self, num_slots: int, capacity: int, lengths: Tensor) -> Cache:
        """A cache over the first slots and positions; `lengths` [num_slots] says where each row writes."""
        return Cache(layers=[layer.view(num_slots, capacity, lengths) for layer in self._layers])

    def put(self, slots: Sequence[int], lengths: Sequence[int], cache: Any) -> None:
        """Copy the rows of a left-padded dynamic cache into slots, without the padding."""
        for mine, theirs in zip(self._layers, cache.layers, strict=True):
            mine.put(slots, lengths, theirs)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one slot's row of `length` positions to another slot."""
        for layer in self._layers:
            layer.move(source, target, length)


class _LayerBuffers:
    """One layer: keys and values, or the states of linear attention by index."""

    def __init__(self, like: Any, num_slots: int, capacity: int) -> None:
        self._attention: list[Tensor] = []
        self._conv: dict[int, Tensor] = {}
        self._recurrent: dict[int, Tensor] = {}
        self._conv_kernel_size: dict[int, int | None] = {}
        self._number_of_states = 0
        if isinstance(like, LinearAttentionLayer):
            self._number_of_states = like.number_of_states
            self._conv_kernel_size = dict(like.conv_kernel_size)
            self._conv = {i: _empty_like(t, num_slots) for i, t in like.conv_states.items() if t is not None}
            self._recurrent = {i: _empty_like(t, num_slots) for i, t in like.recurrent_states.items() if t is not None}
        elif like.is_initialized:
            self._attention = [
                t.new_zeros(num_slots, t.shape[1], capacity, t.shape[3]) for t in (like.keys, like.values)
            ]

    def view(self, num_slots: int, capacity: int, lengths: Tensor) -> Any:
        if self._attention:
            return RowsLayer(*(t[:num_slots, :, :capacity] for t in self._attention), lengths)
        if not self._number_of_states:
            return DynamicLayer()  # a layer that keeps nothing
        layer = LinearAttentionLayer(self._number_of_states)
        for states, view, initialized in (
            (self._conv, layer.conv_states, layer.is_conv_states_initialized),
            (self._recurrent, layer.recurrent_states, layer.is_recurrent_states_initialized),
        ):
            for index, tensor in states.items():
                view[index], initialized[index], layer.has_previous_state[index] = tensor[:num_slots], True, True
                layer.dtype, layer.device = tensor.dtype, tensor.device
        layer.conv_kernel_size = dict(self._conv_kernel_size)
        return layer

    def put(self, slots: Sequence[int], lengths: Sequence[int], layer: Any) -> None:
        if self._attention:
            for mine, theirs in zip(self._attention, (layer.keys, layer.values), strict=True):
                for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
                    mine[slot, :, :length] = theirs[row, :, theirs.shape[2] - length :]
                    mine[slot, :, length:] = 0  # masked, but a NaN of the row before would pass: 0 times it is NaN
        for states, given in ((self._conv, "conv_states"), (self._recurrent, "recurrent_states")):
            for index, tensor in states.items():
                tensor[torch.tensor(slots, device=tensor.device)] = getattr(layer, given)[index]

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in self._attention:
            tensor[target, :, :length] = tensor[source, :, :length]
            tensor[target, :, length:] = 0
        for tensor in (*self._conv.values(), *self._recurrent.values()):
            tensor[target] = tensor[source]


def _empty_like(tensor: Tensor, num_slots: int) -> Tensor:
    return tensor.new_zeros(num_slots, *tensor.shape[1:])
