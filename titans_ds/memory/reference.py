"""The executable specification of the paper's rule, through torch autograd, one sample and one step at a time.

Slow and plain on purpose: no batching, no padding, no closed form. Works in fp64. The tests compare the rest to it.
`reference_rule.py` does the same for everything else that a memory can be set to.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from titans_ds.config import MemoryConfig


def network(weights: Sequence[Tensor], x_TD: Tensor, config: MemoryConfig) -> Tensor:
    """f_W(x) for one sample: weights [O, I], x [T, D]."""
    for level, weight in enumerate(weights):
        x_TD = x_TD @ weight.T
        if level < len(weights) - 1 and config.activation == "silu":
            x_TD = F.silu(x_TD)
    return x_TD


def write_loss(weights: Sequence[Tensor], keys_TD: Tensor, values_TD: Tensor, config: MemoryConfig) -> Tensor:
    """mean_t |f_W(k_t) - v_t|^2 / 2 of one sample, a scalar; of the mean pair where config.write is `pooled`."""
    if config.write == "pooled":
        keys_TD, values_TD = keys_TD.mean(dim=0, keepdim=True), values_TD.mean(dim=0, keepdim=True)
    return 0.5 * (network(weights, keys_TD, config) - values_TD).square().sum(dim=-1).mean()


def write(
    weights: Sequence[Tensor],
    keys_TD: Tensor,
    values_TD: Tensor,
    config: MemoryConfig,
    step_sizes: Sequence[Tensor | float],
    create_graph: bool = False,
) -> list[Tensor]:
    """config.inner_steps gradient steps on one sample's weights; differentiable once more with create_graph."""
    current = list(weights)
    if len(keys_TD) == 0:
        return current
    for _ in range(config.inner_steps):
        leaves = [w if w.requires_grad else w.detach().requires_grad_() for w in current]
        loss = write_loss(leaves, keys_TD, values_TD, config)
        gradients = torch.autograd.grad(loss, leaves, create_graph=create_graph)
        current = [w - theta * g for w, theta, g in zip(leaves, step_sizes, gradients, strict=True)]
    return current


def pairs(
    hidden_TH: Tensor, previous_H: Tensor | None, key_weight: Tensor, value_weight: Tensor, config: MemoryConfig
) -> tuple[Tensor, Tensor]:
    """Keys and values of one sample's real tokens; under token shift the key comes from the token before."""
    sources = hidden_TH
    if config.token_shift:
        if previous_H is None:
            sources, hidden_TH = hidden_TH[:-1], hidden_TH[1:]
        else:
            sources = torch.cat([previous_H.unsqueeze(0), hidden_TH[:-1]])
    return sources @ key_weight.T, hidden_TH @ value_weight.T
