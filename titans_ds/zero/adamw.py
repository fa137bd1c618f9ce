"""AdamW with a step that ranks can agree to skip."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class SkippableAdamW(torch.optim.AdamW):
    """AdamW whose step does nothing where `skip` is set, or where any rank has a gradient that is not finite.

    DeepSpeed's engines call the step in the middle of their own; skipping here lets them clear their buffers as usual,
    at every ZeRO stage, while parameters and moments stay as they were. `applied` says what the last step did; `agree`
    turns one rank's flag (a bool scalar) into that of all.
    """

    skip: bool = False
    applied: bool = False
    agree: Callable[[Tensor], Tensor] = staticmethod(lambda flag: flag)

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One AdamW step; none where the gradient norm is not finite."""
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        gradients = [g for g in gradients if g.numel() > 0]  # a rank's share may be empty
        # The greatest entry is finite where all are (a norm of another kind might overflow); a few launches for all.
        greatest = nn.utils.get_total_norm(gradients, math.inf) if gradients else torch.zeros(())
        if bool(self.agree(~torch.isfinite(greatest))) or self.skip:
            return None
        self.applied = True
        return super().step(closure)

    def prepare(self, lr: float, skip: bool) -> None:
        """Settings of the step to come: one learning rate for all groups."""
        self.skip, self.applied = skip, False
        for group in self.param_groups:
            group["lr"] = lr

    def state_bytes(self) -> int:
        """Bytes of the moments held here."""
        moments = [v for state in self.state.values() for v in state.values() if isinstance(v, Tensor) and v.dim() > 0]
        return sum(moment.numel() * moment.element_size() for moment in moments)
