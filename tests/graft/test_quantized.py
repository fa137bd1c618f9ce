"""Bases in 4 and 8 bits: a memory on one is a memory on its weights, and every gradient arrives."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import GraftConfig, LoraSettings, TitansModel, preset
from titans_ds.errors import ConfigError
from titans_ds.graft import quantized
from titans_ds.memory import Pass
from titans_ds.training import build
from titans_ds.training.settings import ModelSettings
from titans_ds.zero.footprint import Model, Setup, parameter_bytes

SMOLLM = Path.home() / ".cache" / "titans-models" / "smollm2-135m"
# How near a gradient is to that on the same weights written out: bnb-8bit rounds activations to 8 bits as well.
NEAR = {"bnb-4bit": 1e-3, "bnb-8bit": 0.1, "torchao-int8": 1e-3}
FORMS = [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}"))
    for name, (package, _, _) in quantized.FORMS.items()
]
needs_bnb = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plain") / "base"
    tiny_base("llama", hidden_size=64, intermediate_size=128).save_pretrained(place)
    return place


def load(folder: Path, name: str = "none", **settings: Any) -> nn.Module:
    return build.load_base(ModelSettings(base=str(folder), quantization=name, **settings), 0, 0).eval()


def written_out(module: Any) -> torch.Tensor:
    """The values that a quantised weight stands for."""
    weight = module.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):
        scales = module.state.SCB if weight.SCB is None else weight.SCB  # the first product takes them along
        return weight.data.float() * scales[:, None] / 127
    return weight.dequantize()


def plain_twin(base: nn.Module, folder: Path) -> nn.Module:
    """A plain model whose weights are those that a quantised one stands for."""
    twin = load(folder)
    with torch.no_grad():
        for name, module in base.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                twin.get_submodule(name).weight.copy_(written_out(module))
    return twin


def gradients(model: TitansModel) -> torch.Tensor:
    """Of a loss after priming, of all that is learned, in one vector."""
    torch.manual_seed(0)
    with torch.no_grad():  # P_o starts as what makes a read of nothing nothing
        for _, parameter in model.titans_parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    model.zero_grad()
    ids = token_ids(2, 24)
    state = model.read_write(token_ids(2, 24, seed=1)).state
    hidden = model.read_write(ids, state=state).last_hidden
    logits = model.logits(hidden)[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", FORMS)
def test_every_gradient_arrives_also_after_an_evaluation(name: str, folder: Path) -> None:
    base = load(folder, name)
    stored = plain_twin(base, folder)
    with torch.no_grad():  # before and after the memory: a layer may have another form of its weights for this
        base(token_ids(1, 8))
        model = titans_ds.attach(base)
        model(token_ids(1, 8), memory=model.init_state(1))
    twin = plain_twin(base, folder)
    for before, after in zip(stored.parameters(), twin.parameters(), strict=True):  # scales, in 8 bits of precision
        torch.testing.assert_close(after, before, rtol=2**-8, atol=0)
    plain = titans_ds.attach(twin)
    found, expected = gradients(model.train()), gradients(plain.train())
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < NEAR[name]


@pytest.mark.parametrize("name", FORMS)
def test_a_memory_on_a_quantised_base_and_its_adapter_on_both(name: str, folder: Path, tmp_path: Path) -> None:
    base, ids = load(folder, name), token_ids(2, 9)
    model = titans_ds.attach(base)
    with torch.no_grad(), model.memory_session(2) as memory:
        with model.disable_memory():
            plain = model(ids).logits
        assert torch.equal(base(ids).logits, plain)
        assert torch.equal(model(ids, memory=memory.state).logits, plain)  # nothing was read yet
        model.prime(token_ids(2, 30, seed=1), memory)
        read = model(ids, memory=memory.state).logits
        assert not torch.equal(read, plain)
        model.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "titans_config.json").read_text())
        package = "torchao" if name == "torchao-int8" else "bitsandbytes"
        assert written["base_model"]["quantization"]["quant_method"] == package
        again = TitansModel.from_pretrained(load(folder, name), tmp_path).eval()
        assert torch.equal(again(ids, memory=memory.state).logits, read)
        form = quantized.settings_of(name, {}, "float32")
        by_path = TitansModel.from_pretrained(folder, tmp_path, quantization_config=form).eval()
        assert torch.equal(by_path(ids, memory=memory.state).logits, read)
        on_plain = TitansModel.from_pretrained(folder, tmp_path).eval()
        assert quantized.describe(on_plain.base_model.config) is None
        assert on_plain(ids, memory=memory.state).logits.shape == read.shape
    assert model.parameter_counts() == on_plain.parameter_counts()
    assert {p.dtype for _, p in model.titans_parameters()} == {torch.float32}


@pytest.mark.parametrize("name", FORMS)
def test_lora_and_a_prefix_memory_learn_through_a_quantised_base(name: str, folder: Path, tmp_path: Path) -> None:
    lora = LoraSettings(rank=2, targets=["all-linear"])
    config = GraftConfig(layers="attention", memory=preset("gradmem"))  # type: ignore[arg-type]
    ids = token_ids(2, 12)
    for model in (titans_ds.attach(load(folder, name), lora=lora), titans_ds.attach(load(folder, name), config)):
        model.train()
        state = model.read_write(token_ids(2, 12, seed=1), plan=Pass(graph=True, through_base=True)).state
        model.logits(model.read_write(ids, state=state).last_hidden).logsumexp(-1).mean().backward()
        learned = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert sum(float(g.abs().sum()) for g in learned) > 0
        assert all(bool(g.isfinite().all()) for g in learned)
    model = titans_ds.attach(load(folder, name), lora=lora)
    model.save_pretrained(tmp_path)
    assert TitansModel.from_pretrained(load(folder, name), tmp_path).lora == model.lora


@pytest.mark.parametrize("name", FORMS)
def test_the_estimate_counts_what_the_weights_take(name: str, folder: Path) -> None:
    base = load(folder, name)
    maps = [m.weight for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    parts: Callable[[Any], list[torch.Tensor]] = lambda w: (  # noqa: E731
        [w.data, w.quant_state.absmax] if hasattr(w, "quant_state") else [w.data] if hasattr(w, "SCB") else [w.qdata]
    )
    counted = sum(t.numel() * t.element_size() for weight in maps for t in parts(weight))
    number = sum(
        m.weight.numel() for n, m in load(folder).named_modules() if isinstance(m, nn.Linear) and n != "lm_head"
    )
    settings = quantized.describe(base.config)
    assert settings is not None
    setup = Setup(0, 1, linear_bytes=quantized.bytes_per_weight(settings))
    assert parameter_bytes(Model(number, 0, 0, 1, 1, 1, linear=number), setup) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"quantization": "bnb-4bits"}, r"'bnb-4bits', which is unknown; did you mean 'bnb-4bit'\?"),
        ({"quantization": "bnb-4bit", "trainable": "all"}, "weights of few bits don't learn"),
        ({"quantization_options": {"bnb_4bit_quant_type": "fp4"}}, "quantization is 'none'; name a form"),
        ({"base": None, "architecture": {"model_type": "llama"}, "quantization": "bnb-8bit"}, "give model.base"),
    ],
)
def test_settings_that_can_not_work_are_named(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ModelSettings(**{"base": "somewhere", **settings})


@needs_bnb
def test_options_go_to_the_package_and_unknown_ones_are_named(folder: Path) -> None:
    options = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}
    base = load(folder, "bnb-4bit", quantization_options=options)
    assert base.model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "fp4"
    with pytest.raises(
        ConfigError, match=r"'bnb_4bit_quant_typ', which is unknown; did you mean 'bnb_4bit_quant_type'"
    ):
        load(folder, "bnb-4bit", quantization_options={"bnb_4bit_quant_typ": "nf4"})


def test_a_missing_package_is_named_with_its_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, extra in (("bnb-4bit", "quantization"), ("torchao-int8", "torchao")):
        with pytest.raises(ConfigError, match=rf"install it: pip install 'titans-ds\[{extra}\]'"):
            load(folder, name)


@needs_bnb
@pytest.mark.long
@pytest.mark.skipif(not (SMOLLM / "config.json").is_file(), reason=f"no model at {SMOLLM}")
def test_a_real_model_in_four_bits_remembers_generates_and_learns() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM)
    model = titans_ds.attach(load(SMOLLM, "bnb-4bit", dtype="bfloat16"))
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), model.memory_session(1) as memory:
        with model.disable_memory():
            plain = model.generate(ids, **options)
        assert "Paris" in tokenizer.decode(plain[0])
        assert torch.equal(model.generate(ids, memory=memory, **options), plain)  # an empty memory is the base
        model.prime_text(tokenizer, ["def area(radius):\n    return 3.14159 * radius**2\n"], memory)
        assert model.generate(ids, memory=memory, **options).shape[1] > ids.shape[1]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    losses = []
    for _ in range(3):
        state = model.train().read_write(ids).state
        logits = model.logits(model.read_write(ids, state=state).last_hidden)[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
