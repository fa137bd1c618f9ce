"""Reads of every chunk with its own two matrices, heads of any width: a Triton kernel where a product has something to
follow it, a plain product elsewhere. Nothing token-sized is kept but the queries.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, H hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_ds.memory.kernels.wide import Walk
from titans_ds.memory.network import Form


class WideReads(torch.autograd.Function):
    """(form, queries [N, R, C, D], W_1 [N, R, H, D], W_2 [N, R, D, H]) -> f_W of the queries."""

    @staticmethod
    def forward(ctx: Any, form: Form, queries: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        queries = queries.contiguous()
        ctx.form = form
        ctx.save_for_backward(queries, w1, w2)
        return _hidden(form, queries, w1, None)[1] @ w2.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_reads: Tensor) -> tuple[Tensor | None, ...]:
        from titans_ds.memory.kernels import wide_kernels

        queries, w1, w2 = ctx.saved_tensors
        d_reads = d_reads.contiguous()
        z = queries.new_empty(*queries.shape[:3], w1.shape[2])
        walk, x = _hidden(ctx.form, queries, w1, z)
        d_w2 = d_reads.mT @ x if ctx.needs_input_grad[3] else None
        walk.tokens(wide_kernels.slopes, walk.hidden, d_reads, w2, z)  # to z, in its place
        return None, z @ w1, z.mT @ queries if ctx.needs_input_grad[2] else None, d_w2


def _hidden(form: Form, queries: Tensor, w1: Tensor, z: Tensor | None) -> tuple[Walk, Tensor]:
    """How kernels are launched, and x = h act(q W_1^T); z takes what is inside."""
    from titans_ds.memory.kernels import wide_kernels

    walk = Walk(queries, w1.shape[2], form)
    x = queries.new_empty(*queries.shape[:3], walk.hidden)
    walk.tokens(wide_kernels.hidden, walk.hidden, queries, w1, z, x)
    return walk, x
