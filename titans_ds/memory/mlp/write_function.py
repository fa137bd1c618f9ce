"""The backward pass of a write, by hand: it keeps what was written, and goes through the inner step again.

Autograd would keep the inner step's graph: activations, errors and derivatives of every token, and every intermediate
of the optimizer. Here a step keeps its inputs alone (fast weights, keys, values, coefficients), and works out the rest
again.

With z_l = W_l x_l, x_(l+1) = h a(z_l), d_n = z_n - v and d_l = a'(z_l) * h W_(l+1)^T d_(l+1), the
inner gradients are sums G_jl = sum_t c_jt d_lt x_lt^T, and what the outer loss says to them, with directions U_jl, is
    P = sum_j sum_l <G_jl, U_jl> = sum_j sum_l sum_t c_jt <d_lt, U_jl x_lt>.
Its derivative goes up through the d_l (first to last level), to the error, and down through the z_l again.

Covered: the optimizers sgd and momentum with all their gates, any depth, both activations, limits on the
gradient's norm, several inner steps. Left to autograd: adamw, muon, gradient fan, and residual_norm.

Legend of shape suffixes: N batch x heads, C tokens of a chunk, O/I a matrix's output/input width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from titans_ds.memory.mlp import network
from titans_ds.memory.mlp.config import RuleConfig
from titans_ds.memory.mlp.gates import Coefficients
from titans_ds.memory.mlp.network import Form, Weights
from titans_ds.memory.mlp.optimizers import NORM_EPS, Fast

# What one inner step does, given the fast weights, keys, values, coefficients and step sizes.
Plain = Callable[[Fast, Tensor, Tensor, Coefficients, Tensor], Fast]
_COEFFICIENTS = ("surprise", "to_weights", "to_momentum", "keep", "momentum_keep", "carry")


def covers(rule: RuleConfig, form: Form) -> bool:
    """Whether the backward pass of this rule is written down here."""
    return rule.gradient == "exact" and rule.optimizer in ("sgd", "momentum") and form.norm is None


def derived_step(
    fast: Fast,
    keys_NCI: Tensor,
    values_NCO: Tensor,
    c: Coefficients,
    step_sizes: Tensor,
    rule: RuleConfig,
    form: Form,
    plain: Plain,
) -> Fast:
    """One inner step, as `plain` does it, with the backward pass of this file.

    Args:
        fast: before.
        keys_NCI, values_NCO: of a chunk.
        c: of the chunk; adamw's and muon's `step` is not among what is covered.
        step_sizes: theta of each matrix, [depth].
        rule, form: of which `covers` is true.
        plain: the forward pass.
    """
    depth = len(fast.weights)
    problem = _Problem(rule, form, depth, plain)
    given = [getattr(c, name) for name in _COEFFICIENTS]
    tensors = (step_sizes, keys_NCI, values_NCO, *given, *fast.weights, *fast.momentum)
    outputs: Weights = _Step.apply(problem, *tensors)  # type: ignore[no-untyped-call]
    return Fast(outputs[:depth], outputs[depth:])


@dataclass(frozen=True)
class _Problem:
    """What is no tensor."""

    rule: RuleConfig
    form: Form
    depth: int
    plain: Plain


class _Step(torch.autograd.Function):
    """(step sizes, keys, values, coefficients, W, S) -> (W, S)."""

    @staticmethod
    def forward(ctx: Any, problem: _Problem, *tensors: Tensor) -> Weights:
        ctx.problem = problem
        ctx.save_for_backward(*tensors)
        sizes, keys, values, c, fast = _unpack(problem, tensors)
        new = problem.plain(fast, keys, values, c, sizes)
        return (*new.weights, *new.momentum)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        problem: _Problem = ctx.problem
        sizes, keys, values, c, fast = _unpack(problem, ctx.saved_tensors)
        outer = _Outer(grads[: problem.depth], grads[problem.depth :])
        return None, *_backward(problem, sizes, keys, values, c, fast, outer)


def _unpack(problem: _Problem, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Coefficients, Fast]:
    sizes, keys, values = tensors[:3]
    first = 3 + len(_COEFFICIENTS)
    c = Coefficients(**dict(zip(_COEFFICIENTS, tensors[3:first], strict=True)))
    return sizes, keys, values, c, Fast(tensors[first : first + problem.depth], tensors[first + problem.depth :])


@dataclass(frozen=True)
class _Outer:
    """The outer loss's derivative in the new weights and the new momentum."""

    weights: Weights
    momentum: Weights


@dataclass
class _Sum:
    """One sum G of the inner step: its token weights c_t [N, C] (by the coefficient's name), and directions U_l."""

    name: str
    weights_NC: Tensor
    directions: list[Tensor]
    factors: list[Tensor] | None = None  # by level, [N] or []: what U_l is multiplied by
    asked: list[Tensor] | None = None  # U_l x_lt, [N, C, O]
    dots: list[Tensor] | None = None  # <d_lt, U_l x_lt>, [N, C]


def _backward(
    problem: _Problem, sizes: Tensor, keys: Tensor, values: Tensor, c: Coefficients, fast: Fast, outer: _Outer
) -> tuple[Tensor | None, ...]:
    """The gradients, in the order of the inputs."""
    trace = _Trace.of(fast.weights, keys, values, problem.form)
    sums, to_fast, to_factors = _through_optimizer(c, fast, outer)
    for part in sums:
        trace.ask(part)
    to_sizes = _through_sizes(problem, sizes, c, trace, sums)
    to_tokens: dict[str, Tensor] = {}
    for part in sums:
        gained = _total([f.unsqueeze(-1) * d for f, d in zip(part.factors or [], part.dots or [], strict=True)])
        to_tokens[part.name] = to_tokens[part.name] + gained if part.name in to_tokens else gained
    to_keys, to_values, to_weights = trace.through_gradients(sums)
    weights = [a + b.to(a.dtype) for a, b in zip(to_fast.weights, to_weights, strict=True)]
    by_name = to_tokens | to_factors
    return to_sizes, to_keys, to_values, *(by_name.get(name) for name in _COEFFICIENTS), *weights, *to_fast.momentum


def _through_optimizer(c: Coefficients, fast: Fast, outer: _Outer) -> tuple[list[_Sum], Fast, dict[str, Tensor]]:
    """S' = eta S - theta G, W' = keep W + S'; or W' = keep W + carry S - theta G_w; without S, W' = keep W - theta G.

    Returns:
        the sums with their directions (theta comes later), the derivatives in W and S, and in the factors [N].
    """
    weights_name = "surprise" if c.to_weights is None else "to_weights"
    momentum_name = weights_name if c.to_momentum is None else "to_momentum"
    factors = {} if c.keep is None else {"keep": _rows(fast.weights, outer.weights)}
    to_weights = tuple(_scale(u, c.keep) for u in outer.weights)
    if not fast.momentum:
        sums = [_Sum(weights_name, getattr(c, weights_name), list(outer.weights))]
        return sums, Fast(to_weights), factors
    directions = outer.momentum
    if c.carry is None:
        directions = tuple(u + v for u, v in zip(outer.momentum, outer.weights, strict=True))
    to_momentum = tuple(_scale(u, c.momentum_keep) for u in directions)
    if c.momentum_keep is not None:
        factors["momentum_keep"] = _rows(fast.momentum, directions)
    sums = [_Sum(momentum_name, getattr(c, momentum_name), list(directions))]
    if c.carry is not None:
        sums.append(_Sum(weights_name, getattr(c, weights_name), list(outer.weights)))
        to_momentum = tuple(s + _scale(u, c.carry) for s, u in zip(to_momentum, outer.weights, strict=True))
        factors["carry"] = _rows(fast.momentum, outer.weights)
    return sums, Fast(to_weights, to_momentum), factors


def _through_sizes(problem: _Problem, sizes: Tensor, c: Coefficients, trace: _Trace, sums: list[_Sum]) -> Tensor:
    """Theta and the limit f on the gradient's norm: U_l gets its factor -theta_l f. Returns the derivative in theta.

    The limit's own derivative is one more sum, of the gradient G that it is the norm of, in the direction of G.
    """
    levels, most = range(problem.depth), problem.rule.max_gradient_norm
    inner = [_total([(p.weights_NC * (p.dots or [])[i]).sum(dim=-1) for p in sums]) for i in levels]  # <G, U> [N]
    limited: Tensor | None = None
    if most is not None:
        gradients = trace.gradients(c.surprise)
        square = _rows(gradients, gradients)
        limited = (most / (square + NORM_EPS).sqrt()).clamp(max=1.0)
        to_limit = _total([-sizes[i] * inner[i] for i in levels])
        to_square = torch.where(limited < 1, -0.5 * to_limit * limited / (square + NORM_EPS), 0.0)
        own = _Sum("surprise", c.surprise, gradients, [2 * to_square] * problem.depth)
        trace.ask(own)
    for part in sums:
        part.factors = [-sizes[i] if limited is None else -sizes[i] * limited for i in levels]
        if limited is None:
            part.factors = [f.expand(part.weights_NC.shape[0]) for f in part.factors]
    if most is not None:
        sums.append(own)
    return torch.stack([-(inner[i] if limited is None else limited * inner[i]).sum() for i in levels])


@dataclass(frozen=True)
class _Trace:
    """The inner step's forward and backward pass, token by token, not weighted; in the dtype of the keys."""

    form: Form
    weights: Weights
    values: Tensor
    outputs: list[Tensor]
    inputs: list[Tensor]
    deltas: list[Tensor]
    before: list[Tensor]  # of each delta but the last: before it was multiplied by the activation's derivative

    @classmethod
    def of(cls, weights: Weights, keys: Tensor, values: Tensor, form: Form) -> _Trace:
        """Once more."""
        weights = tuple(w.to(keys.dtype) for w in weights)
        outputs, inputs = network.trace(weights, keys, form)
        deltas = [outputs[-1] - values]
        before: list[Tensor] = []
        for level in range(len(weights) - 1, 0, -1):
            before.insert(0, network.scaled(deltas[0] @ weights[level], form))
            deltas.insert(0, before[0] * network.activation_derivative(outputs[level - 1], form))
        return cls(form, weights, values, outputs, inputs, deltas, before)

    def gradients(self, token_weights_NC: Tensor) -> list[Tensor]:
        """sum_t c_t d_t x_t^T of every level, at least fp32."""
        weights = token_weights_NC.unsqueeze(-1).to(self.values.dtype)
        return [
            ((weights * d).mT @ x).to(token_weights_NC.dtype) for d, x in zip(self.deltas, self.inputs, strict=True)
        ]

    def ask(self, part: _Sum) -> None:
        """U_l x_l, and its product with d_l, of one sum."""
        part.directions = [u.to(self.values.dtype) for u in part.directions]
        part.asked = [x @ u.mT for x, u in zip(self.inputs, part.directions, strict=True)]
        dtype = part.weights_NC.dtype
        part.dots = [(d * y).sum(dim=-1, dtype=dtype) for d, y in zip(self.deltas, part.asked, strict=True)]

    def through_gradients(self, sums: list[_Sum]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The derivatives of P in keys, values and weights."""
        levels = range(len(self.weights))
        shares = [[self._share(part, level) for level in levels] for part in sums]
        to_deltas = [_total([s[i] * (p.asked or [])[i] for s, p in zip(shares, sums, strict=True)]) for i in levels]
        to_inputs = [
            _total([s[i] * (self.deltas[i] @ p.directions[i]) for s, p in zip(shares, sums, strict=True)])
            for i in levels
        ]
        to_weights = [torch.zeros_like(w) for w in self.weights]
        to_error, to_outputs = self._up(to_deltas, to_weights)
        return self._down(to_error, to_outputs, to_inputs, to_weights), -to_error, to_weights

    def _share(self, part: _Sum, level: int) -> Tensor:
        factor = (part.factors or [])[level]
        return (part.weights_NC * factor.unsqueeze(-1)).unsqueeze(-1).to(self.values.dtype)

    def _up(self, to_deltas: list[Tensor], to_weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Through the inner backward pass, against its direction: to the error, and to each z but the last."""
        to_delta, to_outputs = to_deltas[0], []
        for level, before in enumerate(self.before):
            z, weight = self.outputs[level], self.weights[level + 1]
            curved = to_delta * before * network.activation_curvature(z, self.form)
            to_outputs.append(curved)
            to_before = network.scaled(to_delta * network.activation_derivative(z, self.form), self.form)
            to_weights[level + 1] += self.deltas[level + 1].mT @ to_before
            to_delta = to_deltas[level + 1] + to_before @ weight.mT
        return to_delta, to_outputs

    def _down(
        self, to_output: Tensor, to_outputs: list[Tensor], to_inputs: list[Tensor], to_weights: list[Tensor]
    ) -> Tensor:
        """Through the inner forward pass: to the keys, and to the weights."""
        for level in range(len(self.weights) - 1, -1, -1):
            to_weights[level] += to_output.mT @ self.inputs[level]
            to_input = to_inputs[level] + to_output @ self.weights[level]
            if level > 0:
                slope = network.activation_derivative(self.outputs[level - 1], self.form)
                to_output = network.scaled(to_input, self.form) * slope + to_outputs[level - 1]
        return to_input


def _scale(x_NOI: Tensor, factor_N: Tensor | None) -> Tensor:
    return x_NOI if factor_N is None else x_NOI * factor_N.view(-1, 1, 1)


def _rows(left: Weights | list[Tensor], right: Weights | list[Tensor]) -> Tensor:
    """sum_l <left_l, right_l> of each row, [N]."""
    return _total([(a * b).sum(dim=(1, 2)) for a, b in zip(left, right, strict=True)])


def _total(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
