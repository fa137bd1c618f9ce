"""The trained memories that come along: found by name, told as measured, and loadable on a base of their shape."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from titans_ds import TitansModel, assets
from titans_ds.errors import AdapterError


def test_a_name_that_is_none_says_which_there_are() -> None:
    with pytest.raises(AdapterError, match=r"'qwen' comes along; expected one of hybrid, qwen2.5-coder-0.5b"):
        assets.adapter("qwen")


@pytest.mark.parametrize("name", ["hybrid", "qwen2.5-coder-0.5b"])
def test_the_card_tells_the_losses_that_training_measured(name: str) -> None:
    """All four, and own memory better than the others by more than three standard errors."""
    folder = assets.adapter(name)
    told = json.loads((folder / "titans_config.json").read_text())["provenance"]
    card = (folder / "README.md").read_text()
    assert f"| own memory | {told['losses']['memory']['mean']:.4f} ± " in card
    for mode in ("wrong", "empty", "ablated"):
        found = told["minus_memory"][mode]
        assert f"{told['losses'][mode]['mean']:.4f} ± " in card
        assert f"| {found['mean']:.4f} ± {found['standard_error']:.4f} |" in card
        assert found["mean"] > 3 * found["standard_error"]


def test_the_memory_of_the_half_billion_model_loads_on_its_shape() -> None:
    """24 layers of 896, with random weights, a small vocabulary and narrow MLPs."""
    config = Qwen2Config(
        vocab_size=64, hidden_size=896, intermediate_size=16, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = assets.adapter("qwen2.5-coder-0.5b")
    model = TitansModel.from_pretrained(AutoModelForCausalLM.from_config(config), folder).eval()
    assert "[8, 12, 16, 20]: 1 head of 896" in model.memory_summary()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 24e6
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad(), model.memory_session(batch_size=1) as memory:
        logits = []
        for _ in range(2):
            with model.reading(memory):
                logits.append(model(input_ids=ids).logits)
            model.prime(ids.flip(1), memory)
    assert torch.isfinite(logits[1]).all()
    assert not torch.equal(logits[0], logits[1])
