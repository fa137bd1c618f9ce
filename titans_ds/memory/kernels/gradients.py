"""The weighted gradients of chunks at the call's start, and back through them: PyTorch, or one Triton kernel each.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, O/I a matrix's output/input width,
L matrices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titans_ds.memory import network
from titans_ds.memory.kernels import launch, pair
from titans_ds.memory.network import Form

Tensors = dict[str, Tensor]
Sums = list[list[Tensor]]  # by matrix, G^w and, where it is another, G^m: [N, R, O, I]
_BY_CHUNK = {"keys": 1, "values": 1, "a": 2, "b": 2, "c": 1}  # the chunks' dimension


@dataclass(frozen=True)
class Problem:
    """What the gradients are of.

    Args:
        form: of f_W and its loss; its norm is among the tensors, as scale and bias.
        max_gradient_norm: see RuleConfig.
        depth: number of matrices.
        fused: one Triton kernel, for two matrices of a width that it can hold, without a norm.
        triton: there is Triton for what stands between products.
    """

    form: Form
    max_gradient_norm: float | None
    depth: int
    fused: bool
    triton: bool

    def pair(self, given: Tensors) -> bool:
        """Whether pair.py does it."""
        return self.triton and self.depth == 2 and self.max_gradient_norm is None and "scale" not in given


def chunk_gradients(given: Tensors, chunks: slice, problem: Problem) -> tuple[Sums, pair.Trace | None]:
    """Of some chunks.

    Args:
        given: keys, values [N, R, C, D], token weights a and, where G^m is another sum, b [L, N, R, C], c [N, R, C] of
            the gradient whose norm is limited, w0, w1, … in the dtype of the keys.
        chunks: which.
        problem: of what.

    Returns:
        the gradients, and what the backward need not compute again.
    """
    if problem.fused:
        return launch.span_forward(given, chunks, problem.form, problem.max_gradient_norm), None
    if problem.pair(given):
        return pair.forward(given, chunks, problem.form)
    return _chunk_gradients(_part(given, chunks), problem), None


def chunk_gradients_backward(
    given: Tensors, chunks: slice, problem: Problem, trace: pair.Trace | None, d_sums: Sums, found: Tensors
) -> None:
    """The derivative of `chunk_gradients` in what it was given.

    Args:
        given, chunks, problem, trace: as there.
        d_sums: in the sums; overwritten.
        found: where it goes: into these chunks of what is by chunk, on top of what is there (or not yet) elsewhere.
    """
    if problem.fused:
        launch.span_backward(given, chunks, problem.form, problem.max_gradient_norm, d_sums, found)
        return
    if trace is not None:
        pair.backward(given, chunks, problem.form, trace, d_sums, found)
        return
    leaves = {name: t.detach().requires_grad_() for name, t in _part(given, chunks).items()}
    with torch.enable_grad():
        sums = _chunk_gradients(leaves, problem)
    outputs, grads = ([t for level in levels for t in level] for levels in (sums, d_sums))
    derivatives = torch.autograd.grad(outputs, list(leaves.values()), grads, allow_unused=True)
    for name, d in zip(leaves, derivatives, strict=True):
        if name in _BY_CHUNK:
            place = _cut(found[name], name, chunks)
            place.zero_() if d is None else place.copy_(d)
        elif d is not None:
            launch.add(found, name, d)


def _part(given: Tensors, chunks: slice) -> Tensors:
    return {name: _cut(t, name, chunks) if name in _BY_CHUNK else t for name, t in given.items()}


def _cut(t: Tensor, name: str, chunks: slice) -> Tensor:
    return t.narrow(_BY_CHUNK[name], chunks.start, chunks.stop - chunks.start)


def _chunk_gradients(given: Tensors, problem: Problem) -> Sums:
    keys, values = given["keys"], given["values"]
    form = replace(problem.form, norm=(given["scale"], given["bias"])) if "scale" in given else problem.form
    weights = tuple(given[f"w{i}"] for i in range(problem.depth))
    terms = network.terms(weights, keys.flatten(1, 2), values.flatten(1, 2), form)
    inputs = [x.view(*keys.shape[:3], -1) for x in terms.inputs]
    deltas = [d.view(*keys.shape[:3], -1) for d in terms.deltas]
    sets = [given["a"]] + ([given["b"]] if "b" in given else [])
    if problem.max_gradient_norm is not None:
        limit = _limit(inputs, deltas, given["c"], problem.max_gradient_norm).unsqueeze(-1)
        sets = [token_weights * limit for token_weights in sets]
    return [
        [_weighted(delta, w[level]).mT @ x for w in sets]
        for level, (x, delta) in enumerate(zip(inputs, deltas, strict=True))
    ]


def _weighted(delta: Tensor, token_weights: Tensor) -> Tensor:
    return delta * token_weights.unsqueeze(-1).to(delta.dtype)


def _limit(inputs: list[Tensor], deltas: list[Tensor], c_NRC: Tensor, max_norm: float) -> Tensor:
    """What brings a chunk's gradient, over all matrices, down to max_norm; its norm is a sum over pairs of tokens."""
    square: Tensor | float = 0.0
    for x, d in zip(inputs, deltas, strict=True):
        square = square + (x @ x.mT).to(c_NRC.dtype) * (d @ d.mT)
    total = c_NRC.unsqueeze(-2) @ square @ c_NRC.unsqueeze(-1)
    total = total.view(c_NRC.shape[:2]).clamp(min=0)
    return (max_norm / (total + 1e-12).sqrt()).clamp(max=1.0)
