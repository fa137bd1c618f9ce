"""Cross-entropy over a large vocabulary, chunk by chunk: no [B, T, V] tensor ever exists.

Each chunk's logits are made, used and dropped; backward makes them again (non-reentrant checkpointing). The number of
chunks depends on shapes alone, so every rank makes as many passes through the language-model head; ZeRO-3 needs that.

Where the head is frozen, backward needs the gradient of the hidden states alone, and that of a token's loss is one row,
known as soon as its logits are. Liger's kernel makes those rows in the forward pass: two products with the head in all
instead of three, and the softmax in one pass over the logits.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from titans_ds.errors import ConfigError
from titans_ds.training.data.segments import IGNORED

LossKernel = Literal["auto", "chunked", "liger"]


def token_losses(
    logits: Callable[[Tensor], Tensor], hidden_BTH: Tensor, labels_BT: Tensor, chunk_tokens: int
) -> Tensor:
    """Cross-entropy of every token, at least fp32 [B, T], in nats; 0 where the label is IGNORED.

    Args:
        logits: language-model head, [N, H] -> [N, V], called through the module's `__call__`.
        hidden_BTH: last hidden states.
        labels_BT: int64, already shifted.
        chunk_tokens: tokens whose logits exist at a time.
    """
    hidden, labels = hidden_BTH.flatten(0, 1), labels_BT.flatten()
    chunks = zip(torch.split(hidden, chunk_tokens), torch.split(labels, chunk_tokens), strict=True)
    losses = [_chunk(logits, h, l) for h, l in chunks]  # noqa: E741
    return torch.cat(losses).view(labels_BT.shape)


def _chunk(logits: Callable[[Tensor], Tensor], hidden_NH: Tensor, labels_N: Tensor) -> Tensor:
    def loss(hidden: Tensor) -> Tensor:
        scores = logits(hidden)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return functional.cross_entropy(scores, labels_N, ignore_index=IGNORED, reduction="none")

    if not torch.is_grad_enabled():
        return loss(hidden_NH)
    return cast(Tensor, checkpoint(loss, hidden_NH, use_reentrant=False))


def check_kernel(kernel: LossKernel) -> None:
    """Raises ConfigError where Liger's kernel is asked for and is not installed."""
    if kernel == "liger" and not _has_liger():
        raise ConfigError(
            "training.loss_kernel is 'liger', which needs the package liger-kernel: pip install 'titans-ds[kernels]', "
            "or set it to 'auto' or 'chunked'"
        )


def fused_weight(head: nn.Module, kernel: LossKernel) -> Tensor | None:
    """Weight [V, H] of a head that Liger's kernel takes; None where `token_losses` is to be called.

    It takes a plain linear map that is frozen and whole on this rank; `auto` on a GPU only, and where it is installed.
    """
    if kernel == "chunked" or type(head) is not nn.Linear or head._forward_hooks or head._forward_pre_hooks:
        return None
    # ZeRO-3 marks what it partitions by ds_id. Asked for such a weight by name, it gathers that for the whole pass.
    parameters = dict(head.named_parameters(recurse=False))
    if len(parameters) > 1 or any(p.requires_grad or hasattr(p, "ds_id") for p in parameters.values()):
        return None
    weight = parameters["weight"]
    return weight if kernel == "liger" or (weight.is_cuda and _has_liger()) else None


def fused_token_losses(weight_VH: Tensor, hidden_BTH: Tensor, labels_BT: Tensor, chunk_tokens: int) -> Tensor:
    """`token_losses` of a frozen head, in fp32, by Liger's kernel; see `fused_weight`."""
    losses = _FrozenHead.apply(hidden_BTH.flatten(0, 1), weight_VH, labels_BT.flatten(), chunk_tokens)  # type: ignore[no-untyped-call]
    return cast(Tensor, losses).view(labels_BT.shape)


class _FrozenHead(torch.autograd.Function):
    """Losses [N] of hidden states [N, H]; keeps the gradient of each, one row, for backward."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_N: Tensor, chunk_tokens: int) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import fused_linear_cross_entropy_forward

        vocabulary, width = weight_VH.shape
        logits_over_hidden = -(-vocabulary // width)
        losses_N, _, _, _, rows_NH, _, _ = fused_linear_cross_entropy_forward(
            hidden_NH.contiguous(),
            weight_VH,
            labels_N,
            ignore_index=IGNORED,
            reduction="none",
            compute_gradients=ctx.needs_input_grad[0],
            weight_requires_grad=False,
            # Its logits are this many times the hidden states in size: chunk_tokens rows of them, a power of two.
            chunk_mem_const=max(1, chunk_tokens * logits_over_hidden // hidden_NH.shape[0]),
        )
        ctx.save_for_backward(rows_NH)
        return cast(Tensor, losses_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None, None, None]:
        (rows_NH,) = ctx.saved_tensors
        return (rows_NH * gradient_N[:, None]).to(rows_NH.dtype), None, None, None  # in fp32: a step's scale is small


@functools.cache  # asked for every segment
def _has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None
