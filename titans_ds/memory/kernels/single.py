"""The writes of `chunk` with one matrix: a Triton kernel that keeps it on the chip (single_kernels.py).

Kept for the backward: the inputs, and W (and S) before every chunk in the dtype of the keys.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_ds.memory.kernels.factors import Factors
from titans_ds.memory.kernels.launch import LOSSES, padded
from titans_ds.memory.network import LAYER_NORM_EPS, Form
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.rule import Pairs

WARPS = {64: (4, 4), 128: (8, 8)}  # of a program, forward and backward, by the width that it is made for


@dataclass(frozen=True)
class Plan:
    """What does not depend on the data.

    Args:
        form: of f_W and its loss.
        max_gradient_norm: see RuleConfig.
        momentum: there is an S.
        separate: its gradients are weighted otherwise than those of W.
        graph: keep what the backward needs.
    """

    form: Form
    max_gradient_norm: float | None
    momentum: bool
    separate: bool
    graph: bool


@dataclass(frozen=True)
class _Inputs:
    """Keys and values [N, R, C, D]; token weights a, b [1, N, R, C], c [N, R, C]; keep, eta, carry [N, R]; scale, bias
    [N, D]."""

    keys: Tensor
    values: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    keep: Tensor
    eta: Tensor
    carry: Tensor
    scale: Tensor
    bias: Tensor


def write(
    fast: Fast, pairs: Pairs, f: Factors, form: Form, max_norm: float | None, separate: bool, graph: bool
) -> tuple[Tensor, Fast]:
    """Write all chunks.

    Args:
        fast: at the start: W [N, D, D], and S where there is momentum.
        pairs: of all chunks, [N, R, C, D].
        f: their factors.
        form: of f_W and its loss.
        max_norm: see RuleConfig.max_gradient_norm.
        separate: S has token weights of its own.
        graph: differentiate through the write.

    Returns:
        W before every chunk [N, R, D, D] in the dtype of the keys, and the fast weights at the end.
    """
    count, width = pairs.keys.shape[0], pairs.keys.shape[-1]
    norm = [f.keep.new_zeros(1, 1).expand(count, width)] * 2
    if form.norm is not None:
        norm = [t.to(f.keep.dtype).expand(count, 1, width).squeeze(1) for t in form.norm]
    plan = Plan(form, max_norm, bool(fast.momentum), separate, graph)
    inputs = _Inputs(pairs.keys, pairs.values, *vars(f).values(), *norm)
    states, *ends = SingleWrites.apply(  # type: ignore[no-untyped-call]
        plan, *vars(inputs).values(), *fast.weights, *fast.momentum
    )
    return states, Fast((ends[0],), tuple(ends[1:]))


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
        d_states = torch.zeros_like(states[0]) if d_outputs[0] is None else d_outputs[0].contiguous()
        d_ends = [_at_end(d, s, ctx.dtype) for d, s in zip(d_outputs[1:], states, strict=True)]
        found = _Inputs(*(torch.empty_like(t) for t in vars(inputs).values()))
        _launch_backward(plan, inputs, states, d_states, found, d_ends)
        return (None, *_of_use(found, plan), *d_ends)


def _at_end(d: Tensor | None, states: Tensor, dtype: torch.dtype) -> Tensor:
    """The derivative in W or S at the end, to be moved back in place."""
    if d is None:
        return states.new_zeros(states.shape[:1] + states.shape[2:], dtype=dtype)
    return d.clone(memory_format=torch.contiguous_format)


def _of_use(found: _Inputs, plan: Plan) -> list[Tensor | None]:
    """None in the place of what this rule does not look at, and no kernel has written."""
    unused = set() if plan.separate else {"b"}
    unused |= set() if plan.momentum else {"eta", "carry"}
    unused |= {"c"} if plan.max_gradient_norm is None else set()
    unused |= {"scale", "bias"} if plan.form.norm is None else set()
    return [None if name in unused else t for name, t in vars(found).items()]


def _launch_forward(plan: Plan, inputs: _Inputs, ends: list[Tensor], states: list[Tensor]) -> None:
    from titans_ds.memory.kernels.single_kernels import single_forward

    num_rows, num_chunks = inputs.keys.shape[:2]
    single_forward[(num_rows,)](
        *vars(inputs).values(), ends[0], ends[-1], states[0], states[-1],
        num_rows, num_chunks, *_numbers(plan),
        SAVE_MOMENTUM=len(states) == 2, **options(plan, inputs.keys, False),
    )  # fmt: skip


def _launch_backward(
    plan: Plan, inputs: _Inputs, states: list[Tensor], d_states: Tensor, found: _Inputs, d_ends: list[Tensor]
) -> None:
    from titans_ds.memory.kernels.single_kernels import single_backward

    num_rows, num_chunks = inputs.keys.shape[:2]
    single_backward[(num_rows,)](
        *vars(inputs).values(), states[0], states[-1], d_states, *vars(found).values(), d_ends[0], d_ends[-1],
        num_rows, num_chunks, *_numbers(plan), **options(plan, inputs.keys, True),
    )  # fmt: skip


def _numbers(plan: Plan) -> tuple[float, float, float]:
    return plan.max_gradient_norm or 0.0, plan.form.huber_delta, LAYER_NORM_EPS


def options(plan: Plan, keys_NRCD: Tensor, backward: bool) -> dict[str, Any]:
    """The kernels' compile-time arguments."""
    chunk, dim = keys_NRCD.shape[2:]
    return {
        "C": chunk,
        "D": dim,
        "CB": padded(chunk),
        "DB": padded(dim),
        "LOSS": LOSSES[plan.form.loss],
        "NORM": plan.form.norm is not None,
        "MOMENTUM": plan.momentum,
        "SEPARATE": plan.separate,
        "LIMIT": plan.max_gradient_norm is not None,
        "PRECISION": "tf32" if keys_NRCD.dtype != torch.float32 else "ieee",
        "num_warps": WARPS[64 if dim <= 64 else 128][backward],
        "num_stages": 1,
    }
