"""Rotary position codes of a base model, put on stored keys and taken off.

Keys are kept as they were before rotation, so that a file can be moved to any position. Rotations are computed in fp32.

Legend of shape suffixes: H heads, N tokens, D width of a head, R its rotated part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from titans_ds.errors import UnsupportedModelError
from titans_ds.graft.head import decoder_of


class Rotary:
    """Of one base model.

    Raises:
        UnsupportedModelError: its decoder has no rotary embedding of the common kind.
    """

    def __init__(self, base: nn.Module) -> None:
        self.module: Any = getattr(decoder_of(base), "rotary_emb", None)
        if self.module is None or not hasattr(self.module, "inv_freq"):
            raise UnsupportedModelError(
                f"{type(base).__name__} has no single rotary position embedding, so that its keys can't be kept apart "
                "from their positions; use a base such as Llama, Qwen, SmolLM or Mistral"
            )

    def __call__(self, keys_HND: Tensor, positions_N: Tensor, back: bool = False) -> Tensor:
        """Keys at these positions, [H, N, D]; with `back`, without them.

        Args:
            keys_HND: with `back` at these positions, else before rotation.
            positions_N: [N], or [H, N] where every head has its own.
            back: take the rotation off.
        """
        rows = positions_N.view(-1, positions_N.shape[-1])
        ids = rows[None].expand(3, -1, -1) if getattr(self.module, "mrope_section", None) else rows
        wide = keys_HND.float()
        cos, sin = (t.float() for t in self.module(wide[None], ids))  # [1 or H, N, R]
        size = cos.shape[-1]
        turned, rest = wide[..., :size], wide[..., size:]
        half = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], dim=-1)
        if back:  # cos and sin may be scaled alike, as YaRN's are
            scale = getattr(self.module, "attention_scaling", 1.0) ** 2
            cos, sin = cos / scale, -sin / scale
        return torch.cat([turned * cos + half * sin, rest], dim=-1).to(keys_HND.dtype)
