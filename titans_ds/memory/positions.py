"""Which tokens of a call are written: what the token shift, the convolution and the chunks count by.

Legend of shape suffixes: B batch, T tokens, H any width. Padding may stand anywhere; only written tokens count.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.memory.state import LayerState, choose_rows


@dataclass(frozen=True)
class Positions:
    """The written tokens of one call.

    Args:
        mask_BT: true where a token is written.
        before_BT: number of written tokens before each position.
        order_BT: the written tokens' positions first, in their order.
        count_B: number of written tokens.
        all_written: known without looking at the mask.
    """

    mask_BT: Tensor
    before_BT: Tensor
    order_BT: Tensor
    count_B: Tensor
    all_written: bool

    @classmethod
    def of(cls, mask_BT: Tensor | None, batch_size: int, num_tokens: int, device: torch.device) -> Positions:
        """Count; a mask of None writes every token."""
        if mask_BT is None:
            index_BT = torch.arange(num_tokens, device=device).expand(batch_size, -1)
            count_B = torch.full((batch_size,), num_tokens, device=device)
            return cls(torch.ones_like(index_BT, dtype=torch.bool), index_BT, index_BT, count_B, True)
        mask_BT = mask_BT.bool()
        before_BT = mask_BT.long().cumsum(dim=1) - mask_BT.long()
        order_BT = torch.argsort(~mask_BT, dim=1, stable=True)
        return cls(mask_BT, before_BT, order_BT, mask_BT.sum(dim=1), False)

    def compact(self, x_BTH: Tensor) -> Tensor:
        """Written tokens first, in their order."""
        return x_BTH if self.all_written else take(x_BTH, self.order_BT)


def take(x_BTH: Tensor, index_BN: Tensor) -> Tensor:
    """x[b, index[b, n]]: [B, N, H]."""
    return x_BTH.gather(1, index_BN.unsqueeze(-1).expand(-1, -1, x_BTH.shape[-1]))


def previous_tokens(hidden_BTH: Tensor, state: LayerState, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """For every position the last real token before it (in this call or the one before), and whether there is one."""
    latest_BT = _latest_real(mask_BT)
    before_BT = torch.cat([torch.full_like(latest_BT[:, :1], -1), latest_BT[:, :-1]], dim=1)  # -1: the carried token
    carried = torch.cat([state["last_hidden"].unsqueeze(1).to(hidden_BTH.dtype), hidden_BTH], dim=1)
    return take(carried, before_BT + 1), (before_BT >= 0) | (state["has_last"] > 0).unsqueeze(1)


def last_token(hidden_BTH: Tensor, mask_BT: Tensor, state: LayerState) -> LayerState:
    """What the token shift carries: the last real token's hidden state, and that there is one."""
    last_B = _latest_real(mask_BT)[:, -1]
    rows = torch.arange(hidden_BTH.shape[0], device=hidden_BTH.device)
    last_BH = hidden_BTH[rows, last_B.clamp(min=0)].to(state["last_hidden"].dtype)
    return {
        "last_hidden": choose_rows(last_B >= 0, last_BH, state["last_hidden"]),
        "has_last": torch.maximum(state["has_last"], (last_B >= 0).to(state["has_last"].dtype)),
    }


def _latest_real(mask_BT: Tensor) -> Tensor:
    """[B, T]: the index of the last real token up to each position, -1 before the first."""
    positions = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return torch.where(mask_BT, positions, -1).cummax(dim=1).values
