"""Attention of one query a row over a masked cache, without a copy of the cache for every query head.

Where several query heads share a key-value head, transformers before 5.23 repeats the keys and values for each as soon
as there is a mask: at 9B sizes that moves more memory than all weights. One query leaves the other way open: the heads
that share a key take the place of queries.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from titans_ds.graft.mac import attend_with_memory

LIBRARY_PACKS = hasattr(sdpa_attention, "pack_gqa")


def attend(
    module: Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: `sdpa`, with packed queries where there is one a row.

    Args:
        module: the attention module.
        query: [B, heads, T, D].
        key, value: [B, key-value heads, S, D].
        attention_mask: [B, 1, T, S], bool or additive.
        dropout: 0, but in training.
        scaling: of the logits.
        kwargs: handed on.

    Returns:
        [B, T, heads, D], and no weights.
    """
    groups = query.shape[1] // key.shape[1]
    if query.shape[2] != 1 or groups == 1 or attention_mask is None or attention_mask.shape[1] != 1:
        given = (module, query, key, value, attention_mask)
        return sdpa_attention.sdpa_attention_forward(*given, dropout=dropout, scaling=scaling, **kwargs)
    packed = query.unflatten(1, (-1, groups)).squeeze(3)  # [B, key-value heads, groups, D]
    output = scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
    return output.flatten(1, 2).unsqueeze(1), None


@contextlib.contextmanager
def packed_queries() -> Iterator[None]:
    """Inside, models whose attention is `sdpa`, with memory or without, pack their queries."""
    replaced: dict[str, Callable[..., Any]] = {
        "sdpa": attend,
        "titans_sdpa": functools.partial(attend_with_memory, attend),
    }
    local = ALL_ATTENTION_FUNCTIONS._local_mapping  # what stands in it goes before what is registered for all
    before = dict(local)
    local.update(replaced)
    try:
        yield
    finally:
        local.clear()
        local.update(before)
