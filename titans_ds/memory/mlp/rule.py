"""The write rule: one chunk's keys and values into the fast weights.

W <- W - theta grad l(W) at its simplest: with a pooled key and value the rule of "Parametric Memory Cannot Replace
Retrieval", with all tokens TTT's gradient step (Sun et al., 2024), with momentum and forget gate Titans' rule.

Legend of shape suffixes: N batch x heads, C tokens of a chunk, D width of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.errors import ConfigError
from titans_ds.memory.mlp import network, write_function
from titans_ds.memory.mlp.config import RuleConfig
from titans_ds.memory.mlp.fan import ForwardAlignment
from titans_ds.memory.mlp.gates import Coefficients
from titans_ds.memory.mlp.network import Form, Terms, Weights
from titans_ds.memory.mlp.optimizers import Fast, Surprise, limit, step, without_forgetting


@dataclass(frozen=True)
class Inner:
    """The inner optimization problem of a call: the same for all of its chunks.

    Args:
        rule: see RuleConfig.
        form: of f_W and its loss.
        step_sizes: theta of each matrix [depth], in the dtype of the fast weights; negative under the sign flip.
        inner_steps: K.
        fan: what predicts the gradient in place of its closed form; None for the exact one.
        derived: where writes have a graph, go back by hand (write_function.py), if the rule allows it.
    """

    rule: RuleConfig
    form: Form
    step_sizes: Tensor
    inner_steps: int
    derived: bool = True
    fan: ForwardAlignment | None = None

    def __post_init__(self) -> None:
        if self.rule.acts_per_token and self.inner_steps > 1:
            raise ConfigError(
                f"controls: inner_steps is {self.inner_steps}, but this memory's rule (gate_scope "
                f"{self.rule.gate_scope!r}) steps once a chunk; use 0 or 1"
            )


@dataclass(frozen=True)
class Pairs:
    """What to store: keys and values [N, C, D]."""

    keys: Tensor
    values: Tensor


def pool(x_NRCD: Tensor, shares_NRC: Tensor) -> Tensor:
    """The mean over a chunk's tokens to store, as a chunk of one token: a write of rank 1 per matrix. [N, R, 1, D]."""
    return shares_NRC.unsqueeze(-2) @ x_NRCD


def write_chunk(fast: Fast, pairs: Pairs, c: Coefficients, inner: Inner) -> Fast:
    """The fast weights after one chunk.

    Args:
        fast: before the chunk.
        pairs: what to store.
        c: weights and factors of this chunk.
        inner: the problem.
    """
    derived = inner.derived and torch.is_grad_enabled() and write_function.covers(inner.rule, inner.form)

    def plain(fast: Fast, keys: Tensor, values: Tensor, c: Coefficients, sizes: Tensor) -> Fast:
        surprise = _surprise(fast.weights, Pairs(keys, values), c, inner)
        return step(fast, surprise, c, sizes, inner.rule, keys.dtype)

    for k in range(inner.inner_steps):
        now, sizes = c if k == 0 else without_forgetting(c), inner.step_sizes * _schedule(k, inner)
        given = (fast, pairs.keys, pairs.values, now, sizes)
        fast = write_function.derived_step(*given, inner.rule, inner.form, plain) if derived else plain(*given)
    return fast


def _surprise(weights: Weights, pairs: Pairs, c: Coefficients, inner: Inner) -> Surprise:
    """The chunk's gradients at its start, weighted for W and for S, and limited in norm where the rule says so."""
    rule, form = inner.rule, inner.form
    if c.to_weights is None and c.to_momentum is None:  # the same gradient for W and S
        if inner.fan is None:  # weighting the error is cheaper than weighting every matrix's derivative
            gradients = network.gradient(network.terms(weights, pairs.keys, pairs.values, form, c.surprise))
        else:
            gradients = network.gradient(_terms(weights, pairs, c, inner), c.surprise)
        surprise = Surprise(gradients, gradients)
        return surprise if rule.max_gradient_norm is None else limit(surprise, gradients, rule.max_gradient_norm)
    at_start = _terms(weights, pairs, c, inner)
    to_weights = network.gradient(at_start, c.surprise if c.to_weights is None else c.to_weights)
    to_momentum = to_weights if c.to_momentum is None else network.gradient(at_start, c.to_momentum)
    surprise = Surprise(to_weights, to_momentum)
    if rule.max_gradient_norm is None:
        return surprise
    weighted = to_weights if c.to_weights is None else network.gradient(at_start, c.surprise)
    return limit(surprise, weighted, rule.max_gradient_norm)


def _terms(weights: Weights, pairs: Pairs, c: Coefficients, inner: Inner) -> Terms:
    if inner.fan is None:
        return network.terms(weights, pairs.keys, pairs.values, inner.form)
    return Terms(*inner.fan(weights, pairs.keys, pairs.values, inner.form, c.surprise))


def _schedule(k: int, inner: Inner) -> float:
    """Factor of theta at inner step k: 1, or half a cosine from 1 at k = 0 to 0 at k = K."""
    return 1.0 if inner.rule.schedule == "constant" else 0.5 * (1 + math.cos(math.pi * k / inner.inner_steps))


def choose(done_N: Tensor, new: Fast, old: Fast) -> Fast:
    """Row by row the new state, where a chunk was finished, or the old one."""

    def pick(yes: Weights, no: Weights) -> Weights:
        return tuple(torch.where(done_N.view(-1, 1, 1), y, n) for y, n in zip(yes, no, strict=True))

    steps = None if new.steps is None or old.steps is None else torch.where(done_N, new.steps, old.steps)
    weights = pick(new.weights, old.weights)
    return Fast(weights, pick(new.momentum, old.momentum), pick(new.second, old.second), steps)
