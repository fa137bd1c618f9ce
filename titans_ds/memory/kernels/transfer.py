"""The two recurrences over chunks as one linear map, so that no state between chunks has to be computed one by one.

Momentum and weights after chunk r, with G^w_r and G^m_r the chunk's two weighted sums of gradients:

    S_(r+1) = eta_r S_r - theta G^m_r        W_(r+1) = keep_r W_r + carry_r S_r - theta G^w_r

are linear in W_0, S_0 and all G. `Transfer` holds the factors: of each, in what each chunk reads and in the state at
the end.

Legend of shape suffixes: N batch x heads, R chunks, E = R + 2 states (those that the chunks read, W and S at the end).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.memory.gates import Coefficients


@dataclass(frozen=True)
class Factors:
    """keep, momentum_keep and carry of every chunk [N, R], neutral where it is not finished; None where always so."""

    keep: Tensor | None
    momentum_keep: Tensor | None
    carry: Tensor | None

    def block(self, chunks: slice) -> Factors:
        """Those of some chunks."""
        return Factors(*(None if t is None else t[:, chunks] for t in (self.keep, self.momentum_keep, self.carry)))


@dataclass(frozen=True)
class Transfer:
    """Factors of a block of chunks.

    Args:
        to_weights: of G^w, [N, E, R]; of the one G where there is but one.
        to_momentum: of G^m where it is not G^w, [N, E, R].
        weights, momentum: of W_0 and S_0, [N, E]; momentum None where there is none.
    """

    to_weights: Tensor
    to_momentum: Tensor | None
    weights: Tensor
    momentum: Tensor | None


def factors(c: Coefficients, finished_NR: Tensor, has_momentum: bool) -> Factors:
    """From the coefficients of all chunks: a chunk that is not finished changes nothing."""

    def masked(t: Tensor | None, neutral: float) -> Tensor | None:
        return None if t is None else torch.where(finished_NR, t, torch.full_like(t, neutral))

    if not has_momentum:
        return Factors(masked(c.keep, 1.0), None, None)
    carry = c.momentum_keep if c.carry is None else c.carry
    return Factors(masked(c.keep, 1.0), masked(c.momentum_keep, 1.0), masked(carry, 0.0))


def transfer(f: Factors, separate: bool, like_NR: Tensor) -> Transfer:
    """The factors of a block.

    Args:
        f: of the block's chunks.
        separate: G^w and G^m are weighted differently.
        like_NR: for shape, dtype and device.
    """
    num_chunks = like_NR.shape[1]
    decay = _decay(f.keep, like_NR)  # [N, R + 1, R + 1]: of W from state s to state r
    zero = like_NR.new_zeros(like_NR.shape[0], 1, num_chunks)
    direct = decay[:, :, 1:]  # what chunk s adds, it adds to state s + 1
    if f.momentum_keep is None or f.carry is None:
        return Transfer(torch.cat([direct, zero], 1), None, _with_zero(decay[:, :, 0]), None)
    momentum = _decay(f.momentum_keep, like_NR)
    # W_r gets carry_j S_j of every chunk j < r.
    through = (direct * f.carry.unsqueeze(1)) @ momentum[:, :-1]  # [N, R + 1, R + 1]: of S from state s to W_r
    of_gradient = torch.cat([through[:, :, 1:], momentum[:, -1:, 1:]], 1)
    of_momentum = torch.cat([through[:, :, 0], momentum[:, -1:, 0]], 1)
    of_weights = _with_zero(decay[:, :, 0])
    if separate:
        return Transfer(torch.cat([direct, zero], 1), of_gradient, of_weights, of_momentum)
    # One G: what S takes of it, W takes in the same chunk.
    return Transfer(of_gradient + torch.cat([direct, zero], 1), None, of_weights, of_momentum)


def _decay(keep_NR: Tensor | None, like_NR: Tensor) -> Tensor:
    """prod of keep over the chunks s to r - 1 where r >= s, else 0; [N, R + 1, R + 1], in log space."""
    size = like_NR.shape[1] + 1
    ones = torch.ones(size, size, dtype=torch.bool, device=like_NR.device).tril()
    if keep_NR is None:
        return ones.to(like_NR.dtype).expand(like_NR.shape[0], size, size)
    log = keep_NR.clamp(min=torch.finfo(keep_NR.dtype).tiny).log().cumsum(dim=1)
    total = torch.cat([torch.zeros_like(log[:, :1]), log], dim=1)
    return torch.exp((total.unsqueeze(2) - total.unsqueeze(1)).masked_fill(~ones, -torch.inf))


def _with_zero(factors_NR: Tensor) -> Tensor:
    return torch.cat([factors_NR, torch.zeros_like(factors_NR[:, :1])], dim=1)
