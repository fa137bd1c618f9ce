"""Triton: the weighted gradients of a chunk at the call's start, and a chunk's reads; back through both.

One program per chunk. The gradients are the same steps as in chunk_kernels.py, whose functions they share, with the
weights read and not written: token weights `a` of the gradient in W, `b` of that in S (SEPARATE), one set per matrix,
and `c` of the one whose norm is limited. A call works on R chunks of texts of TOTAL: what is by token is a part of
tensors that hold all of them, what is by state is of these chunks alone.

Legend of shape suffixes: N memories, R chunks of C tokens, D width, H hidden width; CB, DB, HB the same as powers of
two, 16 or more.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl

from titans_ds.memory.kernels.chunk_kernels import _activate, _dot, _error, _load, _store, _sum_backward


@triton.jit
def span_forward(
    k_ptr, v_ptr, c_ptr, a_ptr, b_ptr, w1_ptr, w2_ptr,
    ga1_ptr, ga2_ptr, gb1_ptr, gb2_ptr,
    N, R, TOTAL, max_norm, huber_delta, hidden_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr,
    SILU: tl.constexpr, LOSS: tl.constexpr, SEPARATE: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; grid (N R,)."""
    i = tl.program_id(0).to(tl.int64)
    n = i // R
    j = n * TOTAL + i % R
    second = N * TOTAL * C  # from the first matrix's token weights to the second's
    c, d, h = tl.arange(0, CB), tl.arange(0, DB), tl.arange(0, HB)
    T: tl.constexpr = k_ptr.dtype.element_ty
    k = _load(k_ptr + j * C * D, c, d, C, D)
    v = _load(v_ptr + j * C * D, c, d, C, D).to(tl.float32)
    w1 = _load(w1_ptr + n * H * D, h, d, H, D)
    w2 = _load(w2_ptr + n * H * D, d, h, D, H)
    z = _dot(k, tl.trans(w1), T, PRECISION)
    x, slope, _ = _activate(z, SILU)
    x = (x * hidden_scale).to(T)
    e, _ = _error(_dot(x, tl.trans(w2), T, PRECISION), v, huber_delta, LOSS)
    u = _dot(e, w2, T, PRECISION) * slope * hidden_scale
    limit = 1.0
    if LIMIT:
        weight = tl.load(c_ptr + j * C + c, c < C, 0.0)[:, None]
        n1 = _dot(tl.trans((weight * u).to(T)), k, T, PRECISION)
        n2 = _dot(tl.trans((weight * e).to(T)), x, T, PRECISION)
        square = tl.sum(tl.sum(n1 * n1, 1), 0) + tl.sum(tl.sum(n2 * n2, 1), 0)
        limit = tl.minimum(max_norm / tl.sqrt(square + 1e-12), 1.0)
    a = tl.load(a_ptr + j * C + c, c < C, 0.0)[:, None]
    g1 = limit * _dot(tl.trans((a * u).to(T)), k, T, PRECISION)
    _store(ga1_ptr + i * H * D, g1.to(T), h, d, H, D)
    a = tl.load(a_ptr + second + j * C + c, c < C, 0.0)[:, None]
    g2 = limit * _dot(tl.trans((a * e).to(T)), x, T, PRECISION)
    _store(ga2_ptr + i * H * D, g2.to(T), d, h, D, H)
    if SEPARATE:
        b = tl.load(b_ptr + j * C + c, c < C, 0.0)[:, None]
        g1 = limit * _dot(tl.trans((b * u).to(T)), k, T, PRECISION)
        _store(gb1_ptr + i * H * D, g1.to(T), h, d, H, D)
        b = tl.load(b_ptr + second + j * C + c, c < C, 0.0)[:, None]
        g2 = limit * _dot(tl.trans((b * e).to(T)), x, T, PRECISION)
        _store(gb2_ptr + i * H * D, g2.to(T), d, h, D, H)


@triton.jit
def span_backward(
    k_ptr, v_ptr, c_ptr, a_ptr, b_ptr, w1_ptr, w2_ptr,
    dga1_ptr, dga2_ptr, dgb1_ptr, dgb2_ptr,  # the first two become the derivative in W_1 and W_2, chunk by chunk
    dk_ptr, dv_ptr, dc_ptr, da_ptr, db_ptr,
    N, R, TOTAL, max_norm, huber_delta, hidden_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr,
    SILU: tl.constexpr, LOSS: tl.constexpr, SEPARATE: tl.constexpr, LIMIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; grid (N R,)."""
    i = tl.program_id(0).to(tl.int64)
    n = i // R
    j = n * TOTAL + i % R
    second = N * TOTAL * C  # from the first matrix's token weights to the second's
    c, d, h = tl.arange(0, CB), tl.arange(0, DB), tl.arange(0, HB)
    T: tl.constexpr = k_ptr.dtype.element_ty
    k = _load(k_ptr + j * C * D, c, d, C, D)
    v = _load(v_ptr + j * C * D, c, d, C, D).to(tl.float32)
    w1 = _load(w1_ptr + n * H * D, h, d, H, D)
    w2 = _load(w2_ptr + n * H * D, d, h, D, H)
    z = _dot(k, tl.trans(w1), T, PRECISION)
    x, slope, bend = _activate(z, SILU)
    x, slope, bend = (x * hidden_scale).to(T), (slope * hidden_scale).to(T), (bend * hidden_scale).to(T)
    e, e_slope = _error(_dot(x, tl.trans(w2), T, PRECISION), v, huber_delta, LOSS)
    e = e.to(T)
    t = _dot(e, w2, T, PRECISION).to(T)
    u = t.to(tl.float32) * slope
    limit = 1.0
    if LIMIT:
        weight = tl.load(c_ptr + j * C + c, c < C, 0.0)[:, None]
        n1 = _dot(tl.trans((weight * u).to(T)), k, T, PRECISION)
        n2 = _dot(tl.trans((weight * e).to(T)), x, T, PRECISION)
        square = tl.sum(tl.sum(n1 * n1, 1), 0) + tl.sum(tl.sum(n2 * n2, 1), 0) + 1e-12
        limit = tl.minimum(max_norm / tl.sqrt(square), 1.0)
        n1, n2 = n1.to(T), n2.to(T)
    a = tl.load(a_ptr + second + j * C + c, c < C, 0.0)[:, None]
    d_e, d_x, d_a = _sum_backward(x, e, a, limit * _load(dga2_ptr + i * H * D, d, h, D, H), T, PRECISION)
    tl.store(da_ptr + second + j * C + c, d_a, c < C)
    if LIMIT:
        moved = tl.sum(a * d_a[:, None])  # limit times its derivative
    a = tl.load(a_ptr + j * C + c, c < C, 0.0)[:, None]
    d_u, d_k, d_a = _sum_backward(k, u, a, limit * _load(dga1_ptr + i * H * D, h, d, H, D), T, PRECISION)
    tl.store(da_ptr + j * C + c, d_a, c < C)
    if LIMIT:
        moved += tl.sum(a * d_a[:, None])
    if SEPARATE:
        b = tl.load(b_ptr + second + j * C + c, c < C, 0.0)[:, None]
        m_e, m_x, d_b = _sum_backward(x, e, b, limit * _load(dgb2_ptr + i * H * D, d, h, D, H), T, PRECISION)
        d_e, d_x = d_e + m_e, d_x + m_x
        tl.store(db_ptr + second + j * C + c, d_b, c < C)
        if LIMIT:
            moved += tl.sum(b * d_b[:, None])
        b = tl.load(b_ptr + j * C + c, c < C, 0.0)[:, None]
        m_u, m_k, d_b = _sum_backward(k, u, b, limit * _load(dgb1_ptr + i * H * D, h, d, H, D), T, PRECISION)
        d_u, d_k = d_u + m_u, d_k + m_k
        tl.store(db_ptr + j * C + c, d_b, c < C)
        if LIMIT:
            moved += tl.sum(b * d_b[:, None])
    if LIMIT:
        back = tl.where(limit < 1.0, -moved / square, 0.0)
        m_e, m_x, d_c2 = _sum_backward(x, e, weight, back * n2, T, PRECISION)
        m_u, m_k, d_c1 = _sum_backward(k, u, weight, back * n1, T, PRECISION)
        d_e, d_x, d_u, d_k = d_e + m_e, d_x + m_x, d_u + m_u, d_k + m_k
        tl.store(dc_ptr + j * C + c, d_c1 + d_c2, c < C)
    # Through u = (e W_2) act'(z), e(y - v), y = x W_2^T, x = act(z), z = k W_1^T.
    d_t = (d_u * slope).to(T)
    d_z = d_u * t * bend
    d_e += _dot(d_t, tl.trans(w2), T, PRECISION)
    if LOSS == 1:
        _store(dv_ptr + j * C * D, (-d_e).to(T), c, d, C, D)
    d_y = (d_e * e_slope).to(T)
    if LOSS != 1:
        _store(dv_ptr + j * C * D, -d_y, c, d, C, D)
    d_z = (d_z + (d_x + _dot(d_y, w2, T, PRECISION)) * slope).to(T)
    d_k += _dot(d_z, w1, T, PRECISION)
    _store(dk_ptr + j * C * D, d_k.to(T), c, d, C, D)
    tl.debug_barrier()  # all warps have read what is overwritten now
    _store(dga1_ptr + i * H * D, _dot(tl.trans(d_z), k, T, PRECISION).to(T), h, d, H, D)
    d_w2 = _dot(tl.trans(e), d_t, T, PRECISION) + _dot(tl.trans(d_y), x, T, PRECISION)
    _store(dga2_ptr + i * H * D, d_w2.to(T), d, h, D, H)


@triton.jit
def read_forward(
    q_ptr, w1_ptr, w2_ptr, y_ptr, R, TOTAL, hidden_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr,
    SILU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """f_W(q) of every chunk with its own weights; grid (N R,)."""
    i = tl.program_id(0).to(tl.int64)
    j = i // R * TOTAL + i % R
    c, d, h = tl.arange(0, CB), tl.arange(0, DB), tl.arange(0, HB)
    T: tl.constexpr = q_ptr.dtype.element_ty
    q = _load(q_ptr + j * C * D, c, d, C, D)
    w1 = _load(w1_ptr + i * H * D, h, d, H, D)
    w2 = _load(w2_ptr + i * H * D, d, h, D, H)
    x, _, _ = _activate(_dot(q, tl.trans(w1), T, PRECISION), SILU)
    _store(y_ptr + j * C * D, _dot(x * hidden_scale, tl.trans(w2), T, PRECISION).to(T), c, d, C, D)


@triton.jit
def read_backward(
    q_ptr, w1_ptr, w2_ptr, dy_ptr, dq_ptr, dw1_ptr, dw2_ptr, R, TOTAL, hidden_scale,
    C: tl.constexpr, D: tl.constexpr, H: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr, HB: tl.constexpr,
    SILU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """To the queries and to every chunk's weights; grid (N R,)."""
    i = tl.program_id(0).to(tl.int64)
    j = i // R * TOTAL + i % R
    c, d, h = tl.arange(0, CB), tl.arange(0, DB), tl.arange(0, HB)
    T: tl.constexpr = q_ptr.dtype.element_ty
    q = _load(q_ptr + j * C * D, c, d, C, D)
    w1 = _load(w1_ptr + i * H * D, h, d, H, D)
    w2 = _load(w2_ptr + i * H * D, d, h, D, H)
    d_y = _load(dy_ptr + j * C * D, c, d, C, D)
    x, slope, _ = _activate(_dot(q, tl.trans(w1), T, PRECISION), SILU)
    _store(dw2_ptr + i * H * D, _dot(tl.trans(d_y), x * hidden_scale, T, PRECISION).to(T), d, h, D, H)
    d_z = (_dot(d_y, w2, T, PRECISION) * slope * hidden_scale).to(T)
    _store(dw1_ptr + i * H * D, _dot(tl.trans(d_z), q, T, PRECISION).to(T), h, d, H, D)
    _store(dq_ptr + j * C * D, _dot(d_z, w1, T, PRECISION).to(T), c, d, C, D)
