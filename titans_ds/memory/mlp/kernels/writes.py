"""What all writers have in common: what they are given, how kernels are launched, and what comes back.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, L matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_ds.memory.mlp.gates import Coefficients
from titans_ds.memory.mlp.network import Form
from titans_ds.memory.mlp.rule import Inner

# Warps of a program, forward and backward, by the width that it is made for: chosen by spills, see docs/kernels.md.
WARPS = {64: (8, 4), 128: (8, 8)}


@dataclass(frozen=True)
class Plan:
    """What does not depend on the data.

    Args:
        form: of f_W and its loss.
        max_gradient_norm: see RuleConfig.
        momentum: there is an S.
        separate: its gradients are weighted otherwise than those of W.
        graph: keep what the backward needs, S of every chunk among it.
        triton: written by a Triton kernel.
    """

    form: Form
    max_gradient_norm: float | None
    momentum: bool
    separate: bool
    graph: bool
    triton: bool


@dataclass(frozen=True)
class Inputs:
    """Keys and values [N, R, C, D]; token weights a, b [L, N, R, C], c [N, R, C]; keep, eta, carry [N, R]."""

    keys: Tensor
    values: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    keep: Tensor
    eta: Tensor
    carry: Tensor

    @property
    def num_chunks(self) -> int:
        """R."""
        return self.keys.shape[1]


def or_zeros(d: Tensor | None, like: Tensor) -> Tensor:
    """A derivative that may be missing, as a contiguous tensor of the right shape."""
    return torch.zeros_like(like) if d is None else d.contiguous()


def at_end(d: Tensor | None, states: Tensor, dtype: torch.dtype) -> Tensor:
    """The derivative in W or S at the end, to be moved back in place."""
    if d is None:
        return states.new_zeros(states.shape[:1] + states.shape[2:], dtype=dtype)
    return d.clone(memory_format=torch.contiguous_format)


def used_derivatives(found: Inputs, plan: Plan) -> list[Tensor | None]:
    """Derivatives in the inputs; None in the place of what this rule does not look at."""
    unused = set() if plan.separate else {"b"}
    unused |= set() if plan.momentum else {"eta", "carry"}
    unused |= {"c"} if plan.max_gradient_norm is None else set()
    unused |= {"scale", "bias"} if plan.form.norm is None else set()
    return [None if name in unused else t for name, t in vars(found).items()]


@dataclass(frozen=True)
class Factors:
    """The factors of the recurrences over chunks, W_(r+1) = keep W_r + carry S_r + G^w, S_(r+1) = eta S_r + G^m.

    What the chunks' writes are made of, beside gradients; a chunk that is not finished changes nothing.

    Args:
        a, b: weights of the tokens' gradients in W and S, the step sizes and the sign in them, [L, N, R, C]; b is a
            where they are the same.
        c: those of the gradient whose norm is limited, [N, R, C].
        keep, eta, carry: [N, R]; the last two of no consequence without momentum.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    keep: Tensor
    eta: Tensor
    carry: Tensor


def factors(c: Coefficients, finished_NR: Tensor | None, inner: Inner) -> Factors:
    """From the coefficients of all chunks; finished_NR: see chunks.Work."""
    idle = None if finished_NR is None else ~finished_NR

    def masked(t: Tensor | None, neutral: float) -> Tensor:
        if t is None:
            return torch.ones_like(c.surprise[..., 0])
        return t if idle is None else t.masked_fill(idle, neutral)

    def weighed(t: Tensor) -> Tensor:
        return t if finished_NR is None else t * finished_NR.unsqueeze(-1)

    sizes = -inner.step_sizes.view(-1, 1, 1, 1)
    surprise = weighed(c.surprise)
    a = sizes * (surprise if c.to_weights is None else weighed(c.to_weights))
    b = a if c.to_momentum is None else sizes * weighed(c.to_momentum)
    carry = c.momentum_keep if c.carry is None else c.carry
    return Factors(a, b, surprise, masked(c.keep, 1.0), masked(c.momentum_keep, 1.0), masked(carry, 0.0))


def options(
    keys_NRCD: Tensor,
    hidden: int,
    form: Form,
    limited: bool,
    separate: bool,
    warps: dict[int, tuple[int, int]],
    backward: bool,
) -> dict[str, Any]:
    """Sizes, and which rule."""
    chunk, dim = keys_NRCD.shape[2:]
    return {
        "C": chunk,
        "D": dim,
        "H": hidden,
        "CB": padded(chunk),
        "DB": padded(dim),
        "HB": padded(hidden),
        "SILU": form.activation == "silu",
        "SEPARATE": separate,
        "LIMIT": limited,
        "PRECISION": "tf32" if keys_NRCD.dtype != torch.float32 else "ieee",
        "num_warps": warps[64 if max(dim, hidden) <= 64 else 128][backward],
        "num_stages": 1,
    }


def numbers(form: Form, max_gradient_norm: float | None) -> tuple[float, float]:
    """The scalars: norm limit, factor of the hidden layer."""
    return max_gradient_norm or 0.0, form.hidden_scale


def both_states(tensors: list[Tensor]) -> list[Tensor]:
    """The kernels' arguments for both matrices' W and S: without momentum the last two are never looked at."""
    return tensors if len(tensors) == 4 else [*tensors, *tensors]


def padded(size: int) -> int:
    """The next power of two that a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())
