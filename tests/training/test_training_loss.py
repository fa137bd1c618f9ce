"""Chunked cross-entropy is plain cross-entropy, and never holds the logits of a whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import titans_ds
from tests.support.tiny_models import VOCAB, tiny_base, token_ids
from titans_ds.config import GraftConfig
from titans_ds.errors import ConfigError
from titans_ds.memory import Pass
from titans_ds.memory.mlp import MLPConfig
from titans_ds.training.data.segments import IGNORED
from titans_ds.training.module import TrainingModule
from titans_ds.training.settings import TrainingSettings
from titans_ds.training.speed import loss
from titans_ds.training.speed.loss import fused_token_losses, fused_weight, token_losses


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
    model = titans_ds.attach(base, GraftConfig(segment_tokens=64, memory=MLPConfig(dim=8)))
    module, ids = TrainingModule(model, chunk).train(), token_ids(2, 64)
    with LargestTensor() as watch:
        reset, mask = torch.ones(2, dtype=torch.bool), torch.ones(2, 64, dtype=torch.bool)
        module(ids, ids, mask, reset, None, Pass())[0].backward()
    return watch.elements


def test_no_tensor_has_the_logits_of_a_batch() -> None:
    """The watch sees them when the chunk is the whole batch, and nothing larger than weights when it is 16 tokens."""
    logits = 2 * 64 * VOCAB * 16
    assert largest_tensor(128) == logits
    assert largest_tensor(16) <= VOCAB * 16 * 32 < logits  # the embedding


def frozen_head(width: int, vocabulary: int) -> nn.Linear:
    """As a causal LM's."""
    return nn.Linear(width, vocabulary, bias=False).requires_grad_(False)


@pytest.mark.parametrize("chunk", [3, 8, 64])
def test_fused_equals_chunked(chunk: int) -> None:
    """Losses, and the gradient of the hidden states where every token's loss counts differently."""
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    head, hidden = frozen_head(6, 150), torch.randn(3, 7, 6, requires_grad=True)
    labels = torch.randint(0, 150, (3, 7))
    labels[0, 4:], labels[2] = IGNORED, IGNORED
    results = []
    for losses in (fused_token_losses(head.weight, hidden, labels, chunk), token_losses(head, hidden, labels, chunk)):
        results.append((losses, *torch.autograd.grad(losses.square().sum(), hidden)))
    torch.testing.assert_close(*(r[0] for r in results), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(*(r[1] for r in results), atol=1e-6, rtol=1e-5)
    assert (results[0][1][2] == 0).all()
    assert results[0][1][0].abs().max() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(fused_token_losses(head.weight, hidden, labels, chunk), results[0][0])


def test_fused_keeps_small_scales() -> None:
    """A mean over many tokens multiplies bf16 rows by less than bf16 can tell apart."""
    pytest.importorskip("liger_kernel")
    torch.manual_seed(0)
    head, labels = frozen_head(8, 40).bfloat16(), torch.randint(0, 40, (1, 16))
    hidden = torch.randn(1, 16, 8, dtype=torch.bfloat16, requires_grad=True)
    (whole,) = torch.autograd.grad(fused_token_losses(head.weight, hidden, labels, 16).sum(), hidden)
    (scaled,) = torch.autograd.grad((fused_token_losses(head.weight, hidden, labels, 16) * (1 / 3)).sum(), hidden)
    assert torch.equal(scaled, (whole.float() / 3).bfloat16())


def test_which_heads_are_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain, frozen, whole; on a CPU only if asked for."""
    pytest.importorskip("liger_kernel")
    head = frozen_head(4, 9)
    assert fused_weight(head, "liger") is head.weight
    assert fused_weight(head, "auto") is None
    assert fused_weight(head, "chunked") is None
    assert fused_weight(nn.Linear(4, 9).requires_grad_(False), "liger") is None
    assert fused_weight(nn.Linear(4, 9, bias=False), "liger") is None
    hooked, partitioned = frozen_head(4, 9), frozen_head(4, 9)
    hooked.register_forward_hook(lambda *_: None)
    partitioned.weight.ds_id = 0  # type: ignore[attr-defined]
    assert fused_weight(hooked, "liger") is None
    assert fused_weight(partitioned, "liger") is None
    monkeypatch.setattr(loss, "_has_liger", lambda: False)
    assert TrainingSettings(loss_kernel="auto").loss_kernel == "auto"
    with pytest.raises(ConfigError, match=r"pip install 'titans-ds\[kernels\]'"):
        TrainingSettings(loss_kernel="liger")


def test_training_passes_agree() -> None:
    """The whole module, a memory on a frozen hybrid: losses, and the gradients of what is trained."""
    pytest.importorskip("liger_kernel")
    results = []
    for kernel in ("liger", "chunked"):
        torch.manual_seed(0)
        model = titans_ds.attach(tiny_base("qwen3_5"), GraftConfig(segment_tokens=16, memory=MLPConfig(dim=8)))
        module, ids = TrainingModule(model, 8, kernel).train(), token_ids(2, 16)
        reset, mask = torch.ones(2, dtype=torch.bool), torch.ones(2, 16, dtype=torch.bool)
        total, rows, *_ = module(ids, ids, mask, reset, None, Pass())
        total.backward()
        grads = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
        results.append((rows.detach(), grads))
    (ours, our_grads), (plain, plain_grads) = results
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-6)
    assert our_grads.keys() == plain_grads.keys() != set()
    for name, gradient in plain_grads.items():
        torch.testing.assert_close(our_grads[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
