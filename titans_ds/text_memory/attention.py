"""A base model's attention, seen and changed from outside: what its layers ask for, and a bias on stored keys.

transformers' models call the attention function that their configuration names. Inside of `attending` that is one of
ours. It computes what `sdpa` does, adds a bias per head and key where a layer has one, and keeps queries where asked.

Legend of shape suffixes: B batch, H key-value heads, Q query heads, T tokens, N stored keys, D width of a head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NAME = "titans_text_memory"  # of the attention function


@dataclass
class Attending:
    """What one pass does with attention.

    Args:
        bias: by layer, what is added to the logits of the first N keys, [H, N]; later keys get none.
        keep_queries: keep every layer's rotated queries.
        queries: by layer, [Q, T, D] of the last call.
    """

    bias: dict[int, Tensor] = field(default_factory=dict)
    keep_queries: bool = False
    queries: dict[int, Tensor] = field(default_factory=dict)


_ACTIVE: list[Attending] = []


@contextlib.contextmanager
def attending(base: nn.Module, what: Attending) -> Iterator[Attending]:
    """Inside, the base model's attention layers follow `what`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config: Any = base.config.get_text_config()  # type: ignore[operator, union-attr]
    before = config._attn_implementation
    _ACTIVE.append(what)
    try:
        config._attn_implementation = NAME
        yield what
    finally:
        config._attn_implementation = before
        _ACTIVE.pop()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' functions have it: query [B, Q, T, D], key and value [B, H, N, D] -> [B, T, Q, D]."""
    what, layer = _ACTIVE[-1], int(module.layer_idx)  # type: ignore[arg-type]
    if what.keep_queries:
        what.queries[layer] = query[0].detach()
    groups, tokens, total = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(tokens, total, dtype=torch.bool, device=query.device).tril(total - tokens)
    mask = attention_mask[..., :total]
    if (bias_HN := what.bias.get(layer)) is not None:
        added = F.pad(bias_HN, (0, total - bias_HN.shape[1])).repeat_interleave(groups, 0)[None, :, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=torch.float32).masked_fill(~mask, -torch.inf)
        mask = (mask + added).to(query.dtype)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    read = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return read.transpose(1, 2).contiguous(), None
