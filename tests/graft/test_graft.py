"""The graft on real (tiny, random) models of every family: identity, isolation, causality, sessions, recomputation."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import titans_ds
from tests.support.tiny_models import FAMILIES, tiny_base, token_ids
from titans_ds import DeltaConfig, GraftConfig, MLPConfig, TitansModel
from titans_ds.errors import ConfigError, DataError, StateError, UnsupportedModelError
from titans_ds.graft import families
from titans_ds.memory import MemoryState, Pass

INJECTIONS = ("additive", "mac", "mag", "mal", "delta", "delta mac")  # the first four with a network as the memory


def graft(
    family: str = "qwen3_5", injection: str = "additive", layers: object = "attention", **memory: object
) -> TitansModel:
    if injection.startswith("delta"):
        injection = injection.removeprefix("delta").strip() or "additive"
        config: DeltaConfig | MLPConfig = DeltaConfig(dim=16, **memory)  # type: ignore[arg-type]
    else:
        query = "tied" if injection == "mac" else "learned"
        settings = {"dim": 16, "step_size": 0.05, "write": "token", "query_projection": query, **memory}
        config = MLPConfig(**settings)  # type: ignore[arg-type]
    where = {"layers": layers, "injection": injection, "segment_tokens": 8, "gate_init": 0.0, "gate_floor": 0.15}
    return titans_ds.attach(tiny_base(family), GraftConfig(memory=config, **where))  # type: ignore[arg-type]


def primed(model: TitansModel, batch: int = 2, seed: int = 5, tokens: int = 20) -> MemoryState:
    with model.memory_session(batch) as memory:
        model.prime(token_ids(batch, tokens, seed=seed), memory)
        return memory.state


def nonfinite(state: MemoryState) -> MemoryState:
    return state.map(lambda t: torch.full_like(t, float("inf")))


@pytest.mark.parametrize("injection", INJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamilyAndInjection:
    def test_disabled_memory_is_the_base_model_bit_for_bit(self, family, injection) -> None:
        ids = token_ids(2, 12)
        with torch.no_grad():
            expected = tiny_base(family)(ids).logits
        texts = tiny_base(family).generate(ids, max_new_tokens=8, do_sample=False)
        model = graft(family, injection)
        broken = nonfinite(primed(model))
        with model.disable_memory(), torch.no_grad(), model.memory_session(2) as memory:
            memory.state = broken
            assert torch.equal(model(ids, memory=broken).logits, expected)
            assert torch.equal(model.generate(ids, memory=memory, max_new_tokens=8, do_sample=False), texts)
            model.train()
            assert torch.equal(model(ids).logits, expected)
        with torch.no_grad():
            assert torch.equal(model.base_model(ids).logits, expected)
        base_names = set(dict(tiny_base(family).named_parameters()))
        assert base_names == {n for n, _ in model.base_model.named_parameters() if ".titans." not in n}

    def test_priming_changes_the_output_and_lowers_the_inner_loss(self, family, injection) -> None:
        model = graft(family, injection)
        ids, text = token_ids(2, 12), token_ids(2, 8, seed=5)
        with torch.no_grad():
            before, after = model(ids).logits, model(ids, memory=primed(model, tokens=8)).logits
            with model.disable_memory():
                ablated = model(ids).logits
            again = model.read_write(text, state=primed(model, tokens=8).layers, plan=Pass(stats=True))
            first = model.read_write(text, plan=Pass(stats=True))
        assert (after - ablated).abs().max() > 1e-2
        assert (after - before).abs().max() > 1e-2
        for index in model.layer_indices[:1]:  # deeper layers meet other hidden states the second time
            assert (first.stats[index]["inner_loss_after"] < first.stats[index]["inner_loss_before"]).all()
            assert (again.stats[index]["inner_loss_before"] < first.stats[index]["inner_loss_before"]).all()

    def test_a_sample_is_the_same_alone_and_in_a_batch(self, family, injection) -> None:
        model = graft(family, injection, token_shift=True)
        lengths, ids = (19, 7, 12), token_ids(3, 19)
        rows = [ids[i, :n].tolist() for i, n in enumerate(lengths)]
        prompts = token_ids(3, 6, seed=2)
        with torch.no_grad(), model.memory_session(3) as memory:
            model.prime(rows, memory)
            together = model(prompts, memory=memory.state).logits
            for i, row in enumerate(rows):
                with model.memory_session(1) as own:
                    model.prime([row], own)
                    last = model.layer_indices[-1]
                    for name, tensor in own.state.layers[last].items():
                        expected = memory.state.layers[last][name][i]
                        torch.testing.assert_close(tensor[0], expected, atol=1e-5, rtol=1e-5)
                    alone = model(prompts[i : i + 1], memory=own.state).logits[0]
                    torch.testing.assert_close(alone, together[i], atol=1e-5, rtol=1e-5)

    def test_left_padded_and_cached_generation_equal_the_full_forward(self, family, injection) -> None:
        model, state = graft(family, injection), primed(graft(family, injection), batch=2)
        prompt = token_ids(2, 9)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt[1:, :6]], dim=1)
        batch = torch.cat([prompt[:1], padded])
        mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
        with torch.no_grad(), model.memory_session(2) as memory:
            memory.state = state
            out = model.generate(batch, attention_mask=mask, memory=memory, max_new_tokens=5, do_sample=False)
            for row, text in enumerate((prompt[:1], prompt[1:, :6])):
                own = state.select(torch.tensor([row]))
                for step in range(5):
                    logits = model(text, memory=own).logits[:, -1]
                    assert int(logits.argmax()) == int(out[row, 9 + step])
                    text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)

    def test_causal(self, family, injection) -> None:
        model = graft(family, injection, token_shift=True)
        ids, state = token_ids(1, 12), primed(model, batch=1)
        changed = ids.clone()
        changed[0, 7] = (changed[0, 7] + 1) % 100 + 3
        with torch.no_grad():
            a, b = (model.read_write(x, state=state.layers).last_hidden for x in (ids, changed))
        torch.testing.assert_close(a[:, :7], b[:, :7], atol=1e-6, rtol=1e-6)
        assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-3

    @pytest.mark.parametrize("second_order", [False, True])
    def test_recomputation_gives_the_same_gradients_over_a_window(self, family, injection, second_order) -> None:
        settings = {} if injection.startswith("delta") else {"learn_initial_weights": True}
        if second_order and settings:
            settings |= {"key_projection": "learned", "value_projection": "learned", "learn_step_size": True}
        gradients = []
        for checkpointing in (False, True):
            model = graft(family, injection, **settings)
            model.train()
            if not second_order:  # as training does: they would get no gradient
                for _, parameter in model.write_only_parameters():
                    parameter.requires_grad_(False)
            if checkpointing:
                model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
            state, total = None, 0.0
            for file in range(3):
                out = model.read_write(token_ids(2, 8, seed=file), state=state, plan=Pass(graph=second_order))
                total = total + model.logits(out.last_hidden).float().square().mean()
                state = out.state if second_order else MemoryState(out.state).detach().layers
            total.backward()
            gradients.append({n: p.grad for n, p in model.titans_parameters() if p.requires_grad})
        for name, expected in gradients[0].items():
            assert expected is not None, name
            assert expected.norm() > 0, name
            assert (gradients[1][name] - expected).norm() <= 1e-6 * expected.norm(), name


def test_reading_and_generating_leave_the_session_alone() -> None:
    model = graft()
    with model.memory_session(2) as memory:
        model.prime(token_ids(2, 12), memory)
        before = memory.state
        copy = before.map(torch.clone)
        model.generate(token_ids(2, 5), memory=memory, max_new_tokens=4, do_sample=True)
        model(token_ids(2, 5), memory=memory.state)
    assert memory.state is before
    for index, layer in copy.layers.items():
        for name, tensor in layer.items():
            assert torch.equal(before.layers[index][name], tensor)


def test_generate_reads_the_memory() -> None:
    model, prompt = graft(), token_ids(2, 5)
    outputs = []
    for seed in (1, 2):
        with model.memory_session(2) as memory:
            model.prime(token_ids(2, 16, seed=seed), memory)
            outputs.append(model.generate(prompt, memory=memory, max_new_tokens=16, do_sample=False))
    assert not torch.equal(*outputs)


def test_write_prompt_primes_however_the_prefill_is_split() -> None:
    model, prompt = graft(), token_ids(1, 19)
    results = []
    for extra in ({}, {"prefill_chunk_size": 4}):
        with model.memory_session(1) as memory:
            out = model.generate(prompt, memory=memory, write_prompt=True, max_new_tokens=6, do_sample=False, **extra)
            results.append((out, memory.state.layers[1]["w0"]))
    with model.memory_session(1) as memory:
        model.prime(prompt, memory)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][1], memory.state.layers[1]["w0"])


def test_beams_and_several_samples_share_their_own_memory() -> None:
    model, prompt = graft(), token_ids(2, 5)
    state = primed(model)
    together, alone = [], []
    for rows in ([0, 1], [0], [1]):
        with model.memory_session(len(rows)) as memory:
            memory.state = state.select(torch.tensor(rows))
            out = model.generate(
                prompt[rows], memory=memory, max_new_tokens=6, num_beams=3, num_return_sequences=2, do_sample=False
            )
            (together if len(rows) == 2 else alone).append(out)
    assert together[0].shape[0] == 4
    assert torch.equal(together[0], torch.cat(alone))


def test_deltanet_layers_can_carry_a_memory() -> None:
    model = graft(layers=[0, 3])
    assert model.layer_indices == [0, 3]
    ids, state = token_ids(2, 6), primed(model)
    with torch.no_grad():
        assert (model(ids, memory=state).logits - model(ids).logits).abs().max() > 1e-2
        model.train()
        model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
    out = model.read_write(ids, state=state.layers)
    model.logits(out.last_hidden).square().mean().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for _, p in model.titans_parameters())


@pytest.mark.parametrize(("mode", "moves"), [("clamp", False), ("affine", True)])
def test_gate_floor(mode, moves) -> None:
    config = GraftConfig(
        layers="attention", gate_init=-5.0, gate_floor=0.15, gate_floor_mode=mode, memory=MLPConfig(dim=16)
    )
    model = titans_ds.attach(tiny_base("llama"), config)
    for value in model.gates().values():
        torch.testing.assert_close(value, torch.tensor([0.15]), atol=0.01, rtol=0)
        assert value >= 0.15
    out = model.read_write(token_ids(1, 6))
    model.logits(out.last_hidden).square().mean().backward()
    assert all((gate.grad.abs().item() > 0) == moves for gate in model.gate_parameters().values())


def test_frozen_base_and_detach() -> None:
    base = tiny_base("qwen3")
    base.lm_head.weight.requires_grad_(False)
    model = titans_ds.attach(base, GraftConfig(layers="attention", memory=MLPConfig(dim=16)))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"base_model.model.layers.{n.split('.')[1]}.self_attn.titans.{n.split('.', 2)[2]}"
        for n, _ in model.titans_parameters()
    }
    trainable, total = model.parameter_counts()
    assert trainable == 4 * (16 * 32 + 1)
    assert total == sum(p.numel() for p in model.parameters())
    assert model.detach() is base
    assert not any("titans" in n for n in base.state_dict())
    assert not base.lm_head.weight.requires_grad
    assert base.model.norm.weight.requires_grad
    titans_ds.attach(base)  # and again


def test_a_state_saved_in_one_process_completes_in_another(tmp_path) -> None:
    model, prompt = graft(), token_ids(2, 5)
    tiny_base("qwen3_5").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with model.memory_session(2) as memory:
        model.prime(token_ids(2, 20, seed=3), memory)
        memory.save(tmp_path / "state.safetensors")
        expected = model.generate(prompt, memory=memory, max_new_tokens=8, do_sample=False)
    script = f"""
import titans_ds
from tests.support.tiny_models import token_ids
model = titans_ds.TitansModel.from_pretrained({str(tmp_path / "base")!r}, {str(tmp_path / "adapter")!r})
with model.memory_session(2) as memory:
    memory.load({str(tmp_path / "state.safetensors")!r})
    print(model.generate(token_ids(2, 5), memory=memory, max_new_tokens=8, do_sample=False).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(expected.tolist())


def test_session_errors(tmp_path) -> None:
    model, other = graft(), graft(seed=1)
    with model.memory_session(2) as memory:
        memory.save(tmp_path / "state")
        with pytest.raises(StateError, match="holds 2 samples, but the input has 3"):
            model.prime(token_ids(3, 4), memory)
        with pytest.raises(StateError, match="holds 2 samples, but the input has 1"):
            model.generate(token_ids(1, 4), memory=memory)
        with pytest.raises(DataError, match=r"expected \[batch, tokens\]"):
            model.prime(token_ids(4), memory)
    with other.memory_session(2) as memory, pytest.raises(StateError, match="another adapter"):
        memory.load(tmp_path / "state")
    with model.memory_session(3) as memory, pytest.raises(StateError, match="holds 2 samples, this session 3"):
        memory.load(tmp_path / "state")


def test_reset_forgets() -> None:
    model = graft()
    with model.memory_session(2) as memory:
        model.prime(token_ids(2, 12), memory)
        written = memory.state
        memory.reset(torch.tensor([True, False]))
        assert torch.equal(memory.state.layers[1]["w0"][0], memory.initial.layers[1]["w0"][0])
        assert torch.equal(memory.state.layers[1]["w0"][1], written.layers[1]["w0"][1])
        memory.reset()
        assert torch.equal(memory.state.layers[1]["w0"], memory.initial.layers[1]["w0"])


def test_controls_change_the_rule_inside_the_context_only() -> None:
    model, ids = graft(), token_ids(1, 8)
    plain = primed(model, 1).layers[1]["w0"]
    with model.controls(inner_steps=0):
        assert torch.equal(primed(model, 1).layers[1]["w0"], model.init_state(1).layers[1]["w0"])
    with model.controls(sign=-1.0):
        assert (primed(model, 1, tokens=8).layers[1]["w0"] - plain).abs().max() > 1e-3
    state = primed(model, 1)
    with torch.no_grad():
        before = model(ids, memory=state).logits
        dict(model.titans_parameters())["layers.3.memory.query_projection.weight"].mul_(-1.0)
        with model.controls(query="key"):
            by_key = model(ids, memory=state).logits
        assert not torch.equal(by_key, before)
    assert torch.equal(primed(model, 1).layers[1]["w0"], plain)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"names layer 9, but this model has layers 0 to 3 \(attention at \[1, 3\]\)"):
        graft(layers=[1, 9])
    model = graft()
    with pytest.raises(ConfigError, match="has a memory already"):
        titans_ds.attach(model.base_model)
    with pytest.raises(UnsupportedModelError, match="register_family"):
        families.find_mixers(torch.nn.Linear(2, 2))


def test_the_multimodal_checkpoint_of_the_hybrid_loads(tmp_path) -> None:
    """The released hybrids are multimodal: their weights carry a language_model prefix, beside a vision tower."""
    from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

    text = tiny_base("qwen3_5")
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    whole = Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=text.config.to_dict(), vision_config=vision, tie_word_embeddings=False)
    )
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    whole.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = token_ids(1, 8)
    with torch.no_grad():
        torch.testing.assert_close(base(ids).logits, text(ids).logits)
    model = titans_ds.attach(base, GraftConfig(layers="attention", gate_init=0.0, memory=MLPConfig(dim=16)))
    assert model.layer_indices == [1, 3]
    assert (model(ids).logits - text(ids).logits).abs().max() > 1e-3
