"""Reads of every chunk with its own weights, and back through them: PyTorch, or one Triton kernel each.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, O/I a matrix's output/input width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.memory.kernels import launch
from titans_ds.memory.kernels.gradients import Problem
from titans_ds.memory.network import Form


def read(weights: list[Tensor], queries: Tensor, chunks: slice, problem: Problem, out: Tensor) -> None:
    """The plain MLP of these chunks' queries.

    Args:
        weights: of each matrix, what these chunks read, [N, R, O, I].
        queries: of all chunks, [N, R, C, D].
        chunks: which.
        problem: f_W.
        out: where the reads of all chunks go, as the queries.
    """
    if problem.fused:
        launch.read_forward(weights, queries, chunks, problem.form, out)
        return
    x, _ = _trace(weights[:-1], queries[:, chunks], problem.form)
    out[:, chunks] = x[-1] @ weights[-1].mT


def read_backward(
    weights: list[Tensor], queries: Tensor, chunks: slice, problem: Problem, d_out: Tensor, found: Tensor
) -> list[Tensor]:
    """The derivative of `read`, hidden layers computed again.

    Args:
        weights, queries, chunks, problem: as there.
        d_out: in the reads of all chunks, [N, R, C, D].
        found: where that in the queries goes, for all chunks.

    Returns:
        in the weights, [N, R, O, I].
    """
    if problem.fused:
        return launch.read_backward(weights, queries, chunks, problem.form, d_out, found)
    inputs, outputs = _trace(weights[:-1], queries[:, chunks], problem.form)
    d_x = d_out[:, chunks]
    d_weights: list[Tensor] = []
    for level in reversed(range(len(weights))):
        d_weights.insert(0, d_x.mT @ inputs.pop())
        d_x = d_x @ weights[level]
        if level > 0:
            d_x = _activate_backward(d_x, outputs.pop(), problem.form)
    found[:, chunks] = d_x
    return d_weights


def _trace(weights: list[Tensor], x: Tensor, form: Form) -> tuple[list[Tensor], list[Tensor]]:
    """Every matrix's input, one more than there are matrices, and every output before the activation."""
    inputs, outputs = [x], []
    for w in weights:
        outputs.append(inputs[-1] @ w.mT)
        x = F.silu(outputs[-1]) if form.activation == "silu" else outputs[-1]
        inputs.append(x if form.hidden_scale == 1.0 else x * form.hidden_scale)
    return inputs, outputs


def _activate_backward(d_x: Tensor, z: Tensor, form: Form) -> Tensor:
    d_x = d_x if form.hidden_scale == 1.0 else d_x * form.hidden_scale
    return torch.ops.aten.silu_backward(d_x, z) if form.activation == "silu" else d_x  # type: ignore[no-any-return]
