"""Reading one matrix's states between chunks: linear attention over chunks, with its derivative.

W_r = p_r W + m_r S + sum_s a_rs G_s. A chunk's queries meet (A G)_r, one matrix product over all chunks of a block,
beside two products with W and S themselves. Memory: two states a chunk, in the dtype of the keys, and only while a
block of chunks is worked on.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, E = R + 2 states (see transfer.py), I/O a matrix's
input and output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.memory.kernels.transfer import Transfer

_SPLIT = 4096  # entries of a state that one product of the factors' gradient sums over

State = tuple[Tensor, Tensor | None]  # W and S, [N, O, I]


@dataclass(frozen=True)
class Written:
    """What the chunks of a block add to one matrix.

    Args:
        gradients: G^w, and G^m where it is another, [N, R, O, I].
        transfer: of the block, with the step size in the factors of the gradients.
    """

    gradients: list[Tensor]
    transfer: Transfer

    @property
    def factors(self) -> list[Tensor]:
        """Of each of the gradients, [N, E, R]."""
        t = self.transfer
        return [t.to_weights] if t.to_momentum is None else [t.to_weights, t.to_momentum]


@dataclass
class Gradients:
    """Of a loss, in what `attend` was given; lists as in Written."""

    queries: Tensor | None
    gradients: list[Tensor]
    factors: list[Tensor]
    of_weights: Tensor
    of_momentum: Tensor | None
    start: State

    def of_transfer(self) -> dict[str, Tensor]:
        """In the fields of Transfer, by name."""
        found = {"to_weights": self.factors[0], "weights": self.of_weights}
        if len(self.factors) > 1:
            found["to_momentum"] = self.factors[1]
        return found if self.of_momentum is None else found | {"momentum": self.of_momentum}


def attend(queries: Tensor | None, written: Written, start: State) -> tuple[Tensor | None, State]:
    """q W_r^T for the queries of every chunk r [N, R, C, O], and W and S at the end, in their own dtype."""
    reads = None
    if queries is not None:
        weights, momentum = start
        transposed = (weights.mT, None if momentum is None else momentum.mT)
        reads = _through(queries, _states(written).mT, written.transfer, transposed)
    return reads, _end(written, start)


def attend_backward(
    queries: Tensor | None, written: Written, start: State, d_reads: Tensor | None, d_end: State
) -> Gradients:
    """The derivative of `attend`, states recomputed.

    Args:
        queries, written, start: as there.
        d_reads: in the reads, [N, R, C, O].
        d_end: in W and S at the end.
    """
    t, (num_rows, num_chunks) = written.transfer, written.gradients[0].shape[:2]
    d_states = written.gradients[0].new_empty(num_rows, num_chunks + 2, *start[0].shape[1:])
    d_states[:, num_chunks] = d_end[0]
    d_states[:, num_chunks + 1] = 0 if d_end[1] is None else d_end[1]
    d_queries = None
    if queries is None or d_reads is None:
        d_states[:, :num_chunks] = 0
    else:
        d_queries = read_backward(written, start, d_reads)
        d_states[:, :num_chunks] = d_reads.mT @ queries
    flat = d_states.flatten(2)
    d_factors = [_over_states(flat, g.flatten(2)).to(t.weights.dtype) for g in written.gradients]
    d_gradients = [
        (a.mT.to(g.dtype) @ flat).view(g.shape) for g, a in zip(written.gradients, written.factors, strict=True)
    ]
    d_weights, of_weights = _start_backward(queries, t.weights, start[0], d_reads, (d_end[0], None))
    d_momentum = of_momentum = None
    if start[1] is not None and t.momentum is not None:
        d_momentum, of_momentum = _start_backward(queries, t.momentum, start[1], d_reads, d_end)
    return Gradients(d_queries, d_gradients, d_factors, of_weights, of_momentum, (d_weights, d_momentum))


def read_backward(written: Written, start: State, d_reads: Tensor) -> Tensor:
    """The derivative of the reads in the queries alone."""
    return _through(d_reads, _states(written), written.transfer, start)


def _states(written: Written) -> Tensor:
    """(A G)_r of the chunks: [N, R, O, I]."""
    num_chunks = written.gradients[0].shape[1]
    total: Tensor | None = None
    for g, a in zip(written.gradients, written.factors, strict=True):
        a, flat = a[:, :num_chunks].to(g.dtype), g.flatten(2)
        total = a @ flat if total is None else torch.baddbmm(total, a, flat)
    assert total is not None
    return total.view(written.gradients[0].shape)


def _through(x: Tensor, states: Tensor, t: Transfer, start: State) -> Tensor:
    """x_r (p_r W + m_r S + states_r), with the factors at full precision."""
    num_chunks, flat = x.shape[1], x.flatten(1, 2)

    def part(weights: Tensor, factors_NE: Tensor) -> Tensor:
        product = (flat @ weights.to(x.dtype)).view(*x.shape[:3], -1)
        return scaled(product, factors_NE[:, :num_chunks, None].expand(x.shape[:3]))

    base = part(start[0], t.weights)
    if start[1] is not None and t.momentum is not None:
        base = base.add_(part(start[1], t.momentum))
    return torch.baddbmm(base.flatten(0, 1), x.flatten(0, 1), states.flatten(0, 1)).view(base.shape)


def _end(written: Written, start: State) -> State:
    """W and S after the block: products of the keys' dtype, summed in the state's."""
    t, num_chunks = written.transfer, written.gradients[0].shape[1]
    sums: Tensor | None = None
    for g, a in zip(written.gradients, written.factors, strict=True):
        part = precise_product(a[:, num_chunks:], g.flatten(2), start[0].dtype)
        sums = part if sums is None else sums + part
    assert sums is not None
    gained = sums.view(sums.shape[0], 2, *start[0].shape[1:])
    weights = _per_row(t.weights[:, num_chunks]) * start[0] + gained[:, 0]
    if start[1] is None or t.momentum is None:
        return weights, None
    weights = weights + _per_row(t.momentum[:, num_chunks]) * start[1]
    return weights, _per_row(t.momentum[:, num_chunks + 1]) * start[1] + gained[:, 1]


def _start_backward(
    queries: Tensor | None, factors_NE: Tensor, base: Tensor, d_reads: Tensor | None, d_end: State
) -> tuple[Tensor, Tensor]:
    """To W (or S) at the start, and to its factors."""
    num_chunks = factors_NE.shape[1] - 2
    d_base, d_factors = _per_row(factors_NE[:, num_chunks]) * d_end[0], torch.zeros_like(factors_NE)
    d_factors[:, num_chunks] = (d_end[0] * base).sum(dim=(1, 2))
    if d_end[1] is not None:
        d_base = d_base + _per_row(factors_NE[:, num_chunks + 1]) * d_end[1]
        d_factors[:, num_chunks + 1] = (d_end[1] * base).sum(dim=(1, 2))
    if queries is None or d_reads is None:
        return d_base, d_factors
    weighted = scaled(d_reads, factors_NE[:, :num_chunks, None].expand(d_reads.shape[:3])).flatten(1, 2)
    d_base = d_base + wide_product(weighted.mT, queries.flatten(1, 2), base.dtype)
    along = (d_reads.flatten(1, 2) @ base.to(d_reads.dtype)).view(queries.shape)
    d_factors[:, :num_chunks] = along.mul_(queries).sum(dim=(2, 3), dtype=d_factors.dtype)
    return d_base, d_factors


def _over_states(left_NEX: Tensor, right_NRX: Tensor) -> Tensor:
    """<left_e, right_r> over all entries of a state, [N, E, R].

    Few and small outputs of a very long sum: cut, so that it fills the device.
    """
    width = left_NEX.shape[-1]
    if width <= _SPLIT or width % _SPLIT:
        return left_NEX @ right_NRX.mT
    split = (-1, width // _SPLIT, _SPLIT)
    rows = []
    for left, right in zip(left_NEX, right_NRX, strict=True):
        parts = left.view(split).transpose(0, 1) @ right.view(split).permute(1, 2, 0)
        rows.append(parts.sum(dim=0, dtype=torch.promote_types(parts.dtype, torch.float32)))
    return torch.stack(rows)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x [..., D] times factor [...], rounded once, to the dtype of x."""
    out = torch.empty_like(x)
    return torch.mul(x, factor.unsqueeze(-1), out=out)


def precise_product(factors: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """factors @ x in `dtype`, where x may be narrower: the factors as the sum of two numbers of its dtype."""
    if x.dtype == dtype:
        return factors @ x
    high = factors.to(x.dtype)
    both = torch.cat([high, (factors - high).to(x.dtype)], dim=1)
    product = wide_product(both, x, dtype)
    return product[:, : factors.shape[1]] + product[:, factors.shape[1] :]


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in a wider dtype than theirs, without a wide copy of them where the device can."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32:
        return torch.bmm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _per_row(factor_N: Tensor) -> Tensor:
    return factor_N.view(-1, 1, 1)
