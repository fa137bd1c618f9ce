"""Triton: back through a chunk's write for heads of any width, four kernels; see wide.py, and wide_kernels.py for the
way programs and tensors are laid out.

Directions are the derivatives in the sums of gradients, of those in W (P) and in S (Q, where SEPARATE), in the dtype of
the keys. What is a sum over a whole row or matrix comes out as each tile's share of it, to be added up afterwards.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl

from titans_ds.memory.kernels.chunk_kernels import _activate
from titans_ds.memory.kernels.tile_kernels import (
    place,
    product,
    product_left,
    product_right,
    read,
    read_row,
    write,
    write_row,
)


@triton.jit
def _moved(
    x_ptr, delta_ptr, p_ptr, q_ptr, a_ptr, b_ptr, row, column,
    C: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr, SEPARATE: tl.constexpr,
    BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile's share of what a weighted sum of gradients (a delta)^T x is along its direction; x [C, IN]."""
    p = product_right(tl.zeros((BT, BX), tl.float32), x_ptr, p_ptr, row, column, C, OUT, IN, BT, BX, BK, PRECISION)
    p *= read_row(a_ptr, row, C, BT)[:, None]
    if SEPARATE:
        q = product_right(tl.zeros((BT, BX), tl.float32), x_ptr, q_ptr, row, column, C, OUT, IN, BT, BX, BK, PRECISION)
        p += read_row(b_ptr, row, C, BT)[:, None] * q
    return tl.sum(tl.sum(p * read(delta_ptr, row, column, C, OUT, BT, BX).to(tl.float32), 1), 0)


@triton.jit(do_not_specialize=["level", "step", "r"])
def moved(
    k_ptr, x_ptr, u_ptr, e_ptr, p1_ptr, p2_ptr, q1_ptr, q2_ptr, a_ptr, b_ptr, share_ptr,
    level, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What both matrices' sums are along their directions: the derivative in the limit, times the limit, by tile."""
    down: tl.constexpr = (C + BT - 1) // BT
    first: tl.constexpr = down * ((H + BX - 1) // BX)
    tiles: tl.constexpr = first + down * ((D + BX - 1) // BX)
    n, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    i = n * step + r
    share_ptr += tile * (level // C) + i
    if tile < first:
        row, column = tile // ((H + BX - 1) // BX) * BT, tile % ((H + BX - 1) // BX) * BX
        share = _moved(
            k_ptr + i * C * D, u_ptr + i * C * H, p1_ptr + n * H * D, q1_ptr + n * H * D, a_ptr + i * C, b_ptr + i * C,
            row, column, C, D, H, SEPARATE, BT, BX, BK, PRECISION,
        )  # fmt: skip
    else:
        tile -= first
        row, column = tile // ((D + BX - 1) // BX) * BT, tile % ((D + BX - 1) // BX) * BX
        share = _moved(
            x_ptr + i * C * H, e_ptr + i * C * D, p2_ptr + n * H * D, q2_ptr + n * H * D, a_ptr + level + i * C,
            b_ptr + level + i * C, row, column, C, H, D, SEPARATE, BT, BX, BK, PRECISION,
        )  # fmt: skip
    tl.store(share_ptr, share)


@triton.jit
def _back(share_ptr, gain_ptr, i, stride, TILES: tl.constexpr, SHARES: tl.constexpr):
    """The derivative in half the gradient's squared norm, from `moved`."""
    tile = tl.arange(0, SHARES)
    return tl.load(gain_ptr + i) * tl.sum(tl.load(share_ptr + tile * stride + i, tile < TILES, 0.0), 0)


@triton.jit(do_not_specialize=["level", "step", "r"])
def slopes_backward(
    k_ptr, p1_ptr, q1_ptr, a_ptr, b_ptr, t_ptr, z_ptr, dt_ptr, dz_ptr, da_ptr, db_ptr, nu_ptr, share_ptr, gain_ptr,
    level, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr, TILES: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """From a u k^T to a, and through u = t h act'(z) to t and z; u takes the place of t."""
    n, row, column = place(C, H, BT, BX)
    i = n * step + r
    share = column // BX * level + i * C
    p, q = tl.zeros((BT, BX), tl.float32), tl.zeros((BT, BX), tl.float32)
    p = product_right(p, k_ptr + i * C * D, p1_ptr + n * H * D, row, column, C, H, D, BT, BX, BK, PRECISION)
    if SEPARATE:
        q = product_right(q, k_ptr + i * C * D, q1_ptr + n * H * D, row, column, C, H, D, BT, BX, BK, PRECISION)
    _, slope, bend = _activate(read(z_ptr + i * C * H, row, column, C, H, BT, BX).to(tl.float32), SILU)
    t = read(t_ptr + i * C * H, row, column, C, H, BT, BX).to(tl.float32)
    u = t * slope * scale
    write_row(da_ptr + share, tl.sum(u * p, 1), row, C, BT)
    d_u = read_row(a_ptr + i * C, row, C, BT)[:, None] * p
    if SEPARATE:
        write_row(db_ptr + share, tl.sum(u * q, 1), row, C, BT)
        d_u += read_row(b_ptr + i * C, row, C, BT)[:, None] * q
    if LIMIT:
        along = read(nu_ptr + i * C * H, row, column, C, H, BT, BX).to(tl.float32)
        d_u += _back(share_ptr, gain_ptr, i, level // C, TILES, SHARES) * along
    write(t_ptr + i * C * H, u, row, column, C, H, BT, BX)
    write(dt_ptr + n * C * H, d_u * slope * scale, row, column, C, H, BT, BX)
    write(dz_ptr + n * C * H, d_u * t * bend * scale, row, column, C, H, BT, BX)


@triton.jit(do_not_specialize=["level", "step", "r"])
def errors_backward(
    x_ptr, p2_ptr, q2_ptr, a_ptr, b_ptr, e_ptr, dt_ptr, w2_ptr, dy_ptr, dv_ptr, da_ptr, db_ptr, ne_ptr, share_ptr,
    gain_ptr, level, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr, TILES: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """From a e x^T to a, and with t = e W_2 to e, and through the loss to the values and y."""
    n, row, column = place(C, D, BT, BX)
    i = n * step + r
    share = column // BX * level + i * C
    p, q = tl.zeros((BT, BX), tl.float32), tl.zeros((BT, BX), tl.float32)
    p = product_right(p, x_ptr + i * C * H, p2_ptr + n * H * D, row, column, C, D, H, BT, BX, BK, PRECISION)
    if SEPARATE:
        q = product_right(q, x_ptr + i * C * H, q2_ptr + n * H * D, row, column, C, D, H, BT, BX, BK, PRECISION)
    e = read(e_ptr + i * C * D, row, column, C, D, BT, BX).to(tl.float32)
    write_row(da_ptr + share, tl.sum(e * p, 1), row, C, BT)
    d_e = read_row(a_ptr + level + i * C, row, C, BT)[:, None] * p
    if SEPARATE:
        write_row(db_ptr + share, tl.sum(e * q, 1), row, C, BT)
        d_e += read_row(b_ptr + level + i * C, row, C, BT)[:, None] * q
    if LIMIT:
        along = read(ne_ptr + i * C * D, row, column, C, D, BT, BX).to(tl.float32)
        d_e += _back(share_ptr, gain_ptr, i, level // C, TILES, SHARES) * along
    d_e = product_right(d_e, dt_ptr + n * C * H, w2_ptr + i * H * D, row, column, C, D, H, BT, BX, BK, PRECISION)
    if LOSS == 2:
        d_e = tl.where(tl.abs(e) < huber_delta, d_e, 0.0)
    write(dv_ptr + i * C * D, -d_e, row, column, C, D, BT, BX)
    if LOSS != 1:
        write(dy_ptr + n * C * D, d_e, row, column, C, D, BT, BX)


@triton.jit(do_not_specialize=["level", "step", "r"])
def hidden_backward(
    e_ptr, p2_ptr, q2_ptr, a_ptr, b_ptr, dy_ptr, w2_ptr, z_ptr, dz_ptr, nx_ptr, share_ptr, gain_ptr,
    level, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr, TILES: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """From a e x^T and y = x W_2^T to x, and on top of that in z."""
    n, row, column = place(C, H, BT, BX)
    i = n * step + r
    d_x = tl.zeros((BT, BX), tl.float32)
    d_x = product(d_x, e_ptr + i * C * D, p2_ptr + n * H * D, row, column, C, H, D, BT, BX, BK, PRECISION)
    d_x *= read_row(a_ptr + level + i * C, row, C, BT)[:, None]
    if SEPARATE:
        p = tl.zeros((BT, BX), tl.float32)
        p = product(p, e_ptr + i * C * D, q2_ptr + n * H * D, row, column, C, H, D, BT, BX, BK, PRECISION)
        d_x += read_row(b_ptr + level + i * C, row, C, BT)[:, None] * p
    if LIMIT:
        along = read(nx_ptr + i * C * H, row, column, C, H, BT, BX).to(tl.float32)
        d_x += _back(share_ptr, gain_ptr, i, level // C, TILES, SHARES) * along
    if LOSS != 1:
        d_x = product(d_x, dy_ptr + n * C * D, w2_ptr + i * H * D, row, column, C, H, D, BT, BX, BK, PRECISION)
    _, slope, _ = _activate(read(z_ptr + i * C * H, row, column, C, H, BT, BX).to(tl.float32), SILU)
    d_z = read(dz_ptr + n * C * H, row, column, C, H, BT, BX).to(tl.float32) + d_x * slope * scale
    write(dz_ptr + n * C * H, d_z, row, column, C, H, BT, BX)


@triton.jit
def _step_backward(
    d_w, dw_ptr, ds_ptr, ws_ptr, ss_ptr, dws_ptr, p_ptr, q_ptr, share_ptr, shares, keep, eta, carry, row, column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BX: tl.constexpr,
):  # fmt: skip
    """A tile of the derivatives in W and S before a chunk from those after it, and of the next directions."""
    dw = read(dw_ptr, row, column, ROWS, COLUMNS, BX, BX).to(tl.float32)
    w = read(ws_ptr, row, column, ROWS, COLUMNS, BX, BX).to(tl.float32)
    tl.store(share_ptr, tl.sum(tl.sum(dw * w, 1), 0))
    d_w += read(dws_ptr, row, column, ROWS, COLUMNS, BX, BX).to(tl.float32) + keep * dw
    write(dw_ptr, d_w, row, column, ROWS, COLUMNS, BX, BX)
    if MOMENTUM:
        ds = read(ds_ptr, row, column, ROWS, COLUMNS, BX, BX).to(tl.float32)
        s = read(ss_ptr, row, column, ROWS, COLUMNS, BX, BX).to(tl.float32)
        tl.store(share_ptr + shares, tl.sum(tl.sum(ds * s, 1), 0))
        tl.store(share_ptr + 2 * shares, tl.sum(tl.sum(dw * s, 1), 0))
        ds = eta * ds + carry * dw
        write(ds_ptr, ds, row, column, ROWS, COLUMNS, BX, BX)
        if SEPARATE:
            write(q_ptr, ds, row, column, ROWS, COLUMNS, BX, BX)
        else:
            d_w += ds
    write(p_ptr, d_w, row, column, ROWS, COLUMNS, BX, BX)


@triton.jit
def _keys_backward(
    u_ptr, p1_ptr, q1_ptr, a_ptr, b_ptr, dz_ptr, w1_ptr, dk_ptr, nk_ptr, back, row, column,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SEPARATE: tl.constexpr, LIMIT: tl.constexpr,
    BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From a u k^T and z = k W_1^T to a tile of the keys."""
    d_k = product(tl.zeros((BT, BX), tl.float32), u_ptr, p1_ptr, row, column, C, D, H, BT, BX, BK, PRECISION)
    d_k *= read_row(a_ptr, row, C, BT)[:, None]
    if SEPARATE:
        p = product(tl.zeros((BT, BX), tl.float32), u_ptr, q1_ptr, row, column, C, D, H, BT, BX, BK, PRECISION)
        d_k += read_row(b_ptr, row, C, BT)[:, None] * p
    if LIMIT:
        d_k += back * read(nk_ptr, row, column, C, D, BT, BX).to(tl.float32)
    d_k = product(d_k, dz_ptr, w1_ptr, row, column, C, D, H, BT, BX, BK, PRECISION)
    write(dk_ptr, d_k, row, column, C, D, BT, BX)


@triton.jit(do_not_specialize=["level", "step", "r"])
def step_backward(
    k_ptr, x_ptr, u_ptr, e_ptr, a_ptr, b_ptr, keep_ptr, eta_ptr, carry_ptr,
    dt_ptr, dy_ptr, dz_ptr, w1s_ptr, w2s_ptr, s1s_ptr, s2s_ptr, dw1s_ptr, dw2s_ptr,
    p1_ptr, q1_ptr,  # this chunk's directions of the first matrix
    dw1_ptr, dw2_ptr, ds1_ptr, ds2_ptr,  # after the chunk, and in place before it
    p1_next_ptr, p2_next_ptr, q1_next_ptr, q2_next_ptr, dk_ptr, share_ptr, nk_ptr, moved_ptr, gain_ptr,
    level, step, r, scale, huber_delta,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, SILU: tl.constexpr, LOSS: tl.constexpr,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, BT: tl.constexpr, BX: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr, TILES: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """Tiles of the keys, which take longest, before those of the two matrices."""
    across: tl.constexpr = (D + BX - 1) // BX
    down: tl.constexpr = (H + BX - 1) // BX
    keys: tl.constexpr = ((C + BT - 1) // BT) * ((D + BX - 1) // BX)
    tiles: tl.constexpr = ((H + BX - 1) // BX) * ((D + BX - 1) // BX)
    num_rows = tl.num_programs(0) // (keys + 2 * tiles)
    pid = tl.program_id(0)
    if pid < num_rows * keys:
        n, row, column = place(C, D, BT, BX)
        i = n * step + r
        back = 0.0
        if LIMIT:
            back = _back(moved_ptr, gain_ptr, i, level // C, TILES, SHARES)
            nk_ptr += i * C * D
        _keys_backward(
            u_ptr + i * C * H, p1_ptr + n * H * D, q1_ptr + n * H * D, a_ptr + i * C, b_ptr + i * C,
            dz_ptr + n * C * H, w1s_ptr + i * H * D, dk_ptr + i * C * D, nk_ptr, back, row, column, C, D, H, SEPARATE,
            LIMIT, BT, BX, BK, PRECISION,
        )  # fmt: skip
    else:
        pid -= num_rows * keys
        n, tile = (pid // (2 * tiles)).to(tl.int64), pid % (2 * tiles)
        i, own = n * step + r, n * H * D
        keep, eta, carry = tl.load(keep_ptr + i), tl.load(eta_ptr + i), tl.load(carry_ptr + i)
        shares = 2 * tiles * num_rows * step
        share_ptr += tile * num_rows * step + i
        d_w, before = tl.zeros((BX, BX), tl.float32), i * H * D
        if tile < tiles:
            row, column = tile // across * BX, tile % across * BX
            d_w = product_left(d_w, dz_ptr + n * C * H, k_ptr + i * C * D, row, column, H, D, C, BX, BX, BT, PRECISION)
            _step_backward(
                d_w, dw1_ptr + own, ds1_ptr + own, w1s_ptr + before, s1s_ptr + before, dw1s_ptr + before,
                p1_next_ptr + own, q1_next_ptr + own, share_ptr, shares, keep, eta, carry, row, column,
                H, D, MOMENTUM, SEPARATE, BX,
            )  # fmt: skip
        else:
            tile -= tiles
            row, column = tile // down * BX, tile % down * BX
            d_w = product_left(d_w, e_ptr + i * C * D, dt_ptr + n * C * H, row, column, D, H, C, BX, BX, BT, PRECISION)
            if LOSS != 1:
                d_w = product_left(
                    d_w, dy_ptr + n * C * D, x_ptr + i * C * H, row, column, D, H, C, BX, BX, BT, PRECISION
                )
            _step_backward(
                d_w, dw2_ptr + own, ds2_ptr + own, w2s_ptr + before, s2s_ptr + before, dw2s_ptr + before,
                p2_next_ptr + own, q2_next_ptr + own, share_ptr, shares, keep, eta, carry, row, column,
                D, H, MOMENTUM, SEPARATE, BX,
            )  # fmt: skip
