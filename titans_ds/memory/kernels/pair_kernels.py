"""Triton: what stands between the products of pair.py, one pass over its tokens each.

A program has one token's row of a block of chunks; tokens of R chunks of texts of TOTAL. Token weights are pointers to
the first of these chunks, of tensors that hold all of them.

Legend of shape suffixes: N memories, R chunks of C tokens, X width of a row; XB the same as a power of two.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl

from titans_ds.memory.kernels.chunk_kernels import _activate, _error


@triton.jit
def _row(R, TOTAL, C: tl.constexpr, X: tl.constexpr, XB: tl.constexpr):
    """This program's row in a block, its token in whole texts, the columns, and which of them there are."""
    i = tl.program_id(0).to(tl.int64)
    x = tl.arange(0, XB)
    return i * X + x, i // (R * C) * TOTAL * C + i % (R * C), x, x < X


@triton.jit
def hidden(z_ptr, x_ptr, scale, SILU: tl.constexpr, R, TOTAL, C: tl.constexpr, X: tl.constexpr, XB: tl.constexpr):
    """x = h act(z)."""
    at, _, _, inside = _row(R, TOTAL, C, X, XB)
    x, _, _ = _activate(tl.load(z_ptr + at, inside, 0.0).to(tl.float32), SILU)
    tl.store(x_ptr + at, (x * scale).to(x_ptr.dtype.element_ty), inside)


@triton.jit
def errors(
    y_ptr, v_ptr, a_ptr, b_ptr, e_ptr, ae_ptr, be_ptr, huber_delta, LOSS: tl.constexpr, SEPARATE: tl.constexpr,
    R, TOTAL, C: tl.constexpr, X: tl.constexpr, XB: tl.constexpr,
):  # fmt: skip
    """e, the loss's derivative in y, and a e, b e."""
    at, token, x, inside = _row(R, TOTAL, C, X, XB)
    y = tl.load(y_ptr + at, inside, 0.0).to(tl.float32)
    v = tl.load(v_ptr + token * X + x, inside, 0.0).to(tl.float32)
    e, _ = _error(y, v, huber_delta, LOSS)
    e = e.to(e_ptr.dtype.element_ty)
    tl.store(e_ptr + at, e, inside)
    tl.store(ae_ptr + at, (tl.load(a_ptr + token) * e).to(e.dtype), inside)
    if SEPARATE:
        tl.store(be_ptr + at, (tl.load(b_ptr + token) * e).to(e.dtype), inside)


@triton.jit
def through(
    t_ptr, z_ptr, a_ptr, b_ptr, au_ptr, bu_ptr, scale, SILU: tl.constexpr, SEPARATE: tl.constexpr,
    R, TOTAL, C: tl.constexpr, X: tl.constexpr, XB: tl.constexpr,
):  # fmt: skip
    """a u and b u of u = t h act'(z)."""
    at, token, _, inside = _row(R, TOTAL, C, X, XB)
    _, slope, _ = _activate(tl.load(z_ptr + at, inside, 0.0).to(tl.float32), SILU)
    u = tl.load(t_ptr + at, inside, 0.0).to(tl.float32) * slope * scale
    tl.store(au_ptr + at, (tl.load(a_ptr + token) * u).to(au_ptr.dtype.element_ty), inside)
    if SEPARATE:
        tl.store(bu_ptr + at, (tl.load(b_ptr + token) * u).to(bu_ptr.dtype.element_ty), inside)


@triton.jit
def errors_backward(
    e_ptr, pa_ptr, pb_ptr, a_ptr, b_ptr, de_ptr, da_ptr, db_ptr, SEPARATE: tl.constexpr,
    R, TOTAL, C: tl.constexpr, X: tl.constexpr, XB: tl.constexpr,
):  # fmt: skip
    """From those in a e and b e, p: to e, a and b."""
    at, token, _, inside = _row(R, TOTAL, C, X, XB)
    e = tl.load(e_ptr + at, inside, 0.0).to(tl.float32)
    p = tl.load(pa_ptr + at, inside, 0.0).to(tl.float32)
    tl.store(da_ptr + token, tl.sum(e * p, 0))
    d_e = tl.load(a_ptr + token) * p
    if SEPARATE:
        p = tl.load(pb_ptr + at, inside, 0.0).to(tl.float32)
        tl.store(db_ptr + token, tl.sum(e * p, 0))
        d_e += tl.load(b_ptr + token) * p
    tl.store(de_ptr + at, d_e.to(de_ptr.dtype.element_ty), inside)


@triton.jit
def through_backward(
    t_ptr, z_ptr, pa_ptr, pb_ptr, a_ptr, b_ptr, dt_ptr, dz_ptr, da_ptr, db_ptr,
    scale, SILU: tl.constexpr, SEPARATE: tl.constexpr,
    R, TOTAL, C: tl.constexpr, X: tl.constexpr, XB: tl.constexpr,
):  # fmt: skip
    """From those in a u and b u, p: to t, z, a and b."""
    at, token, _, inside = _row(R, TOTAL, C, X, XB)
    _, slope, bend = _activate(tl.load(z_ptr + at, inside, 0.0).to(tl.float32), SILU)
    t = tl.load(t_ptr + at, inside, 0.0).to(tl.float32)
    p = tl.load(pa_ptr + at, inside, 0.0).to(tl.float32)
    u = t * slope * scale
    tl.store(da_ptr + token, tl.sum(u * p, 0))
    d_u = tl.load(a_ptr + token) * p
    if SEPARATE:
        p = tl.load(pb_ptr + at, inside, 0.0).to(tl.float32)
        tl.store(db_ptr + token, tl.sum(u * p, 0))
        d_u += tl.load(b_ptr + token) * p
    tl.store(dt_ptr + at, (d_u * slope * scale).to(dt_ptr.dtype.element_ty), inside)
    tl.store(dz_ptr + at, (d_u * t * bend * scale).to(dz_ptr.dtype.element_ty), inside)


@triton.jit
def values_backward(
    e_ptr, de_ptr, dv_ptr, huber_delta, LOSS: tl.constexpr,
    R, TOTAL, C: tl.constexpr, X: tl.constexpr, XB: tl.constexpr,
):  # fmt: skip
    """From that in e: to the values, and in place to y."""
    at, token, x, inside = _row(R, TOTAL, C, X, XB)
    d_e = tl.load(de_ptr + at, inside, 0.0).to(tl.float32)
    if LOSS == 2:
        e = tl.load(e_ptr + at, inside, 0.0).to(tl.float32)
        d_e = tl.where(tl.abs(e) < huber_delta, d_e, 0.0)
        tl.store(de_ptr + at, d_e.to(de_ptr.dtype.element_ty), inside)
    tl.store(dv_ptr + token * X + x, (-d_e).to(dv_ptr.dtype.element_ty), inside)


@triton.jit
def hidden_backward(
    z_ptr, dx_ptr, dz_ptr, scale, SILU: tl.constexpr, R, TOTAL, C: tl.constexpr, X: tl.constexpr, XB: tl.constexpr
):
    """From that in x: on top of that in z."""
    at, _, _, inside = _row(R, TOTAL, C, X, XB)
    _, slope, _ = _activate(tl.load(z_ptr + at, inside, 0.0).to(tl.float32), SILU)
    d_z = tl.load(dz_ptr + at, inside, 0.0).to(tl.float32)
    d_z += tl.load(dx_ptr + at, inside, 0.0).to(tl.float32) * slope * scale
    tl.store(dz_ptr + at, d_z.to(dz_ptr.dtype.element_ty), inside)
