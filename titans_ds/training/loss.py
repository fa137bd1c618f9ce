"""Cross-entropy over a large vocabulary, chunk by chunk: no [B, T, V] tensor ever exists.

Each chunk's logits are made, used and dropped; backward makes them again (non-reentrant checkpointing). The number of
chunks depends on shapes alone, so every rank makes as many passes through the language-model head; ZeRO-3 needs that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from titans_ds.training.segments import IGNORED


def token_losses(
    logits: Callable[[Tensor], Tensor], hidden_BTH: Tensor, labels_BT: Tensor, chunk_tokens: int
) -> Tensor:
    """Cross-entropy of every token, at least fp32 [B, T], in nats; 0 where the label is IGNORED.

    Args:
        logits: language-model head, [N, H] -> [N, V], called through the module's `__call__`.
        hidden_BTH: last hidden states.
        labels_BT: int64, already shifted.
        chunk_tokens: tokens whose logits exist at a time.
    """
    hidden, labels = hidden_BTH.flatten(0, 1), labels_BT.flatten()
    chunks = zip(torch.split(hidden, chunk_tokens), torch.split(labels, chunk_tokens), strict=True)
    losses = [_chunk(logits, h, l) for h, l in chunks]  # noqa: E741
    return torch.cat(losses).view(labels_BT.shape)


def _chunk(logits: Callable[[Tensor], Tensor], hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    def loss(hidden: Tensor) -> Tensor:
        scores = logits(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return functional.cross_entropy(scores, labels_N, ignore_index=IGNORED, reduction="none")

    if not torch.is_grad_enabled():
        return loss(hidden_NH)
    return cast(Tensor, checkpoint(loss, hidden_NH, use_reentrant=False))
