"""Triton: rows of norm 1, and the gradient; see unit_rows in projection.py."""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _places(rows, D: tl.constexpr, DB: tl.constexpr, ROWS: tl.constexpr):
    row, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, DB)[None, :]
    return row.to(tl.int64) * D + d, (row < rows) & (d < D)


@triton.jit
def unit_forward(x_ptr, y_ptr, rows, eps, D: tl.constexpr, DB: tl.constexpr, ROWS: tl.constexpr):
    """Grid (rows / ROWS)."""
    places, inside = _places(rows, D, DB, ROWS)
    x = tl.load(x_ptr + places, inside, 0.0).to(tl.float32)
    y = x / tl.sqrt(tl.sum(x * x, 1) + eps)[:, None]
    tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), inside)


@triton.jit
def unit_backward(x_ptr, dy_ptr, dx_ptr, rows, eps, D: tl.constexpr, DB: tl.constexpr, ROWS: tl.constexpr):
    """Grid (rows / ROWS)."""
    places, inside = _places(rows, D, DB, ROWS)
    x = tl.load(x_ptr + places, inside, 0.0).to(tl.float32)
    d = tl.load(dy_ptr + places, inside, 0.0).to(tl.float32)
    length = tl.sqrt(tl.sum(x * x, 1) + eps)[:, None]
    y = x / length
    tl.store(dx_ptr + places, ((d - y * tl.sum(d * y, 1)[:, None]) / length).to(dx_ptr.dtype.element_ty), inside)
