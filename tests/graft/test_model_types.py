"""Model types of transformers by their structure: one of each class here, all of them in the long tests."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

import titans_ds
from tests.support import model_types
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds.errors import UnsupportedModelError
from titans_ds.graft import families


@pytest.mark.parametrize("model_type", model_types.EXAMPLES)
def test_one_type_of_each_structural_class_attaches_trains_and_generates(model_type: str) -> None:
    found = model_types.examine(model_type)
    assert found.works, found
    assert found.structure == model_types.EXAMPLES[model_type]


@pytest.mark.long
@pytest.mark.parametrize("model_type", model_types.model_types())
def test_every_type_does_what_the_page_of_models_says(model_type: str) -> None:
    page = model_types.PAGE.read_text()
    assert model_types.row(model_types.examine(model_type)) in page, "run python -m tests.support.model_types"


def test_the_page_of_models_names_every_type_of_the_installed_transformers() -> None:
    page = model_types.PAGE.read_text()
    assert [name for name in model_types.model_types() if f"| {name} |" not in page] == []
    assert "fails:" not in page


class TokenMixer(LlamaAttention):
    """Attention under a name that says nothing of it."""


def test_a_model_built_otherwise_is_named_with_register_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_FAMILIES", {})
    base = tiny_base("llama")
    for layer in base.model.layers:
        layer.self_attn.__class__ = TokenMixer
    with pytest.raises(UnsupportedModelError, match=r"no child of layer 0 .* is a token mixer.*register_family"):
        titans_ds.attach(base)
    titans_ds.register_family("llama", layers="model.layers", attention="self_attn")
    model, ids = titans_ds.attach(base).eval(), token_ids(1, 8)
    with torch.no_grad(), model.memory_session(1) as memory:
        model.prime(token_ids(1, 20, seed=1), memory)
        assert not torch.equal(model(ids, memory=memory.state).logits, tiny_base("llama")(ids).logits)


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("mamba", "'mamba' has no attention layer: its mixers are MambaMixer. A memory is grafted beside attention"),
        ("codegen", r"'codegen' can't be grafted: CodeGenAttention.forward takes no further keyword arguments"),
        ("gptj", r"were never called: GPTJForCausalLM does not hand keyword arguments from its layers"),
        ("bert", r"'bert' is an encoder.*is_decoder"),
    ],
)
def test_a_type_that_cannot_be_grafted_says_why(model_type: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        model_types.Checks(model_types.tiny_model(model_type, is_decoder=model_type != "bert"))
