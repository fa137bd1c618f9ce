"""What chunkwise_kernels.py does, in PyTorch: for heads too wide for one program, and where there is no Triton.

A chunk costs its products and little else: no graph, state updates in place. The backward computes all chunks again in
batched products, and walks over the chunks for what depends on the derivative in the state alone.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.memory.mlp.kernels.products import scaled, wide_product
from titans_ds.memory.mlp.kernels.writes import Inputs
from titans_ds.memory.mlp.network import Form
from titans_ds.memory.mlp.optimizers import NORM_EPS


@dataclass(frozen=True)
class _Trace:
    """f_W and its loss on the tokens of one chunk, or of all: z, x = h act(z), e, t = e W_2, u = t h act'(z)."""

    z: Tensor
    x: Tensor
    e: Tensor
    t: Tensor
    u: Tensor

    def chunk(self, r: int) -> _Trace:
        """Of one chunk."""
        return _Trace(self.z[:, r], self.x[:, r], self.e[:, r], self.t[:, r], self.u[:, r])


def forward(
    given: Inputs, form: Form, max_norm: float | None, separate: bool, ends: Sequence[Tensor], states: Sequence[Tensor]
) -> None:
    """Write all chunks.

    Args:
        given: see there.
        form: of f_W and its loss.
        max_norm: see RuleConfig.max_gradient_norm.
        separate: b is not a.
        ends: W_1, W_2 (, S_1, S_2), moved on in place.
        states: takes the same before every chunk, [N, R, …] in the dtype of the keys; the first two, or all.
    """
    weights, momenta = ends[:2], ends[2:]
    for r in range(given.num_chunks):
        for state, end in zip(states, ends, strict=False):
            state[:, r] = end
        keys = given.keys[:, r]
        trace = _trace(states[0][:, r], states[1][:, r], keys, given.values[:, r], form)
        parts = ((trace.u, keys), (trace.e, trace.x))
        limit = None if max_norm is None else _limit(parts, given.c[:, r], max_norm)[0]
        for level, (delta, x) in enumerate(parts):
            gained = _gradient(delta, x, given.a[level, :, r], limit, weights[level].dtype)
            weights[level].mul_(_rows(given.keep[:, r]))
            if momenta:
                weights[level].addcmul_(momenta[level], _rows(given.carry[:, r]))
            weights[level].add_(gained)
            if momenta:
                if separate:
                    gained = _gradient(delta, x, given.b[level, :, r], limit, weights[level].dtype)
                momenta[level].mul_(_rows(given.eta[:, r])).add_(gained)


def backward(
    given: Inputs,
    form: Form,
    max_norm: float | None,
    separate: bool,
    states: Sequence[Tensor],
    d_states: Sequence[Tensor],
    found: Inputs,
    d_ends: Sequence[Tensor],
    walked: int,
) -> None:
    """The derivative of `forward`.

    Args:
        given, form, max_norm, separate, states: as there.
        d_states: in W_1 and W_2 before every chunk.
        found: takes the derivatives in what was given.
        d_ends: in W_1, W_2 (, S_1, S_2) after the first `walked` chunks; moved back to the start in place.
        walked: number of chunks to go back through; the derivatives in what the others were given stay as they are.
    """
    trace = _trace(states[0], states[1], given.keys, given.values, form)
    for r in reversed(range(walked)):
        _factors_backward(given, states, found, d_ends, r)
        step = _Backward(given, form, trace.chunk(r), (states[0][:, r], states[1][:, r]), found, r)
        step.sums(d_ends, separate, max_norm)
        d_w1, d_w2 = step.network()
        _move_back(given, d_ends, r)
        d_ends[0].add_(d_w1).add_(d_states[0][:, r])
        d_ends[1].add_(d_w2).add_(d_states[1][:, r])


class _Backward:
    """Of one chunk: from the derivative in its sums of gradients to everything else."""

    def __init__(
        self, given: Inputs, form: Form, trace: _Trace, weights: tuple[Tensor, Tensor], found: Inputs, r: int
    ) -> None:
        self.given, self.form, self.trace, self.weights, self.found, self.r = given, form, trace, weights, found, r
        self.keys = given.keys[:, r]
        self.to_keys = self.to_x = self.to_e = self.to_u = torch.zeros(
            (), dtype=self.keys.dtype, device=self.keys.device
        )

    def sums(self, d_ends: Sequence[Tensor], separate: bool, max_norm: float | None) -> None:
        """Through every weighted sum of gradients, and the limit on their norm."""
        given, found, r, t = self.given, self.found, self.r, self.trace
        directions = list(d_ends[:2])
        if len(d_ends) > 2 and not separate:
            directions = [d_ends[0] + d_ends[2], d_ends[1] + d_ends[3]]
        limit = square = None
        parts = ((t.u, self.keys), (t.e, t.x))
        if max_norm is not None:
            limit, square, gradients = _limit(parts, given.c[:, r], max_norm)
        moved = self._sum(given.a, directions, limit, found.a)
        if separate:
            moved = moved + self._sum(given.b, d_ends[2:], limit, found.b)
        if limit is not None and square is not None:
            back = torch.where(limit < 1, -moved / (square + NORM_EPS), 0.0)
            both = torch.zeros_like(found.a)
            self._sum(given.c.expand(2, *given.c.shape), [_rows(back) * g for g in gradients], None, both)
            found.c[:, r] = both[:, :, r].sum(dim=0)

    def _sum(self, token_weights: Tensor, directions: Sequence[Tensor], limit: Tensor | None, found: Tensor) -> Tensor:
        """Of one weighted sum, both matrices; returns [N], the product of sum and direction."""
        t, r, total = self.trace, self.r, torch.zeros((), device=self.keys.device)
        for level, (delta, x) in enumerate(((t.u, self.keys), (t.e, t.x))):
            weight = token_weights[level, :, r]
            direction = directions[level] if limit is None else directions[level] * _rows(limit)
            direction = direction.to(x.dtype)
            along, down = x @ direction.mT, scaled(delta, weight) @ direction
            found[level, :, r] = (delta * along).sum(dim=-1, dtype=weight.dtype)
            total = total + (weight * found[level, :, r]).sum(dim=-1)
            if level == 0:
                self.to_u, self.to_keys = self.to_u + scaled(along, weight), self.to_keys + down
            else:
                self.to_e, self.to_x = self.to_e + scaled(along, weight), self.to_x + down
        return total

    def network(self) -> tuple[Tensor, Tensor]:
        """Through u, e, the values and f_W: to keys, values and weights."""
        t, (w1, w2), form, r = self.trace, self.weights, self.form, self.r
        to_t, bent = _through_slope(self.to_u, t, form)
        to_e = self.to_e + to_t @ w2.mT
        self.found.values[:, r] = -to_e
        to_z = slope_of(self.to_x + to_e @ w2, t.z, form) + bent
        self.found.keys[:, r] = self.to_keys + to_z @ w1
        return to_z.mT @ self.keys, torch.baddbmm(t.e.mT @ to_t, to_e.mT, t.x)


def _trace(w1: Tensor, w2: Tensor, keys: Tensor, values: Tensor, form: Form) -> _Trace:
    z = keys @ w1.mT
    x = F.silu(z) if form.activation == "silu" else z
    x = x if form.hidden_scale == 1.0 else x * form.hidden_scale
    e = x @ w2.mT - values
    t = e @ w2
    return _Trace(z, x, e, t, slope_of(t, z, form))


def slope_of(d: Tensor, z: Tensor, form: Form) -> Tensor:
    """d h act'(z)."""
    d = d if form.hidden_scale == 1.0 else d * form.hidden_scale
    return torch.ops.aten.silu_backward(d, z) if form.activation == "silu" else d  # type: ignore[no-any-return]


def _through_slope(to_u: Tensor, t: _Trace, form: Form) -> tuple[Tensor, Tensor]:
    """u = t h act'(z): to t, and to z."""
    to_t = slope_of(to_u, t.z, form)
    if form.activation != "silu":
        return to_t, torch.zeros_like(to_t)
    s = torch.sigmoid(t.z)
    bend = s * (1 - s) * (2 + t.z * (1 - 2 * s)) * form.hidden_scale
    return to_t, to_u * t.t * bend


def _gradient(delta: Tensor, x: Tensor, weight: Tensor, limit: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight = weight if limit is None else weight * limit.unsqueeze(-1)
    return wide_product(scaled(delta, weight).mT, x, dtype)


def _limit(
    parts: Sequence[tuple[Tensor, Tensor]], shares: Tensor, max_norm: float
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The factor that brings the gradients' norm down to max_norm, its square [N], and the gradients."""
    gradients = [_gradient(delta, x, shares, None, shares.dtype) for delta, x in parts]
    square = gradients[0].square().sum(dim=(1, 2)) + gradients[1].square().sum(dim=(1, 2))
    return (max_norm / (square + NORM_EPS).sqrt()).clamp(max=1.0), square, gradients


def _factors_backward(given: Inputs, states: Sequence[Tensor], found: Inputs, d_ends: Sequence[Tensor], r: int) -> None:
    found.keep[:, r] = _dots(d_ends[:2], states[:2], r)
    if len(d_ends) > 2:
        found.eta[:, r] = _dots(d_ends[2:], states[2:], r)
        found.carry[:, r] = _dots(d_ends[:2], states[2:], r)


def _dots(left: Sequence[Tensor], states: Sequence[Tensor], r: int) -> Tensor:
    return (left[0] * states[0][:, r]).sum(dim=(1, 2)) + (left[1] * states[1][:, r]).sum(dim=(1, 2))


def _move_back(given: Inputs, d_ends: Sequence[Tensor], r: int) -> None:
    """Through W' = keep W + carry S, S' = eta S."""
    for level in range(2):
        if len(d_ends) > 2:
            momentum = d_ends[2 + level]
            momentum.mul_(_rows(given.eta[:, r])).addcmul_(d_ends[level], _rows(given.carry[:, r]))
        d_ends[level].mul_(_rows(given.keep[:, r]))


def _rows(factor_N: Tensor) -> Tensor:
    return factor_N.view(-1, 1, 1)
