"""Bias-free linear maps between the model's width and the memory's: frozen with orthonormal rows, or learned."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_ds.memory.features import Split


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

    def forward(self, x: Tensor, split: Split | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]; split into heads [B, T, heads, d] where asked for."""
        return F.linear(x, self.weight.to(x.dtype)) if split is None else split.of_projection(x, self.weight)

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
