"""Triton: tiles of matrices of any size, and products of such matrices, tile by tile.

Sizes are compile-time constants: where the tiles fill a matrix there are no masks. Inside a matrix offsets are 32-bit.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(C: tl.constexpr, X: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr):
    """Of this program among those of matrices [C, X] in tiles [BT, BX]: which matrix, and the tile's corner."""
    columns: tl.constexpr = (X + BX - 1) // BX
    tiles: tl.constexpr = (C + BT - 1) // BT * columns
    i = tl.program_id(0)
    return (i // tiles).to(tl.int64), i % tiles // columns * BT, i % tiles % columns * BX


@triton.jit
def read(ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """A tile of a matrix [ROWS, COLUMNS]; zeros outside of it."""
    r, c = row + tl.arange(0, BR), column + tl.arange(0, BC)
    at = r[:, None] * COLUMNS + c[None, :]
    if ROWS % BR == 0 and COLUMNS % BC == 0:
        return tl.load(ptr + at)
    return tl.load(ptr + at, (r[:, None] < ROWS) & (c[None, :] < COLUMNS), 0.0)


@triton.jit
def write(ptr, x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """The other way, in the dtype of what is there."""
    r, c = row + tl.arange(0, BR), column + tl.arange(0, BC)
    at = r[:, None] * COLUMNS + c[None, :]
    x = x.to(ptr.dtype.element_ty)
    if ROWS % BR == 0 and COLUMNS % BC == 0:
        tl.store(ptr + at, x)
    else:
        tl.store(ptr + at, x, (r[:, None] < ROWS) & (c[None, :] < COLUMNS))


@triton.jit
def read_row(ptr, start, SIZE: tl.constexpr, B: tl.constexpr):
    """A piece of a vector [SIZE]; zeros outside of it."""
    i = start + tl.arange(0, B)
    if SIZE % B == 0:
        return tl.load(ptr + i)
    return tl.load(ptr + i, i < SIZE, 0.0)


@triton.jit
def write_row(ptr, x, start, SIZE: tl.constexpr, B: tl.constexpr):
    """The other way."""
    i = start + tl.arange(0, B)
    tl.store(ptr + i, x, i < SIZE)


@triton.jit
def product(
    total, x_ptr, y_ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total += a tile of x y: x [ROWS, DEPTH], y [DEPTH, COLUMNS]."""
    for k in range(0, DEPTH, BK):
        x = read(x_ptr, row, k, ROWS, DEPTH, BR, BK)
        y = read(y_ptr, k, column, DEPTH, COLUMNS, BK, BC)
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def product_right(
    total, x_ptr, y_ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total += a tile of x y^T: x [ROWS, DEPTH], y [COLUMNS, DEPTH]."""
    for k in range(0, DEPTH, BK):
        x = read(x_ptr, row, k, ROWS, DEPTH, BR, BK)
        y = read(y_ptr, column, k, COLUMNS, DEPTH, BC, BK)
        total = tl.dot(x, tl.trans(y), total, input_precision=PRECISION)
    return total


@triton.jit
def product_left(
    total, x_ptr, y_ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total += a tile of x^T y: x [DEPTH, ROWS], y [DEPTH, COLUMNS]."""
    for k in range(0, DEPTH, BK):
        x = read(x_ptr, k, row, DEPTH, ROWS, BK, BR)
        y = read(y_ptr, k, column, DEPTH, COLUMNS, BK, BC)
        total = tl.dot(tl.trans(x), y, total, input_precision=PRECISION)
    return total


@triton.jit
def weighted_product_left(
    total, x_ptr, y_ptr, weight_ptr, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total += a tile of (weight x)^T y: x [DEPTH, ROWS], y [DEPTH, COLUMNS], weight [DEPTH]."""
    for k in range(0, DEPTH, BK):
        x = read(x_ptr, k, row, DEPTH, ROWS, BK, BR)
        y = read(y_ptr, k, column, DEPTH, COLUMNS, BK, BC)
        weighted = (read_row(weight_ptr, k, DEPTH, BK)[:, None] * x).to(y.dtype)
        total = tl.dot(tl.trans(weighted), y, total, input_precision=PRECISION)
    return total
