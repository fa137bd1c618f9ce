"""What the writers of `chunk` have in common: what they are given, and what comes back.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.memory.kernels import Engine
from titans_ds.memory.network import Form


@dataclass(frozen=True)
class Plan:
    """What does not depend on the data.

    Args:
        form: of f_W and its loss.
        max_gradient_norm: see RuleConfig.
        momentum: there is an S.
        separate: its gradients are weighted otherwise than those of W.
        graph: keep what the backward needs, S of every chunk among it.
        engine: what writes.
    """

    form: Form
    max_gradient_norm: float | None
    momentum: bool
    separate: bool
    graph: bool
    engine: Engine


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
    """A derivative, contiguous."""
    return torch.zeros_like(like) if d is None else d.contiguous()


def at_end(d: Tensor | None, states: Tensor, dtype: torch.dtype) -> Tensor:
    """The derivative in W or S at the end, to be moved back in place."""
    if d is None:
        return states.new_zeros(states.shape[:1] + states.shape[2:], dtype=dtype)
    return d.clone(memory_format=torch.contiguous_format)


def of_use(found: Inputs, plan: Plan) -> list[Tensor | None]:
    """Derivatives in the inputs; None in the place of what this rule does not look at."""
    unused = set() if plan.separate else {"b"}
    unused |= set() if plan.momentum else {"eta", "carry"}
    unused |= {"c"} if plan.max_gradient_norm is None else set()
    unused |= {"scale", "bias"} if plan.form.norm is None else set()
    return [None if name in unused else t for name, t in vars(found).items()]
