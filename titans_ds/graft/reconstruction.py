"""How well the base model predicts a text: what a prefix memory is written by.

Logits exist for some tokens at a time, unless a graph is kept through them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 1024  # tokens
Head = Callable[[Tensor], Tensor]


def mean_losses(logits: Head, hidden_BTH: Tensor, ids_BT: Tensor, there_BT: Tensor) -> Tensor:
    """Mean cross-entropy of each sample's tokens, nats, at least fp32, [B]; 0 for a sample without tokens.

    Args:
        logits: language-modelling head, [M, H] -> [M, V].
        hidden_BTH: what predicts each token.
        ids_BT: the tokens.
        there_BT: false at padding.
    """
    chunks = zip(*(torch.split(x, _CHUNK) for x in (hidden_BTH.flatten(0, 1), ids_BT.flatten())), strict=True)
    return _mean(torch.cat([_cross_entropy(logits, hidden, ids) for hidden, ids in chunks]), there_BT)


def losses_and_derivative(logits: Head, hidden_BTH: Tensor, ids_BT: Tensor, there_BT: Tensor) -> tuple[Tensor, Tensor]:
    """`mean_losses`, and the derivative of their sum in the hidden states [B, T, H]; no graph is left."""
    wide = torch.promote_types(hidden_BTH.dtype, torch.float32)
    shares_BT = there_BT.to(wide) / there_BT.sum(dim=1, keepdim=True).clamp(min=1)
    parts = (hidden_BTH.detach().flatten(0, 1), ids_BT.flatten(), shares_BT.flatten())
    found = [_chunk(logits, *chunk) for chunk in zip(*(torch.split(x, _CHUNK) for x in parts), strict=True)]
    losses, derivatives = (torch.cat(part) for part in zip(*found, strict=True))
    return _mean(losses, there_BT), derivatives.view(hidden_BTH.shape)


def _chunk(logits: Head, hidden_MH: Tensor, ids_M: Tensor, shares_M: Tensor) -> tuple[Tensor, Tensor]:
    hidden_MH = hidden_MH.requires_grad_()
    loss_M = _cross_entropy(logits, hidden_MH, ids_M)
    (derivative,) = torch.autograd.grad((loss_M * shares_M).sum(), hidden_MH)
    return loss_M.detach(), derivative


def _mean(losses: Tensor, there_BT: Tensor) -> Tensor:
    loss_BT = losses.view(there_BT.shape).masked_fill(~there_BT, 0)
    return loss_BT.sum(dim=1) / there_BT.sum(dim=1).clamp(min=1)


def _cross_entropy(logits: Head, hidden_MH: Tensor, ids_M: Tensor) -> Tensor:
    scores = logits(hidden_MH)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return functional.cross_entropy(wide, ids_M, reduction="none")
