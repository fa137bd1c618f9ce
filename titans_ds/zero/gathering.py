"""What ZeRO-3 gathers at once: whole frozen layers instead of every linear map by itself.

DeepSpeed hooks every module that holds parameters, and waits on the host before and after each; with a frozen base that
takes longer than the layers themselves. A module marked as a leaf is gathered whole when it is entered, by one hook.

Gathered ahead is what `stage3_prefetch_bucket_size` has room for: 5e7 parameters by default, of layers that have
several times as many (2.2e8 in a base of 9B). The rest would be waited for, so the bucket holds the largest leaf.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from titans_ds.memory import LayerMemory

_PREFETCH = 50_000_000  # DeepSpeed's own


def mark_whole(module: nn.Module) -> list[nn.Module]:
    """Mark the leaves, before deepspeed.initialize; returns them.

    A leaf is a layer of a model in which nothing is trained and no memory sits, or a part of one of the other layers.
    A memory is never inside: its writes call it from outside of its layer, too, where only its own hooks gather it.
    """
    from deepspeed.utils import set_z3_leaf_module

    leaves = list(_leaves(module))
    for leaf in leaves:
        set_z3_leaf_module(leaf, True)
    return leaves


def prefetch_whole(zero: dict[str, Any], leaves: list[nn.Module]) -> dict[str, Any]:
    """The section zero_optimization, with room for the largest leaf to be gathered ahead; a size in it is kept."""
    largest = max((sum(whole_numel(p) for p in leaf.parameters()) for leaf in leaves), default=0)
    return {"stage3_prefetch_bucket_size": max(largest, _PREFETCH)} | zero


def whole_numel(parameter: nn.Parameter) -> int:
    """Of the whole parameter, also of one that was partitioned when it was loaded, or packed two in a byte."""
    packed = getattr(parameter, "quant_state", None)
    return int(getattr(parameter, "ds_numel", parameter.numel()) if packed is None else packed.shape.numel())


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for layer in child:
                yield from [layer] if _plain(layer) else filter(_plain, layer.children())
        else:
            yield from _leaves(child)


def _plain(module: nn.Module) -> bool:
    """Several modules in one, nothing of which is trained, and no memory."""
    trained = any(p.requires_grad for p in module.parameters())
    inner = list(module.modules())
    return len(inner) > 1 and not trained and not any(isinstance(m, LayerMemory) for m in inner)
