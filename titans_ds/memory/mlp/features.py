"""From projections to keys, values and queries: short causal convolution, activation, L2 norm.

Legend of shape suffixes: B batch, T tokens, D memory dim, K convolution kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titans_ds.memory.mlp.config import FeatureConfig
from titans_ds.memory.mlp.kernels import chosen
from titans_ds.memory.positions import Positions, take
from titans_ds.memory.projection import unit_rows

_EPS = 1e-24  # beside the sum of squares


class Convolution(nn.Module):
    """Depthwise causal convolution over the tokens written: y_t = sum_i weight_i x_(t - i). Starts as the identity.

    Args:
        dim: number of channels D.
        kernel: K, tokens that it sees.
    """

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        weight = torch.zeros(kernel, dim)
        weight[0] = 1.0
        self.weight = nn.Parameter(weight)  # [K, D], by distance

    def forward(self, x_BTD: Tensor, tail_BKD: Tensor, positions: Positions) -> Tensor:
        """Each token with the K - 1 tokens written before it.

        Args:
            x_BTD: what to convolve.
            tail_BKD: the K - 1 tokens written before this call, zeros where there are none.
            positions: which tokens are written; one that is not still sees those before it.
        """
        reach, weight = tail_BKD.shape[1], self.weight.to(x_BTD.dtype)
        extended = torch.cat([tail_BKD, positions.compact(x_BTD)], dim=1)
        y_BTD = x_BTD * weight[0]
        for distance in range(1, reach + 1):
            y_BTD = y_BTD + weight[distance] * _earlier(extended, reach - distance, positions)
        return y_BTD


def _earlier(extended: Tensor, offset: int, positions: Positions) -> Tensor:
    if positions.all_written:
        return extended[:, offset : offset + positions.num_tokens]
    return take(extended, positions.before_BT + offset)


def next_tail(tail_BKH: Tensor, hidden_BTH: Tensor, positions: Positions) -> Tensor:
    """The last K tokens written up to the end of this call, [B, K, H], in the dtype of the tail."""
    extended = torch.cat([tail_BKH, positions.compact(hidden_BTH).to(tail_BKH.dtype)], dim=1)
    ends = positions.count_B.unsqueeze(1) + torch.arange(tail_BKH.shape[1], device=tail_BKH.device)
    return take(extended, ends)


def by_head(x_BTD: Tensor, heads: int, config: FeatureConfig, norm: bool) -> Tensor:
    """What a projection becomes: activation and, for keys and queries (`norm`), L2 norm: [B, T, heads, d]."""
    x_BTD = activate(x_BTD, config)
    x_BTD = normalize(x_BTD, heads, config) if norm else x_BTD
    return torch.unflatten(x_BTD, -1, (heads, -1))


def activate(x: Tensor, config: FeatureConfig) -> Tensor:
    """The activation of keys, values and queries."""
    return F.silu(x) if config.activation == "silu" else x


def normalize(x_BTD: Tensor, heads: int, config: FeatureConfig) -> Tensor:
    """The L2 norm of keys and queries, head by head."""
    if not config.normalize_keys:
        return x_BTD
    plain = chosen() in ("loop", "torch")  # no Triton
    return unit_rows(torch.unflatten(x_BTD, -1, (heads, -1)), _EPS, False if plain else None).flatten(-2)
