"""`chunk` with the fast weights on the chip: one Triton program per memory walks over its chunks (chunk_kernels.py).

The kernel writes, and hands out the weights that each chunk reads; the reads are large batched products. Kept for the
backward: the inputs, and those weights (and momentum) in the dtype of the keys.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_ds.memory import network
from titans_ds.memory.gates import Coefficients
from titans_ds.memory.kernels.transfer import factors
from titans_ds.memory.network import Form
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.rule import Inner, Pairs

_LOSSES = {"l2": 0, "dot": 1, "huber": 2}


@dataclass(frozen=True)
class Plan:
    """What does not depend on the data.

    Args:
        form: of f_W and its loss.
        max_gradient_norm: see RuleConfig.
        momentum: there is an S.
        separate: its gradients are weighted otherwise than those of W.
        save_momentum: keep S of every chunk for the backward.
    """

    form: Form
    max_gradient_norm: float | None
    momentum: bool
    separate: bool
    save_momentum: bool

    def options(self, keys_NRCD: Tensor, hidden: int) -> dict[str, Any]:
        """The kernels' compile-time arguments."""
        chunk, dim = keys_NRCD.shape[2:]
        wide = max(dim, hidden) > 64
        return {
            "C": chunk,
            "D": dim,
            "H": hidden,
            "CB": _padded(chunk),
            "DB": _padded(dim),
            "HB": _padded(hidden),
            "SILU": self.form.activation == "silu",
            "LOSS": _LOSSES[self.form.loss],
            "MOMENTUM": self.momentum,
            "SEPARATE": self.separate,
            "LIMIT": self.max_gradient_norm is not None,
            "PRECISION": "tf32" if keys_NRCD.dtype != torch.float32 else "ieee",
            "num_warps": 16 if wide else 8,
            "num_stages": 1,
        }

    def numbers(self) -> tuple[float, float, float]:
        """The kernels' scalars: norm limit, where huber turns, factor of the hidden layer."""
        limit = 0.0 if self.max_gradient_norm is None else self.max_gradient_norm
        return limit, self.form.huber_delta, self.form.hidden_scale


def run_chunk(
    fast: Fast,
    pairs: Pairs,
    c: Coefficients,
    finished_NR: Tensor,
    inner: Inner,
    queries_NRCD: Tensor | None,
    graph: bool,
) -> tuple[Tensor | None, Fast]:
    """Read every chunk with the weights before it, and write all of them.

    Args:
        fast: at the start.
        pairs: of all chunks, [N, R, C, D].
        c: of all chunks.
        finished_NR: true where a chunk is written.
        inner: the inner problem; `kernels.chunks` says which ones are supported.
        queries_NRCD: by chunk; None reads nothing.
        graph: differentiate through the write.
    """
    with torch.set_grad_enabled(graph):
        states, new = _write(fast, pairs, c, finished_NR, inner, graph)
    if queries_NRCD is None:
        return None, new
    if graph or not any(w.requires_grad for w in fast.weights):
        return _read(states, queries_NRCD, inner.form), new
    # In first order the first chunk alone still reads weights that lead somewhere.
    first = network.forward(fast.weights, queries_NRCD[:, 0], inner.form).unsqueeze(1)
    if queries_NRCD.shape[1] == 1:
        return first, new
    rest = _read(tuple(s[:, 1:] for s in states), queries_NRCD[:, 1:], inner.form)
    return torch.cat([first, rest], dim=1), new


def _read(states: tuple[Tensor, ...], queries_NRCD: Tensor, form: Form) -> Tensor:
    reads = network.forward(tuple(s.flatten(0, 1) for s in states), queries_NRCD.flatten(0, 1), form)
    return reads.view(queries_NRCD.shape)


def _write(
    fast: Fast, pairs: Pairs, c: Coefficients, finished_NR: Tensor, inner: Inner, graph: bool
) -> tuple[tuple[Tensor, ...], Fast]:
    f = factors(c, finished_NR, inner.rule.has_momentum)
    ones = torch.ones_like(c.surprise[..., 0])
    sizes = -inner.step_sizes.view(-1, 1, 1, 1)
    mask = finished_NR.unsqueeze(-1)
    to_weights = c.surprise if c.to_weights is None else c.to_weights
    a = sizes * (to_weights * mask)
    b = a if c.to_momentum is None else sizes * (c.to_momentum * mask)
    norm = inner.rule.max_gradient_norm
    plan = Plan(inner.form, norm, inner.rule.has_momentum, c.to_momentum is not None, graph)
    scalars = [ones if t is None else t for t in (f.keep, f.momentum_keep, f.carry)]
    out = ChunkWrites.apply(  # type: ignore[no-untyped-call]
        plan, pairs.keys, pairs.values, a, b, c.surprise * mask, *scalars, *fast.weights, *fast.momentum
    )
    return out[:2], Fast(out[2:4], out[4:])


class ChunkWrites(torch.autograd.Function):
    """(plan, keys, values, weights of the tokens a, b [2, N, R, C] and c, keep, momentum_keep, carry [N, R], W_1, W_2
    (, S_1, S_2)) -> W_1 and W_2 before every chunk [N, R, …] in the dtype of the keys, and all of these at the end."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *given: Tensor) -> tuple[Tensor, ...]:
        from titans_ds.memory.kernels.chunk_kernels import chunk_forward

        inputs = [t.contiguous() for t in given[:8]]
        ends = [t.clone(memory_format=torch.contiguous_format) for t in given[8:]]
        keys, hidden = inputs[0], ends[0].shape[1]
        num_rows, num_chunks = keys.shape[:2]
        states = [keys.new_empty(num_rows, num_chunks, *w.shape[1:]) for w in ends[: 4 if plan.save_momentum else 2]]
        unused = ends[0]
        w1, w2, s1, s2 = (*ends, unused, unused)[:4]
        w1s, w2s, s1s, s2s = (*states, unused, unused)[:4]
        saves = plan.save_momentum and plan.momentum
        chunk_forward[(num_rows,)](
            *inputs, w1, w2, s1, s2, w1s, w2s, s1s, s2s,
            num_rows, num_chunks, *plan.numbers(),
            SAVE_MOMENTUM=saves, **plan.options(keys, hidden),
        )  # fmt: skip
        if plan.save_momentum:
            ctx.plan = plan
            ctx.save_for_backward(*inputs, *states)
        return (*states[:2], *ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        from titans_ds.memory.kernels.chunk_kernels import chunk_backward

        plan: Plan = ctx.plan
        inputs, states = list(ctx.saved_tensors[:8]), list(ctx.saved_tensors[8:])
        d_states = [d.contiguous() for d in d_outputs[:2]]
        d_ends = [d.clone(memory_format=torch.contiguous_format) for d in d_outputs[2:]]
        found = [torch.zeros_like(t) if i >= 2 else torch.empty_like(t) for i, t in enumerate(inputs)]
        keys, unused = inputs[0], d_ends[0]
        (num_rows, num_chunks), hidden = keys.shape[:2], states[0].shape[2]
        dw1, dw2, ds1, ds2 = (*d_ends, unused, unused)[:4]
        w1s, w2s, s1s, s2s = (*states, unused, unused)[:4]
        chunk_backward[(num_rows,)](
            *inputs, w1s, w2s, s1s, s2s, *d_states, *found, dw1, dw2, ds1, ds2,
            num_rows, num_chunks, *plan.numbers(), **plan.options(keys, hidden),
        )  # fmt: skip
        if not plan.separate:
            found[3] = None  # type: ignore[call-overload]
        return (None, *found, *d_ends)


def _padded(size: int) -> int:
    """The next power of two that a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())
