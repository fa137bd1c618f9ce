"""Which tokens of a call are written: what the token shift, the convolution and the chunks count by.

Legend of shape suffixes: B batch, T tokens, H any width. Padding may stand anywhere; only written tokens count.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_ds.memory.state import LayerState, choose_rows


@dataclass(frozen=True)
class Positions:
    """The written tokens of one call; what follows from the mask is computed when first asked for.

    Args:
        given_BT: the mask, true (1) where a token is written; None writes every token.
        batch_size, num_tokens: B, T.
        device: of the call.
    """

    given_BT: Tensor | None
    batch_size: int
    num_tokens: int
    device: torch.device

    @property
    def all_written(self) -> bool:
        """Whether all tokens are written, known without looking at the mask (which would wait for the device)."""
        return self.given_BT is None

    @functools.cached_property
    def mask_BT(self) -> Tensor:
        """True where a token is written."""
        if self.given_BT is not None:
            return self.given_BT.bool()
        return torch.ones(self.batch_size, self.num_tokens, dtype=torch.bool, device=self.device)

    @functools.cached_property
    def before_BT(self) -> Tensor:
        """Number of written tokens before each position."""
        if self.given_BT is None:
            return torch.arange(self.num_tokens, device=self.device).expand(self.batch_size, -1)
        return self.mask_BT.long().cumsum(dim=1) - self.mask_BT.long()

    @functools.cached_property
    def order_BT(self) -> Tensor:
        """The written tokens' positions first, in their order."""
        return self.before_BT if self.given_BT is None else torch.argsort(~self.mask_BT, dim=1, stable=True)

    @functools.cached_property
    def count_B(self) -> Tensor:
        """Number of written tokens."""
        if self.given_BT is None:
            return torch.full((self.batch_size,), self.num_tokens, device=self.device)
        return self.mask_BT.sum(dim=1)

    def compact(self, x_BTH: Tensor) -> Tensor:
        """Written tokens first, in their order."""
        return x_BTH if self.all_written else take(x_BTH, self.order_BT)


def take(x_BTH: Tensor, index_BN: Tensor) -> Tensor:
    """x[b, index[b, n]]: [B, N, H]."""
    return x_BTH.gather(1, index_BN.unsqueeze(-1).expand(-1, -1, x_BTH.shape[-1]))


def previous_tokens(hidden_BTH: Tensor, state: LayerState, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """For every position the last real token before it (in this call or the one before), and whether there is one."""
    before_BT = previous_positions(mask_BT)
    carried = torch.cat([state["last_hidden"].unsqueeze(1).to(hidden_BTH.dtype), hidden_BTH], dim=1)
    return take(carried, before_BT + 1), (before_BT >= 0) | (state["has_last"] > 0).unsqueeze(1)


def previous_positions(mask_BT: Tensor) -> Tensor:
    """[B, T]: where the last written token before each position stands; -1 where there is none in this call."""
    latest_BT = _latest_real(mask_BT)
    return torch.cat([torch.full_like(latest_BT[:, :1], -1), latest_BT[:, :-1]], dim=1)


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
