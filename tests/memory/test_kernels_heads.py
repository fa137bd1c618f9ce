"""From a projection to heads: the Triton kernel against PyTorch in fp64."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch

from tests.support.kernel_memories import first_and_long
from titans_ds.memory.mlp import FeatureConfig, features, kernels
from titans_ds.memory.mlp.kernels import heads as fused

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")


def run(given: list[torch.Tensor], split: features.Split, kernel: str) -> list[torch.Tensor]:
    """By head, and the gradients: of a projection (x), or of what it projects and its weight."""
    given = [t.clone().requires_grad_() for t in given]
    with kernels.choice(kernel):
        y = split(*given) if len(given) == 1 else split.of_projection(*given)
    gradients = torch.autograd.grad((y * torch.linspace(0, 1, y.numel(), device=DEVICE).view_as(y)).sum(), given)
    return [y.detach(), *gradients]


@pytest.mark.parametrize("seed", first_and_long(12))
def test_random_shapes(seed) -> None:
    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3])
    config = FeatureConfig(activation=rng.choice(["silu", "none"]), normalize_keys=seed % 3 > 0)
    shape = (rng.choice([1, 3]), rng.choice([1, 5, 70]), heads * rng.choice([1, 16, 19, 200]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE)
    x[0, 0] = 0  # its norm is 0
    weight = torch.randn(2 * shape[2], shape[2], generator=generator, dtype=torch.float64).to(DEVICE)
    split = features.Split(heads, config, seed % 2 > 0)
    for given in ([x], [x, weight]):
        got, expected = run([t.float() for t in given], split, "triton"), run(given, split, "torch")
        assert got[0].shape == expected[0].shape
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
