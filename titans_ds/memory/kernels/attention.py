"""Reading one matrix's states between chunks: linear attention over chunks, with its derivative.

W_r = p_r W + m_r S + sum_s a_rs G_s, with G_s = sum_c w_sc delta_sc x_sc^T. A chunk's queries meet (A G)_r, one matrix
product over all chunks of a block, beside two products with W and S themselves. Memory: two states a chunk, in the
dtype of the keys, and only while a block of chunks is worked on.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, E = R + 2 states (see transfer.py), I/O a matrix's
input and output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.memory.kernels.transfer import Transfer

_SPLIT = 4096  # entries of a state that one product of the factors' gradient sums over


@dataclass(frozen=True)
class Written:
    """What the chunks of a block add to one matrix.

    Args:
        inputs: x [N, R, C, I].
        deltas: [N, R, C, O], in the same dtype.
        to_weights, to_momentum: weights of the tokens [N, R, C]; to_momentum None where it is to_weights.
        transfer: of the block, with the step size in the factors of the gradients.
    """

    inputs: Tensor
    deltas: Tensor
    to_weights: Tensor
    to_momentum: Tensor | None
    transfer: Transfer

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Token weights and factors: of G^w, and of G^m where it is another."""
        first = [(self.to_weights, self.transfer.to_weights)]
        if self.to_momentum is None or self.transfer.to_momentum is None:
            return first
        return [*first, (self.to_momentum, self.transfer.to_momentum)]


@dataclass
class Gradients:
    """Of a loss, in what `attend` was given; those of `pairs` in their order."""

    queries: Tensor | None
    inputs: Tensor
    deltas: Tensor
    token_weights: list[Tensor]
    factors: list[Tensor]
    of_weights: Tensor
    of_momentum: Tensor | None
    weights: Tensor
    momentum: Tensor | None


def attend(
    queries: Tensor | None, written: Written, weights_NOI: Tensor, momentum_NOI: Tensor | None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """q W_r^T for the queries of every chunk r [N, R, C, O], and W and S at the end, in their own dtype."""
    reads = None if queries is None else _read(queries, _states(written), written.transfer, weights_NOI, momentum_NOI)
    weights, momentum = finish(written, weights_NOI, momentum_NOI)
    return reads, weights, momentum


def finish(written: Written, weights_NOI: Tensor, momentum_NOI: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """W and S after the block, from its tokens: products of the keys' dtype, summed in the state's."""
    t, num_chunks = written.transfer, written.inputs.shape[1]
    x = written.inputs.flatten(1, 2)

    def end(row: int, base: Tensor) -> Tensor:
        total = sum_of([w * a[:, num_chunks + row].unsqueeze(-1) for w, a in written.pairs[-1 if row else 0 :]])
        return base + wide_product(scaled(written.deltas, total).flatten(1, 2).mT, x, weights_NOI.dtype)

    kept = _per_row(t.weights[:, num_chunks]) * weights_NOI
    if momentum_NOI is None or t.momentum is None:
        return end(0, kept), None
    kept = kept + _per_row(t.momentum[:, num_chunks]) * momentum_NOI
    return end(0, kept), end(1, _per_row(t.momentum[:, num_chunks + 1]) * momentum_NOI)


def attend_backward(
    queries: Tensor | None,
    written: Written,
    start: tuple[Tensor, Tensor | None],
    d_reads: Tensor | None,
    d_end: tuple[Tensor, Tensor | None],
) -> Gradients:
    """The derivative of `attend`, states recomputed.

    Args:
        queries, written: as there.
        start: W and S at the start of the block.
        d_reads: in the reads, [N, R, C, O].
        d_end: in W and S at the end.
    """
    x, (weights, momentum) = written.inputs, start
    num_rows, num_chunks = x.shape[:2]
    d_states = x.new_empty(num_rows, num_chunks + 2, *weights.shape[1:])
    d_states[:, num_chunks] = d_end[0]
    d_states[:, num_chunks + 1] = 0 if d_end[1] is None else d_end[1]
    d_queries = None
    if queries is None or d_reads is None:
        d_states[:, :num_chunks] = 0
    else:
        d_queries = read_backward(queries, written, start, d_reads)
        d_states[:, :num_chunks] = d_reads.mT @ queries
    back = Gradients(d_queries, x, x, [], [], x, None, weights, momentum)
    _into_gradients(written, d_states, back)
    _into_start(queries, written.transfer, start, d_reads, d_end, back)
    return back


def read_backward(queries: Tensor, written: Written, start: tuple[Tensor, Tensor | None], d_reads: Tensor) -> Tensor:
    """The derivative of the reads in the queries alone."""
    return _through(d_reads, _states(written), written.transfer, start[0], start[1])


def _states(written: Written) -> Tensor:
    """(A G)_r of the chunks: [N, R, O, I]."""
    num_chunks = written.inputs.shape[1]
    total: Tensor | None = None
    for w, a in written.pairs:
        g = _gradients(written, w).flatten(2)
        a = a[:, :num_chunks].to(g.dtype)
        total = a @ g if total is None else torch.baddbmm(total, a, g)
    assert total is not None
    return total.view(*total.shape[:2], written.deltas.shape[-1], written.inputs.shape[-1])


def _gradients(written: Written, token_weights: Tensor) -> Tensor:
    return scaled(written.deltas, token_weights).mT @ written.inputs


def _read(queries: Tensor, states: Tensor, t: Transfer, weights: Tensor, momentum: Tensor | None) -> Tensor:
    return _through(queries, states.mT, t, weights.mT, None if momentum is None else momentum.mT)


def _through(x: Tensor, states: Tensor, t: Transfer, weights: Tensor, momentum: Tensor | None) -> Tensor:
    """x_r (p_r W + m_r S + states_r), with the factors at full precision."""
    num_chunks, flat = x.shape[1], x.flatten(1, 2)
    base = (flat @ weights.to(x.dtype)).view(*x.shape[:3], -1)
    base = scaled(base, t.weights[:, :num_chunks, None].expand(x.shape[:3]))
    if momentum is not None and t.momentum is not None:
        other = (flat @ momentum.to(x.dtype)).view(base.shape)
        base = base + scaled(other, t.momentum[:, :num_chunks, None].expand(x.shape[:3]))
    product = torch.baddbmm(base.flatten(0, 1), x.flatten(0, 1), states.flatten(0, 1))
    return product.view(base.shape)


def _into_gradients(written: Written, d_states: Tensor, back: Gradients) -> None:
    """From the states' derivative to inputs, deltas, token weights and factors."""
    x, deltas = written.inputs, written.deltas
    flat, first = d_states.flatten(2), True
    for w, a in written.pairs:
        g = _gradients(written, w).flatten(2)
        back.factors.append(_over_states(flat, g).to(a.dtype))
        d_g = torch.matmul(a.mT.to(g.dtype), flat, out=g).view(*x.shape[:2], deltas.shape[-1], x.shape[-1])
        along = x @ d_g.mT
        back.token_weights.append((along * deltas).sum(dim=-1, dtype=w.dtype))
        d_deltas, d_inputs = scaled(along, w), scaled(deltas, w) @ d_g
        back.deltas = d_deltas if first else back.deltas + d_deltas
        back.inputs = d_inputs if first else back.inputs + d_inputs
        first = False


def _into_start(
    queries: Tensor | None,
    t: Transfer,
    start: tuple[Tensor, Tensor | None],
    d_reads: Tensor | None,
    d_end: tuple[Tensor, Tensor | None],
    back: Gradients,
) -> None:
    """To W and S at the start, and to their factors."""
    back.weights, back.of_weights = _base_backward(queries, t.weights, start[0], d_reads, (d_end[0], None))
    if start[1] is not None and t.momentum is not None:
        back.momentum, back.of_momentum = _base_backward(queries, t.momentum, start[1], d_reads, d_end)


def _base_backward(
    queries: Tensor | None,
    factors_NE: Tensor,
    base: Tensor,
    d_reads: Tensor | None,
    d_end: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor]:
    num_chunks = factors_NE.shape[1] - 2
    d_base, d_factors = _per_row(factors_NE[:, num_chunks]) * d_end[0], torch.zeros_like(factors_NE)
    d_factors[:, num_chunks] = (d_end[0] * base).sum(dim=(1, 2))
    if d_end[1] is not None:
        d_base = d_base + _per_row(factors_NE[:, num_chunks + 1]) * d_end[1]
        d_factors[:, num_chunks + 1] = (d_end[1] * base).sum(dim=(1, 2))
    if queries is None or d_reads is None:
        return d_base, d_factors
    shape = d_reads.shape[:3]
    weighted = scaled(d_reads, factors_NE[:, :num_chunks, None].expand(shape)).flatten(1, 2)
    d_base = d_base + wide_product(weighted.mT, queries.flatten(1, 2), base.dtype)
    along = (d_reads.flatten(1, 2) @ base.to(d_reads.dtype)).view(queries.shape)
    d_factors[:, :num_chunks] = (along * queries).sum(dim=(2, 3), dtype=d_factors.dtype)
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


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Their sum."""
    total = tensors[0]
    for t in tensors[1:]:
        total = total + t
    return total


def wide_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right in a wider dtype than theirs, without a wide copy of them where the device can."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32:
        return torch.bmm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)


def _per_row(factor_N: Tensor) -> Tensor:
    return factor_N.view(-1, 1, 1)
