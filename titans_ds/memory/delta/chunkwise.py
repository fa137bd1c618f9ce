"""The (gated) delta rule in chunks of tokens: a few large products in place of a loop over tokens.

Inside a chunk, with G_t the product of a_1 ... a_t and D_ts = G_t / G_s (1 without gates):

    S_t = G_t S_0 + sum_(s <= t) D_ts u_s k_s^T
    u_t + b_t sum_(s < t) D_ts <k_s, k_t> u_s = b_t (v_t - G_t S_0 k_t)

The second line is a triangular system with the same matrix A = I + diag(b) tril(D * K K^T, -1) whatever S_0 is (the UT
transform of DeltaNet, arXiv 2406.06484, section 3.2, with the gate of arXiv 2412.06464). So A is inverted for all
chunks at once, and only two products a chunk wait for the chunk before:

    U = A^-1 diag(b) V - A^-1 diag(b G) K S_0^T        S_C = G_C S_0 + U^T diag(G_C / G) K

A chunk is a way of computing: its length changes no result but by rounding. The backward pass is written by hand. It
keeps the state at the start of each chunk and the rows U; automatic differentiation would keep every product.

Legend of shape suffixes: B batch, T tokens, N heads, M = B N, R chunks, C tokens of a chunk, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 16  # rows of a triangle that are inverted by substitution; larger ones are put together from these


def delta_rule(
    queries_BTND: Tensor,
    keys_BTND: Tensor,
    values_BTND: Tensor,
    step_BTN: Tensor,
    log_keep_BTN: Tensor | None,
    state_BNDD: Tensor,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As titans_ds.memory.delta.naive.delta_rule, which says what the arguments are.

    Products are in the dtype of the queries. States, gates and the triangular inverse are in that of the state, which
    is at least fp32.

    Args:
        chunk_size: tokens of a chunk; None for a length that suits the width of the heads.
    """
    batch, tokens, heads, width = queries_BTND.shape
    if tokens == 0:
        return torch.zeros_like(values_BTND), state_BNDD
    size = min(chunk_size or chunk_length(width), tokens)
    padding = -tokens % size

    def chunks(x: Tensor) -> Tensor:
        """[B, T, N, ...] -> [M, R, C, ...]; a token of padding writes nothing."""
        if padding:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
        return x.transpose(1, 2).reshape(batch * heads, -1, size, *x.shape[3:])

    wide = state_BNDD.dtype
    log_keep = None if log_keep_BTN is None else chunks(log_keep_BTN.to(wide))
    reads, state = _DeltaRule.apply(  # type: ignore[no-untyped-call]
        chunks(queries_BTND),
        chunks(keys_BTND),
        chunks(values_BTND),
        chunks(step_BTN.to(wide)),
        log_keep,
        state_BNDD.flatten(0, 1),
    )
    reads_BNTD = reads.view(batch, heads, -1, width)[:, :, :tokens]
    return reads_BNTD.transpose(1, 2), state.view_as(state_BNDD)


def chunk_length(width: int) -> int:
    """Tokens of a chunk: long for wide heads, whose states are dear; short for narrow ones, whose triangles are."""
    return 128 if width <= 256 else 512


class _Decays:
    """Products of the gates a within chunks; all of them 1 where there are no gates."""

    def __init__(self, log_keep_MRC: Tensor | None) -> None:
        self.total = None if log_keep_MRC is None else log_keep_MRC.cumsum(dim=-1)  # log G_t

    def from_start(self, x_MRCD: Tensor) -> Tensor:
        """diag(G) x: what the chunk's first state has become at each token."""
        return x_MRCD if self.total is None else x_MRCD * self.total.exp().to(x_MRCD.dtype).unsqueeze(-1)

    def to_end(self, x_MRCD: Tensor) -> Tensor:
        """diag(G_C / G) x: what a token's write has become at the end of its chunk."""
        if self.total is None:
            return x_MRCD
        return x_MRCD * (self.total[..., -1:] - self.total).exp().to(x_MRCD.dtype).unsqueeze(-1)

    def between(self, x_MRCC: Tensor) -> Tensor:
        """D * x, for x that is 0 above its diagonal."""
        if self.total is None:
            return x_MRCC
        difference = self.total.unsqueeze(-1) - self.total.unsqueeze(-2)
        return x_MRCC * difference.tril().exp().to(x_MRCC.dtype)

    def whole(self, chunk: int, state_MDD: Tensor) -> Tensor:
        """G_C S: what a state has become at the end of a chunk."""
        return state_MDD if self.total is None else state_MDD * self.total[:, chunk, -1].exp()[:, None, None]


class _DeltaRule(torch.autograd.Function):
    """(queries, keys, values [M, R, C, D], step, log_keep [M, R, C], state [M, D, D]) -> reads, state."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, step: Tensor, log_keep: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype, decays = q.dtype, _Decays(log_keep)
        # Of all chunks at once: A^-1, and what the writes are but for the state that each chunk starts from.
        similar = decays.between((k @ k.mT).to(step.dtype).tril(-1))
        inverse = unit_lower_inverse(step.unsqueeze(-1) * similar)
        solve = (inverse * step.unsqueeze(-2)).to(dtype)
        recalling, written = solve @ decays.from_start(k), solve @ v
        keys_to_end = decays.to_end(k)
        # Chunk after chunk: two products each.
        states, u = q.new_empty(*q.shape[:2], *state.shape[1:]), torch.empty_like(v)
        for chunk in range(q.shape[1]):
            narrow = states[:, chunk].copy_(state)
            torch.baddbmm(written[:, chunk], recalling[:, chunk], narrow.mT, alpha=-1, out=u[:, chunk])
            state = add_product(decays.whole(chunk, state), u[:, chunk].mT, keys_to_end[:, chunk])
        reads = decays.from_start(q) @ states.mT + decays.between((q @ k.mT).tril()) @ u
        ctx.save_for_backward(q, k, v, step, log_keep, states, u, inverse.to(dtype))
        if not any(ctx.needs_input_grad[1:]):
            ctx.mark_non_differentiable(state)  # queries, which alone need a gradient here, do not change it
        return reads, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_reads: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, step, log_keep, states, u, inverse = ctx.saved_tensors
        decays, dtype, chunks = _Decays(log_keep), q.dtype, q.shape[1]
        d_reads = d_reads.to(dtype)
        # reads = diag(G) Q S^T + E U, with E = tril(D * Q K^T)
        d_products = (d_reads @ u.mT).tril()  # of tril(Q K^T), but for D
        d_e = decays.between(d_products)
        d_queries = decays.from_start(d_reads) @ states + d_e @ k if ctx.needs_input_grad[0] else None
        if not any(ctx.needs_input_grad[1:]):
            return d_queries, None, None, None, None, None
        e = decays.between((q @ k.mT).tril())
        keys_from_start, keys_to_end = decays.from_start(k), decays.to_end(k)
        # From chunk to chunk goes the gradient of the state that a chunk leaves, through U and P = diag(G) K S^T.
        solve = inverse * step.unsqueeze(-2).to(dtype)
        of_reads = e.mT @ d_reads
        own, through = solve.mT @ of_reads, solve.mT @ keys_to_end
        d_after = torch.empty_like(states)
        d_both = torch.cat([d_reads, torch.empty_like(d_reads)], dim=2)  # of the reads diag(G) Q S^T, and of P
        d_p, asked = d_both[:, :, q.shape[2] :], torch.cat([decays.from_start(q), keys_from_start], dim=2)
        for chunk in reversed(range(chunks)):
            narrow = d_after[:, chunk].copy_(d_state)
            torch.baddbmm(own[:, chunk], through[:, chunk], narrow.mT, beta=-1, alpha=-1, out=d_p[:, chunk])
            d_state = add_product(decays.whole(chunk, d_state), d_both[:, chunk].mT, asked[:, chunk])
        # Of all chunks at once: U = A^-1 diag(b) (V - P), and A = I + diag(b) tril(D * K K^T, -1).
        carried = keys_to_end @ d_after.mT
        d_right = inverse.mT @ (of_reads + carried)
        d_a = -(d_right @ u.mT).tril(-1)
        b = step.unsqueeze(-1).to(dtype)
        d_similar = decays.between(b * d_a)
        d_keys = d_e.mT @ q + decays.to_end(u @ d_after) + decays.from_start(d_p @ states)
        d_keys = d_keys + (d_similar + d_similar.mT) @ k
        similar = decays.between((k @ k.mT).tril(-1))
        recalled = keys_from_start @ states.mT
        d_step = _sum(d_a * similar, step) + _sum(d_right * (v - recalled), step)
        if log_keep is None:
            return d_queries, d_keys, b * d_right, d_step, None, d_state
        # Every decay is exp of a difference of totals L = log G: x * exp(L_t - L_s) gives its own value to L_t and L_s.
        pairs = (d_products * e + b * d_a * similar).to(step.dtype)
        to_end = _sum(u * carried, step)
        d_total = pairs.sum(-1) - pairs.sum(-2) - to_end + _sum(d_p * recalled, step)
        d_total = d_total + _sum(decays.from_start(d_reads) * (q @ states.mT), step)
        kept = _sum((states * d_after).flatten(-2), step) * log_keep.sum(-1).exp()
        d_total[..., -1] += to_end.sum(-1) + kept
        return d_queries, d_keys, b * d_right, d_step, d_total.flip(-1).cumsum(-1).flip(-1), d_state


def _sum(x: Tensor, like: Tensor) -> Tensor:
    """Over the last dimension, in the dtype of `like`."""
    return x.sum(-1, dtype=like.dtype)


def add_product(x_MDD: Tensor, left_MDC: Tensor, right_MCD: Tensor) -> Tensor:
    """x + left @ right; x is fp32 or wider, the factors may be narrower, and the sum keeps the width of x."""
    if x_MDD.dtype == left_MDC.dtype:
        return torch.baddbmm(x_MDD, left_MDC, right_MCD)
    if x_MDD.is_cuda and x_MDD.dtype == torch.float32:
        return torch.baddbmm(x_MDD, left_MDC, right_MCD, out_dtype=torch.float32)
    return x_MDD + torch.bmm(left_MDC, right_MCD)


def unit_lower_inverse(strict_XCC: Tensor) -> Tensor:
    """(I + L)^-1 for L that is 0 on and above its diagonal, [..., C, C].

    Diagonal blocks first, by substitution; then pairs of blocks become blocks of twice the size:
    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]].
    """
    size = strict_XCC.shape[-1]
    block = min(_BLOCK, size)
    whole = block
    while whole < size:
        whole *= 2
    lower = F.pad(strict_XCC, (0, whole - size, 0, whole - size)).reshape(-1, whole, whole)
    eye = torch.eye(block, dtype=lower.dtype, device=lower.device)
    diagonal = _blocks(lower, block, 0) + eye
    inverse = torch.linalg.solve_triangular(diagonal, eye.expand_as(diagonal), upper=False, unitriangular=True)
    negative = -lower
    while block < whole:
        pairs = torch.unflatten(inverse, 1, (-1, 2))
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        below = second @ _blocks(negative, 2 * block, block)[..., :block] @ first
        upper = torch.cat([first, torch.zeros_like(first)], dim=-1)
        inverse = torch.cat([upper, torch.cat([below, second], dim=-1)], dim=-2)
        block *= 2
    found: Tensor = inverse.view(*strict_XCC.shape[:-2], whole, whole)[..., :size, :size]
    return found


def _blocks(lower: Tensor, size: int, row: int) -> Tensor:
    """Rows from `row` on of the diagonal blocks of this size, [X, blocks, size - row, size]."""
    number = lower.shape[1] // size
    blocks = lower.view(-1, number, size, number, size).diagonal(dim1=1, dim2=3)
    return blocks.permute(0, 3, 1, 2)[:, :, row:]
