"""Rows in and out of a key-value cache: what lets finished samples leave a batch and new ones enter it.

Works on the layers that grow by concatenation (full attention) and on those of fixed size (linear attention: DeltaNet,
Mamba). A cache with other layers (sliding windows) can lose rows but not take any in: `can_join` says so, and such
a model is decoded batch after batch.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer, LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

_JOINABLE = (DynamicLayer, LinearAttentionLayer, LinearAttentionAndFullAttentionLayer)


def can_join(cache: Any) -> bool:
    """Return whether rows can be added to this cache."""
    return all(type(layer) in _JOINABLE for layer in getattr(cache, "layers", [None]))


def fork(cache: Any) -> Any:
    """Return a copy that can be continued on its own."""
    return copy.deepcopy(cache)


def select_rows(cache: Any, rows: Tensor) -> None:
    """Keep the given rows, in that order."""
    cache.reorder_cache(rows)


def keep_last(cache: Any, num_tokens: int) -> None:
    """Drop the oldest positions beyond `num_tokens`: columns that are padding for every row left."""
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            layer.keys = layer.keys[..., -num_tokens:, :]
            layer.values = layer.values[..., -num_tokens:, :]


def join(first: Any, second: Any, length: int) -> Any:
    """Append the rows of `second` to `first`, both left-padded to `length` positions. Returns `first`."""
    for mine, theirs in zip(first.layers, second.layers, strict=True):
        if isinstance(mine, DynamicLayer) and mine.is_initialized:
            mine.keys = torch.cat([_widen(mine.keys, length), _widen(theirs.keys, length)])
            mine.values = torch.cat([_widen(mine.values, length), _widen(theirs.values, length)])
        if isinstance(mine, LinearAttentionLayer):
            for index in range(mine.number_of_states):
                if mine.is_conv_states_initialized[index]:
                    mine.conv_states[index] = torch.cat([mine.conv_states[index], theirs.conv_states[index]])
                if mine.is_recurrent_states_initialized[index]:
                    states = [mine.recurrent_states[index], theirs.recurrent_states[index]]
                    mine.recurrent_states[index] = torch.cat(states)
    return first


def _widen(tensor: Tensor, length: int) -> Tensor:
    """[B, H, T, D] -> [B, H, length, D], zeros on the left."""
    return pad(tensor, (0, 0, length - tensor.shape[-2], 0))
