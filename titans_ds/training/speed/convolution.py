"""DeltaNet's short convolution by flash-linear-attention's kernel, in place of PyTorch's depthwise one.

transformers takes a fused convolution from the package causal-conv1d alone; without it, a convolution, a cut and an
activation over the longest tensor of the layer, which cost several times the bytes that have to move.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "causal_conv1d_fn"


def fuse_convolutions(base: nn.Module) -> int:
    """Exchange the convolution of a model's DeltaNet layers, on a GPU; returns of how many kinds of layers.

    It is exchanged in transformers' module of that kind, so for all models of it in this process. Nothing happens where
    flash-linear-attention is missing, or causal-conv1d is there.
    """
    if not _available():
        return 0
    homes = {type(m).__module__ for m in base.modules() if hasattr(m, "conv1d")}
    found = [sys.modules[home] for home in homes if hasattr(sys.modules[home], _NAME)]
    for home in found:
        setattr(home, _NAME, fused(getattr(home, _NAME)))
    return len(found)


def _available() -> bool:
    """Whether there is a kernel to take, and none in its place already."""
    if not torch.cuda.is_available() or importlib.util.find_spec("causal_conv1d") is not None:
        return False
    try:
        importlib.import_module("fla.modules.causal_conv1d")
    except Exception:  # a broken one counts as missing, as it does in transformers
        return False
    return True


def fused(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The convolution x [B, D, T], weight [D, W] (, bias [D]) -> [B, D, T] and activation; plain where x is not on a
    GPU. What is fused already stays."""
    if hasattr(plain, "titans_plain"):
        return plain

    # Here, since it imports torch._dynamo, which takes a second.
    uncompiled = torch.compiler.disable(_convolve)  # type: ignore[no-untyped-call]

    @functools.wraps(plain)
    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: Any = None, **more: Any) -> Any:
        if not x.is_cuda or activation not in (None, "silu", "swish") or _packed(more):
            return plain(x, weight, bias, activation, **more)
        return uncompiled(x.transpose(1, 2).contiguous(), weight, bias, activation).transpose(1, 2)

    convolve.titans_plain = plain  # type: ignore[attr-defined]
    return convolve


def _packed(more: dict[str, Any]) -> bool:
    return any(more.get(name) is not None for name in ("seq_idx", "cu_seqlens", "cu_seq_lens_q"))


def _convolve(x_BTD: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    from fla.modules.causal_conv1d import causal_conv1d

    y: Tensor = causal_conv1d(x_BTD, weight.to(x_BTD.dtype), bias, activation=activation)[0]
    return y
