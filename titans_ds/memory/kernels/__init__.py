"""Fast paths of the chunked memory, each the same function as the loop over chunks in titans_ds.memory.chunks.

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
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.errors import ConfigError
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.rule import Inner

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


@dataclass(frozen=True)
class Engine:
    """What does a call, other than the loop.

    Args:
        triton: some of it are Triton kernels.
        fused: all products of a chunk are in Triton kernels; never so without `triton`.
    """

    triton: bool
    fused: bool


def engine(fast: Fast, inner: Inner, keys_NRCD: Tensor) -> Engine | None:
    """What does this call; None is the loop.

    Raises:
        ConfigError: `triton` is chosen, and cannot do it.
    """
    name, span = chosen(), inner.rule.chunk_semantics == "span"
    if name == "loop" or inner.rule.chunk_semantics == "delta":
        return None
    two = len(fast.weights) == 2 and inner.form.norm is None
    one = len(fast.weights) == 1 and not span
    narrow = (two or one) and _narrow(fast, keys_NRCD)
    reason = None if _linear(inner) else "it does one step of sgd or momentum"
    reason = reason or (None if span else _unable(one, two, narrow, keys_NRCD, inner)) or _obstacle(keys_NRCD, span)
    if name == "triton" and reason is not None:
        raise ConfigError(f"TITANS_DS_KERNEL is 'triton', but {reason}. Set it to 'auto'")
    apart = keys_NRCD.dtype == torch.float32 or (_spills(fast) and (span or inner.rule.max_gradient_norm is None))
    fused = narrow and (one or name == "triton" or not apart)
    if reason is None and (name == "triton" or (name == "auto" and _agrees(keys_NRCD, fast, inner, fused))):
        return Engine(triton=True, fused=fused)
    if not span and not (two and (name == "torch" or keys_NRCD.shape[1] > 1)):
        return None
    return Engine(triton=False, fused=False) if _linear(inner) else None


def _agrees(keys_NRCD: Tensor, fast: Fast, inner: Inner, fused: bool) -> bool:
    from titans_ds.memory.kernels import self_check  # which imports what imports this package

    return self_check.passes(keys_NRCD, fast, inner, fused)


def _linear(inner: Inner) -> bool:
    """Whether a write is linear in the exact gradient at its chunk's start (or the call's)."""
    exact = inner.fan is None
    return exact and inner.derived and inner.inner_steps == 1 and inner.rule.optimizer in ("sgd", "momentum")


def _unable(one: bool, two: bool, narrow: bool, keys_NRCD: Tensor, inner: Inner) -> str | None:
    """Why no Triton kernels write `chunk`."""
    if not (one or two):
        return "it does one matrix, or two without residual_norm"
    if one and not narrow:
        return f"it does one matrix in heads of up to {MOST_WIDTH} and chunks of up to {MOST_CHUNK} tokens"
    if keys_NRCD.shape[2] > MOST_CHUNK and inner.rule.max_gradient_norm is not None:
        return f"it does max_gradient_norm in chunks of up to {MOST_CHUNK} tokens"
    return None


def _narrow(fast: Fast, keys_NRCD: Tensor) -> bool:
    """Whether a program can hold a chunk and its weights."""
    width = max(keys_NRCD.shape[3], fast.weights[0].shape[1])
    return width <= MOST_WIDTH and keys_NRCD.shape[2] <= MOST_CHUNK


def _spills(fast: Fast) -> bool:
    """Whether a backward keeps more than the registers hold: half a minute to compile, and slower than products."""
    return max(fast.weights[0].shape[1:]) > MOST_WIDTH // 2


def _obstacle(keys_NRCD: Tensor, span: bool) -> str | None:
    """Why Triton cannot do it here, or is not worth it."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if keys_NRCD.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it does bf16, fp16 and fp32, not {keys_NRCD.dtype}"
    if not keys_NRCD.is_cuda and (chosen() == "auto" or os.environ.get("TRITON_INTERPRET") != "1"):
        return f"the tensors are on {keys_NRCD.device.type}, not on a GPU"
    if chosen() == "auto" and (keys_NRCD.shape[1] == 1 or (keys_NRCD.dtype == torch.float32 and not span)):
        return "one chunk, or fp32, is faster in PyTorch"
    return None
