"""LoRA beside the memory: what trains, what ablation keeps, and both adapters on disk."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import GraftConfig, LoraSettings, MLPConfig, TitansModel
from titans_ds.errors import AdapterError, ConfigError

MEMORY = MLPConfig(dim=16, step_size=0.05, write="token", query_projection="tied")
TARGETS = {"qwen3_5": ["q_proj", "in_proj_qkv"], "gpt_neox": ["query_key_value"], "llama": ["q_proj", "v_proj"]}


def make(family: str = "llama", injection: str = "additive", rank: int = 4) -> TitansModel:
    lora = LoraSettings(rank=rank, alpha=8.0, targets=TARGETS[family])
    config = GraftConfig(layers="attention", injection=injection, gate_init=0.0, memory=MEMORY)  # type: ignore[arg-type]
    model = titans_ds.attach(tiny_base(family), config, lora=lora)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.base_model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("family", sorted(TARGETS))
@pytest.mark.parametrize("injection", ["additive", "mac"])
def test_memory_and_lora_train_together_and_ablate_apart(family, injection) -> None:
    model, ids = make(family, injection), token_ids(2, 9)
    with torch.no_grad():
        expected = tiny_base(family)(ids).logits
        with model.disable_memory():
            with_lora = model(ids).logits
            with model.disable_lora():
                assert torch.equal(model(ids).logits, expected)
        assert (with_lora - expected).abs().max() > 1e-3
        assert (model(ids).logits - with_lora).abs().max() > 1e-3
    out = model.read_write(ids)
    model.logits(out.last_hidden).square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(".lora_A." in n for n in trained)
    assert all(".lora_" in n or ".titans." in n for n in trained)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.norm() > 0, name


def test_both_adapters_load_with_one_call_and_lora_alone_with_peft(tmp_path) -> None:
    model, ids = make(), token_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = TitansModel.from_pretrained(tiny_base("llama"), tmp_path)
    assert loaded.lora == LoraSettings(rank=4, alpha=8.0, targets=["q_proj", "v_proj"])
    by_peft = PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "lora").eval()
    with torch.no_grad(), model.disable_memory():
        torch.testing.assert_close(loaded(ids).logits, loaded(ids).logits)
        with_lora = model(ids).logits
        torch.testing.assert_close(by_peft(ids).logits, with_lora)
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
        assert (loaded(ids).logits - with_lora).abs().max() > 1e-3


def test_lora_errors(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"names 'c_attn', which matches no linear module of this model.*q_proj"):
        titans_ds.attach(tiny_base("llama"), lora=LoraSettings(targets=["c_attn"]))
    with pytest.raises(ConfigError, match=r"lora.rank is 0"):
        LoraSettings(rank=0)
    with pytest.raises(ConfigError, match=r"lora.targets is empty"):
        LoraSettings(targets=[])
    make().save_pretrained(tmp_path)
    (tmp_path / "lora" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(AdapterError, match="is damaged"):
        TitansModel.from_pretrained(tiny_base("llama"), tmp_path)
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="r is missing"):
        TitansModel.from_pretrained(tiny_base("llama"), tmp_path)
