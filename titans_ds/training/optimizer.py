"""AdamW over the right groups, with linear warm-up and cosine decay."""

from __future__ import annotations

import math

from torch import nn

from titans_ds.training.settings import OptimizerSettings
from titans_ds.zero.adamw import SkippableAdamW


def make_optimizer(module: nn.Module, settings: OptimizerSettings) -> SkippableAdamW:
    """AdamW over the trainable parameters; weight decay on matrices alone."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if is_matrix(p)], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if not is_matrix(p)], "weight_decay": 0.0},
    ]
    return SkippableAdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps)


def lr_at(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step `step` (from 0): linear warm-up to lr, then half a cosine down to lr * min_lr_ratio."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(total_steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether weight decay is for it: it has two dimensions or more."""
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # under ZeRO-3 the shape itself is [0]
