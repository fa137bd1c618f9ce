"""Persistent tokens: learned keys and values of the attention layers, beside any injection."""

from __future__ import annotations

import pytest
import torch

import titans_ds
from tests.support.tiny_models import FAMILIES, tiny_base, token_ids
from titans_ds import GraftConfig, MLPConfig, TitansModel
from titans_ds.errors import ConfigError

INJECTIONS = ("additive", "mac", "mag", "mal")


def graft(family: str = "qwen3_5", injection: str = "mac", tokens: int = 3, **settings: object) -> TitansModel:
    memory = MLPConfig(dim=16, step_size=0.05, write="token", query_projection="tied")
    where = {"layers": "attention", "injection": injection, "gate_init": 0.0, **settings}
    if injection == "mac":
        where["memory_tokens"] = 5
    config = GraftConfig(persistent_tokens=tokens, memory=memory, **where)  # type: ignore[arg-type]
    return titans_ds.attach(tiny_base(family, attn_implementation="sdpa"), config)


def primed(model: TitansModel, batch: int):
    with model.memory_session(batch) as memory:
        model.prime(token_ids(batch, 20, seed=5), memory)
        return memory


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_skips_them_and_none_of_them_is_the_graft_without(family, injection) -> None:
    ids = token_ids(2, 9)
    with torch.no_grad():
        expected = tiny_base(family)(ids).logits
        model = graft(family, injection)
        with model.disable_memory():
            assert torch.equal(model(ids).logits, expected)
        assert (model(ids).logits - expected).abs().max() > 1e-3
        without, plain = graft(family, injection, tokens=0)(ids).logits, model(ids).logits
        assert (without - plain).abs().max() > 1e-3
        for memory in model.memories.values():
            memory.persistent.gate.fill_(-90.0)
        torch.testing.assert_close(model(ids).logits, without, atol=1e-4, rtol=1e-4)
    assert "persistent" not in " ".join(n for n, _ in graft(family, injection, tokens=0).titans_parameters())


@pytest.mark.parametrize("injection", ["additive", "mac"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_and_left_padded_generation_equal_the_full_forward(family, injection) -> None:
    model, prompt = graft(family, injection), token_ids(2, 9)
    batch = torch.cat([prompt[:1], torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt[1:, :6]], dim=1)])
    mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    memory = primed(model, 2)
    with torch.no_grad():
        out = model.generate(batch, attention_mask=mask, memory=memory, max_new_tokens=5, do_sample=False)
        for row, text in enumerate((prompt[:1], prompt[1:, :6])):
            own = memory.state.select(torch.tensor([row]))
            for step in range(5):
                logits = model(text, memory=own).logits[:, -1]
                assert int(logits.argmax()) == int(out[row, 9 + step])
                text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_causal(injection) -> None:
    model, ids = graft("qwen3", injection), token_ids(1, 12)
    changed = ids.clone()
    changed[0, 7] += 1
    with torch.no_grad():
        a, b = (model.read_write(x).last_hidden for x in (ids, changed))
    torch.testing.assert_close(a[:, :7], b[:, :7], atol=1e-6, rtol=1e-6)
    assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-3


def test_the_keys_and_values_are_those_of_the_layer_s_projections() -> None:
    """One layer, one query: attention written out, with N further keys at logit q.k / sqrt(d) + log s."""
    base = tiny_base("llama", num_hidden_layers=1, num_key_value_heads=4)
    model = titans_ds.attach(base, GraftConfig(persistent_tokens=3, memory=MLPConfig(dim=8)))
    grafted, attention = model.memories[0], base.model.layers[0].self_attn
    with torch.no_grad():
        grafted.gate.fill_(-90.0)  # nothing but the persistent tokens
        grafted.persistent.gate.fill_(0.3)
        hidden = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
        cos, _ = base.model.rotary_emb(hidden, torch.zeros(1, 1, dtype=torch.long))
        seen: list[torch.Tensor] = []
        handle = attention.register_forward_hook(lambda m, a, out: seen.append(out[0]))
        assert torch.equal(cos, torch.ones_like(cos)), "at position 0 the rotation is the identity"
        model(token_ids(1, 1))
        handle.remove()
        inputs = base.model.layers[0].input_layernorm(base.model.embed_tokens(token_ids(1, 1)))[0]
        tokens = torch.cat([grafted.persistent.tokens, inputs])
        key, value = (p(tokens).view(4, 4, 8).transpose(0, 1) for p in (attention.k_proj, attention.v_proj))
        query = attention.q_proj(inputs).view(1, 4, 8).transpose(0, 1)
        bias = torch.cat([torch.sigmoid(torch.tensor(0.3)).log().expand(3), torch.zeros(1)])
        weights = (query @ key.mT / 8**0.5 + bias).softmax(dim=-1)
        expected = attention.o_proj((weights @ value).transpose(0, 1).flatten(1))
    torch.testing.assert_close(seen[0][0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("injection", INJECTIONS)
def test_first_order_trains_them_with_and_without_recomputation(injection) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = graft("qwen3_5", injection).train()
        if checkpointing:
            model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        model.read_write(token_ids(2, 8)).last_hidden.square().mean().backward()
        gradients.append({n: p.grad for n, p in model.titans_parameters() if "persistent" in n})
    assert len(gradients[0]) == 4
    for name, expected in gradients[0].items():
        assert expected is not None
        assert expected.norm() > 0, name
        assert (gradients[1][name] - expected).norm() <= 1e-6 * expected.norm()


def test_saved_in_the_adapter(tmp_path) -> None:
    model, ids = graft(injection="additive"), token_ids(1, 7)
    with torch.no_grad():
        for memory in model.memories.values():
            memory.persistent.tokens.mul_(1.7)
        model.save_pretrained(tmp_path)
        again = TitansModel.from_pretrained(tiny_base("qwen3_5"), tmp_path)
        assert again.graft.persistent_tokens == 3
        assert torch.equal(again(ids).logits, model(ids).logits)
    base = model.detach()
    with torch.no_grad():
        assert torch.equal(base(ids).logits, tiny_base("qwen3_5")(ids).logits)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="persistent_tokens is -1"):
        GraftConfig(persistent_tokens=-1)
    with pytest.raises(ConfigError, match="without persistent_tokens"):
        graft("qwen3_5", "additive", layers=[0, 1])
