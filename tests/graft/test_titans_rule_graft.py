"""The whole Titans rule inside models: generation, checkpointing, padding, adapters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import preset
from titans_ds.config import GraftConfig
from titans_ds.errors import ConfigError
from titans_ds.memory import MemoryState, Pass


def attach(family: str = "llama", injection: str = "additive", **features: bool) -> titans_ds.TitansModel:
    memory = preset("titans", dim=16, heads=2, step_size=0.5)
    rule = dataclasses.replace(memory.rule, chunk_size=4)
    if injection == "mac":  # its queries are its own
        memory = dataclasses.replace(memory, query_projection="tied")
        features = {"convolve_queries": False, **features}
    memory = dataclasses.replace(memory, rule=rule, features=dataclasses.replace(memory.features, **features))
    config = GraftConfig(layers="attention", memory=memory, injection=injection, gate_init=2.0)
    model = titans_ds.attach(tiny_base(family), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.titans_parameters():
            if "convolution" in name or "gates" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def written(model: titans_ds.TitansModel, *rows: int) -> titans_ds.MemoryState:
    with model.memory_session(len(rows)) as session:
        model.prime([token_ids(22, seed=row).tolist() for row in rows], session)
        return session.state


@pytest.mark.parametrize("name", ["delta", "gated_delta", "titans", "ttt_linear"])
def test_every_token_that_was_primed_can_be_read(name: str, tmp_path: Path) -> None:
    """Also where a text ends inside of a chunk; and the session goes on from there, through a file as well."""
    memory = preset(name, dim=16)
    model = titans_ds.attach(tiny_base("llama"), GraftConfig(layers="attention", memory=memory, gate_init=2.0)).eval()
    prompt = token_ids(1, 6, seed=3)
    unwritten = model(prompt, memory=model.init_state(1)).logits
    for tokens in (2, 20, 21, 63, 64, 65):
        with model.memory_session(1) as session:
            model.prime(token_ids(1, tokens, seed=1), session)
            logits = model(prompt, memory=session.state).logits
        assert (logits - unwritten).abs().max() > 1e-3, tokens
        # The last token too: another one in its place is another memory.
        changed = token_ids(1, tokens, seed=1)
        changed[0, -1] = 3 + (changed[0, -1] - 2) % 100
        with model.memory_session(1) as session:
            model.prime(changed, session)
            assert not torch.equal(model(prompt, memory=session.state).logits, logits), tokens
    with model.memory_session(1) as session:
        model.prime(token_ids(1, 20, seed=1), session)
        session.state.save(tmp_path / "state.safetensors")
        model.prime(token_ids(1, 70, seed=2), session)
        expected = model(prompt, memory=session.state).logits
        text = model.generate(prompt, memory=session, max_new_tokens=5, do_sample=False)
        session.state = MemoryState.load(tmp_path / "state.safetensors")[0]
        model.prime(token_ids(1, 70, seed=2), session)
        torch.testing.assert_close(model(prompt, memory=session.state).logits, expected, rtol=0, atol=0)
        assert torch.equal(model.generate(prompt, memory=session, max_new_tokens=5, do_sample=False), text)


@pytest.mark.parametrize("injection", ["additive", "mac", "mag", "mal"])
@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_cached_generation_equals_the_full_forward_pass(family, injection) -> None:
    """Each step's queries are convolved with the tokens before it, across the steps."""
    model, ids = attach(family, injection), token_ids(2, 9, seed=3)
    with model.memory_session(2) as session:
        session.state = written(model, 0, 1)
        options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        out = model.generate(ids, memory=session, max_new_tokens=6, **options)
        full = model(out.sequences, memory=session.state).logits
        again = model.generate(ids, memory=session, max_new_tokens=6, **options)
    for step, logits in enumerate(out.logits):
        torch.testing.assert_close(full[:, 8 + step], logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again.logits[step], logits, rtol=0, atol=0)  # nothing was left behind


def test_left_padding_does_not_reach_the_convolution() -> None:
    model, ids = attach(), token_ids(1, 6, seed=3)
    state = written(model, 0)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    expected = model(ids, memory=state).logits
    torch.testing.assert_close(
        model(padded, attention_mask=mask, memory=state).logits[:, 3:], expected, rtol=1e-4, atol=1e-4
    )
    with model.memory_session(1) as session:
        session.state = state
        plain = model.generate(ids, memory=session, max_new_tokens=5, do_sample=False)
        shifted = model.generate(padded, attention_mask=mask, memory=session, max_new_tokens=5, do_sample=False)
    assert torch.equal(shifted[:, 3:], plain)


def test_beam_search_is_refused_where_queries_are_convolved() -> None:
    ids = token_ids(1, 6, seed=3)
    with pytest.raises(ConfigError, match="convolve_queries"):
        attach().generate(ids, num_beams=2, max_new_tokens=3)
    attach(convolve_queries=False).generate(ids, num_beams=2, max_new_tokens=3)


@pytest.mark.parametrize("injection", ["additive", "mac", "mag", "mal"])
def test_second_order_gradients_survive_checkpointing(injection) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = attach("llama", injection).train()
        if checkpointing:
            model.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        state, loss, mask = None, torch.zeros(()), torch.tensor([[1] * 11, [1] * 7 + [0] * 4])
        for segment in range(3):
            output = model.read_write(
                token_ids(2, 11, seed=segment), state=state, write_mask=mask, plan=Pass(graph=True)
            )
            state, loss = output.state, loss + output.last_hidden.square().mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in model.titans_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        if "initial_w" not in name:
            assert gradient.norm() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-6, atol=1e-9)


def test_an_adapter_of_the_whole_rule_comes_back(tmp_path) -> None:
    model, ids = attach(), token_ids(1, 9, seed=3)
    model.save_pretrained(tmp_path)
    loaded = titans_ds.TitansModel.from_pretrained(tiny_base("llama"), tmp_path).eval()
    torch.testing.assert_close(
        loaded(ids, memory=written(loaded, 5)).logits, model(ids, memory=written(model, 5)).logits, rtol=0, atol=0
    )
