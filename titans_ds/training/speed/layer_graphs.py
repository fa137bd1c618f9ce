"""Frozen layers of the base model as CUDA graphs (titans_ds.cuda_graphs.layers).

Between two memories a frozen base launches thousands of small kernels a step, each through Python and autograd. Where
a processor takes longer over that than a GPU over the kernels, the GPU waits. Layers that learn nothing and have no
memory are replayed instead.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from titans_ds.cuda_graphs.layers import LayerGraphs, MakeGraphed
from titans_ds.errors import ConfigError
from titans_ds.graft.call import KEYWORD
from titans_ds.graft.families import layers_of
from titans_ds.graft.injection import CHILD

_LOG = logging.getLogger(__name__)


def graph_layers(base: nn.Module, make: MakeGraphed | None = None) -> int:
    """Replay the frozen layers of a base model in training. Returns how many; call after grafting, LoRA, compilation.

    Args:
        base: the model.
        make: captures; PyTorch's where not given.

    Raises:
        UnsupportedModelError: the model's type is not known; see find_mixers.
        ConfigError: there is no GPU; or ZeRO-3 has partitioned the model, whose parameters have no place of their own.
    """
    if any(hasattr(p, "ds_id") for p in base.parameters()):
        raise ConfigError(
            "training.layer_graphs is on under ZeRO-3, which moves parameters at every pass; switch it off, or use "
            "ZeRO-2"
        )
    if make is None and not torch.cuda.is_available():
        raise ConfigError("training.layer_graphs is on, but there is no CUDA GPU here; switch it off")
    layers = [layer for layer in layers_of(base) if _is_frozen(layer)]
    if not layers:
        _LOG.warning("training.layer_graphs is on, but every layer learns something or has a memory: nothing to replay")
        return 0
    graphs = LayerGraphs(layers, make, frozenset({KEYWORD}))
    for index, layer in enumerate(layers):
        layer.forward = graphs.wrapped(index)
    return len(layers)


def _is_frozen(layer: nn.Module) -> bool:
    learns = any(p.requires_grad for p in layer.parameters())
    return not learns and not any(hasattr(m, CHILD) for m in layer.modules())
