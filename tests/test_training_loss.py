"""Chunked cross-entropy is plain cross-entropy, and never holds the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import titans_ds
from tests.tiny_models import VOCAB, tiny_base, token_ids
from titans_ds.config import GraftConfig, MemoryConfig
from titans_ds.training.loss import token_losses
from titans_ds.training.module import TrainingModule
from titans_ds.training.segments import IGNORED


@pytest.mark.parametrize("chunk", [1, 5, 7, 64])
def test_chunked_equals_plain(chunk: int) -> None:
    """Losses, gradient of the hidden states and of the head, at chunks that divide the batch and that don't."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(6, 11).double(), torch.randn(3, 7, 6, dtype=torch.double, requires_grad=True)
    labels = torch.randint(0, 11, (3, 7))
    labels[0, 4:], labels[2] = IGNORED, IGNORED
    plain = functional.cross_entropy(head(hidden).transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    expected = torch.autograd.grad(plain.square().sum(), [hidden, *head.parameters()])
    # The losses are fp32, as logits are cast to it: compare with what fp32 can hold.
    ours = token_losses(head, hidden, labels, chunk)
    gradients = torch.autograd.grad(ours.square().sum(), [hidden, *head.parameters()])
    torch.testing.assert_close(ours.double(), plain, atol=1e-6, rtol=1e-6)
    assert (ours[labels == IGNORED] == 0).all()
    for ours_g, plain_g in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours_g, plain_g, atol=1e-6, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Watches every tensor that any operation makes, in forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at its results."""
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def largest_tensor(chunk: int) -> int:
    """Elements of the largest tensor in a training pass of 2 x 64 tokens over a vocabulary of 128 x 16."""
    base = tiny_base("qwen2", vocab_size=VOCAB * 16)
    model = titans_ds.attach(base, GraftConfig(segment_tokens=64, memory=MemoryConfig(dim=8)))
    module, ids = TrainingModule(model, chunk).train(), token_ids(2, 64)
    with LargestTensor() as watch:
        reset, mask = torch.ones(2, dtype=torch.bool), torch.ones(2, 64, dtype=torch.bool)
        module(ids, ids, mask, reset, None, (True, True, False, False, True))[0].backward()
    return watch.elements


def test_no_tensor_has_the_logits_of_a_batch() -> None:
    """The watch sees them when the chunk is the whole batch, and nothing larger than weights when it is 16 tokens."""
    logits = 2 * 64 * VOCAB * 16
    assert largest_tensor(128) == logits
    assert largest_tensor(16) <= VOCAB * 16 * 32 < logits  # the embedding
