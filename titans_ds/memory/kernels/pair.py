"""The weighted gradients of chunks for two matrices of any width, and back: large products, and a Triton kernel between
two of them.

    z = k W_1^T    x = h act(z)    e = loss'(x W_2^T - v)    t = e W_2    u = t h act'(z)
    G_1 = sum_c a_c u_c k_c^T      G_2 = sum_c a_c e_c x_c^T      and the same with b, where G^m is another sum

The backward keeps z, e and t of a block of chunks. No residual norm, no limit on the gradient's norm.

Legend of shape suffixes: N batch x heads, R chunks of C tokens, D width of a head, H hidden width, X any width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from titans_ds.memory.kernels.launch import LOSSES, add
from titans_ds.memory.network import Form

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Trace:
    """Of a block: z and t [N, R C, H], e [N, R C, D]."""

    z: Tensor
    e: Tensor
    t: Tensor


class _Block:
    """Some chunks of a call: what their kernels are launched with."""

    def __init__(self, given: Tensors, chunks: slice, form: Form) -> None:
        self.chunks, self.form, self.separate = chunks, form, "b" in given
        self.keys, self.values = given["keys"][:, chunks], given["values"][:, chunks]
        self.num_rows, self.num_chunks, self.chunk, _ = self.keys.shape
        self.total = given["keys"].shape[1]
        self.w1, self.w2 = given["w0"], given["w1"]
        self.by_chunk = self.chunked(self.keys)  # a copy, unless there is but one row
        self.weights = [self.token_weights(given, level) for level in range(2)]

    def chunked(self, x: Tensor) -> Tensor:
        """[N, R, C, X] or [N, R C, X] -> [N R, C, X]."""
        return x.reshape(self.num_rows * self.num_chunks, self.chunk, -1)

    def rows(self, x: Tensor) -> Tensor:
        """[N R, C, X] -> [N, R C, X]."""
        return x.view(self.num_rows, self.num_chunks * self.chunk, -1)

    def token_weights(self, given: Tensors, level: int) -> list[Tensor]:
        """a and b of a matrix from these chunks on, b any where it is not another."""
        return [given[n][level][:, self.chunks] for n in ("a", "b" if self.separate else "a")]

    def launch(self, kernel: Any, like: Tensor, *tensors: Tensor, **numbers: object) -> None:
        """A program for every row of `like` [N, R C, X]."""
        width = like.shape[-1]
        padded = 1 << (width - 1).bit_length()
        kernel[(like.shape[0] * like.shape[1],)](
            *tensors, **numbers, R=self.num_chunks, TOTAL=self.total, C=self.chunk, X=width, XB=padded,
            num_warps=max(1, min(8, padded // 256)),
        )  # fmt: skip

    @property
    def activation(self) -> dict[str, object]:
        """Of f_W."""
        return {"scale": self.form.hidden_scale, "SILU": self.form.activation == "silu"}

    @property
    def loss(self) -> dict[str, object]:
        """Of the write."""
        return {"huber_delta": self.form.huber_delta, "LOSS": LOSSES[self.form.loss]}

    def hidden(self, z: Tensor) -> Tensor:
        """x."""
        from titans_ds.memory.kernels import pair_kernels

        x = torch.empty_like(z)
        self.launch(pair_kernels.hidden, z, z, x, **self.activation)
        return x

    def weighted_errors(self, y: Tensor) -> list[Tensor]:
        """a e (and b e); y is overwritten by e."""
        from titans_ds.memory.kernels import pair_kernels

        found = [torch.empty_like(y) for _ in range(1 + self.separate)]
        tensors = (y, self.values, *self.weights[1], y, found[0], found[-1])
        self.launch(pair_kernels.errors, y, *tensors, SEPARATE=self.separate, **self.loss)
        return found

    def weighted_slopes(self, t: Tensor, z: Tensor) -> list[Tensor]:
        """a u (and b u)."""
        from titans_ds.memory.kernels import pair_kernels

        found = [torch.empty_like(t) for _ in range(1 + self.separate)]
        tensors = (t, z, *self.weights[0], found[0], found[-1])
        self.launch(pair_kernels.through, t, *tensors, SEPARATE=self.separate, **self.activation)
        return found


def forward(given: Tensors, chunks: slice, form: Form) -> tuple[list[list[Tensor]], Trace]:
    """What `gradients.chunk_gradients` returns, by matrix."""
    block = _Block(given, chunks, form)
    z = block.keys.flatten(1, 2) @ block.w1.mT
    x = block.hidden(z)
    e = x @ block.w2.mT
    errors = block.weighted_errors(e)
    t = e @ block.w2
    first = [block.chunked(au).mT @ block.by_chunk for au in block.weighted_slopes(t, z)]
    second = [block.chunked(ae).mT @ block.chunked(x) for ae in errors]
    shape = (block.num_rows, block.num_chunks)
    return [[torch.unflatten(g, 0, shape) for g in sums] for sums in (first, second)], Trace(z, e, t)


def backward(
    given: Tensors, chunks: slice, form: Form, trace: Trace, d_sums: list[list[Tensor]], found: Tensors
) -> None:
    """What `gradients.chunk_gradients_backward` does."""
    block = _Block(given, chunks, form)
    d_first, d_second = ([d.flatten(0, 1) for d in sums] for sums in d_sums)
    d_keys = _sum(block.weighted_slopes(trace.t, trace.z), d_first, block)
    d_t, d_z = _through_backward(block, trace, d_first, found)
    x = block.hidden(trace.z)
    d_e = torch.baddbmm(_errors_backward(block, trace, x, d_second, found), d_t, block.w2.mT)
    d_x = _sum(_weighted_again(block, trace.e), d_second, block)
    d_w2 = trace.e.mT @ d_t
    _values_backward(block, trace, d_e, found)
    if form.loss != "dot":
        d_w2 = torch.baddbmm(d_w2, d_e.mT, x)
        d_x = torch.baddbmm(d_x, d_e, block.w2)
    _hidden_backward(block, trace, d_x, d_z)
    add(found, "w0", d_z.mT @ block.keys.flatten(1, 2))
    add(found, "w1", d_w2)
    found["keys"][:, chunks] = torch.baddbmm(d_keys, d_z, block.w1).view(
        block.keys.shape
    )  # last: it may overwrite keys


def _sum(weighted: list[Tensor], d_sums: list[Tensor], block: _Block) -> Tensor:
    """From the weighted derivatives' side of the sums to the other: [N, R C, X]."""
    total = block.chunked(weighted[0]) @ d_sums[0]
    for w, d in zip(weighted[1:], d_sums[1:], strict=True):
        total = torch.baddbmm(total, block.chunked(w), d)
    return block.rows(total)


def _weighted_again(block: _Block, e: Tensor) -> list[Tensor]:
    weights = block.weights[1][: 1 + block.separate]
    shape = (*e.shape[:2], 1)
    return [torch.mul(e, w.reshape(shape), out=torch.empty_like(e)) for w in weights]


def _through_backward(block: _Block, trace: Trace, d_sums: list[Tensor], found: Tensors) -> tuple[Tensor, Tensor]:
    from titans_ds.memory.kernels import pair_kernels

    along = [block.rows(block.by_chunk @ d.mT) for d in d_sums]
    d_t, d_z = torch.empty_like(trace.t), torch.empty_like(trace.z)
    tensors = (trace.t, trace.z, along[0], along[-1], *block.weights[0], d_t, d_z, *block.token_weights(found, 0))
    block.launch(pair_kernels.through_backward, trace.t, *tensors, SEPARATE=block.separate, **block.activation)
    return d_t, d_z


def _errors_backward(block: _Block, trace: Trace, x: Tensor, d_sums: list[Tensor], found: Tensors) -> Tensor:
    from titans_ds.memory.kernels import pair_kernels

    along, d_e = [block.rows(block.chunked(x) @ d.mT) for d in d_sums], torch.empty_like(trace.e)
    tensors = (trace.e, along[0], along[-1], *block.weights[1], d_e, *block.token_weights(found, 1))
    block.launch(pair_kernels.errors_backward, d_e, *tensors, SEPARATE=block.separate)
    return d_e


def _values_backward(block: _Block, trace: Trace, d_e: Tensor, found: Tensors) -> None:
    from titans_ds.memory.kernels import pair_kernels

    tensors = (trace.e, d_e, found["values"][:, block.chunks])
    block.launch(pair_kernels.values_backward, d_e, *tensors, **block.loss)


def _hidden_backward(block: _Block, trace: Trace, d_x: Tensor, d_z: Tensor) -> None:
    from titans_ds.memory.kernels import pair_kernels

    block.launch(pair_kernels.hidden_backward, d_z, trace.z, d_x, d_z, **block.activation)
