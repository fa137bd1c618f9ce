"""Between the model's width and the memory's: bias-free linear maps, frozen or learned, and heads side by side.

Legend of shape suffixes: B batch, T tokens, D memory dim, N batch x heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORM_EPS = 1e-6


class Projection(nn.Module):
    """y = W x, computed in the dtype of x. Starts semi-orthogonal, the same on every machine for a given seed.

    A frozen weight is a buffer, so that it travels with the adapter and never meets an optimizer.

    Args:
        in_features, out_features: widths; `weight` is [out_features, in_features].
        learned: a parameter, or a buffer.
        seed: of the initial weight.
    """

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, *, learned: bool, seed: int) -> None:
        super().__init__()
        weight = semi_orthogonal(out_features, in_features, seed)
        if learned:
            self.weight = nn.Parameter(weight)
        else:
            self.register_buffer("weight", weight)

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]; by `product(x, weight)`, with what follows it, where given."""
        return F.linear(x, self.weight.to(x.dtype)) if product is None else product(x, self.weight)

    def transposed(self, y: Tensor) -> Tensor:
        """The adjoint map, [..., out_features] -> [..., in_features].

        For a frozen weight only: ZeRO-3 gathers a parameter in `forward`, and nowhere else.
        """
        return F.linear(y, self.weight.to(y.dtype).mT)


def semi_orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] fp32 with orthonormal rows (columns, where there are fewer), drawn on the CPU.

    The matrix of `nn.init.orthogonal_`, up to rounding: the QR decomposition whose R has a positive diagonal is unique,
    and R is the Cholesky factor of the Gram matrix: products, on all cores, in place of reflections. In fp64,
    and nearly square matrices twice (CholeskyQR2, Yamamoto et al. 2015).
    """
    drawn = torch.empty(rows, columns).normal_(generator=torch.Generator().manual_seed(seed)).double()
    tall = drawn.mT if rows < columns else drawn
    for _ in range(1 if tall.shape[0] >= 2 * tall.shape[1] else 2):
        upper = torch.linalg.cholesky(tall.mT @ tall, upper=True)
        tall = torch.linalg.solve_triangular(upper, tall, upper=True, left=False)
    return (tall.mT if rows < columns else tall).float().contiguous()


def split_heads(x_BTD: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] (or [B, T, heads, d]) -> [B * heads, T, d]."""
    if x_BTD.dim() == 3:
        if heads == 1:
            return x_BTD
        x_BTD = torch.unflatten(x_BTD, -1, (heads, -1))
    return x_BTD.transpose(1, 2).flatten(0, 1)


def merge_heads(x_NTD: Tensor, heads: int) -> Tensor:
    """The inverse of `split_heads`."""
    if heads == 1:
        return x_NTD
    return torch.unflatten(x_NTD, 0, (-1, heads)).transpose(1, 2).flatten(2)


def rms_norm(x: Tensor, scale: Tensor | None = None) -> Tensor:
    """RMSNorm over the last dimension, in the dtype of x."""
    return F.rms_norm(x, x.shape[-1:], None if scale is None else scale.to(x.dtype), eps=_NORM_EPS)
