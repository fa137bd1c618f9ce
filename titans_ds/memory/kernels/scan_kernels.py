"""Triton: momentum and weights from chunk to chunk, and back; see scan.py, which says the same in PyTorch.

A program has BLOCK entries of one memory's state in registers, and walks over the chunks. It asks for a chunk's entries
two chunks before it needs them: what a step costs is its bytes, not the way to memory and back.

Legend of shape suffixes: N memories, R chunks, X entries of a state.
"""

# mypy: ignore-errors
# Triton compiles these functions: their arguments are pointers and tiles, and have no Python types.
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _at(ptr, r, R, X, inside):
    """Entries of chunk r of [R, X]; zeros where there is no such chunk."""
    return tl.load(ptr + r * X, inside & (r >= 0) & (r < R), 0.0)


@triton.jit
def scan_forward(
    g_ptr, m_ptr,  # [N, R, X]: G^w, overwritten by W; where S goes, and where G^m is if SEPARATE
    keep_ptr, eta_ptr, carry_ptr,  # [N, R]
    w_ptr, s_ptr, w_end_ptr, s_end_ptr,  # [N, X]: before and after
    R, X, w_stride, s_stride, factor_stride,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, SAVE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, X / BLOCK)."""
    n = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < X
    g_ptr += n * R * X + x
    m_ptr += n * R * X + x
    keep_ptr += n * factor_stride
    eta_ptr += n * factor_stride
    carry_ptr += n * factor_stride
    w = tl.load(w_ptr + n * w_stride + x, inside, 0.0)
    s = tl.zeros_like(w)
    if MOMENTUM:
        s = tl.load(s_ptr + n * s_stride + x, inside, 0.0)
    g, g_next = _at(g_ptr, 0, R, X, inside), _at(g_ptr, 1, R, X, inside)
    m, m_next = g, g_next
    if SEPARATE:
        m, m_next = _at(m_ptr, 0, R, X, inside), _at(m_ptr, 1, R, X, inside)
    for r in range(R):
        g_later = _at(g_ptr, r + 2, R, X, inside)
        m_later = g_later
        if SEPARATE:
            m_later = _at(m_ptr, r + 2, R, X, inside)
        keep = tl.load(keep_ptr + r)
        tl.store(g_ptr + r * X, w.to(g_ptr.dtype.element_ty), inside)
        if SAVE:
            tl.store(m_ptr + r * X, s.to(m_ptr.dtype.element_ty), inside)
        w = keep * w + g.to(w.dtype)
        if MOMENTUM:
            w += tl.load(carry_ptr + r) * s
            s = tl.load(eta_ptr + r) * s + m.to(w.dtype)
        g, g_next, m, m_next = g_next, g_later, m_next, m_later
    tl.store(w_end_ptr + n * X + x, w, inside)
    if MOMENTUM:
        tl.store(s_end_ptr + n * X + x, s, inside)


@triton.jit
def scan_backward(
    d_ptr,  # [N, R, X]: the derivative in W_r of what reads it, overwritten by that in G^w
    w_ptr, s_ptr,  # [N, R, X]: W_r and S_r; where SEPARATE the latter is overwritten by the derivative in G^m
    keep_ptr, eta_ptr, carry_ptr,  # [N, R]
    dw_ptr, ds_ptr,  # [N, X]: in W and S at the end, overwritten by those at the start
    share_ptr,  # [3, blocks, N, R]: each program's share of the derivatives in keep, eta and carry
    R, X, factor_stride, share_stride, share_row,
    MOMENTUM: tl.constexpr, SEPARATE: tl.constexpr, READS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (N, X / BLOCK)."""
    n = tl.program_id(0).to(tl.int64)
    x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = x < X
    d_ptr += n * R * X + x
    w_ptr += n * R * X + x
    s_ptr += n * R * X + x
    keep_ptr += n * factor_stride
    eta_ptr += n * factor_stride
    carry_ptr += n * factor_stride
    share_ptr += (tl.program_id(1) * tl.num_programs(0) + n) * share_row
    dw = tl.load(dw_ptr + n * X + x, inside, 0.0)
    ds = tl.zeros_like(dw)
    if MOMENTUM:
        ds = tl.load(ds_ptr + n * X + x, inside, 0.0)
    w = _at(w_ptr, R - 1, R, X, inside)
    w_next = _at(w_ptr, R - 2, R, X, inside)
    s, s_next, d, d_next = w, w_next, w, w_next
    if MOMENTUM:
        s, s_next = _at(s_ptr, R - 1, R, X, inside), _at(s_ptr, R - 2, R, X, inside)
    if READS:
        d, d_next = _at(d_ptr, R - 1, R, X, inside), _at(d_ptr, R - 2, R, X, inside)
    for step in range(R):
        r = R - 1 - step
        w_later = _at(w_ptr, r - 2, R, X, inside)
        s_later, d_later = w_later, w_later
        if MOMENTUM:
            s_later = _at(s_ptr, r - 2, R, X, inside)
        if READS:
            d_later = _at(d_ptr, r - 2, R, X, inside)
        keep = tl.load(keep_ptr + r)
        tl.store(share_ptr + r, tl.sum(dw * w.to(dw.dtype), 0))
        d_g = dw
        if MOMENTUM:
            eta, carry, s_r = tl.load(eta_ptr + r), tl.load(carry_ptr + r), s.to(dw.dtype)
            tl.store(share_ptr + share_stride + r, tl.sum(ds * s_r, 0))
            tl.store(share_ptr + 2 * share_stride + r, tl.sum(dw * s_r, 0))
            if SEPARATE:
                tl.store(s_ptr + r * X, ds.to(s_ptr.dtype.element_ty), inside)
            else:
                d_g = dw + ds
            ds = eta * ds + carry * dw
        tl.store(d_ptr + r * X, d_g.to(d_ptr.dtype.element_ty), inside)
        dw = keep * dw
        if READS:
            dw += d.to(dw.dtype)
        w, w_next, s, s_next, d, d_next = w_next, w_later, s_next, s_later, d_next, d_later
    tl.store(dw_ptr + n * X + x, dw, inside)
    if MOMENTUM:
        tl.store(ds_ptr + n * X + x, ds, inside)
