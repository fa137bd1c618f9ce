"""Bases that others have worked on: LoRA by PEFT, quantised layers, weights that wait elsewhere, more tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import LoraSettings, TitansModel
from titans_ds.errors import ConfigError


def with_lora(**settings: object) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **settings)
    return get_peft_model(tiny_base("llama"), config)


@pytest.mark.parametrize("unwrapped", [False, True])
def test_lora_that_the_base_has_is_kept_saved_and_loaded(unwrapped: bool, tmp_path: Path) -> None:
    peft, ids = with_lora().eval(), token_ids(2, 9)
    with torch.no_grad():
        expected = peft(ids).logits
        assert not torch.equal(expected, tiny_base("llama")(ids).logits)
    base = peft.get_base_model() if unwrapped else peft
    model = titans_ds.attach(base)
    assert model.lora == LoraSettings(rank=4, alpha=8.0, targets=["q_proj", "v_proj"])
    assert any(".lora_A." in name for name, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = TitansModel.from_pretrained(tiny_base("llama"), tmp_path)
    with torch.no_grad():
        for one in (model.eval(), loaded.eval()):
            with one.disable_memory():
                torch.testing.assert_close(one(ids).logits, expected)
                with one.disable_lora():
                    torch.testing.assert_close(one(ids).logits, tiny_base("llama")(ids).logits)


def test_adapters_that_could_not_be_saved_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"LoRA with use_dora, .* expected one LoRA adapter .*merge_and_unload"):
        titans_ds.attach(with_lora(use_dora=True))
    with pytest.raises(ConfigError, match="has LoRA of its own already; leave `lora` out"):
        titans_ds.attach(with_lora(), lora=LoraSettings(targets=["o_proj"]))


def test_all_linear_is_every_linear_module_but_the_head(tmp_path: Path) -> None:
    model = titans_ds.attach(tiny_base("llama"), lora=LoraSettings(rank=2, targets=["all-linear"]))
    assert model.lora is not None
    assert model.lora.targets == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    model.save_pretrained(tmp_path)
    assert TitansModel.from_pretrained(tiny_base("llama"), tmp_path).lora == model.lora


def primed_logits(model: TitansModel) -> torch.Tensor:
    ids = token_ids(2, 9)
    with torch.no_grad(), model.memory_session(2) as memory:
        model.prime(token_ids(2, 20, seed=1), memory)
        model.generate(ids, memory=memory, max_new_tokens=2, do_sample=False)
        return model(ids, memory=memory.state).logits


@pytest.mark.parametrize("before", [True, False], ids=["offloaded, then attached", "attached, then offloaded"])
def test_weights_may_wait_in_host_memory(before: bool) -> None:
    expected = primed_logits(titans_ds.attach(tiny_base("llama")).eval())
    base = tiny_base("llama").eval()
    if before:
        cpu_offload(base, execution_device=torch.device("cpu"))
    model = titans_ds.attach(base).eval()
    if not before:
        cpu_offload(base, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in base.parameters())
    torch.testing.assert_close(primed_logits(model), expected)


class Packed(nn.Module):
    """A linear layer as quantisation leaves it: a buffer of whole numbers, and no parameter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.abs().max().item() / 127
        self.register_buffer("packed", (linear.weight / self.scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scale)


def test_attention_without_parameters_takes_a_memory() -> None:
    base = tiny_base("llama").eval()
    for layer in base.model.layers:
        for name, child in list(layer.self_attn.named_children()):
            if isinstance(child, nn.Linear):
                setattr(layer.self_attn, name, Packed(child))
        assert not list(layer.self_attn.parameters())
    model, ids = titans_ds.attach(base).eval(), token_ids(2, 9)
    with torch.no_grad(), model.disable_memory():
        plain = model(ids).logits
    assert not torch.equal(primed_logits(model), plain)


def test_an_adapter_loads_on_a_base_with_more_tokens(tmp_path: Path) -> None:
    titans_ds.attach(tiny_base("llama")).save_pretrained(tmp_path)
    base = tiny_base("llama")
    base.resize_token_embeddings(base.config.vocab_size + 8)
    with pytest.warns(UserWarning, match=r"vocabulary of 128 tokens, this one has 136; is it resized\?"):
        model = TitansModel.from_pretrained(base, tmp_path).eval()
    assert primed_logits(model).shape[-1] == 136
