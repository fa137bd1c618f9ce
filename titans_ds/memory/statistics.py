"""What a write did, by sample: the inner loss before and after it, and how far it moved the fast weights."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_ds.memory import network
from titans_ds.memory.chunks import Work
from titans_ds.memory.gates import shares
from titans_ds.memory.network import Form, Weights
from titans_ds.memory.optimizers import Fast
from titans_ds.memory.state import LayerState


@torch.no_grad()
def write_stats(before: Fast, after: Fast, work: Work, form: Form, heads: int) -> LayerState:
    """inner_loss_before, inner_loss_after (means over the pairs written, sums over heads) and write_norm, each [B]."""
    keys, values = work.pairs.keys, work.pairs.values
    stored = keys.new_ones(keys.shape[:3], dtype=torch.bool) if work.active_NRC is None else work.active_NRC
    stored = stored if work.finished_NR is None else stored & work.finished_NR.unsqueeze(-1)
    shares_NS = shares(stored.flatten(1), torch.float32)
    keys, values = keys.flatten(1, 2), values.flatten(1, 2)

    def loss(weights: Weights) -> Tensor:
        return torch.unflatten(network.loss(weights, keys, values, shares_NS, form), 0, (-1, heads)).sum(dim=1)

    moved = [(a - b).flatten(1).square().sum(dim=1) for a, b in zip(after.weights, before.weights, strict=True)]
    square = torch.unflatten(torch.stack(moved).sum(dim=0), 0, (-1, heads)).sum(dim=1)
    return {
        "inner_loss_before": loss(before.weights),
        "inner_loss_after": loss(after.weights),
        "write_norm": square.sqrt(),
    }
