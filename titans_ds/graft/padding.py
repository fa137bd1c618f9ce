"""Batches of token ids of unequal length."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from titans_ds.errors import DataError


def as_right_padded(
    input_ids: Tensor | Sequence[Sequence[int]], attention_mask: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids with all padding moved to the right.

    Args:
        input_ids: [B, T], or one list of token ids per sample.
        attention_mask: [B, T], true at tokens; all of them where None. Only with a tensor of ids.
        device: of the result.

    Returns:
        ids [B, T'] (0 at padding) and mask [B, T'] (bool), T' the longest sample.

    Raises:
        DataError: ids of a wrong shape, or a mask of another shape.
    """
    if isinstance(input_ids, Tensor):
        rows = _rows(input_ids, attention_mask)
    else:
        rows = [torch.tensor(list(row), dtype=torch.long) for row in input_ids]
    if not rows:
        raise DataError("no samples: expected token ids of shape [batch, tokens] with at least one row")
    lengths = torch.tensor([len(row) for row in rows], device=device)
    ids = pad_sequence([row.to(device) for row in rows], batch_first=True)
    return ids, torch.arange(ids.shape[1], device=device) < lengths.unsqueeze(1)


def _rows(input_ids: Tensor, attention_mask: Tensor | None) -> list[Tensor]:
    if input_ids.dim() != 2:
        raise DataError(f"token ids have shape {list(input_ids.shape)}; expected [batch, tokens]")
    if attention_mask is None:
        return list(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise DataError(f"attention_mask has shape {list(attention_mask.shape)}; expected {list(input_ids.shape)}")
    return [row[keep.bool()] for row, keep in zip(input_ids, attention_mask, strict=True)]
