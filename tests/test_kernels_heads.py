"""From a projection to heads: the Triton kernel against PyTorch in fp64."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch

from titans_ds.config import FeatureConfig
from titans_ds.memory import features, kernels
from titans_ds.memory.kernels import heads as fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")


def run(x: torch.Tensor, heads: int, config: FeatureConfig, norm: bool, kernel: str) -> list[torch.Tensor]:
    """By head, and the gradient."""
    x = x.clone().requires_grad_()
    with kernels.choice(kernel):
        y = features.by_head(x, heads, config, norm)
    (gradient,) = torch.autograd.grad((y * torch.linspace(0, 1, y.numel(), device=DEVICE).view_as(y)).sum(), x)
    return [y.detach(), gradient]


@pytest.mark.parametrize("seed", range(12))
def test_random_shapes(seed) -> None:
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3])
    config = FeatureConfig(activation=rng.choice(["silu", "none"]), normalize_keys=seed % 3 > 0)
    shape = (rng.choice([1, 3]), rng.choice([1, 5, 70]), heads * rng.choice([1, 16, 19, 200]))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)
    x[0, 0] = 0  # its norm is 0
    got = run(x.float(), heads, config, seed % 2 > 0, "triton")
    expected = run(x, heads, config, seed % 2 > 0, "torch")
    assert got[0].shape == (*shape[:2], heads, shape[2] // heads)
    for left, right in zip(got, expected, strict=True):
        assert (left.double() - right).norm() <= 1e-5 * right.norm()


def test_a_wrong_kernel_is_found_out(monkeypatch, caplog) -> None:
    case = fused.Case(DEVICE, torch.float32, 2, 32, True, True)
    assert fused.agrees(case)
    assert caplog.text == ""
    fused.agrees.cache_clear()
    monkeypatch.setattr(fused, "_EPS", 10.0)
    assert not fused.agrees(case)
    fused.agrees.cache_clear()
    assert "PyTorch does it instead" in caplog.text
