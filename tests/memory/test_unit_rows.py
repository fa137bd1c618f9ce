"""Rows of norm 1: the Triton kernels against PyTorch in fp64."""

from __future__ import annotations

import random
from importlib.util import find_spec

import pytest
import torch

from tests.support.kernel_memories import first_and_long
from titans_ds.memory.projection import unit_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (pip install triton)")


@pytest.mark.parametrize("seed", first_and_long(12))
def test_the_kernel_equals_the_formula(seed: int) -> None:
    """Rows of any number and width, a row of zeros among them, in three dtypes, from strided tensors too."""
    rng = random.Random(seed)
    dtype, tolerance = [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)][seed % 3]
    shape = (rng.choice([1, 3]), rng.choice([1, 5, 70]), rng.choice([16, 19, 200, 1024]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    x[0, 0] = 0
    x = x.transpose(0, 1).requires_grad_()
    eps = rng.choice([1e-12, 1e-3])
    weights = torch.linspace(-1, 1, x.numel(), dtype=torch.float64, device=DEVICE).view_as(x)
    weights[0, 0] = 0
    exact_x = x.detach().double().requires_grad_()
    found, exact = unit_rows(x, eps, triton=True), unit_rows(exact_x, eps, triton=False)
    (gradient,) = torch.autograd.grad((found * weights).sum(), x)
    (exact_gradient,) = torch.autograd.grad((exact * weights).sum(), exact_x)
    assert found.dtype == dtype
    for got, expected in ((found, exact), (gradient, exact_gradient)):
        assert (got.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1e-30)
