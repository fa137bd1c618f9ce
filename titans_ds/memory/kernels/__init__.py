"""Fast paths of the chunked memory, each the same function as the loop over chunks in titans_ds.memory.chunks.

The environment variable TITANS_DS_KERNEL, or `choice`, says which one runs:

- `auto`: the fastest one that supports the rule and the device;
- `loop`: chunk after chunk in PyTorch, the specification;
- `torch`: batched products in PyTorch where the rule allows it, no Triton;
- `triton`: Triton, and an error where it does not support the rule or the device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from titans_ds.errors import ConfigError
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.rule import Inner

CHOICES = ("auto", "loop", "torch", "triton")
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


def spans(fast: Fast, inner: Inner) -> bool:
    """Whether `kernels.span` does this call: `span` with a rule that is linear in the gradients."""
    rule = inner.rule
    linear = rule.optimizer in ("sgd", "momentum") and inner.inner_steps == 1 and fast.steps is None
    return linear and rule.chunk_semantics == "span" and chosen() != "loop"
