"""Triton: the writes of `chunk` with one matrix, a program per memory, W on the chip from the first chunk to the last.

f_W(x) is W x, or x + scale LayerNorm(W x) + bias as in TTT-Linear (arXiv 2407.04620). Token weights a, b, c and the
factors keep, eta, carry are those of chunkwise_kernels.py; a program walks over its chunks as there. The derivative
that a gradient is made of, delta = J(n, i) g with n = LayerNorm(z), i = 1 / std(z) and J = i (1 - 11^T / D - n n^T /
D), has J symmetric; its own derivative in z goes through n and through i.

Legend of shape suffixes: N memories, R chunks of C tokens, D width; CB, DB the same as powers of two, 16 or more.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl

from titans_ds.memory.mlp.kernels.chunkwise_kernels import _dot, _load, _store, _sum_backward


@triton.jit
def _mean(x, D: tl.constexpr):
    """Over the width of each token; zeros stand around it."""
    return (tl.sum(x, 1) / D)[:, None]


@triton.jit
def _inside(x, D: tl.constexpr):
    """Zeros around the width."""
    if x.shape[1] == D:
        return x
    return tl.where(tl.arange(0, x.shape[1])[None, :] < D, x, 0.0)


@triton.jit
def _normalize(z, eps, D: tl.constexpr):
    """n = LayerNorm(z) and i."""
    centred = _inside(z - _mean(z, D), D)
    inverse = 1 / tl.sqrt(_mean(centred * centred, D) + eps)
    return centred * inverse, inverse


@triton.jit
def _project(t, n, inverse, D: tl.constexpr):
    """J t."""
    return _inside(inverse * (t - _mean(t, D) - n * _mean(t * n, D)), D)


@triton.jit
def _deltas(
    k, v, w, scale, bias, eps,
    D: tl.constexpr, NORM: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The loss's derivative delta in z = k W^T; e, the derivative in f_W(k); n and i, if any."""
    z = _dot(k, tl.trans(w.to(T)), T, PRECISION)
    if NORM:
        normed, inverse = _normalize(z, eps, D)
        e = k.to(tl.float32) + scale * normed + bias - v
        delta = _project(scale * e, normed, inverse, D)
    else:
        e = z - v
        delta, normed, inverse = e, z, z
    return delta, e, normed, inverse


@triton.jit
def _square(delta, k, weight, max_norm, T: tl.constexpr, PRECISION: tl.constexpr):
    """The gradient with these weights, the square of its norm, and the factor that limits it."""
    g = _dot(tl.trans((weight[:, None] * delta).to(T)), k, T, PRECISION)
    square = tl.sum(tl.sum(g * g, 1), 0) + 1e-12
    return g, square, tl.minimum(max_norm / tl.sqrt(square), 1.0)


@triton.jit
def single_forward(
    k_ptr, v_ptr, a_ptr, b_ptr, c_ptr, keep_ptr, eta_ptr, carry_ptr, scale_ptr, bias_ptr,
    w_ptr, s_ptr,  # at the start, and in place at the end
    ws_ptr, ss_ptr,  # before every chunk
    N, R, max_norm, eps,
    C: tl.constexpr, D: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr,
    NORM: tl.constexpr, MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, LIMIT: tl.constexpr,
    SAVE_MOMENTUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; grid (N,)."""
    n = tl.program_id(0).to(tl.int64)
    c, d = tl.arange(0, CB), tl.arange(0, DB)
    T: tl.constexpr = k_ptr.dtype.element_ty
    w = _load(w_ptr + n * D * D, d, d, D, D)
    if MOMENTUM:
        s = _load(s_ptr + n * D * D, d, d, D, D)
    scale = tl.load(scale_ptr + n * D + d, d < D, 0.0)[None, :]
    bias = tl.load(bias_ptr + n * D + d, d < D, 0.0)[None, :]
    for r in range(R):
        i = n * R + r
        _store(ws_ptr + i * D * D, w.to(T), d, d, D, D)
        if SAVE_MOMENTUM:
            _store(ss_ptr + i * D * D, s.to(T), d, d, D, D)
        k = _load(k_ptr + i * C * D, c, d, C, D)
        v = _load(v_ptr + i * C * D, c, d, C, D).to(tl.float32)
        delta, _, _, _ = _deltas(k, v, w, scale, bias, eps, D, NORM, T, PRECISION)
        a = tl.load(a_ptr + i * C + c, c < C, 0.0)[:, None]
        g = _dot(tl.trans((a * delta).to(T)), k, T, PRECISION)
        limit = 1.0
        if LIMIT:
            weight = tl.load(c_ptr + i * C + c, c < C, 0.0)
            _, _, limit = _square(delta, k, weight, max_norm, T, PRECISION)
        w = tl.load(keep_ptr + i) * w + limit * g
        if MOMENTUM:
            w += tl.load(carry_ptr + i) * s
            if SEPARATE:
                b = tl.load(b_ptr + i * C + c, c < C, 0.0)[:, None]
                g = _dot(tl.trans((b * delta).to(T)), k, T, PRECISION)
            s = tl.load(eta_ptr + i) * s + limit * g
    _store(w_ptr + n * D * D, w, d, d, D, D)
    if MOMENTUM:
        _store(s_ptr + n * D * D, s, d, d, D, D)


@triton.jit
def single_backward(
    k_ptr, v_ptr, a_ptr, b_ptr, c_ptr, keep_ptr, eta_ptr, carry_ptr, scale_ptr, bias_ptr,
    ws_ptr, ss_ptr, dws_ptr,
    dk_ptr, dv_ptr, da_ptr, db_ptr, dc_ptr, dkeep_ptr, deta_ptr, dcarry_ptr, dscale_ptr, dbias_ptr,
    dw_ptr, ds_ptr,  # at the end, and in place at the start
    N, R, max_norm, eps,
    C: tl.constexpr, D: tl.constexpr, CB: tl.constexpr, DB: tl.constexpr,
    NORM: tl.constexpr, MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, LIMIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """See the module; grid (N,)."""
    n = tl.program_id(0).to(tl.int64)
    c, d = tl.arange(0, CB), tl.arange(0, DB)
    T: tl.constexpr = k_ptr.dtype.element_ty
    dw = _load(dw_ptr + n * D * D, d, d, D, D)
    if MOMENTUM:
        ds = _load(ds_ptr + n * D * D, d, d, D, D)
    scale = tl.load(scale_ptr + n * D + d, d < D, 0.0)[None, :]
    bias = tl.load(bias_ptr + n * D + d, d < D, 0.0)[None, :]
    if NORM:
        d_scale = tl.zeros((DB,), tl.float32)
        d_bias = tl.zeros((DB,), tl.float32)
    for step in range(R):
        i = n * R + (R - 1 - step)
        k = _load(k_ptr + i * C * D, c, d, C, D)
        v = _load(v_ptr + i * C * D, c, d, C, D).to(tl.float32)
        w = _load(ws_ptr + i * D * D, d, d, D, D)
        delta, e, normed, inverse = _deltas(
            k, v, w, scale, bias, eps, D, NORM, T, PRECISION
        )  # fmt: skip
        a = tl.load(a_ptr + i * C + c, c < C, 0.0)[:, None]
        direction = dw
        if MOMENTUM and not SEPARATE:
            direction = dw + ds
        limit = 1.0
        if LIMIT:
            weight = tl.load(c_ptr + i * C + c, c < C, 0.0)
            gradient, square, limit = _square(delta, k, weight, max_norm, T, PRECISION)
        d_delta, d_k, d_a = _sum_backward(k, delta, a, limit * direction, T, PRECISION)
        tl.store(da_ptr + i * C + c, d_a, c < C)
        if LIMIT:
            moved = tl.sum(a * d_a[:, None])  # limit times its derivative
        if SEPARATE:
            b = tl.load(b_ptr + i * C + c, c < C, 0.0)[:, None]
            m_delta, m_k, d_b = _sum_backward(k, delta, b, limit * ds, T, PRECISION)
            d_delta, d_k = d_delta + m_delta, d_k + m_k
            tl.store(db_ptr + i * C + c, d_b, c < C)
            if LIMIT:
                moved += tl.sum(b * d_b[:, None])
        if LIMIT:
            back = tl.where(limit < 1.0, -moved / square, 0.0)
            m_delta, m_k, d_c = _sum_backward(k, delta, weight[:, None], back * gradient, T, PRECISION)
            d_delta, d_k = d_delta + m_delta, d_k + m_k
            tl.store(dc_ptr + i * C + c, d_c, c < C)
        # Through delta = J g, g = scale e, e = y - v, y = k + scale n + bias, n = LayerNorm(z), z = k W^T.
        d_e = d_delta
        if NORM:
            g = scale * e
            d_g = _project(d_delta, normed, inverse, D)
            along, across = _mean(d_delta * normed, D), _mean(g * normed, D)
            shared = _mean(d_delta * g, D) - _mean(d_delta, D) * _mean(g, D) - along * across
            d_normed = -inverse * (g * along + d_delta * across)
            d_e = scale * d_g
            d_scale += tl.sum(e * d_g, 0)
        d_y = d_e
        _store(dv_ptr + i * C * D, (-d_y).to(T), c, d, C, D)
        if NORM:
            d_k += d_y
            d_scale += tl.sum(d_y * normed, 0)
            d_bias += tl.sum(d_y, 0)
            d_normed += scale * d_y
            d_z = _project(d_normed, normed, inverse, D) - inverse * inverse * normed * shared
        else:
            d_z = d_y
        d_z = d_z.to(T)
        d_k += _dot(d_z, w, T, PRECISION)
        _store(dk_ptr + i * C * D, d_k.to(T), c, d, C, D)
        # The factors, then the states before this chunk.
        keep = tl.load(keep_ptr + i)
        tl.store(dkeep_ptr + i, tl.sum(tl.sum(dw * w.to(tl.float32), 1), 0))
        if MOMENTUM:
            eta, carry = tl.load(eta_ptr + i), tl.load(carry_ptr + i)
            s = _load(ss_ptr + i * D * D, d, d, D, D).to(tl.float32)
            tl.store(deta_ptr + i, tl.sum(tl.sum(ds * s, 1), 0))
            tl.store(dcarry_ptr + i, tl.sum(tl.sum(dw * s, 1), 0))
            ds = eta * ds + carry * dw
        dw = keep * dw + _load(dws_ptr + i * D * D, d, d, D, D).to(tl.float32)
        dw += _dot(tl.trans(d_z), k, T, PRECISION)
    _store(dw_ptr + n * D * D, dw, d, d, D, D)
    if MOMENTUM:
        _store(ds_ptr + n * D * D, ds, d, d, D, D)
    if NORM:
        tl.store(dscale_ptr + n * D + d, d_scale, d < D)
        tl.store(dbias_ptr + n * D + d, d_bias, d < D)
