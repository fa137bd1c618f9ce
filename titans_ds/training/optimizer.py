"""AdamW with linear warm-up and cosine decay, and a step that ranks can agree to skip."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titans_ds.training.settings import OptimizerSettings


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose step does nothing while `skip` is set.

    DeepSpeed's engines call the step in the middle of their own; skipping here lets them clear their buffers as usual,
    at every ZeRO stage, while parameters and moments stay as they were.
    """

    skip: bool = False
    applied: bool = False
    agree: Callable[[Tensor], Tensor] = staticmethod(lambda flag: flag)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; none where `skip` is set, or where any rank (through `agree`) has a gradient that is not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        finite = torch.stack([torch.isfinite(g).all() for g in gradients]).all() if gradients else torch.ones(())
        if bool(self.agree(~finite)) or self.skip:
            return None
        self.applied = True
        return super().step(closure)


def make_optimizer(module: nn.Module, settings: OptimizerSettings) -> SkippableAdamW:
    """AdamW over the trainable parameters; weight decay on matrices alone."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if _is_matrix(p)], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if not _is_matrix(p)], "weight_decay": 0.0},
    ]
    return SkippableAdamW([g for g in groups if g["params"]], lr=settings.lr, betas=settings.betas, eps=settings.eps)


def lr_at(step: int, total_steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step `step` (from 0): linear warm-up to lr, then half a cosine down to lr * min_lr_ratio."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(total_steps - settings.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return settings.lr * (settings.min_lr_ratio + (1 - settings.min_lr_ratio) * cosine)


def _is_matrix(parameter: nn.Parameter) -> bool:
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2  # under ZeRO-3 the shape itself is [0]
