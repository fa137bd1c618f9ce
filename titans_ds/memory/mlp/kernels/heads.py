"""From hidden states to heads: a projection, then activation, L2 norm and split in one Triton kernel.

It keeps the hidden states, which others keep too, and the weight: the projection is computed again in the backward.

Legend of shape suffixes: B batch, T tokens, H model width, D = heads * d memory dim.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.memory.mlp.kernels import chosen
from titans_ds.memory.mlp.kernels.products import wide_product

_EPS = 1e-12  # as in torch.nn.functional.normalize
_TILE = 4096  # entries that a program has


def by_head(x_BTD: Tensor, heads: int, silu: bool, norm: bool, weight_DH: Tensor | None = None) -> Tensor:
    """act(x), divided by its L2 norm (`norm`), by head: [B, T, heads, d], a head's tokens beside one another.

    Args:
        x_BTD: the projection; where there is a weight [D, H] what it projects, [B, T, H].
        heads: of how many dimensions each, D / heads.
        silu: the activation, or none.
        norm: of length 1, head by head.
        weight_DH: of the projection, in any dtype.
    """
    return SplitHeads.apply(x_BTD, weight_DH, (heads, silu, norm))  # type: ignore[no-any-return, no-untyped-call]


def is_supported(x_BTD: Tensor, heads: int, silu: bool, norm: bool, dim: int) -> bool:
    """Whether Triton does it here, D = dim: chosen, or found right on this GPU."""
    name, dtypes = chosen(), (torch.bfloat16, torch.float16, torch.float32)
    here = x_BTD.is_cuda or (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1")
    if name in ("loop", "torch") or not here or x_BTD.dtype not in dtypes or x_BTD.numel() == 0:
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(x_BTD.device.type):
        return False
    return name == "triton" or agrees(Case(x_BTD.device, x_BTD.dtype, heads, dim, silu, norm))


@dataclass(frozen=True)
class Case:
    """What the kernels are compiled for."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    dim: int
    silu: bool
    norm: bool


@functools.cache
def agrees(case: Case) -> bool:
    """Whether the kernels do what PyTorch does, on a few random tokens."""
    from titans_ds.memory.mlp.kernels import self_check  # which imports what imports this package

    return self_check.close(case, lambda: self_check.largest_error(_run(case, True), _run(case, False)))


def _run(case: Case, triton: bool) -> list[Tensor]:
    """By head, and the gradient of a random direction."""
    generator = torch.Generator().manual_seed(0)
    x, direction = (torch.randn(2, 5, case.dim, generator=generator).to(case.device, case.dtype) for _ in range(2))
    x = (x if triton else x.float()).requires_grad_()
    if triton:
        y = by_head(x, case.heads, case.silu, case.norm)
    else:
        y = torch.unflatten(F.silu(x) if case.silu else x, -1, (case.heads, -1))
        y = F.normalize(y, dim=-1) if case.norm else y
    (gradient,) = torch.autograd.grad((y.float() * direction.view_as(y)).sum(), x)
    return [y.detach().float(), gradient.float()]


class SplitHeads(torch.autograd.Function):
    """(x [B, T, H], weight [D, H] or None, (heads, silu, norm)) -> [B, T, heads, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, rule: tuple[int, bool, bool]) -> Tensor:
        from titans_ds.memory.mlp.kernels.head_kernels import heads_forward

        narrow = None if weight is None else weight.to(x.dtype)
        ctx.rule, ctx.dtype = rule, None if weight is None else weight.dtype
        ctx.save_for_backward(x, narrow)
        x_BTD = _project(x, narrow)
        (batch, tokens, dim), heads = x_BTD.shape, rule[0]
        y = x_BTD.new_empty(batch, heads, tokens, dim // heads)
        _launch(heads_forward, x_BTD, (x_BTD, y), rule)
        return y.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        from titans_ds.memory.mlp.kernels.head_kernels import heads_backward

        x, narrow = ctx.saved_tensors
        x_BTD = _project(x, narrow)
        d_x = torch.empty_like(x_BTD)
        _launch(heads_backward, x_BTD, (x_BTD, d_y.transpose(1, 2).contiguous(), d_x), ctx.rule)
        if narrow is None:
            return d_x, None, None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = wide_product(d_x.flatten(0, 1).mT, x.flatten(0, 1), ctx.dtype)
        d_hidden = d_x @ narrow if ctx.needs_input_grad[0] else None
        return d_hidden, d_weight, None


def _project(x: Tensor, weight_DH: Tensor | None) -> Tensor:
    return (x if weight_DH is None else F.linear(x, weight_DH)).contiguous()


def _launch(kernel: Any, x_BTD: Tensor, tensors: tuple[Tensor, ...], rule: tuple[int, bool, bool]) -> None:
    heads, silu, norm = rule
    batch, tokens, dim = x_BTD.shape
    width = 1 << (dim // heads - 1).bit_length()
    rows = max(1, _TILE // width)
    kernel[(-(-tokens // rows), batch * heads)](
        *tensors, tokens, _EPS, HEADS=heads, D=dim // heads, ROWS=rows, DB=width, SILU=silu, NORM=norm, num_warps=4
    )
