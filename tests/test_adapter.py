"""Adapters on disk: round trip, model card, and everything that can be wrong with a folder."""

from __future__ import annotations

import json

import pytest
import torch

import titans_ds
from tests.tiny_models import tiny_base, token_ids
from titans_ds import GraftConfig, MemoryConfig, TitansModel
from titans_ds.config import check_trainable
from titans_ds.errors import AdapterError, ConfigError


@pytest.fixture
def saved(tmp_path):
    config = GraftConfig(
        layers=[1, 2], gate_floor=0.1, memory=MemoryConfig(dim=16, learn_initial_weights=True, depth=3)
    )
    model = titans_ds.attach(tiny_base("llama"), config)
    with torch.no_grad():
        for _, parameter in model.titans_parameters():
            parameter.add_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_round_trip(saved) -> None:
    model, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    loaded = TitansModel.from_pretrained(tiny_base("llama"), folder)
    assert loaded.config == model.config
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert "layers [1, 2]" in (folder / "README.md").read_text()


def test_wrong_base(saved) -> None:
    _, folder = saved
    with pytest.raises(AdapterError, match=r"another base model.*hidden_size 16 instead of 32"):
        TitansModel.from_pretrained(tiny_base("llama", hidden_size=16), folder)
    with pytest.raises(AdapterError, match="model_type qwen2 instead of llama"):
        TitansModel.from_pretrained(tiny_base("qwen2"), folder)


def test_damaged_folders(saved, tmp_path) -> None:
    _, folder = saved
    with pytest.raises(AdapterError, match=r"adapter_config.json is missing"):
        TitansModel.from_pretrained(tiny_base("llama"), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(AdapterError, match="is damaged"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    config["graft"]["memory"]["dim"] = 8
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"has shape \[16, 16\] instead of \[8, 8\]"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="not a titans-ds adapter"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)


def test_unknown_keys_of_a_newer_version_warn_and_drop(saved) -> None:
    model, folder = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    config["graft"]["memory"]["momentun"] = 0.9
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="memory.momentun"):
        assert TitansModel.from_pretrained(tiny_base("llama"), folder).config == model.config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate_flor": 0.1}, "unknown setting 'gate_flor'; did you mean 'gate_floor'"),
        ({"memory": {"step_sise": 0.1}}, "unknown setting 'memory.step_sise'; did you mean 'step_size'"),
        ({"gate_floor": 1.0}, r"gate_floor is 1.0; it must be in \[0, 1\)"),
        ({"gate_floor": -0.1}, r"must be in \[0, 1\)"),
        ({"gate_floor": "high"}, "gate_floor is 'high'; expected float"),
        ({"gate_floor_mode": "hard"}, "expected one of 'clamp', 'affine'"),
        ({"layers": []}, "empty list"),
        ({"layers": [1, 1]}, "twice"),
        ({"layers": "deltanet"}, "expected a list of int or one of 'attention'"),
        ({"segment_tokens": 0}, "segment_tokens is 0"),
        ({"memory": {"dim": 0}}, "memory.dim is 0"),
        ({"memory": {"depth": True}}, "depth is True; expected int"),
        ({"memory": {"step_size": 0.0}}, "step_size is 0.0; it must be above 0"),
        ({"memory": {"write": "all"}}, "write is 'all'; expected one of 'pooled', 'token'"),
        ({"memory": {"initial_scale": 0.0}}, "every inner gradient would be 0"),
    ],
)
def test_settings_errors(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        GraftConfig.from_dict(values)


def test_learned_parts_without_a_gradient_are_refused() -> None:
    for setting in ({"learn_step_size": True}, {"value_projection": "learned"}, {"key_projection": "learned"}):
        config = GraftConfig(memory=MemoryConfig(**setting))
        with pytest.raises(ConfigError, match=r"Set training.order to 'second'"):
            check_trainable(config, "first")
        check_trainable(config, "second")
    check_trainable(GraftConfig(memory=MemoryConfig(key_projection="learned", query_projection="tied")), "first")
