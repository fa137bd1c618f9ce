"""Adapters on disk: round trip, model card, and everything that can be wrong with a folder."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import GraftConfig, MLPConfig, TitansModel
from titans_ds.errors import AdapterError, ConfigError, OutputError


@pytest.fixture
def saved(tmp_path):
    config = GraftConfig(layers=[1, 2], gate_floor=0.1, memory=MLPConfig(dim=16, learn_initial_weights=True, depth=3))
    model = titans_ds.attach(tiny_base("llama"), config)
    with torch.no_grad():
        for _, parameter in model.titans_parameters():
            parameter.add_(torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "adapter")
    return model, tmp_path / "adapter"


def test_round_trip(saved) -> None:
    model, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "titans_config.json", "titans_memory.safetensors"]
    loaded = TitansModel.from_pretrained(tiny_base("llama"), folder)
    assert loaded.graft == model.graft
    ids = token_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert "layers [1, 2]" in (folder / "README.md").read_text()


def test_wrong_base(saved) -> None:
    _, folder = saved
    with pytest.raises(AdapterError, match=r"another base model.*hidden_size 16 instead of 32"):
        TitansModel.from_pretrained(tiny_base("llama", hidden_size=16), folder)
    with pytest.raises(AdapterError, match="model_type qwen2 instead of 'llama'"):
        TitansModel.from_pretrained(tiny_base("qwen2"), folder)


def test_damaged_folders(saved, tmp_path) -> None:
    _, folder = saved
    with pytest.raises(AdapterError, match=r"cannot read .*titans_config.json: No such file"):
        TitansModel.from_pretrained(tiny_base("llama"), tmp_path)
    config = json.loads((folder / "titans_config.json").read_text())
    weights = (folder / "titans_memory.safetensors").read_bytes()
    (folder / "titans_memory.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(AdapterError, match="is damaged"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    (folder / "titans_memory.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"titans_memory.safetensors is missing"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    (folder / "titans_memory.safetensors").write_bytes(weights)
    config["graft"]["memory"]["dim"] = 8
    (folder / "titans_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"has shape \[16, 16\] instead of \[8, 8\]"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    (folder / "titans_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not JSON"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    (folder / "titans_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="graft is missing"):
        TitansModel.from_pretrained(tiny_base("llama"), folder)


def test_names_of_an_earlier_version_and_of_peft_are_told_apart(saved, tmp_path) -> None:
    _, folder = saved
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):  # not taken for PEFT's own
        PeftModel.from_pretrained(tiny_base("llama"), folder)
    for new, old in (
        ("titans_config.json", "adapter_config.json"),
        ("titans_memory.safetensors", "adapter_model.safetensors"),
    ):
        (folder / new).rename(folder / old)
    with pytest.raises(AdapterError, match=r"earlier version; rename adapter_config.json to titans_config.json and "):
        TitansModel.from_pretrained(tiny_base("llama"), folder)
    get_peft_model(tiny_base("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "peft")
    with pytest.raises(AdapterError, match=r"is an adapter of PEFT, with no memory; load it by peft\.PeftModel"):
        TitansModel.from_pretrained(tiny_base("llama"), tmp_path / "peft")


def test_saving_again_replaces_what_was_saved_and_nothing_else(saved, tmp_path) -> None:
    model, folder = saved
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("Test-time", "An old"))
    model.save_pretrained(folder)
    assert "Test-time memory for" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("Mine.")
    (folder / "notes.txt").write_text("mine")
    model.save_pretrained(folder)
    assert [(folder / name).read_text() for name in ("README.md", "notes.txt")] == ["Mine.", "mine"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(OutputError, match="holds something else than an adapter"):
        model.save_pretrained(tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["adapter_config.json"]


def test_unknown_keys_of_a_newer_version_warn_and_drop(saved) -> None:
    model, folder = saved
    config = json.loads((folder / "titans_config.json").read_text())
    config["graft"]["memory"]["momentun"] = 0.9
    (folder / "titans_config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="memory.momentun"):
        assert TitansModel.from_pretrained(tiny_base("llama"), folder).graft == model.graft


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"gate_flor": 0.1}, "unknown setting 'gate_flor'; did you mean 'gate_floor'"),
        ({"memory": {"step_sise": 0.1}}, "unknown setting 'graft.memory.step_sise'; did you mean 'step_size'"),
        ({"gate_floor": 1.0}, r"gate_floor is 1.0; it must be in \[0, 1\)"),
        ({"gate_floor": -0.1}, r"must be in \[0, 1\)"),
        ({"gate_floor": "high"}, "gate_floor is 'high'; expected float"),
        ({"gate_floor_mode": "hard"}, "expected one of 'clamp', 'affine'"),
        ({"layers": []}, "empty list"),
        ({"layers": [1, 1]}, "twice"),
        ({"layers": "deltanet"}, "expected a list of int or one of 'auto', 'attention'"),
        ({"segment_tokens": 0}, "segment_tokens is 0"),
        ({"segment_tokens": 10**11}, "segment_tokens is 100000000000; it must be from 1 to 16,777,216"),
        ({"memory": {"dim": 0}}, "memory.dim is 0"),
        ({"memory": {"preset": "paper", "depth": True}}, "depth is True; expected int"),
        ({"memory": {"preset": "paper", "step_size": 0.0}}, "step_size is 0.0; it must be above 0"),
        ({"memory": {"preset": "paper", "write": "all"}}, "write is 'all'; expected one of 'pooled', 'token'"),
        ({"memory": {"preset": "paper", "initial_scale": 0.0}}, "every inner gradient would be 0"),
    ],
)
def test_settings_errors(values, message) -> None:
    with pytest.raises(ConfigError, match=message):
        GraftConfig.from_dict(values)
