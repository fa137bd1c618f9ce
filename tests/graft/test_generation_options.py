"""Every option of generate() with a memory is right, or refused by name.

The reference of a memory that is read token by token: full forward passes without a cache, the best token of each.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import titans_ds
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import GraftConfig, MemorySession, TitansModel, preset
from titans_ds.errors import ConfigError, DataError, StateError

NEW = 8
READ_BY_TOKEN = ("delta", "gated_delta", "gradmem")
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def graft(name: str) -> TitansModel:
    sizes = {} if name == "gradmem" else {"dim": 16}
    gate = {} if name == "gradmem" else {"gate_init": 2.0}
    config = GraftConfig(layers="attention", segment_tokens=16, memory=preset(name, **sizes), **gate)  # type: ignore[arg-type]
    return titans_ds.attach(tiny_base("llama"), config).eval()


def primed(model: TitansModel, batch: int = 1) -> MemorySession:
    session = MemorySession(model.init_state(batch), lambda: "")
    model.prime(token_ids(batch, 30, seed=1), session)
    return session


def full_passes(model: TitansModel, ids: Tensor, memory: MemorySession, unconditional: float = 1.0) -> Tensor:
    """The text after NEW greedy tokens, by one whole forward pass a token; with classifier-free guidance above 1."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW):
            scores = model(ids, memory=memory.state, use_cache=False).logits[:, -1].log_softmax(-1)
            if unconditional != 1.0:
                other = model(ids[:, start - 1 :], memory=memory.state, use_cache=False).logits[:, -1].log_softmax(-1)
                scores = other + unconditional * (scores - other)
            ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids


ONE_TEXT: dict[str, dict[str, Any]] = {
    "cache": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "dynamic"},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "one beam": {"num_beams": 1},
}


@pytest.mark.parametrize("option", ONE_TEXT)
@pytest.mark.parametrize("name", READ_BY_TOKEN)
def test_an_option_changes_no_greedy_token(name: str, option: str) -> None:
    model, ids = graft(name), torch.cat([token_ids(1, 6), token_ids(1, 6)], dim=1)
    memory = primed(model)
    expected = full_passes(model, ids, memory)
    assert torch.equal(model.generate(ids, memory=memory, **GREEDY, **ONE_TEXT[option]), expected)
    with model.reading(memory):
        assert torch.equal(model.base_model.generate(ids, **GREEDY, **ONE_TEXT[option]), expected)


@pytest.mark.parametrize("name", READ_BY_TOKEN)
def test_guidance_an_assistant_and_a_carried_cache(name: str) -> None:
    model, ids = graft(name), token_ids(1, 12)
    memory = primed(model)
    guided = model.generate(ids, memory=memory, guidance_scale=1.5, **GREEDY)
    assert torch.equal(guided, full_passes(model, ids, memory, unconditional=1.5))
    expected = full_passes(model, ids, memory)
    assistant = tiny_base("llama", seed=3, num_hidden_layers=2)
    assert torch.equal(model.generate(ids, memory=memory, assistant_model=assistant, **GREEDY), expected)
    first = model.generate(ids, memory=memory, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 3})
    rest = {**GREEDY, "max_new_tokens": NEW - 3, "past_key_values": first.past_key_values}
    assert torch.equal(model.generate(first.sequences, memory=memory, **rest), expected)


@pytest.mark.parametrize("name", READ_BY_TOKEN)
def test_beams_and_several_sequences_equal_those_without_a_cache(name: str) -> None:
    model, ids = graft(name), token_ids(2, 9)
    memory = primed(model, batch=2)
    for options in ({"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}):
        cached, full = (model.generate(ids, memory=memory, use_cache=c, **GREEDY, **options) for c in (True, False))
        assert torch.equal(cached, full)
        with model.reading(memory):
            assert torch.equal(model.generate(ids, **GREEDY, **options), full)
    sampling = {**GREEDY, "do_sample": True, "top_k": 1}
    several = model.generate(ids, memory=memory, num_return_sequences=3, **sampling)
    for row in range(2):
        own = MemorySession(memory.state.select(torch.tensor([row])), lambda: "")
        expected = full_passes(model, ids[row : row + 1], own)
        assert torch.equal(several[3 * row : 3 * row + 3], expected.expand(3, -1))


@pytest.mark.parametrize("name", [*READ_BY_TOKEN, "titans"])
def test_padding_on_the_left_changes_no_token_and_is_never_written(name: str) -> None:
    """Also where no mask is given: generate() knows padding by its token, and so does write_prompt."""
    model, short, long = graft(name), token_ids(1, 6, seed=4), token_ids(1, 9, seed=5)
    ids = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1), long])
    mask = (ids != 0).long()
    for write_prompt in (False, True):
        texts, states = [], []
        for given in ({"attention_mask": mask}, {}):
            memory = primed(model, batch=2)
            texts.append(model.generate(ids, memory=memory, write_prompt=write_prompt, **given, **GREEDY))
            states.append(memory.state)
        assert torch.equal(texts[0], texts[1])
        for row, prompt in enumerate((short, long)):
            own = MemorySession(primed(model, batch=2).state.select(torch.tensor([row])), lambda: "")
            expected = model.generate(prompt, memory=own, write_prompt=write_prompt, **GREEDY)
            assert torch.equal(texts[0][row, 9:], expected[0, prompt.shape[1] :])
            for index, layer in own.state.layers.items():
                for entry, tensor in layer.items():
                    torch.testing.assert_close(
                        states[1].layers[index][entry][row], tensor[0], atol=1e-5, rtol=1e-5, equal_nan=True
                    )


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt_lookup_num_tokens": 4}, "prompt_lookup_num_tokens=4"),
        ({"guidance_scale": 1.5}, "guidance_scale=1.5"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"assistant_model": tiny_base("llama")}, "assistant_model"),
    ],
)
def test_convolved_queries_refuse_by_name_what_they_cannot_follow(options: dict[str, Any], named: str) -> None:
    model = graft("titans")
    memory = primed(model)
    with pytest.raises(ConfigError, match=f"generate: {named} can't follow.*convolve_queries false"):
        model.generate(token_ids(1, 6), memory=memory, **GREEDY, **options)
    with model.disable_memory():  # the base alone goes along
        model.generate(token_ids(1, 6), **{**GREEDY, "max_new_tokens": 2}, **options)


def test_convolved_queries_follow_a_text_with_and_without_a_cache() -> None:
    model, ids = graft("titans"), token_ids(1, 12)
    memory = primed(model)
    expected = full_passes(model, ids, memory)
    for use_cache in (True, False):
        assert torch.equal(model.generate(ids, memory=memory, use_cache=use_cache, **GREEDY), expected)
    with model.reading(memory):  # one text after another, each from its own start
        for _ in range(2):
            assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_convolved_queries_refuse_a_cache_of_tokens_that_they_have_not_followed() -> None:
    model, ids = graft("titans"), token_ids(1, 12)
    memory = primed(model)
    first = model.generate(ids, memory=memory, return_dict_in_generate=True, **{**GREEDY, "max_new_tokens": 3})
    with pytest.raises(ConfigError, match="past_key_values"):
        model.generate(first.sequences, memory=memory, past_key_values=first.past_key_values, **GREEDY)
    with torch.no_grad():
        whole = model(ids, memory=memory.state).logits[:, 8:]
        start, moved = model.read(ids[:, :8], memory=memory.state, use_cache=True)
        cache = {"past_key_values": start.past_key_values}
        with pytest.raises(ConfigError, match=r"holds 8 tokens that it has not followed.*TitansModel\.read"):
            model(ids[:, 8:], memory=memory.state, **cache)
        with model.reading(memory), pytest.raises(ConfigError, match="holds 8 tokens"):
            model.base_model(ids[:, 8:], **cache)
        rest = model.read(ids[:, 8:], memory=moved, **cache)[0].logits
    torch.testing.assert_close(rest, whole, atol=1e-4, rtol=1e-4)


def test_a_prompt_is_not_written_twice() -> None:
    model, ids = graft("delta"), token_ids(1, 6)
    memory = primed(model)
    first = model.generate(ids, memory=memory, return_dict_in_generate=True, **GREEDY)
    with pytest.raises(ConfigError, match="a second time"):
        model.generate(
            first.sequences, memory=memory, write_prompt=True, past_key_values=first.past_key_values, **GREEDY
        )


def counted(model: TitansModel, ids: Tensor, **options: Any) -> tuple[Tensor, int]:
    """What is generated, and in how many forward passes of the base model."""
    passes = []
    handle = model.base_model.register_forward_hook(lambda *_: passes.append(1))
    text = model.generate(ids, **{**GREEDY, "max_new_tokens": 40, **options})
    handle.remove()
    return text, len(passes)


@pytest.mark.parametrize("name", READ_BY_TOKEN)
def test_lookup_in_primed_files_gives_the_same_text(name: str) -> None:
    """Whatever they hold; also beside sampling, a stop token, and a length that ends within a guess."""
    model, ids = graft(name), token_ids(1, 8, seed=1)  # the beginning of what is primed
    memory = primed(model)
    assert memory.primed == token_ids(1, 30, seed=1).tolist()
    greedy, _ = counted(model, ids, memory=memory)
    for options in ({}, {"eos_token_id": int(greedy[0, 20])}, {"max_new_tokens": 3}, {"do_sample": True, "top_k": 1}):
        expected, _ = counted(model, ids, memory=memory, **options)
        looked_up = {"prompt_lookup_num_tokens": 7, "lookup_primed": True, "memory": memory, **options}
        assert torch.equal(counted(model, ids, **looked_up)[0], expected)
    assert "_get_candidate_generator" not in vars(model.base_model)


def test_a_text_copied_from_a_primed_file_takes_fewer_passes() -> None:
    """The gate is all but closed, so that the memory of a text does not change what the model says after it."""
    model, ids = graft("delta"), token_ids(1, 6)
    for gate in model.gate_parameters().values():
        gate.data.fill_(-20.0)
    with model.memory_session(1) as memory:
        model.prime(token_ids(1, 20, seed=3), memory)
        file, passes = counted(model, ids, memory=memory)
        model.prime(file, memory)
        guessing = {"memory": memory, "prompt_lookup_num_tokens": 10}
        prompt_alone, by_prompt = counted(model, ids, **guessing)
        text, by_file = counted(model, ids, lookup_primed=True, **guessing)
        assert torch.equal(text, file)
        assert torch.equal(prompt_alone, file)
        assert passes == 40
        assert by_file < min(by_prompt, 10)
        memory.reset()
        with pytest.raises(StateError, match="lookup_primed needs a session of one sample that has primed text"):
            model.generate(ids, lookup_primed=True, **guessing, **GREEDY)
        with pytest.raises(ConfigError, match="lookup_primed needs prompt_lookup_num_tokens"):
            model.generate(ids, memory=memory, lookup_primed=True, **GREEDY)


def test_a_prompt_padded_on_the_right_is_refused() -> None:
    model, ids = graft("delta"), token_ids(2, 6)
    ids[0, -1] = 0  # the padding token
    memory = primed(model, batch=2)
    for given in ({}, {"attention_mask": (ids != 0).long()}):
        with pytest.raises(DataError, match=r"padded on the right.*padding_side = 'left'"):
            model.generate(ids, memory=memory, **given, **GREEDY)
        with model.disable_memory():  # the base alone does as it does
            assert model.generate(ids, **given, **GREEDY).shape == (2, 6 + NEW)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"cache_implementation": "quantized"}, ImportError, "optimum-quanto"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, ValueError, "Group Beam Search requires"),
        ({"num_beams": 2, "force_words_ids": [[3]]}, ValueError, "Constrained Beam Search requires"),
        ({"penalty_alpha": 0.6, "top_k": 4}, ValueError, "Contrastive Search requires"),
    ],
)
def test_what_transformers_does_not_have_it_refuses_itself(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    """Ways to search that moved to repositories of code, and caches of packages that are not installed."""
    model = graft("delta")
    if "cache_implementation" in options and importlib.util.find_spec("optimum"):
        pytest.skip("optimum-quanto is installed")
    with pytest.raises(error, match=says):
        model.generate(token_ids(1, 6), memory=primed(model), **{**GREEDY, **options})
