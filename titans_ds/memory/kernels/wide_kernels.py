"""Triton: a chunk's write for heads of any width, four kernels forward; see wide.py.

A program has one tile of a product's result, and does to it what comes before the next product. Tensors of all chunks
[N, R, …] are looked at in chunk n step + r, those of one chunk, or of all at once (step 1, r 0), in n. Token weights
are a set per matrix, [2, N, R, C], LEVEL entries each.

Legend of shape suffixes: N memories, R chunks of C tokens, D width, H hidden width; BT, BX, BK tokens, columns and
depth of a tile.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl

from titans_ds.memory.kernels.chunk_kernels import _activate, _error
from titans_ds.memory.kernels.tile_kernels import (
    place,
    product,
    product_right,
    read,
    read_row,
    weighted_product_left,
    write,
)


@triton.jit(do_not_specialize=["step", "r"])
def hidden(
    k_ptr, w1_ptr, z_ptr, x_ptr, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x = h act(z) of z = k W_1^T, and z where there is a place for it."""
    n, row, column = place(C, H, BT, BX)
    i = n * step + r
    z = tl.zeros((BT, BX), tl.float32)
    z = product_right(z, k_ptr + i * C * D, w1_ptr + i * H * D, row, column, C, H, D, BT, BX, BK, PRECISION)
    z = z.to(x_ptr.dtype.element_ty)
    if z_ptr is not None:
        write(z_ptr + n * C * H, z, row, column, C, H, BT, BX)
    x, _, _ = _activate(z.to(tl.float32), SILU)
    write(x_ptr + n * C * H, x * scale, row, column, C, H, BT, BX)


@triton.jit(do_not_specialize=["step", "r"])
def errors(
    x_ptr, w2_ptr, v_ptr, e_ptr, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """e, the loss's derivative in y = x W_2^T."""
    n, row, column = place(C, D, BT, BX)
    i = n * step + r
    y = tl.zeros((BT, BX), tl.float32)
    if LOSS != 1:
        y = product_right(y, x_ptr + n * C * H, w2_ptr + i * H * D, row, column, C, D, H, BT, BX, BK, PRECISION)
    v = read(v_ptr + i * C * D, row, column, C, D, BT, BX).to(tl.float32)
    e, _ = _error(y, v, huber_delta, LOSS)
    write(e_ptr + n * C * D, e, row, column, C, D, BT, BX)


@triton.jit(do_not_specialize=["step", "r"])
def slopes(
    e_ptr, w2_ptr, z_ptr, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u = e W_2 h act'(z), the loss's derivative in z, in the place of z."""
    n, row, column = place(C, H, BT, BX)
    i = n * step + r
    t = tl.zeros((BT, BX), tl.float32)
    t = product(t, e_ptr + n * C * D, w2_ptr + i * H * D, row, column, C, H, D, BT, BX, BK, PRECISION)
    _, slope, _ = _activate(read(z_ptr + n * C * H, row, column, C, H, BT, BX).to(tl.float32), SILU)
    write(z_ptr + n * C * H, t * slope * scale, row, column, C, H, BT, BX)


@triton.jit
def _gram(x_ptr, C: tl.constexpr, WIDTH: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    """x x^T of a chunk's tokens [C, WIDTH]."""
    total = tl.zeros((BT, BT), tl.float32)
    return product_right(total, x_ptr, x_ptr, 0, 0, C, C, WIDTH, BT, BT, BK, PRECISION)


@triton.jit(do_not_specialize=["step", "r"])
def squares(
    k_ptr, x_ptr, u_ptr, e_ptr, c_ptr, square_ptr, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the gradient's norm, [N, 2] by matrix: |sum_c w_c u_c k_c^T|^2 = sum_cd w_c w_d (u_c u_d) (k_c k_d)."""
    pid = tl.program_id(0)
    n = (pid // 2).to(tl.int64)
    i = n * step + r
    weight = read_row(c_ptr + i * C, 0, C, BT)
    if pid % 2 == 0:
        both = _gram(u_ptr + n * C * H, C, H, BT, BK, PRECISION) * _gram(k_ptr + i * C * D, C, D, BT, BK, PRECISION)
    else:
        both = _gram(e_ptr + n * C * D, C, D, BT, BK, PRECISION) * _gram(x_ptr + n * C * H, C, H, BT, BK, PRECISION)
    tl.store(square_ptr + pid, tl.sum(tl.sum(both * weight[:, None] * weight[None, :], 1), 0))


@triton.jit
def _step(
    delta_ptr, x_ptr, a_ptr, b_ptr, w_ptr, s_ptr, ws_ptr, ss_ptr, keep, eta, carry, limit, stored, row, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, C: tl.constexpr, MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr,
    LIMIT: tl.constexpr, SAVE_MOMENTUM: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of W' = keep W + carry S + G^w, S' = eta S + G^m, and of the same rounded, for the next chunk."""
    g = tl.zeros((BX, BX), tl.float32)
    g = weighted_product_left(g, delta_ptr, x_ptr, a_ptr, row, column, ROWS, COLUMNS, C, BX, BX, BT, PRECISION)
    if LIMIT:
        g *= limit
    w = keep * read(w_ptr, row, column, ROWS, COLUMNS, BX, BX).to(tl.float32) + g
    if MOMENTUM:
        s = read(s_ptr, row, column, ROWS, COLUMNS, BX, BX).to(tl.float32)
        w += carry * s
        if SEPARATE:
            g = tl.zeros((BX, BX), tl.float32)
            g = weighted_product_left(g, delta_ptr, x_ptr, b_ptr, row, column, ROWS, COLUMNS, C, BX, BX, BT, PRECISION)
            if LIMIT:
                g *= limit
        s = eta * s + g
        write(s_ptr, s, row, column, ROWS, COLUMNS, BX, BX)
        if SAVE_MOMENTUM and stored:
            write(ss_ptr, s, row, column, ROWS, COLUMNS, BX, BX)
    write(w_ptr, w, row, column, ROWS, COLUMNS, BX, BX)
    if stored:
        write(ws_ptr, w, row, column, ROWS, COLUMNS, BX, BX)


@triton.jit(do_not_specialize=["step", "r", "level"])
def step_forward(
    k_ptr, x_ptr, u_ptr, e_ptr, a_ptr, b_ptr, keep_ptr, eta_ptr, carry_ptr,
    w1_ptr, w2_ptr, s1_ptr, s2_ptr,  # before, and in place after
    w1s_ptr, w2s_ptr, s1s_ptr, s2s_ptr,  # before every chunk
    square_ptr, max_norm, level, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr, SAVE_MOMENTUM: tl.constexpr,
):  # fmt: skip
    """Both matrices' sums of gradients, and the states after them."""
    m, row, column = place(H, D, BX, BX)
    n = m // 2
    i, own, after = n * step + r, n * H * D, (n * step + r + 1) * H * D
    keep, eta, carry, stored = tl.load(keep_ptr + i), tl.load(eta_ptr + i), tl.load(carry_ptr + i), r + 1 < step
    limit = 1.0
    if LIMIT:
        square = tl.load(square_ptr + 2 * n) + tl.load(square_ptr + 2 * n + 1)
        limit = tl.minimum(max_norm / tl.sqrt(square + 1e-12), 1.0)
    if m % 2 == 0:
        _step(
            u_ptr + n * C * H, k_ptr + i * C * D, a_ptr + i * C, b_ptr + i * C,
            w1_ptr + own, s1_ptr + own, w1s_ptr + after, s1s_ptr + after,
            keep, eta, carry, limit, stored, row, column, H, D, C, MOMENTUM, SEPARATE, LIMIT, SAVE_MOMENTUM,
            BT, BX, PRECISION,
        )  # fmt: skip
    else:
        m, row, column = place(D, H, BX, BX)
        _step(
            e_ptr + n * C * D, x_ptr + n * C * H, a_ptr + level + i * C, b_ptr + level + i * C,
            w2_ptr + own, s2_ptr + own, w2s_ptr + after, s2s_ptr + after,
            keep, eta, carry, limit, stored, row, column, D, H, C, MOMENTUM, SEPARATE, LIMIT, SAVE_MOMENTUM,
            BT, BX, PRECISION,
        )  # fmt: skip
