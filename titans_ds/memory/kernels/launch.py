"""Launching the Triton kernels: their compile-time arguments, and their tensors in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_ds.memory.network import Form

# Warps of a program, forward and backward, by the width that it is made for: chosen by spills, see docs/kernels.md.
WARPS = {64: (8, 4), 128: (8, 8)}
SPAN_WARPS = {64: (4, 4), 128: (8, 8)}
LOSSES = {"l2": 0, "dot": 1, "huber": 2}


def options(
    keys_NRCD: Tensor,
    hidden: int,
    form: Form,
    limited: bool,
    separate: bool,
    warps: dict[int, tuple[int, int]],
    backward: bool,
) -> dict[str, Any]:
    """Sizes, and which rule."""
    chunk, dim = keys_NRCD.shape[2:]
    return {
        "C": chunk,
        "D": dim,
        "H": hidden,
        "CB": padded(chunk),
        "DB": padded(dim),
        "HB": padded(hidden),
        "SILU": form.activation == "silu",
        "LOSS": LOSSES[form.loss],
        "SEPARATE": separate,
        "LIMIT": limited,
        "PRECISION": "tf32" if keys_NRCD.dtype != torch.float32 else "ieee",
        "num_warps": warps[64 if max(dim, hidden) <= 64 else 128][backward],
        "num_stages": 1,
    }


def numbers(form: Form, max_gradient_norm: float | None) -> tuple[float, float, float]:
    """The scalars: norm limit, where huber turns, factor of the hidden layer."""
    return max_gradient_norm or 0.0, form.huber_delta, form.hidden_scale


def four(tensors: list[Tensor]) -> list[Tensor]:
    """The kernels' arguments for both matrices' W and S: without momentum the last two are never looked at."""
    return tensors if len(tensors) == 4 else [*tensors, *tensors]


def padded(size: int) -> int:
    """The next power of two that a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def span_forward(
    given: dict[str, Tensor], chunks: slice, form: Form, max_gradient_norm: float | None
) -> list[list[Tensor]]:
    """What `gradients.chunk_gradients` returns."""
    from titans_ds.memory.kernels.span_kernels import span_forward

    keys, hidden, separate = given["keys"], given["w0"].shape[1], "b" in given
    (num_rows, total, _, dim), num_chunks = keys.shape, chunks.stop - chunks.start
    sums = [
        [keys.new_empty(num_rows, num_chunks, *shape) for _ in range(1 + separate)]
        for shape in ((hidden, dim), (dim, hidden))
    ]
    span_forward[(num_rows * num_chunks,)](
        *_by_token(given, chunks), given["w0"], given["w1"], sums[0][0], sums[1][0], sums[0][-1], sums[1][-1],
        num_rows, num_chunks, total, *numbers(form, max_gradient_norm),
        **options(keys, hidden, form, max_gradient_norm is not None, separate, SPAN_WARPS, False),
    )  # fmt: skip
    return sums


def span_backward(
    given: dict[str, Tensor],
    chunks: slice,
    form: Form,
    max_gradient_norm: float | None,
    d_sums: list[list[Tensor]],
    found: dict[str, Tensor],
) -> None:
    """What `gradients.chunk_gradients_backward` does."""
    from titans_ds.memory.kernels.span_kernels import span_backward

    keys, hidden, separate = given["keys"], given["w0"].shape[1], "b" in given
    (num_rows, total), num_chunks = keys.shape[:2], chunks.stop - chunks.start
    span_backward[(num_rows * num_chunks,)](
        *_by_token(given, chunks), given["w0"], given["w1"],
        d_sums[0][0], d_sums[1][0], d_sums[0][-1], d_sums[1][-1], *_by_token(found, chunks),
        num_rows, num_chunks, total, *numbers(form, max_gradient_norm),
        **options(keys, hidden, form, max_gradient_norm is not None, separate, SPAN_WARPS, True),
    )  # fmt: skip
    # The kernel leaves each chunk's share there: added up like this, and not by atomics, every run is the same.
    for level, d in enumerate(d_sums):
        add(found, f"w{level}", d[0].sum(dim=1, dtype=torch.float32))


def add(found: dict[str, Tensor], name: str, derivative: Tensor) -> None:
    """On top of what is there; at least in fp32 where there is nothing yet."""
    if name in found:
        found[name] += derivative
    else:
        found[name] = derivative.to(torch.promote_types(derivative.dtype, torch.float32))


def _by_token(given: dict[str, Tensor], chunks: slice) -> list[Tensor]:
    """From the first of the chunks on: keys, values, c, a, b; any where there are none."""
    a = given["a"][:, :, chunks]
    c, b = given.get("c"), given.get("b")
    return [
        given["keys"][:, chunks],
        given["values"][:, chunks],
        a if c is None else c[:, chunks],
        a,
        a if b is None else b[:, :, chunks],
    ]


def read_forward(weights: list[Tensor], queries: Tensor, chunks: slice, form: Form, out: Tensor) -> None:
    """What `reads.read` does."""
    from titans_ds.memory.kernels.span_kernels import read_forward

    num_chunks = weights[0].shape[1]
    read_forward[(queries.shape[0] * num_chunks,)](
        queries[:, chunks], *weights, out[:, chunks], num_chunks, queries.shape[1], form.hidden_scale,
        **_read_options(queries, weights, form, False),
    )  # fmt: skip


def read_backward(
    weights: list[Tensor], queries: Tensor, chunks: slice, form: Form, d_out: Tensor, found: Tensor
) -> list[Tensor]:
    """What `reads.read_backward` does."""
    from titans_ds.memory.kernels.span_kernels import read_backward

    num_chunks, d_weights = weights[0].shape[1], [torch.empty_like(w) for w in weights]
    read_backward[(queries.shape[0] * num_chunks,)](
        queries[:, chunks], *weights, d_out[:, chunks], found[:, chunks], *d_weights,
        num_chunks, queries.shape[1], form.hidden_scale, **_read_options(queries, weights, form, True),
    )  # fmt: skip
    return d_weights


def _read_options(queries: Tensor, weights: list[Tensor], form: Form, backward: bool) -> dict[str, Any]:
    everything = options(queries, weights[0].shape[2], form, False, False, SPAN_WARPS, backward)
    return {name: value for name, value in everything.items() if name not in ("LOSS", "SEPARATE", "LIMIT")}
