"""Where a module computes and in what precision, also where it has no parameters or its weights wait elsewhere."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


def device_of(*modules: nn.Module) -> torch.device:
    """The device of the first module that says one: by accelerate's hooks (offload, `device_map`), or by its tensors.

    A quantised layer may have buffers alone, or neither; then the next module is asked. `meta` where none says more.
    """
    for module in modules:
        for part in module.modules():
            chosen = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
            if chosen is not None:
                return torch.device(chosen)
        for tensor in chain(module.parameters(), module.buffers()):
            if tensor.device.type != "meta":
                return tensor.device
    return torch.device("meta")


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the module's floating-point weights; a quantised base keeps those of its norms and embeddings."""
    floating = (t.dtype for t in chain(module.parameters(), module.buffers()) if t.is_floating_point())
    return next(floating, torch.get_default_dtype())
