"""The factors of the two recurrences over chunks, W_(r+1) = keep W_r + carry S_r + G^w and S_(r+1) = eta S_r + G^m.

Legend of shape suffixes: N batch x heads, R chunks, L matrices, C tokens of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.memory.gates import Coefficients
from titans_ds.memory.rule import Inner


@dataclass(frozen=True)
class Factors:
    """What the chunks' writes are made of, beside gradients; a chunk that is not finished changes nothing.

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
