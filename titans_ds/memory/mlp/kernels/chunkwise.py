"""All chunks of a call in two parts: writes that walk over the chunks, and reads that are large batched products.
The writes hand out the weights that each chunk reads.

The writes are a Triton kernel that keeps the fast weights on the chip (chunkwise_kernels.py; for one matrix single.py),
or PyTorch (chunkwise_torch.py).
Kept for the backward: the inputs, and the weights (and momentum) before every chunk in the dtype of the keys. A long
text is cut in blocks of chunks, so that without a graph no more than a block's weights exist at a time.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, H hidden width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.memory.mlp import network
from titans_ds.memory.mlp.gates import Coefficients
from titans_ds.memory.mlp.kernels import chunkwise_torch, single
from titans_ds.memory.mlp.kernels.writes import (
    WARPS,
    Inputs,
    Plan,
    at_end,
    both_states,
    factors,
    numbers,
    options,
    or_zeros,
    used_derivatives,
)
from titans_ds.memory.mlp.network import Form
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.mlp.rule import Inner, Pairs

_BLOCK_BYTES = 256 * 2**20  # of the weights before the chunks of a block


def run_chunk(
    fast: Fast,
    pairs: Pairs,
    c: Coefficients,
    finished_NR: Tensor | None,
    inner: Inner,
    queries_NRCD: Tensor | None,
    graph: bool,
    triton: bool,
) -> tuple[Tensor | None, Fast]:
    """Read every chunk with the weights before it, and write all of them.

    Args:
        fast: at the start.
        pairs: of all chunks, [N, R, C, D].
        c: of all chunks.
        finished_NR: true where a chunk is written; None: everywhere.
        inner: the inner problem; `kernels.backend` says which ones are supported.
        queries_NRCD: by chunk; None reads nothing.
        graph: differentiate through the write.
        triton: a Triton kernel writes, else PyTorch.
    """
    reads = []
    for block in _blocks(pairs.keys, fast):
        part = Pairs(pairs.keys[:, block], pairs.values[:, block])
        asked = None if queries_NRCD is None else queries_NRCD[:, block]
        finished = None if finished_NR is None else finished_NR[:, block]
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()):
            states, new = _write(fast, part, c.block(block), finished, inner, graph, triton)
        if asked is not None:
            reads.append(_read_block(fast, states, asked, inner.form, graph))
        fast = new
    return (torch.cat(reads, dim=1) if len(reads) > 1 else reads[0] if reads else None), fast


def _blocks(keys_NRCD: Tensor, fast: Fast) -> list[slice]:
    """Blocks of chunks, of about the same size."""
    num_chunks = keys_NRCD.shape[1]
    one = sum(w.numel() for w in fast.weights) * keys_NRCD.element_size()
    count = -(-num_chunks // max(1, _BLOCK_BYTES // one))
    size = -(-num_chunks // count)
    return [slice(i, min(i + size, num_chunks)) for i in range(0, num_chunks, size)]


def _read_block(fast: Fast, states: tuple[Tensor, ...], queries_NRCD: Tensor, form: Form, graph: bool) -> Tensor:
    reads = _read(states, queries_NRCD, form)
    if graph or not any(w.requires_grad for w in fast.weights):
        return reads
    # In first order the first chunk alone still reads weights that lead somewhere.
    first = network.forward(fast.weights, queries_NRCD[:, 0], form).unsqueeze(1)
    return torch.cat([first, reads[:, 1:]], dim=1)


def _read(states: tuple[Tensor, ...], queries_NRCD: Tensor, form: Form) -> Tensor:
    """f_W of each chunk's queries. Weights first: their derivative then comes out in the layout that writes need."""
    if len(states) == 1:
        norm = None if form.norm is None else (form.norm[0].unsqueeze(1), form.norm[1].unsqueeze(1))
        return network.finish((states[0] @ queries_NRCD.mT).mT, queries_NRCD, replace(form, norm=norm))
    hidden = (states[0] @ queries_NRCD.mT).mT
    hidden = F.silu(hidden) if form.activation == "silu" else hidden
    hidden = hidden if form.hidden_scale == 1.0 else hidden * form.hidden_scale
    return (states[1] @ hidden.mT).mT


def _write(
    fast: Fast, pairs: Pairs, c: Coefficients, finished_NR: Tensor | None, inner: Inner, graph: bool, triton: bool
) -> tuple[tuple[Tensor, ...], Fast]:
    f = factors(c, finished_NR, inner)
    norm = inner.rule.max_gradient_norm
    momentum = inner.rule.has_momentum
    plan = Plan(inner.form, norm, momentum, momentum and c.to_momentum is not None, graph, triton)
    if len(fast.weights) == 1:
        return single.write(plan, fast, pairs, f)
    out = ChunkWrites.apply(  # type: ignore[no-untyped-call]
        plan, pairs.keys, pairs.values, *vars(f).values(), *fast.weights, *fast.momentum
    )
    return out[:2], Fast(out[2:4], out[4:])


class ChunkWrites(torch.autograd.Function):
    """(plan, keys, values, weights of the tokens a, b [2, N, R, C] and c, keep, momentum_keep, carry [N, R], W_1, W_2
    (, S_1, S_2)) -> W_1 and W_2 before every chunk [N, R, …] in the dtype of the keys, and all of these at the end."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *given: Tensor) -> tuple[Tensor, ...]:
        inputs = Inputs(*(t.contiguous() for t in given[:8]))
        ends = [t.clone(memory_format=torch.contiguous_format) for t in given[8:]]
        shape = inputs.keys.shape[:2]
        states = [inputs.keys.new_empty(*shape, *w.shape[1:]) for w in ends[: 4 if plan.graph else 2]]
        if plan.triton:
            _launch_forward(plan, inputs, ends, states)
        else:
            chunkwise_torch.forward(inputs, plan.form, plan.max_gradient_norm, plan.separate, ends, states)
        if plan.graph:
            ctx.plan, ctx.dtype = plan, ends[0].dtype
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*vars(inputs).values(), *states)
        return (*states[:2], *ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors  # once: under activation checkpointing they can't be asked for again
        inputs, states = Inputs(*saved[:8]), list(saved[8:])
        d_states = [or_zeros(d, s) for d, s in zip(d_outputs[:2], states, strict=False)]
        d_ends = [at_end(d, s, ctx.dtype) for d, s in zip(d_outputs[2:], states, strict=True)]
        walked = inputs.num_chunks
        if not plan.triton and all(d is None for d in d_outputs[2:]):
            walked -= 1  # nothing comes back through the last chunk
            for d_end, d in zip(d_ends, d_states, strict=False):
                d_end.copy_(d[:, walked])
        found, norm, separate = _places(inputs, walked), plan.max_gradient_norm, plan.separate
        if plan.triton:
            _launch_backward(plan, inputs, states, d_states, found, d_ends)
        else:
            chunkwise_torch.backward(inputs, plan.form, norm, separate, states, d_states, found, d_ends, walked)
        return (None, *used_derivatives(found, plan), *d_ends)


def _places(inputs: Inputs, walked: int) -> Inputs:
    """For the derivatives in what was given; those in keys and values of the chunks walked over are written whole."""
    found = [torch.empty_like(t) for t in (inputs.keys, inputs.values)]
    for t in found:
        t[:, walked:].zero_()
    return Inputs(*found, *(torch.zeros_like(t) for t in list(vars(inputs).values())[2:]))


def _launch_forward(plan: Plan, inputs: Inputs, ends: list[Tensor], states: list[Tensor]) -> None:
    from titans_ds.memory.mlp.kernels.chunkwise_kernels import chunk_forward

    (num_rows, num_chunks), hidden = inputs.keys.shape[:2], ends[0].shape[1]
    chunk_forward[(num_rows,)](
        *vars(inputs).values(), *both_states(ends), *both_states(states),
        num_rows, num_chunks, *numbers(plan.form, plan.max_gradient_norm),
        MOMENTUM=plan.momentum, SAVE_MOMENTUM=len(states) == 4, **_options(plan, inputs, hidden, False),
    )  # fmt: skip


def _launch_backward(
    plan: Plan, inputs: Inputs, states: list[Tensor], d_states: list[Tensor], found: Inputs, d_ends: list[Tensor]
) -> None:
    from titans_ds.memory.mlp.kernels.chunkwise_kernels import chunk_backward

    (num_rows, num_chunks), hidden = inputs.keys.shape[:2], states[0].shape[2]
    chunk_backward[(num_rows,)](
        *vars(inputs).values(), *both_states(states), *d_states, *vars(found).values(), *both_states(d_ends),
        num_rows, num_chunks, *numbers(plan.form, plan.max_gradient_norm),
        MOMENTUM=plan.momentum, **_options(plan, inputs, hidden, True),
    )  # fmt: skip


def _options(plan: Plan, inputs: Inputs, hidden: int, backward: bool) -> dict[str, Any]:
    limited = plan.max_gradient_norm is not None
    return options(inputs.keys, hidden, plan.form, limited, plan.separate, WARPS, backward)
