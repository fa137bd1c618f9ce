"""Launching the Triton kernels: their compile-time arguments, and their tensors in order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from titans_ds.memory.network import Form

# Warps of a program, forward and backward, by the width that it is made for: chosen by spills, see docs/kernels.md.
WARPS = {64: (8, 4), 128: (8, 8)}
SPAN_WARPS = {64: (4, 4), 128: (8, 8)}
_LOSSES = {"l2": 0, "dot": 1, "huber": 2}
_ORDER = ("keys", "values", "surprise", "to_weights", "to_momentum")


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
        "CB": _padded(chunk),
        "DB": _padded(dim),
        "HB": _padded(hidden),
        "SILU": form.activation == "silu",
        "LOSS": _LOSSES[form.loss],
        "SEPARATE": separate,
        "LIMIT": limited,
        "PRECISION": "tf32" if keys_NRCD.dtype != torch.float32 else "ieee",
        "num_warps": warps[64 if max(dim, hidden) <= 64 else 128][backward],
        "num_stages": 1,
    }


def numbers(form: Form, max_gradient_norm: float | None) -> tuple[float, float, float]:
    """The scalars: norm limit, where huber turns, factor of the hidden layer."""
    return max_gradient_norm or 0.0, form.huber_delta, form.hidden_scale


def _padded(size: int) -> int:
    """The next power of two that a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length())


def span_forward(given: dict[str, Tensor], form: Form, max_gradient_norm: float | None) -> list[list[Tensor]]:
    """What `gradients.chunk_gradients` returns."""
    from titans_ds.memory.kernels.span_kernels import span_forward

    tensors, separate = _span_tensors(given), "to_momentum" in given
    keys, hidden = tensors[0], given["w0"].shape[1]
    num_rows, num_chunks, _, dim = keys.shape
    sums = [
        [keys.new_empty(num_rows, num_chunks, *shape) for _ in range(1 + separate)]
        for shape in ((hidden, dim), (dim, hidden))
    ]
    span_forward[(num_rows * num_chunks,)](
        *tensors, sums[0][0], sums[1][0], sums[0][-1], sums[1][-1], num_chunks, *numbers(form, max_gradient_norm),
        **options(keys, hidden, form, max_gradient_norm is not None, separate, SPAN_WARPS, False),
    )  # fmt: skip
    return sums


def span_backward(
    given: dict[str, Tensor], form: Form, max_gradient_norm: float | None, d_sums: list[list[Tensor]]
) -> dict[str, Tensor]:
    """What `gradients.chunk_gradients_backward` returns; d_sums are overwritten."""
    from titans_ds.memory.kernels.span_kernels import span_backward

    tensors, separate = _span_tensors(given), "to_momentum" in given
    keys, hidden = tensors[0], given["w0"].shape[1]
    num_rows, num_chunks = keys.shape[:2]
    d_sums = [[d.contiguous() for d in level] for level in d_sums]
    found = [torch.zeros_like(t) for t in tensors[:5]]
    span_backward[(num_rows * num_chunks,)](
        *tensors, d_sums[0][0], d_sums[1][0], d_sums[0][-1], d_sums[1][-1], *found,
        num_chunks, *numbers(form, max_gradient_norm),
        **options(keys, hidden, form, max_gradient_norm is not None, separate, SPAN_WARPS, True),
    )  # fmt: skip
    by_name = dict(zip(_ORDER, found, strict=True))
    # The kernel leaves each chunk's share there: added up like this, and not by atomics, every run is the same.
    by_name |= {f"w{i}": level[0].sum(dim=1, dtype=given[f"w{i}"].dtype) for i, level in enumerate(d_sums)}
    if "to_weights" not in given:
        by_name["surprise"] = by_name["surprise"] + by_name["to_weights"]
    return {name: d for name, d in by_name.items() if name in given}


def _span_tensors(given: dict[str, Tensor]) -> list[Tensor]:
    """Keys, values, the three token weights (the surprise where there is no other), W_1 and W_2 in the keys' dtype."""
    tensors = [given.get(name, given["surprise"]).contiguous() for name in _ORDER]
    return [*tensors, *(given[name].to(given["keys"].dtype).contiguous() for name in ("w0", "w1"))]
