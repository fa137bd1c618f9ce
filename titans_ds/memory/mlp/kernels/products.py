"""Products and scalings that round once, without a wide copy of what they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x [..., D] times factor [...], rounded once, to the dtype of x."""
    out = torch.empty_like(x)
    return torch.mul(x, factor.unsqueeze(-1), out=out)


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in a wider dtype than theirs, without a wide copy of them where the device can."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32:
        return (torch.mm if left.dim() == 2 else torch.bmm)(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)
