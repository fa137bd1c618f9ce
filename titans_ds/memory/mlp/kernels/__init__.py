"""Fast paths of the chunked memory, each the same function as the loop over chunks in titans_ds.memory.mlp.chunks.

The environment variable TITANS_DS_KERNEL, or `choice`, says which one runs:

- `auto`: Triton on CUDA where it supports the rule, and its self-check agrees with PyTorch; else as `torch`;
- `loop`: chunk after chunk in PyTorch, the specification;
- `torch`: batched products and short loops in PyTorch where the rule allows it, no Triton;
- `triton`: Triton, and an error where it does not support the rule or the device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from titans_ds.errors import ConfigError
from titans_ds.memory.mlp.optimizers import Fast
from titans_ds.memory.mlp.rule import Inner

CHOICES = ("auto", "loop", "torch", "triton")
MOST_WIDTH = 128  # of a head and its hidden layer: two matrices and their derivatives stay on the chip
MOST_CHUNK = 128
_override: list[str] = []


def chosen() -> str:
    """The kernel asked for.

    Raises:
        ConfigError: TITANS_DS_KERNEL is none of the four.
    """
    name = _override[-1] if _override else os.environ.get("TITANS_DS_KERNEL", "auto")
    if name not in CHOICES:
        raise ConfigError(f"TITANS_DS_KERNEL is {name!r}; expected one of {', '.join(CHOICES)}")
    return name


@contextlib.contextmanager
def choice(name: str) -> Iterator[None]:
    """Use this kernel inside the context, whatever the environment says."""
    _override.append(name)
    try:
        yield
    finally:
        _override.pop()


def backend(fast: Fast, inner: Inner, keys_NRCD: Tensor) -> Literal["triton", "torch", "loop"]:
    """What does this call.

    Raises:
        ConfigError: `triton` is chosen, and cannot do it.
    """
    name = chosen()
    if name == "loop":
        return "loop"
    two = len(fast.weights) == 2 and inner.form.norm is None
    reason = None if _linear(inner) else "it does one step of sgd or momentum"
    reason = reason or _unable(fast, inner, keys_NRCD) or _obstacle(keys_NRCD)
    if name == "triton":
        if reason is not None:
            raise ConfigError(f"TITANS_DS_KERNEL is 'triton', but {reason}. Set it to 'auto'")
        return "triton"
    # A backward of two matrices that keeps more than the registers hold takes half a minute to compile, and is slower
    # than PyTorch's products.
    spills = two and max(fast.weights[0].shape[1:]) > MOST_WIDTH // 2 and inner.rule.max_gradient_norm is None
    if name == "auto" and reason is None and not spills and _agrees(keys_NRCD, fast, inner):
        return "triton"
    # A single chunk is as fast in the loop, and one matrix has no other path than Triton's.
    batched = two and _linear(inner) and (name == "torch" or keys_NRCD.shape[1] > 1)
    return "torch" if batched else "loop"


def _agrees(keys_NRCD: Tensor, fast: Fast, inner: Inner) -> bool:
    from titans_ds.memory.mlp.kernels import self_check  # which imports what imports this package

    return self_check.passes(keys_NRCD, fast, inner)


def _linear(inner: Inner) -> bool:
    """Whether a write is linear in the exact gradient at its chunk's start."""
    exact = inner.fan is None
    return exact and inner.derived and inner.inner_steps == 1 and inner.rule.optimizer in ("sgd", "momentum")


def _unable(fast: Fast, inner: Inner, keys_NRCD: Tensor) -> str | None:
    """Why no Triton kernel does this write: its program holds a chunk and the weights on the chip."""
    if len(fast.weights) > 2 or (len(fast.weights) == 2 and inner.form.norm is not None):
        return "it does one matrix, or two without residual_norm"
    width = max(keys_NRCD.shape[3], fast.weights[0].shape[1])
    if width > MOST_WIDTH or keys_NRCD.shape[2] > MOST_CHUNK:
        return f"it does heads of a width of up to {MOST_WIDTH} and chunks of up to {MOST_CHUNK} tokens"
    return None


def _obstacle(keys_NRCD: Tensor) -> str | None:
    """Why Triton cannot do it here, or is not worth it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if keys_NRCD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does bf16, fp16 and fp32, not {keys_NRCD.dtype}"
    if not keys_NRCD.is_cuda and (chosen() == "auto" or os.environ.get("TRITON_INTERPRET") != "1"):
        return f"the tensors are on {keys_NRCD.device.type}, not on a GPU"
    if chosen() == "auto" and (keys_NRCD.shape[1] == 1 or keys_NRCD.dtype == torch.float32):
        return "one chunk, or fp32, is faster in PyTorch"
    return None
