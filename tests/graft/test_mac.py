"""Memory as context: extra keys and values of a layer, beside what graft/test_graft.py shows for every injection."""

from __future__ import annotations

import pytest
import torch

import titans_ds
from tests.support.tiny_models import FAMILIES, tiny_base, token_ids
from titans_ds import GraftConfig, MLPConfig, TitansModel
from titans_ds.errors import ConfigError

MEMORY = MLPConfig(dim=16, step_size=0.05, write="token", query_projection="tied")


def mac(family: str = "qwen3_5", layers: object = "attention", **settings: object) -> TitansModel:
    base = tiny_base(family, attn_implementation=settings.pop("attn_implementation", "sdpa"))
    config = GraftConfig(injection="mac", layers=layers, memory_tokens=5, memory=MEMORY, **settings)  # type: ignore[arg-type]
    return titans_ds.attach(base, config)


def primed(model: TitansModel, batch: int = 2):
    with model.memory_session(batch) as memory:
        model.prime(token_ids(batch, 20, seed=5), memory)
        return memory


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_length_is_unchanged_and_split_prefill_agrees(family) -> None:
    model, ids = mac(family), token_ids(2, 11)
    memory = primed(model)
    with torch.no_grad():
        whole = model(ids, memory=memory.state, use_cache=True)
        first = model(ids[:, :4], memory=memory.state, use_cache=True)
        second = model(ids[:, 4:10], memory=memory.state, past_key_values=first.past_key_values, use_cache=True)
        third = model(ids[:, 10:], memory=memory.state, past_key_values=second.past_key_values, use_cache=True)
    assert whole.past_key_values.get_seq_length() == 11
    assert third.past_key_values.get_seq_length() == 11
    pieces = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(pieces, whole.logits, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_equals_sdpa_with_left_padding(family) -> None:
    ids = token_ids(2, 9)
    mask = torch.tensor([[1] * 9, [0, 0, 0] + [1] * 6])
    # Memory tokens have no position, the queries do: as in generate(), positions count from the first real token.
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = []
    for implementation in ("sdpa", "eager"):
        model = mac(family, attn_implementation=implementation)
        memory = primed(model)
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=positions, memory=memory.state)
            logits.append(out.logits[mask.bool()])
            alone = model(ids[1:, 3:], memory=memory.state.select(torch.tensor([1]))).logits[0]
        torch.testing.assert_close(logits[-1][9:], alone, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(*logits, atol=2e-5, rtol=1e-5)


def test_the_gate_weighs_the_memory_columns() -> None:
    """s -> 0 takes the memory out of the softmax; s = 1 leaves N ordinary keys."""
    model, ids = mac(), token_ids(1, 6)
    memory = primed(model, 1)
    with torch.no_grad():
        plain = model.base_model(ids).logits
        gaps = []
        for g in (-60.0, -3.0, 3.0):
            for gate in model.gate_parameters().values():
                gate.fill_(g)
            gaps.append((model(ids, memory=memory.state).logits - plain).abs().max().item())
    assert gaps[0] < 1e-5 < gaps[1] < gaps[2]


def test_only_some_layers_carry_memory_tokens() -> None:
    model = mac("llama", layers=[2])
    ids, memory = token_ids(2, 7), primed(model)
    with torch.no_grad():
        assert (model(ids, memory=memory.state).logits - model.base_model(ids).logits).abs().max() > 1e-3
    out = model.generate(ids, memory=memory, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 11)
    assert model.detach().config._attn_implementation == "sdpa"


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="layer 0 is a DeltaNet layer"):
        mac(layers=[0, 1])
    base = tiny_base("llama")
    base.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ConfigError, match="'sdpa' or 'eager', not 'flex_attention'"):
        titans_ds.attach(base, GraftConfig(injection="mac", memory=MEMORY))
    with pytest.raises(ConfigError, match="memory_tokens is 0"):
        GraftConfig(memory_tokens=0)
