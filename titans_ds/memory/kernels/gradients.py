"""The weighted gradients of all chunks at the call's start, and back through them: PyTorch, or one Triton kernel each.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, O/I a matrix's output/input width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_ds.memory import network
from titans_ds.memory.kernels import launch
from titans_ds.memory.network import Form

Tensors = dict[str, Tensor]
Sums = list[list[Tensor]]  # by matrix, G^w and, where it is another, G^m: [N, R, O, I]


@dataclass(frozen=True)
class Problem:
    """What the gradients are of.

    Args:
        form: of f_W and its loss; its norm is among the tensors, as scale and bias.
        max_gradient_norm: see RuleConfig.
        depth: number of matrices.
        triton: one kernel, where it can.
    """

    form: Form
    max_gradient_norm: float | None
    depth: int
    triton: bool


def chunk_gradients(given: Tensors, problem: Problem) -> Sums:
    """From keys, values [N, R, C, D], token weights [N, R, C] (surprise, to_weights, to_momentum) and w0, w1, …"""
    if problem.triton:
        return launch.span_forward(given, problem.form, problem.max_gradient_norm)
    keys, values, surprise = given["keys"], given["values"], given["surprise"]
    form = replace(problem.form, norm=(given["scale"], given["bias"])) if "scale" in given else problem.form
    weights = tuple(given[f"w{i}"] for i in range(problem.depth))
    terms = network.terms(weights, keys.flatten(1, 2), values.flatten(1, 2), form)
    inputs = [x.view(*keys.shape[:3], -1) for x in terms.inputs]
    deltas = [d.view(*keys.shape[:3], -1) for d in terms.deltas]
    sets = [given.get("to_weights", surprise)] + ([given["to_momentum"]] if "to_momentum" in given else [])
    if problem.max_gradient_norm is not None:
        limit = _limit(inputs, deltas, surprise, problem.max_gradient_norm).unsqueeze(-1)
        sets = [token_weights * limit for token_weights in sets]
    return [[_weighted(delta, w).mT @ x for w in sets] for x, delta in zip(inputs, deltas, strict=True)]


def chunk_gradients_backward(given: Tensors, problem: Problem, d_sums: Sums) -> Tensors:
    """The derivative of `chunk_gradients` in what it was given, everything computed again."""
    if problem.triton:
        return launch.span_backward(given, problem.form, problem.max_gradient_norm, d_sums)
    leaves = {name: t.detach().requires_grad_() for name, t in given.items()}
    with torch.enable_grad():
        sums = chunk_gradients(leaves, problem)
    outputs, grads = ([t for level in levels for t in level] for levels in (sums, d_sums))
    found = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    return {n: torch.zeros_like(t) if d is None else d for (n, t), d in zip(leaves.items(), found, strict=True)}


def _weighted(delta: Tensor, token_weights: Tensor) -> Tensor:
    return delta * token_weights.unsqueeze(-1).to(delta.dtype)


def _limit(inputs: list[Tensor], deltas: list[Tensor], surprise_NRC: Tensor, max_norm: float) -> Tensor:
    """What brings a chunk's gradient, over all matrices, down to max_norm; its norm is a sum over pairs of tokens."""
    square: Tensor | float = 0.0
    for x, d in zip(inputs, deltas, strict=True):
        square = square + (x @ x.mT).to(surprise_NRC.dtype) * (d @ d.mT)
    total = surprise_NRC.unsqueeze(-2) @ square @ surprise_NRC.unsqueeze(-1)
    total = total.view(surprise_NRC.shape[:2]).clamp(min=0)
    return (max_norm / (total + 1e-12).sqrt()).clamp(max=1.0)
