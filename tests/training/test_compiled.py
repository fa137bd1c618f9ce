"""Compiled parts of a base model compute what they did before."""

from __future__ import annotations

import copy
import importlib.util
import inspect

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn
from transformers.models.qwen3_5 import modeling_qwen3_5

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds.config import GraftConfig
from titans_ds.errors import ConfigError
from titans_ds.memory import Pass
from titans_ds.memory.mlp import MLPConfig
from titans_ds.training.module import TrainingModule
from titans_ds.training.settings import DataSettings, ModelSettings, TrainConfig, TrainingSettings
from titans_ds.training.speed.compiled import Compile, compile_parts
from titans_ds.training.speed.convolution import fused

FUSED = importlib.util.find_spec("fla") is not None  # its kernels take nothing that lies on a CPU
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def results(base: nn.Module, what: Compile) -> tuple[Tensor, dict[str, Tensor], int]:
    """Row losses of two segments, gradients, and how many parts were compiled."""
    torch.manual_seed(0)
    model = titans_ds.attach(copy.deepcopy(base), GraftConfig(segment_tokens=16, memory=MLPConfig(dim=8)))
    count = compile_parts(model.base_model, what)
    module, ids = TrainingModule(model, 32).train().to(DEVICE), token_ids(4, 16).to(DEVICE)
    reset = torch.ones(2, dtype=torch.bool, device=DEVICE)
    mask, state, losses = torch.ones(2, 16, dtype=torch.bool, device=DEVICE), None, []
    for rows in ids.split(2):
        total, row_losses, state, _ = module(rows, rows, mask, reset, state, Pass())
        total.backward()
        losses.append(row_losses.detach())
        state, reset = {i: {n: t.detach() for n, t in s.items()} for i, s in state.items()}, torch.zeros_like(reset)
    return torch.cat(losses), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}, count


@pytest.mark.parametrize(("family", "what"), [("qwen2", "mlp"), ("qwen3_5", "mlp"), ("qwen3_5", "layers")])
def test_compiled_equals_eager(family: str, what: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, and the gradients of what is trained; every norm and MLP, those of the mixers with these or alone."""
    if FUSED:  # fla's delta rule has TF32 products in fp32, so that other rounding before it is another result
        plain_rule = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
        monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", plain_rule)
    dynamo.reset()
    dynamo.utils.counters.clear()
    base = tiny_base(family)
    layers = base.model.layers
    norms = sum(name.endswith("norm") for name, _ in layers.named_modules())
    plain, plain_grads, none = results(base, "none")
    ours, grads, compiled = results(base, what)
    assert (none, compiled) == (0, 4 * len(layers) if what == "layers" else norms + len(layers))
    assert 0 < dynamo.utils.counters["stats"]["unique_graphs"] < compiled  # shared by the layers
    assert FUSED or not dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-5)
    assert grads.keys() == plain_grads.keys() != set()
    for name, gradient in plain_grads.items():
        torch.testing.assert_close(grads[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_the_convolution_is_plain_on_a_cpu_and_exchanged_once() -> None:
    plain = modeling_qwen3_5.causal_conv1d_fn
    x, weight = torch.randn(2, 7, 6).transpose(1, 2), torch.randn(6, 4)
    ours = fused(plain)
    assert fused(ours) is ours
    assert torch.equal(ours(x, weight, activation="silu"), plain(x, weight, activation="silu"))


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="needs a GPU and flash-linear-attention",
)
@pytest.mark.parametrize("shape", [(2, 100, 64), (1, 7, 96)])
def test_the_fused_convolution_equals_pytorchs(shape: tuple[int, int, int]) -> None:
    """Values and the gradient in x, in bfloat16, against fp64."""
    plain = modeling_qwen3_5.causal_conv1d_fn
    plain = getattr(plain, "titans_plain", plain)
    torch.manual_seed(0)
    rows, weight = torch.randn(shape, device="cuda").bfloat16(), torch.randn(shape[2], 4, device="cuda").bfloat16()
    up = torch.randn(shape[0], shape[2], shape[1], device="cuda").bfloat16()
    found = []
    for way, dtype in ((fused(plain), torch.bfloat16), (plain, torch.float64)):
        leaf = rows.detach().clone().to(dtype).requires_grad_()
        y = way(leaf.transpose(1, 2), weight.to(dtype), activation="silu")
        y.backward(up.to(dtype))
        found.append((y.double(), leaf.grad.double()))
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 5e-3 * exact.norm()


def test_what_cannot_be_compiled_is_refused() -> None:
    """A partitioned base, and writes through the base."""
    base = tiny_base("qwen2")
    next(base.parameters()).ds_id = 0
    with pytest.raises(ConfigError, match="ZeRO-3"):
        compile_parts(base, "mlp")
    training = TrainingSettings(order="second", window=2, second_order="through_base", compile="mlp")
    with pytest.raises(ConfigError, match="second derivatives"):
        TrainConfig(ModelSettings(base="x"), DataSettings("x"), GraftConfig(), training=training)


def test_one_program_serves_batches_of_any_shape() -> None:
    """Prefills and single tokens, one row and several; a norm after the heads' split, too."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    base = tiny_base("qwen3_5").to(DEVICE)
    ours = copy.deepcopy(base)
    compile_parts(ours, "mlp", shapes_vary=True)
    with torch.no_grad():
        for shape in ((2, 9), (3, 17), (1, 5), (4, 1), (1, 1), (2, 30)):
            ids = torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
            torch.testing.assert_close(ours(ids).logits, base(ids).logits, atol=1e-4, rtol=1e-4)
    # Norms of two widths, the gated norm, the MLP; those between layers once more for a single vector.
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 6
    assert not dynamo.utils.counters["recompile_limit"]
