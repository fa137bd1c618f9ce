"""What a memory starts from: W_0, step sizes, the factor on hidden layers."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from titans_ds.config import MemoryConfig

# E[silu(z)^2] and E[z^2] of a standard normal z
_SECOND_MOMENTS = {"silu": 0.355753, "linear": 1.0}


def initial_weights(config: MemoryConfig, seed: int) -> list[Tensor]:
    """W_0 of every matrix, fp32 [O, I] ([heads, O, I] with several heads), drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    heads = () if config.heads == 1 else (config.heads,)
    weights = []
    for level, (fan_in, fan_out) in enumerate(itertools.pairwise(config.widths)):
        normal = torch.randn(*heads, fan_out, fan_in, generator=generator)
        if config.initial_stds is None:
            weights.append(normal * config.initial_scale / math.sqrt(fan_in))
        else:
            weights.append(normal * config.initial_stds[level])
    return weights


def log_step_sizes(config: MemoryConfig) -> Tensor:
    """log theta of every matrix, [depth]."""
    return torch.tensor([math.log(theta) for theta in config.step_sizes])


def hidden_scale(config: MemoryConfig) -> float:
    """The factor on hidden layers; `unit`: 1 / sqrt(hidden width E[act(z)^2])."""
    if config.hidden_scale == "unit":
        return 1.0 / math.sqrt(config.widths[1] * _SECOND_MOMENTS[config.activation])
    return float(config.hidden_scale)
