"""Inner optimizers: from a chunk's gradients to the next fast weights. Values in, values out.

Legend of shape suffixes: N batch x heads, O/I a matrix's output/input width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_ds.memory.mlp.config import RuleConfig
from titans_ds.memory.mlp.gates import Coefficients
from titans_ds.memory.mlp.network import Weights

NORM_EPS = 1e-12  # beside a gradient's squared norm
ADAM_BETA2 = 0.95  # the second beta; the first is rule.momentum
NEWTON_SCHULZ_STEPS = 5
_ADAM_EPS = 1e-8
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic


@dataclass(frozen=True)
class Fast:
    """Everything that a write changes, at least fp32.

    Args:
        weights: W_l [N, O, I].
        momentum: S_l of the same shapes; empty without momentum.
        second: adamw's second moments; empty otherwise.
        steps: adamw's number of steps so far, [N].
    """

    weights: Weights
    momentum: Weights = ()
    second: Weights = ()
    steps: Tensor | None = None


@dataclass(frozen=True)
class Surprise:
    """A chunk's gradients, weighted as `Coefficients` says, in the dtype of the keys: for W, and for S."""

    to_weights: Weights
    to_momentum: Weights


def step(
    fast: Fast, surprise: Surprise, c: Coefficients, step_sizes: Tensor, rule: RuleConfig, width: torch.dtype
) -> Fast:
    """One step of the rule's optimizer.

    Args:
        fast: before.
        surprise: gradients.
        c: factors of this chunk.
        step_sizes: theta of each matrix, [depth].
        rule: see RuleConfig.
        width: dtype of the products of muon.
    """
    if rule.optimizer == "adamw":
        return _adamw(fast, surprise, c, step_sizes, rule)
    if rule.optimizer == "muon":
        return _muon(fast, surprise, c, step_sizes, rule, width)
    if rule.optimizer == "momentum":
        return _momentum(fast, surprise, c, step_sizes)
    kept = [_scale(w, c.keep) for w in fast.weights]
    return Fast(tuple(w - step_sizes[i] * g.to(w.dtype) for i, (w, g) in enumerate(_zip(kept, surprise.to_weights))))


def _momentum(fast: Fast, surprise: Surprise, c: Coefficients, step_sizes: Tensor) -> Fast:
    """S <- eta S - theta G, W <- (1 - alpha) W + S; or both recurrences over a chunk's tokens in one."""
    weights, momenta = [], []
    for i, (w, s) in enumerate(_zip(fast.weights, fast.momentum)):
        new_s = _scale(s, c.momentum_keep) - step_sizes[i] * surprise.to_momentum[i].to(s.dtype)
        gained = new_s
        if c.carry is not None:
            gained = _scale(s, c.carry) - step_sizes[i] * surprise.to_weights[i].to(s.dtype)
        momenta.append(new_s)
        weights.append(_scale(w, c.keep) + gained)
    return Fast(tuple(weights), tuple(momenta))


def _muon(
    fast: Fast, surprise: Surprise, c: Coefficients, step_sizes: Tensor, rule: RuleConfig, width: torch.dtype
) -> Fast:
    """S <- eta S + G, W <- (1 - alpha) W - theta NS(S), as in ATLAS (arXiv 2505.23735)."""
    weights, momenta = [], []
    for i, (w, s) in enumerate(_zip(fast.weights, fast.momentum)):
        new_s = _scale(s, c.momentum_keep) + surprise.to_momentum[i].to(s.dtype)
        change = newton_schulz(new_s.to(width), NEWTON_SCHULZ_STEPS).to(w.dtype)
        momenta.append(new_s)
        weights.append(_scale(w, c.keep) - step_sizes[i] * _scale(change, c.step))
    return Fast(tuple(weights), tuple(momenta))


def _adamw(fast: Fast, surprise: Surprise, c: Coefficients, step_sizes: Tensor, rule: RuleConfig) -> Fast:
    """AdamW with the forget gate as its (decoupled) weight decay; each sample counts its own steps."""
    steps = torch.ones(()) if fast.steps is None else fast.steps + 1
    fix1, fix2 = (_per_row(-torch.expm1(steps * math.log(beta))) for beta in (rule.momentum, ADAM_BETA2))
    weights, firsts, seconds = [], [], []
    for i, w in enumerate(fast.weights):
        g = surprise.to_momentum[i].to(w.dtype)
        first = rule.momentum * fast.momentum[i] + (1 - rule.momentum) * g
        second = ADAM_BETA2 * fast.second[i] + (1 - ADAM_BETA2) * g.square()
        # The root has no derivative at 0; the least value changes nothing beside eps.
        change = (first / fix1) / ((second / fix2).clamp(min=1e-30).sqrt() + _ADAM_EPS)
        firsts.append(first)
        seconds.append(second)
        weights.append(_scale(w, c.keep) - step_sizes[i] * _scale(change, c.step))
    return Fast(tuple(weights), tuple(firsts), tuple(seconds), steps)


def newton_schulz(matrix_NOI: Tensor, steps: int) -> Tensor:
    """Towards the nearest semi-orthogonal matrix: singular values to about 1 (0.7 to 1.2 after five steps)."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrix_NOI.shape[-2] > matrix_NOI.shape[-1]
    x = matrix_NOI.mT if tall else matrix_NOI
    x = x / (x.square().sum(dim=(-2, -1), keepdim=True) + 1e-14).sqrt()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def limit(surprise: Surprise, weighted: Weights, max_norm: float) -> Surprise:
    """Scale the gradients of each row so that those in `weighted` have at most this norm over all matrices."""
    wide = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in weighted]
    square = torch.stack([g.square().sum(dim=(1, 2)) for g in wide]).sum(dim=0)
    factor = (max_norm / (square + NORM_EPS).sqrt()).clamp(max=1.0)
    to_weights = tuple(g * _per_row(factor).to(g.dtype) for g in surprise.to_weights)
    if surprise.to_momentum is surprise.to_weights:
        return Surprise(to_weights, to_weights)
    return Surprise(to_weights, tuple(g * _per_row(factor).to(g.dtype) for g in surprise.to_momentum))


def without_forgetting(c: Coefficients) -> Coefficients:
    """For inner steps after a chunk's first: the forget gate acts once a write."""
    return replace(c, keep=None)


def _per_row(factor_N: Tensor) -> Tensor:
    return factor_N.view(-1, 1, 1)


def _scale(x_NOI: Tensor, factor_N: Tensor | None) -> Tensor:
    return x_NOI if factor_N is None else x_NOI * _per_row(factor_N)


def _zip(left: Weights | list[Tensor], right: Weights) -> list[tuple[Tensor, Tensor]]:
    return list(zip(left, right, strict=True))
