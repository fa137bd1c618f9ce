"""Triton: what keys, values and queries are made of, from a projection to heads; see heads.py."""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(T, HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, DB: tl.constexpr):
    """Where a program's tokens are by position, and where by head."""
    b, h = tl.program_id(1).to(tl.int64) // HEADS, tl.program_id(1) % HEADS
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, DB)[None, :]
    return ((b * T + t) * HEADS + h) * D + d, ((b * HEADS + h) * T + t) * D + d, (t < T) & (d < D)


@triton.jit
def _activate(x, SILU: tl.constexpr):
    """act(x) and its derivative."""
    if SILU:
        s = tl.sigmoid(x)
        return x * s, s * (1 + x * (1 - s))
    return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def heads_forward(
    x_ptr, y_ptr, T, eps,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, DB: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid (T / ROWS, B HEADS)."""
    by_position, by_head, inside = _places(T, HEADS, D, ROWS, DB)
    y, _ = _activate(tl.load(x_ptr + by_position, inside, 0.0).to(tl.float32), SILU)
    if NORM:
        y = y / tl.maximum(tl.sqrt(tl.sum(y * y, 1)), eps)[:, None]
    tl.store(y_ptr + by_head, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def heads_backward(
    x_ptr, dy_ptr, dx_ptr, T, eps,
    HEADS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, DB: tl.constexpr, SILU: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid (T / ROWS, B HEADS)."""
    by_position, by_head, inside = _places(T, HEADS, D, ROWS, DB)
    y, slope = _activate(tl.load(x_ptr + by_position, inside, 0.0).to(tl.float32), SILU)
    d = tl.load(dy_ptr + by_head, inside, 0.0).to(tl.float32)
    if NORM:
        length = tl.sqrt(tl.sum(y * y, 1))[:, None]
        divisor = tl.maximum(length, eps)
        y = y / divisor
        along = tl.where(length > eps, tl.sum(d * y, 1)[:, None], 0.0)
        d = (d - y * along) / divisor
    tl.store(dx_ptr + by_position, (d * slope).to(dx_ptr.dtype.element_ty), inside)
