"""Triton: the writes of `chunk`, one program per memory, fast weights on the chip from the first chunk to the last.

f_W is W_2 act(W_1 x). A program walks over its chunks, stores the weights that each chunk reads (for the reads, which
are large products of their own, and for the backward), and holds W and S in fp32. The backward walks from the last
chunk to the first with the derivatives in W and S on the chip, and computes everything else of a chunk again.

Token weights come with the step sizes in them, one set per matrix: `a` of the gradient in W, `b` of that in S
(SEPARATE), `c` of the one whose norm is limited (LIMIT). A chunk that is not finished has weights 0, factors 1, 1, 0.

Legend of shape suffixes: N memories, R chunks of C tokens, D width, H hidden width; CB, DB, HB the same as powers of
two, 16 or more.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(z, SILU: tl.constexpr):
    """act(z) and its first two derivatives."""
    if SILU:
        s = tl.sigmoid(z)
        return z * s, s * (1 + z * (1 - s)), s * (1 - s) * (2 + z * (1 - 2 * s))
    return z, tl.full(z.shape, 1.0, tl.float32), tl.zeros(z.shape, tl.float32)


@triton.jit
def _load(ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A matrix [ROWS, COLUMNS], zeros around it. Without a mask where it fills the tile: masks cost registers."""
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    if rows.shape[0] == ROWS and columns.shape[0] == COLUMNS:
        return tl.load(ptr + offsets)
    return tl.load(ptr + offsets, (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS), 0.0)


@triton.jit
def _store(ptr, x, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    offsets = rows[:, None] * COLUMNS + columns[None, :]
    if rows.shape[0] == ROWS and columns.shape[0] == COLUMNS:
        tl.store(ptr + offsets, x)
    else:
        tl.store(ptr + offsets, x, (rows[:, None] < ROWS) & (columns[None, :] < COLUMNS))


@triton.jit
def _dot(x, y, T: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(x.to(T), y.to(T), input_precision=PRECISION)


@triton.jit
def chunk_forward(
    k_ptr, v_ptr, a_ptr, b_ptr, c_ptr, keep_ptr, eta_ptr, carry_ptr,
    w1_ptr, w2_ptr, s1_ptr, s2_ptr,  # at the start, and in place at the end
    w1s_ptr, w2s_ptr, s1s_ptr, s2s_ptr,  # before every chunk
    N, R, max_norm, hidden_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr,
    SILU: tl.constexpr, MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, LIMIT: tl.constexpr,
    SAVE_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; grid (N,)."""
    n = tl.program_id(0).to(tl.int64)
    c, d, h = tl.arange(0, CB), tl.arange(0, DB), tl.arange(0, HB)
    T: tl.constexpr = k_ptr.dtype.element_ty
    w1 = _load(w1_ptr + n * H * D, h, d, H, D)
    w2 = _load(w2_ptr + n * H * D, d, h, D, H)
    if MOMENTUM:
        s1 = _load(s1_ptr + n * H * D, h, d, H, D)
        s2 = _load(s2_ptr + n * H * D, d, h, D, H)
    for r in range(R):
        i = n * R + r
        _store(w1s_ptr + i * H * D, w1.to(T), h, d, H, D)
        _store(w2s_ptr + i * H * D, w2.to(T), d, h, D, H)
        if SAVE_MOMENTUM:
            _store(s1s_ptr + i * H * D, s1.to(T), h, d, H, D)
            _store(s2s_ptr + i * H * D, s2.to(T), d, h, D, H)
        k = _load(k_ptr + i * C * D, c, d, C, D)
        v = _load(v_ptr + i * C * D, c, d, C, D).to(tl.float32)
        z = _dot(k, tl.trans(w1.to(T)), T, PRECISION)
        x, slope, _ = _activate(z, SILU)
        x = (x * hidden_scale).to(T)
        e = _dot(x, tl.trans(w2.to(T)), T, PRECISION) - v
        u = _dot(e, w2, T, PRECISION) * slope * hidden_scale
        a1 = tl.load(a_ptr + i * C + c, c < C, 0.0)[:, None]
        a2 = tl.load(a_ptr + (N * R + i) * C + c, c < C, 0.0)[:, None]
        g1 = _dot(tl.trans((a1 * u).to(T)), k, T, PRECISION)
        g2 = _dot(tl.trans((a2 * e).to(T)), x, T, PRECISION)
        limit = 1.0
        if LIMIT:
            weight = tl.load(c_ptr + i * C + c, c < C, 0.0)[:, None]
            n1 = _dot(tl.trans((weight * u).to(T)), k, T, PRECISION)
            n2 = _dot(tl.trans((weight * e).to(T)), x, T, PRECISION)
            square = tl.sum(tl.sum(n1 * n1, 1), 0) + tl.sum(tl.sum(n2 * n2, 1), 0)
            limit = tl.minimum(max_norm / tl.sqrt(square + 1e-12), 1.0)
        keep = tl.load(keep_ptr + i)
        w1 = keep * w1 + limit * g1
        w2 = keep * w2 + limit * g2
        if MOMENTUM:
            eta, carry = tl.load(eta_ptr + i), tl.load(carry_ptr + i)
            w1 += carry * s1
            w2 += carry * s2
            if SEPARATE:
                b1 = tl.load(b_ptr + i * C + c, c < C, 0.0)[:, None]
                b2 = tl.load(b_ptr + (N * R + i) * C + c, c < C, 0.0)[:, None]
                g1 = _dot(tl.trans((b1 * u).to(T)), k, T, PRECISION)
                g2 = _dot(tl.trans((b2 * e).to(T)), x, T, PRECISION)
            s1 = eta * s1 + limit * g1
            s2 = eta * s2 + limit * g2
    _store(w1_ptr + n * H * D, w1, h, d, H, D)
    _store(w2_ptr + n * H * D, w2, d, h, D, H)
    if MOMENTUM:
        _store(s1_ptr + n * H * D, s1, h, d, H, D)
        _store(s2_ptr + n * H * D, s2, d, h, D, H)


@triton.jit
def _sum_backward(x, delta, weight, d_g, T: tl.constexpr, PRECISION: tl.constexpr):
    """Of a weighted sum of gradients g = (weight delta)^T x: to delta, x and the weight."""
    d_g = d_g.to(T)
    along = _dot(x, tl.trans(d_g), T, PRECISION)
    return weight * along, _dot(weight * delta, d_g, T, PRECISION), tl.sum(delta * along, 1)


@triton.jit
def chunk_backward(
    k_ptr, v_ptr, a_ptr, b_ptr, c_ptr, keep_ptr, eta_ptr, carry_ptr,
    w1s_ptr, w2s_ptr, s1s_ptr, s2s_ptr, dw1s_ptr, dw2s_ptr,
    dk_ptr, dv_ptr, da_ptr, db_ptr, dc_ptr, dkeep_ptr, deta_ptr, dcarry_ptr,
    dw1_ptr, dw2_ptr, ds1_ptr, ds2_ptr,  # at the end, and in place at the start
    N, R, max_norm, hidden_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr,
    SILU: tl.constexpr, MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; grid (N,)."""
    n = tl.program_id(0).to(tl.int64)
    c, d, h = tl.arange(0, CB), tl.arange(0, DB), tl.arange(0, HB)
    T: tl.constexpr = k_ptr.dtype.element_ty
    dw1 = _load(dw1_ptr + n * H * D, h, d, H, D)
    dw2 = _load(dw2_ptr + n * H * D, d, h, D, H)
    if MOMENTUM:
        ds1 = _load(ds1_ptr + n * H * D, h, d, H, D)
        ds2 = _load(ds2_ptr + n * H * D, d, h, D, H)
    for step in range(R):
        i = n * R + (R - 1 - step)
        k = _load(k_ptr + i * C * D, c, d, C, D)
        v = _load(v_ptr + i * C * D, c, d, C, D).to(tl.float32)
        w1 = _load(w1s_ptr + i * H * D, h, d, H, D)
        w2 = _load(w2s_ptr + i * H * D, d, h, D, H)
        # The chunk again.
        z = _dot(k, tl.trans(w1), T, PRECISION)
        x, slope, bend = _activate(z, SILU)
        # In the dtype of the keys what lives long: registers hold sixteen fp32 tiles of 64 x 64, all in all.
        x, slope, bend = (x * hidden_scale).to(T), (slope * hidden_scale).to(T), (bend * hidden_scale).to(T)
        e = _dot(x, tl.trans(w2), T, PRECISION) - v
        e = e.to(T)
        t = _dot(e, w2, T, PRECISION).to(T)
        a1 = tl.load(a_ptr + i * C + c, c < C, 0.0)[:, None]
        a2 = tl.load(a_ptr + (N * R + i) * C + c, c < C, 0.0)[:, None]
        limit = 1.0
        if LIMIT:
            weight = tl.load(c_ptr + i * C + c, c < C, 0.0)[:, None]
            n1 = _dot(tl.trans((weight * t * slope).to(T)), k, T, PRECISION)
            n2 = _dot(tl.trans((weight * e).to(T)), x, T, PRECISION)
            square = tl.sum(tl.sum(n1 * n1, 1), 0) + tl.sum(tl.sum(n2 * n2, 1), 0) + 1e-12
            limit = tl.minimum(max_norm / tl.sqrt(square), 1.0)
            n1, n2 = n1.to(T), n2.to(T)
        # To the second matrix's gradients, then the first's.
        d_g1, d_g2 = dw1, dw2
        if MOMENTUM and not SEPARATE:
            d_g1, d_g2 = dw1 + ds1, dw2 + ds2
        d_e, d_x, d_a2 = _sum_backward(x, e, a2, limit * d_g2, T, PRECISION)
        d_u, d_k, d_a1 = _sum_backward(k, t.to(tl.float32) * slope, a1, limit * d_g1, T, PRECISION)
        tl.store(da_ptr + i * C + c, d_a1, c < C)
        tl.store(da_ptr + (N * R + i) * C + c, d_a2, c < C)
        if LIMIT:
            moved = tl.sum(a1 * d_a1[:, None]) + tl.sum(a2 * d_a2[:, None])  # limit times its derivative
        if SEPARATE:
            b1 = tl.load(b_ptr + i * C + c, c < C, 0.0)[:, None]
            b2 = tl.load(b_ptr + (N * R + i) * C + c, c < C, 0.0)[:, None]
            m_e, m_x, d_b2 = _sum_backward(x, e, b2, limit * ds2, T, PRECISION)
            d_e, d_x = d_e + m_e, d_x + m_x
            m_u, m_k, d_b1 = _sum_backward(k, t.to(tl.float32) * slope, b1, limit * ds1, T, PRECISION)
            d_u, d_k = d_u + m_u, d_k + m_k
            tl.store(db_ptr + i * C + c, d_b1, c < C)
            tl.store(db_ptr + (N * R + i) * C + c, d_b2, c < C)
            if LIMIT:
                moved += tl.sum(b1 * d_b1[:, None]) + tl.sum(b2 * d_b2[:, None])
        if LIMIT:
            back = tl.where(limit < 1.0, -moved / square, 0.0)
            m_e, m_x, d_c2 = _sum_backward(x, e, weight, back * n2, T, PRECISION)
            d_e, d_x = d_e + m_e, d_x + m_x
            m_u, m_k, d_c1 = _sum_backward(k, t.to(tl.float32) * slope, weight, back * n1, T, PRECISION)
            d_u, d_k = d_u + m_u, d_k + m_k
            tl.store(dc_ptr + i * C + c, d_c1 + d_c2, c < C)
        # Through u = (e W_2) act'(z), e = y - v, y = x W_2^T, x = act(z), z = k W_1^T.
        d_t = (d_u * slope).to(T)
        d_z = d_u * t * bend
        d_e += _dot(d_t, tl.trans(w2), T, PRECISION)
        d_y = d_e.to(T)
        _store(dv_ptr + i * C * D, -d_y, c, d, C, D)
        d_z = (d_z + (d_x + _dot(d_y, w2, T, PRECISION)) * slope).to(T)
        d_k += _dot(d_z, w1, T, PRECISION)
        _store(dk_ptr + i * C * D, d_k.to(T), c, d, C, D)
        # The factors, then the states before this chunk.
        keep = tl.load(keep_ptr + i)
        d_keep = tl.sum(tl.sum(dw1 * w1.to(tl.float32), 1), 0) + tl.sum(tl.sum(dw2 * w2.to(tl.float32), 1), 0)
        tl.store(dkeep_ptr + i, d_keep)
        if MOMENTUM:
            eta, carry = tl.load(eta_ptr + i), tl.load(carry_ptr + i)
            s = _load(s1s_ptr + i * H * D, h, d, H, D).to(tl.float32)
            d_eta, d_carry = tl.sum(tl.sum(ds1 * s, 1), 0), tl.sum(tl.sum(dw1 * s, 1), 0)
            ds1 = eta * ds1 + carry * dw1
            s = _load(s2s_ptr + i * H * D, d, h, D, H).to(tl.float32)
            d_eta += tl.sum(tl.sum(ds2 * s, 1), 0)
            d_carry += tl.sum(tl.sum(dw2 * s, 1), 0)
            ds2 = eta * ds2 + carry * dw2
            tl.store(deta_ptr + i, d_eta)
            tl.store(dcarry_ptr + i, d_carry)
        dw1 = keep * dw1 + _load(dw1s_ptr + i * H * D, h, d, H, D).to(tl.float32)
        dw1 += _dot(tl.trans(d_z), k, T, PRECISION)
        dw2 = keep * dw2 + _load(dw2s_ptr + i * H * D, d, h, D, H).to(tl.float32)
        dw2 += _dot(tl.trans(e), d_t, T, PRECISION)
        dw2 += _dot(tl.trans(d_y), x, T, PRECISION)
    _store(dw1_ptr + n * H * D, dw1, h, d, H, D)
    _store(dw2_ptr + n * H * D, dw2, d, h, D, H)
    if MOMENTUM:
        _store(ds1_ptr + n * H * D, ds1, h, d, H, D)
        _store(ds2_ptr + n * H * D, ds2, d, h, D, H)
