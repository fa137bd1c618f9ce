"""torch.compile for the parts of a base model: fewer, larger kernels where PyTorch's own are many and small.

The norms and the MLP of every layer (`mlp`), or also its token mixer (`layers`), are compiled each by itself: what
comes between them, a grafted memory above all, stays as it is. All layers share one compiled program per kind.
DeltaNet's short convolution is exchanged for a fused one (convolution.py) where there is one.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import nn

from titans_ds.errors import ConfigError
from titans_ds.graft.families import find_mixers, layers_of
from titans_ds.training.convolution import fuse_convolutions

Compile = Literal["none", "mlp", "layers"]


def compile_parts(base: nn.Module, what: Compile) -> int:
    """Compile the parts of a base model in place; call after grafting and LoRA. Returns how many.

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
    fuse_convolutions(base)
    mixers = {id(mixer.module) for mixer in find_mixers(base)}
    parts = [m for layer in layers_of(base) for m in layer.children() if what == "layers" or id(m) not in mixers]
    for module in parts:
        cast(Any, module).forward = torch.compile(module.forward)  # hooks stay outside
    return len(parts)
