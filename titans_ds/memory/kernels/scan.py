"""Momentum and weights from chunk to chunk, and back: of one matrix, in PyTorch or by a Triton kernel.

    W_(r+1) = keep_r W_r + carry_r S_r + G^w_r        S_(r+1) = eta_r S_r + G^m_r

are sequential over the chunks, and independent from entry to entry. What the chunks read, W_r, takes the place of
G^w_r, and in the backward the derivative in G^w_r that of the reads in W_r: a block of chunks needs one buffer for
what goes in and comes out. The sums are in the dtype of the states, what each chunk has in that of the keys.

Legend of shape suffixes: N batch x heads, R chunks, O/I a matrix's output/input width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, Tensor | None]  # W and S, [N, O, I]
_BLOCK = 256  # entries of a state in a Triton program of one warp: its sums over entries then need no barrier


@dataclass(frozen=True)
class Scan:
    """How a block of chunks is walked over.

    Args:
        keep, eta, carry: of its chunks, [N, R], rows evenly spaced.
        momentum: there is an S.
        separate: G^m is not G^w.
        triton: by the Triton kernel.
    """

    keep: Tensor
    eta: Tensor
    carry: Tensor
    momentum: bool
    separate: bool
    triton: bool


def scan_forward(sums: list[Tensor], start: State, scan: Scan, save: bool) -> tuple[Tensor, Tensor | None, State]:
    """What every chunk reads, and the state after the last one.

    Args:
        sums: G^w and, where it is another, G^m, [N, R, O, I]; overwritten.
        start: before the first chunk.
        scan: the chunks.
        save: return every chunk's momentum.

    Returns:
        W_r and S_r [N, R, O, I] in the dtype of the sums, and the end.
    """
    saving = save and scan.momentum
    momenta = (sums[-1] if scan.separate else torch.empty_like(sums[0])) if saving else None
    if scan.triton:
        return sums[0], momenta, _launch_forward(sums, momenta, start, scan)
    weights, momentum = start
    for r in range(sums[0].shape[1]):
        gained, momentum_gained = (g[:, r].to(weights.dtype, copy=True) for g in (sums[0], sums[-1]))
        sums[0][:, r] = weights
        weights = torch.addcmul(gained, weights, _rows(scan.keep[:, r]))
        if momentum is not None:
            if momenta is not None:
                momenta[:, r] = momentum
            weights = weights.addcmul_(momentum, _rows(scan.carry[:, r]))
            momentum = torch.addcmul(momentum_gained, momentum, _rows(scan.eta[:, r]))
    return sums[0], momenta, (weights, momentum)


def num_shares(matrix: Tensor, triton: bool) -> int:
    """Of the derivatives in keep, eta and carry, where they go through a matrix [N, O, I]: one of each program."""
    return -(-matrix[0].numel() // _BLOCK) if triton else 1


def scan_backward(
    d_reads: Tensor | None, weights: Tensor, momenta: Tensor | None, d_end: State, scan: Scan, shares: Tensor
) -> tuple[list[Tensor], State]:
    """The derivative of `scan_forward`.

    Args:
        d_reads: in W_r of what reads it [N, R, O, I], overwritten; None where nothing does.
        weights, momenta: W_r and S_r, overwritten.
        d_end: in W and S at the end, overwritten.
        scan: the chunks.
        shares: takes the shares of the derivatives in keep, eta and carry, [3, num_shares, N, R].

    Returns:
        in the sums; in W and S at the start.
    """
    d = torch.empty_like(weights) if d_reads is None else d_reads
    d_sums = [d, momenta] if scan.separate and momenta is not None else [d]
    if scan.triton:
        _launch_backward(d, weights, momenta, d_end, scan, shares, d_reads is not None)
        return d_sums, d_end
    d_w, d_s = d_end
    for r in reversed(range(weights.shape[1])):
        d_read = None if d_reads is None else d_reads[:, r].to(d_w.dtype, copy=True)
        shares[0, 0, :, r] = _dot(d_w, weights[:, r])
        d[:, r] = d_w if d_s is None or scan.separate else d_w + d_s
        if d_s is not None and momenta is not None:
            shares[1, 0, :, r], shares[2, 0, :, r] = _dot(d_s, momenta[:, r]), _dot(d_w, momenta[:, r])
            if scan.separate:
                momenta[:, r] = d_s
            d_s = (d_s * _rows(scan.eta[:, r])).addcmul_(d_w, _rows(scan.carry[:, r]))
        d_w = d_w * _rows(scan.keep[:, r])
        d_w = d_w if d_read is None else d_w.add_(d_read)
    return d_sums, (d_w, d_s)


def _rows(factor_N: Tensor) -> Tensor:
    return factor_N.view(-1, 1, 1)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    return (left * right).sum(dim=(1, 2))


def _launch_forward(sums: list[Tensor], momenta: Tensor | None, start: State, scan: Scan) -> State:
    from titans_ds.memory.kernels.scan_kernels import scan_forward

    weights, momentum = _by_row(start[0]), None if start[1] is None else _by_row(start[1])
    end = [torch.empty(w.shape, dtype=w.dtype, device=w.device) for w in (weights, momentum) if w is not None]
    before = weights if momentum is None else momentum
    num_rows, num_chunks, entries = sums[0].flatten(2).shape
    scan_forward[(num_rows, -(-entries // _BLOCK))](
        sums[0], sums[-1] if momenta is None else momenta, scan.keep, scan.eta, scan.carry,
        weights, before, end[0], end[-1], num_chunks, entries, weights.stride(0), before.stride(0), scan.keep.stride(0),
        MOMENTUM=scan.momentum, SEPARATE=scan.separate, SAVE=momenta is not None, BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip
    return end[0], end[1] if scan.momentum else None


def _launch_backward(
    d: Tensor, weights: Tensor, momenta: Tensor | None, d_end: State, scan: Scan, shares: Tensor, reads: bool
) -> None:
    from titans_ds.memory.kernels.scan_kernels import scan_backward

    num_rows, num_chunks, entries = weights.flatten(2).shape
    d_weights, d_momentum = d_end
    scan_backward[(num_rows, shares.shape[1])](
        d, weights, weights if momenta is None else momenta, scan.keep, scan.eta, scan.carry,
        d_weights, d_weights if d_momentum is None else d_momentum, shares,
        num_chunks, entries, scan.keep.stride(0), shares.stride(0), shares.stride(2),
        MOMENTUM=scan.momentum, SEPARATE=scan.separate, READS=reads, BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip


def _by_row(t: Tensor) -> Tensor:
    """A memory's entries beside one another; memories may share them."""
    return t if t[0].is_contiguous() else t.contiguous()
