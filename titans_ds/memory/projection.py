"""Between the model's width and the memory's: bias-free linear maps, frozen or learned, heads side by side, norms.

Legend of shape suffixes: B batch, T tokens, D memory dim, N batch x heads.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORM_EPS = 1e-6
_TILE = 4096  # entries that a program of the kernels for unit rows has


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


def unit_rows(x: Tensor, eps: float, triton: bool | None = None) -> Tensor:
    """x / sqrt(|x|^2 + eps) of every row (the last dimension), computed in fp32 or wider, in the dtype of x.

    Args:
        x: [..., D].
        eps: beside the sum of squares.
        triton: by the kernel, or not; None: where there is a GPU and the dtype is bf16, fp16 or fp32.
    """
    if triton is None:
        narrow = x.dtype in (torch.bfloat16, torch.float16, torch.float32)
        triton = x.is_cuda and narrow and x.numel() > 0 and not torch.compiler.is_compiling() and _installed()
    if triton:
        return cast(Tensor, _UnitRows.apply(x, eps))  # type: ignore[no-untyped-call]
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    return (x * torch.rsqrt(norm.square() + eps)).to(x.dtype)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


class _UnitRows(torch.autograd.Function):
    """(x [..., D], eps) -> rows of norm 1. Keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        from titans_ds.memory.unit_rows_kernels import unit_forward

        x = x.contiguous()
        ctx.save_for_backward(x)
        ctx.eps = eps
        return _launch(unit_forward, (x, torch.empty_like(x)), eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None]:
        from titans_ds.memory.unit_rows_kernels import unit_backward

        (x,) = ctx.saved_tensors
        return _launch(unit_backward, (x, d_y.contiguous(), torch.empty_like(x)), ctx.eps), None


def _launch(kernel: Any, tensors: tuple[Tensor, ...], eps: float) -> Tensor:
    """Run the kernel over all rows; returns the last tensor, which it fills."""
    out = tensors[-1]
    width = out.shape[-1]
    padded = 1 << (width - 1).bit_length()
    rows, programs_rows = out.numel() // width, max(1, _TILE // padded)
    grid = (-(-rows // programs_rows),)
    kernel[grid](*tensors, rows, eps, D=width, DB=padded, ROWS=programs_rows, num_warps=4)
    return out
