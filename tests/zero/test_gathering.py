"""What ZeRO-3 gathers whole: frozen layers without a memory, and parts of the others, but never a memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import titans_ds
from launch.stages.demo import launcher
from tests.support.tiny_models import tiny_base
from titans_ds.config import GraftConfig, LoraSettings
from titans_ds.graft import lora
from titans_ds.memory import LayerMemory
from titans_ds.memory.mlp import MLPConfig
from titans_ds.zero.gathering import mark_whole, prefetch_whole


def names(model: nn.Module) -> set[str]:
    """Of the leaves, marked in a model."""
    leaves = {id(leaf) for leaf in mark_whole(model)}
    return {name for name, module in model.named_modules() if id(module) in leaves}


def grafted(layers: list[int]) -> nn.Module:
    """A tiny hybrid with memories on some layers, its base frozen."""
    model = titans_ds.attach(tiny_base("qwen3_5"), GraftConfig(layers=layers, memory=MLPConfig(dim=8)))
    return model.base_model


def test_layers_without_a_memory_are_gathered_whole_and_memories_by_themselves() -> None:
    base = grafted([3])
    found = names(base)
    layers = [name for name, _ in base.named_modules() if name.split(".")[-2:-1] == ["layers"]]
    assert {name for name in layers if name in found} == {name for name in layers if not name.endswith(".3")}
    assert f"{layers[3]}.mlp" in found
    for name, module in base.named_modules():
        inside = any(name == leaf or name.startswith(leaf + ".") for leaf in found)
        assert not (inside and isinstance(module, LayerMemory)), name


def test_what_is_trained_is_left_alone() -> None:
    base = grafted([3])
    layers = next(module for name, module in base.named_modules() if name.endswith("layers"))
    layers[0].mlp.requires_grad_(True)
    found = names(base)
    assert not any(name.endswith("layers.0") or name.endswith("layers.0.mlp") for name in found)
    assert any(name.endswith("layers.1") for name in found)


def test_a_model_that_is_trained_whole_has_no_leaves() -> None:
    assert mark_whole(tiny_base("llama").requires_grad_(True)) == []


def test_low_rank_adapters_are_left_alone() -> None:
    base = grafted([3])
    lora.inject(base, LoraSettings(rank=2))
    leaves = mark_whole(base)
    assert leaves
    assert not any(p.requires_grad for leaf in leaves for p in leaf.parameters())


def test_the_largest_layer_is_gathered_ahead() -> None:
    layers = [nn.Sequential(nn.Linear(n, 10_000, bias=False, device="meta")) for n in (1_000, 9_000, 4_000)]
    assert prefetch_whole({"stage": 3}, layers) == {"stage": 3, "stage3_prefetch_bucket_size": 90_000_000}
    layers[1][0].weight = nn.Parameter(torch.empty(0, device="meta"))  # as ZeRO-3 leaves it when it has loaded it
    layers[1][0].weight.ds_numel = 95_000_000
    assert prefetch_whole({}, layers) == {"stage3_prefetch_bucket_size": 95_000_000}
    given = {"stage": 3, "stage3_prefetch_bucket_size": 7}
    assert prefetch_whole(given, layers) == given
    assert prefetch_whole({}, layers[:1]) == prefetch_whole({}, []) == {"stage3_prefetch_bucket_size": 50_000_000}


def test_the_launcher_takes_the_gpus_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a number alone, DeepSpeed takes the machine's first GPUs whatever CUDA_VISIBLE_DEVICES says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    assert "localhost:4,5" in launcher(2)
    assert "--num_accelerators" in launcher(4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "--num_accelerators" in launcher(2)
