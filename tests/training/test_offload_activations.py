"""Activations in host memory: what is moved, what stays, and that a backward pass takes it back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from titans_ds.training.speed import offload
from titans_ds.training.speed.offload import OffloadActivations


class Recorder(OffloadActivations):
    """Notes what it moved and what it left."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.moved: list[Tensor] = []
        self.left: list[Tensor] = []

    def _pack(self, tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
        packed = super()._pack(tensor)
        (self.left if isinstance(packed, Tensor) else self.moved).append(tensor)
        return packed


def make_module(frozen: bool) -> nn.Module:
    """Linear layers (whose weights are kept as views), a norm, and a buffer."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.SiLU(), nn.Linear(128, 64, bias=False))
    module.register_buffer("scale", torch.rand(64))
    module[3].requires_grad_(not frozen)
    return module


def loss_of(module: nn.Module, x: Tensor) -> Tensor:
    """A scalar."""
    y: Tensor = module(x.exp())
    scale = module.get_buffer("scale")
    return (y * scale).square().sum()


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_stay_and_activations_go(frozen: bool) -> None:
    """Parameters, frozen or not, their views and buffers are never copied; everything large beside them is."""
    module, x = make_module(frozen), torch.randn(512, 64, requires_grad=True)
    held = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    recorder = Recorder(module)
    with recorder:
        loss = loss_of(module, x)
    assert all(t.untyped_storage().data_ptr() not in held for t in recorder.moved)
    assert {t.untyped_storage().data_ptr() for t in recorder.left} & held
    assert all(t.nbytes < offload.LEAST_BYTES or t.untyped_storage().data_ptr() in held for t in recorder.left)
    assert sum(t.nbytes for t in recorder.moved) > 3 * 512 * 64 * 4
    loss.backward()  # type: ignore[no-untyped-call]
    moved = [p.grad for p in (x, *module.parameters()) if p.requires_grad]
    module.zero_grad()
    x.grad = None
    loss_of(module, x).backward()  # type: ignore[no-untyped-call]
    plain = [p.grad for p in (x, *module.parameters()) if p.requires_grad]
    assert all(a is not None and b is not None and torch.equal(a, b) for a, b in zip(moved, plain, strict=True))


def test_strides_come_back() -> None:
    """Kernels were given what they keep; a transposed matrix comes back transposed."""
    x = torch.randn(256, 512, requires_grad=True)
    context = OffloadActivations(nn.Module())
    packed = context._pack(x.detach().mT)
    assert not isinstance(packed, Tensor)
    back = context._unpack(packed)
    assert back.stride() == (1, 512)
    assert torch.equal(back, x.mT)
    assert back.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
