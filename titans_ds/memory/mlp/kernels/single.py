"""The writes of one matrix: a Triton kernel that keeps it on the chip (single_kernels.py).

Kept for the backward: the inputs, and W (and S) before every chunk in the dtype of the keys.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_ds.memory.mlp.kernels.writes import Factors, Inputs, Plan, at_end, options, or_zeros, used_derivatives
from titans_ds.memory.mlp.network import LAYER_NORM_EPS
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.mlp.rule import Pairs

WARPS = {64: (4, 4), 128: (8, 8)}  # of a program, forward and backward, by the width that it is made for


@dataclass(frozen=True)
class _Inputs(Inputs):
    """And scale and bias of the residual norm, [N, D]; zeros without one."""

    scale: Tensor
    bias: Tensor


def write(plan: Plan, fast: Fast, pairs: Pairs, f: Factors) -> tuple[tuple[Tensor], Fast]:
    """Write all chunks.

    Args:
        plan: what does not depend on the data.
        fast: at the start: W [N, D, D], and S where there is momentum.
        pairs: of all chunks, [N, R, C, D].
        f: their factors.

    Returns:
        W before every chunk [N, R, D, D] in the dtype of the keys, and the fast weights at the end.
    """
    count, width = pairs.keys.shape[0], pairs.keys.shape[-1]
    norm = [f.keep.new_zeros(1, 1).expand(count, width)] * 2
    if plan.form.norm is not None:
        norm = [t.to(f.keep.dtype).expand(count, 1, width).squeeze(1) for t in plan.form.norm]
    states, *ends = SingleWrites.apply(  # type: ignore[no-untyped-call]
        plan, pairs.keys, pairs.values, *vars(f).values(), *norm, *fast.weights, *fast.momentum
    )
    return (states,), Fast((ends[0],), tuple(ends[1:]))


class SingleWrites(torch.autograd.Function):
    """(plan, what _Inputs holds, W (, S)) -> W before every chunk [N, R, D, D], and W (, S) at the end."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *given: Tensor) -> tuple[Tensor, ...]:
        inputs = _Inputs(*(t.contiguous() for t in given[:10]))
        ends = [t.clone(memory_format=torch.contiguous_format) for t in given[10:]]
        kept = ends if plan.graph else ends[:1]
        states = [inputs.keys.new_empty(*inputs.keys.shape[:2], *w.shape[1:]) for w in kept]
        _launch_forward(plan, inputs, ends, states)
        if plan.graph:
            ctx.plan, ctx.dtype = plan, ends[0].dtype
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*vars(inputs).values(), *states)
        return (states[0], *ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors  # once: under activation checkpointing they can't be asked for again
        inputs, states = _Inputs(*saved[:10]), list(saved[10:])
        d_states = or_zeros(d_outputs[0], states[0])
        d_ends = [at_end(d, s, ctx.dtype) for d, s in zip(d_outputs[1:], states, strict=True)]
        found = _Inputs(*(torch.empty_like(t) for t in vars(inputs).values()))
        _launch_backward(plan, inputs, states, d_states, found, d_ends)
        return (None, *used_derivatives(found, plan), *d_ends)


def _launch_forward(plan: Plan, inputs: _Inputs, ends: list[Tensor], states: list[Tensor]) -> None:
    from titans_ds.memory.mlp.kernels.single_kernels import single_forward

    num_rows, num_chunks = inputs.keys.shape[:2]
    single_forward[(num_rows,)](
        *vars(inputs).values(), ends[0], ends[-1], states[0], states[-1], num_rows, num_chunks,
        SAVE_MOMENTUM=len(states) == 2, **_options(plan, inputs.keys, False),
    )  # fmt: skip


def _launch_backward(
    plan: Plan, inputs: _Inputs, states: list[Tensor], d_states: Tensor, found: _Inputs, d_ends: list[Tensor]
) -> None:
    from titans_ds.memory.mlp.kernels.single_kernels import single_backward

    num_rows, num_chunks = inputs.keys.shape[:2]
    single_backward[(num_rows,)](
        *vars(inputs).values(), states[0], states[-1], d_states, *vars(found).values(), d_ends[0], d_ends[-1],
        num_rows, num_chunks, **_options(plan, inputs.keys, True),
    )  # fmt: skip


def _options(plan: Plan, keys_NRCD: Tensor, backward: bool) -> dict[str, Any]:
    """Scalars and compile-time arguments: those of two matrices, but for what stands between these."""
    limited, width = plan.max_gradient_norm is not None, keys_NRCD.shape[-1]
    found = options(keys_NRCD, width, plan.form, limited, plan.separate, WARPS, backward)
    for name in ("H", "HB", "SILU"):
        del found[name]
    found |= {"max_norm": plan.max_gradient_norm or 0.0, "eps": LAYER_NORM_EPS}
    return found | {"NORM": plan.form.norm is not None, "MOMENTUM": plan.momentum}
