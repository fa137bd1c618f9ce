"""torch.compile for the parts of a base model: fewer, larger kernels where PyTorch's own are many and small.

The norms and the MLP of every layer (`mlp`; norms inside of its token mixer, too), or the whole token mixer as well
(`layers`), are compiled each by itself: what comes between them, a grafted memory above all, stays as it is. All layers
share one compiled program per kind. DeltaNet's short convolution is exchanged for a fused one (convolution.py) where
there is one.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from titans_ds.errors import ConfigError
from titans_ds.graft.families import find_mixers, layers_of
from titans_ds.training.speed.convolution import fuse_convolutions

_LOG = logging.getLogger(__name__)
Compile = Literal["none", "mlp", "layers"]
# Model types whose compiled parts were compared with eager ones; `auto` takes no others.
TRIED = frozenset({"qwen3_5_text", "qwen2", "qwen3", "llama", "gpt_neox"})


def compile_parts(base: nn.Module, what: Compile, shapes_vary: bool = False) -> int:
    """Compile the parts of a base model in place; call after grafting and LoRA. Returns how many.

    Args:
        base: the model.
        what: see above.
        shapes_vary: batches of any size and length, as in evaluation, from one program a part; `mlp` only. Training has
            few shapes, and a program for each.

    Raises:
        UnsupportedModelError: the model's type is not known; see find_mixers.
        ConfigError: ZeRO-3 has partitioned the model, whose gathering can't be compiled.
    """
    if what == "none":
        return 0
    if any(hasattr(p, "ds_id") for p in base.parameters()):
        raise ConfigError(
            "training.compile is on under ZeRO-3, which can't be compiled; set it to 'none', or use ZeRO-2"
        )
    mixers = {id(mixer.module) for mixer in find_mixers(base)}
    fuse_convolutions(base)
    parts = []
    for child in (m for layer in layers_of(base) for m in layer.children()):
        whole = what == "layers" or id(child) not in mixers
        parts += [child] if whole else [m for m in child.modules() if _is_norm(m)]
    for module in parts:
        cast(Any, module).forward = by_row(module.forward) if shapes_vary else torch.compile(module.forward)
    return len(parts)  # hooks stay outside


@functools.cache
def works(device: torch.device) -> bool:
    """Whether a small function can be compiled here: a C compiler and, on a GPU, Triton are there."""
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=True)(torch.ones(3, device=device))
    except Exception as error:  # of any compiler on the way
        _LOG.warning("torch.compile does not work here: %s", str(error).strip().partition("\n")[0])
        return False
    return True


def by_row(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A compiled function of vectors, x [..., H] and what else has its shape, which sees them as [1, N, H].

    Where autograd records, it is as it was.
    """
    compiled = torch.compile(forward, dynamic=True)

    @functools.wraps(forward)
    def call(x: Tensor, *more: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return forward(x, *more)
        y: Tensor = compiled(*map(_vectors, (x, *more)))
        return y.view(*x.shape[:-1], y.shape[-1])

    return call


def _vectors(x: Tensor) -> Tensor:
    """[..., H] as [1, N, H], and no view: a compiled function is one for every shape that its argument is a view of."""
    x = x.contiguous()
    width = x.shape[-1]
    shape = (1, x.numel() // width, width)
    return x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), shape, (x.numel(), width, 1))


def _is_norm(module: nn.Module) -> bool:
    """By the name of its class: every family has its own."""
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())
