"""GradMem-style memory: prefix vectors written by gradient steps on the base model's own loss."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

import titans_ds
from tests.support.tiny_models import FAMILIES, tiny_base, token_ids
from titans_ds import GraftConfig, PrefixConfig, TitansModel
from titans_ds.errors import ConfigError, StateError
from titans_ds.memory import MemoryState, Pass

ATTENTION_ONLY = [family for family in FAMILIES if family != "qwen3_5"]
N = 3


def graft(family: str = "qwen3", layers: object = "attention", **prefix: object) -> TitansModel:
    settings = {"tokens": N, "inner_steps": 2, "step_size": 5.0, "initial_std": 0.5, **prefix}
    config = GraftConfig(layers=layers, segment_tokens=8, memory=PrefixConfig(**settings))  # type: ignore[arg-type]
    return titans_ds.attach(tiny_base(family), config)


def primed(model: TitansModel, batch: int = 2, tokens: int = 20, seed: int = 5) -> MemoryState:
    with model.memory_session(batch) as memory:
        model.prime(token_ids(batch, tokens, seed=seed), memory)
        return memory.state


def prefix_of(state: MemoryState | dict) -> torch.Tensor:
    return (state.layers if isinstance(state, MemoryState) else state)[0]["prefix"]


def behind(base: torch.nn.Module, prefix: torch.Tensor, ids: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Logits [B, N + T, V] of the base model with the prefix put in front: the specification.

    Attention sees only how far positions are apart, but for rounding: rotary embeddings are made in fp32.
    """
    embedded = torch.cat([prefix, base.get_input_embeddings()(ids)], dim=1)
    positions = torch.arange(first, first + embedded.shape[1]).expand(len(ids), -1)
    return base(inputs_embeds=embedded, position_ids=positions).logits


@pytest.mark.parametrize("family", ATTENTION_ONLY)
def test_reading_is_the_base_model_with_the_prefix_in_front(family) -> None:
    model, ids = graft(family), token_ids(2, 9)
    state = primed(model)
    assert prefix_of(state).shape == (2, N, 32)
    with torch.no_grad():
        expected = behind(tiny_base(family), prefix_of(state), ids)[:, N:]
        torch.testing.assert_close(model(ids, memory=state).logits, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_ablation_is_the_base_model_bit_for_bit(self, family) -> None:
        ids = token_ids(2, 12)
        with torch.no_grad():
            expected = tiny_base(family)(ids).logits
        texts = tiny_base(family).generate(ids, max_new_tokens=6, do_sample=False)
        model = graft(family)
        broken = primed(model).map(lambda t: torch.full_like(t, float("inf")))
        with model.disable_memory(), torch.no_grad(), model.memory_session(2) as memory:
            memory.state = broken
            assert torch.equal(model(ids, memory=broken).logits, expected)
            assert torch.equal(model.generate(ids, memory=memory, max_new_tokens=6, do_sample=False), texts)
            assert torch.equal(model.logits(model.read_write(ids, state=broken.layers).last_hidden), expected)
        with torch.no_grad():
            assert torch.equal(model.base_model(ids).logits, expected)
            assert torch.equal(model.detach()(ids).logits, expected)

    def test_writing_lowers_the_loss_of_what_was_written(self, family) -> None:
        model, ids = graft(family), token_ids(2, 8, seed=5)
        first = model.read_write(ids, plan=Pass(stats=True))
        again = model.read_write(ids, state=first.state, plan=Pass(stats=True))
        assert (first.stats[0]["inner_loss_after"] < first.stats[0]["inner_loss_before"]).all()
        assert torch.allclose(again.stats[0]["inner_loss_before"], first.stats[0]["inner_loss_after"])
        assert (first.stats[0]["write_norm"] > 0).all()

    def test_a_sample_is_the_same_alone_and_in_a_batch_and_padding_never_writes(self, family) -> None:
        model, ids = graft(family), token_ids(4, 19)
        lengths = (19, 7, 12, 0)
        rows = [ids[i, :n].tolist() for i, n in enumerate(lengths)]
        left = torch.stack([torch.cat([torch.full((19 - n,), 9), ids[i, :n]]) for i, n in enumerate(lengths)])
        mask = torch.tensor([[False] * (19 - n) + [True] * n for n in lengths])
        with model.memory_session(4) as memory, model.memory_session(4) as padded:
            model.prime(rows, memory)
            model.prime(left, padded, attention_mask=mask)
        together = prefix_of(memory.state)
        assert torch.equal(prefix_of(padded.state), together)
        assert torch.equal(together[3], model.prefix()[0]), "a sample without tokens keeps its state"
        for i, row in enumerate(rows[:3]):
            with model.memory_session(1) as own:
                model.prime([row], own)
            torch.testing.assert_close(prefix_of(own.state)[0], together[i], atol=2e-5, rtol=1e-4)
        # One segment, padding in front, within and behind: the same as the tokens by themselves.
        gaps = torch.tensor([[False, True, True, False, True, True, False]])
        text = token_ids(1, 7, seed=3)
        written, own = (model.read_write(x, write_mask=m).state for x, m in ((text, gaps), (text[gaps][None], None)))
        torch.testing.assert_close(prefix_of(written), prefix_of(own), atol=2e-5, rtol=1e-4)

    def test_left_padded_and_cached_generation_equal_the_full_forward(self, family) -> None:
        model, state = graft(family), primed(graft(family))
        prompt = token_ids(2, 9)
        batch = torch.cat([prompt[:1], torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt[1:, :6]], dim=1)])
        mask = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
        with torch.no_grad(), model.memory_session(2) as memory:
            memory.state = state
            out = model.generate(batch, attention_mask=mask, memory=memory, max_new_tokens=5, do_sample=False)
            beams = model.generate(batch, attention_mask=mask, memory=memory, max_new_tokens=3, num_beams=2)
            for row, text in enumerate((prompt[:1], prompt[1:, :6])):
                own = state.select(torch.tensor([row]))
                with model.memory_session(1) as alone:
                    alone.state = own
                    single = model.generate(text, memory=alone, max_new_tokens=3, num_beams=2)
                assert beams[row, 9:].tolist() == single[0, text.shape[1] :].tolist()
                for step in range(5):
                    logits = model(text, memory=own).logits[:, -1]
                    assert int(logits.argmax()) == int(out[row, 9 + step])
                    text = torch.cat([text, logits.argmax(-1, keepdim=True)], dim=1)

    def test_causal(self, family) -> None:
        model, ids = graft(family), token_ids(1, 12)
        state = primed(model, batch=1)
        changed = ids.clone()
        changed[0, 7] += 1
        with torch.no_grad():
            a, b = (model.read_write(x, state=state.layers).last_hidden for x in (ids, changed))
        torch.testing.assert_close(a[:, :7], b[:, :7], atol=1e-6, rtol=1e-6)
        assert (a[:, 7:] - b[:, 7:]).abs().max() > 1e-3

    @pytest.mark.parametrize("order", ["first", "window", "through_base"])
    def test_recomputation_gives_the_same_gradients_over_a_window(self, family, order) -> None:
        gradients = []
        for checkpointing in (False, True):
            model = graft(family, learn_step_size=order != "first").train()
            model.base_model.requires_grad_(order == "through_base")
            if checkpointing:
                model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
            outer_loss(model, order).backward()
            gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
            assert model.base_model.training
        for name, expected in gradients[0].items():
            assert expected is not None, name
            assert (gradients[1][name] - expected).norm() <= 1e-5 * expected.norm(), name
        assert {n for n in gradients[0] if n.startswith("prefix")} == {"prefix.initial"} | (
            set() if order == "first" else {"prefix.log_step_sizes"}
        )


def outer_loss(model: TitansModel, order: str) -> torch.Tensor:
    """The loss of three segments, each read behind what those before it wrote."""
    state, total = None, torch.zeros(())
    for number in range(3):
        ids = token_ids(2, 8, seed=number)
        out = model.read_write(
            ids, state=state, plan=Pass(graph=order != "first", through_base=order == "through_base")
        )
        total = total + cross_entropy(model.logits(out.last_hidden)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        state = out.state if order != "first" else MemoryState(out.state).detach().layers
    return total


@pytest.mark.parametrize("through_base", [True, False])
def test_outer_gradients_equal_autograd_through_the_written_out_algorithm(through_base) -> None:
    """fp64: P_0, step sizes and the base's weights, against the prefix concatenated in front of the embeddings."""
    model = graft("llama", learn_step_size=True).double()
    model.base_model.requires_grad_(True)
    contexts, question = [token_ids(2, 8, seed=1), token_ids(2, 5, seed=2)], token_ids(2, 6, seed=3)
    state = None
    for ids in contexts:
        state = model.read_write(ids, state=state, plan=Pass(graph=True, through_base=through_base)).state
    hidden = model.read_write(question, state=state, plan=Pass(write=False)).last_hidden
    cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), question[:, 1:].flatten()).backward()

    base = tiny_base("llama").double()
    initial, sizes = model.prefix.initial.detach().clone(), model.prefix.log_step_sizes.detach().clone()
    initial.requires_grad_()
    sizes.requires_grad_()
    prefix = initial.expand(2, -1, -1)
    for ids in contexts:
        for k in range(2):
            prefix = prefix - sizes[k].exp() * written_out_gradient(base, prefix, ids, through_base)
    logits = behind(base, prefix, question, first=-N)[:, N:-1]
    cross_entropy(logits.flatten(0, 1), question[:, 1:].flatten()).backward()
    torch.testing.assert_close(prefix_of(state), prefix, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(model.prefix.initial.grad, initial.grad, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(model.prefix.log_step_sizes.grad, sizes.grad, atol=1e-12, rtol=1e-9)
    expected = dict(base.named_parameters())
    for name, parameter in model.base_model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, atol=1e-12, rtol=1e-9)


def written_out_gradient(base: torch.nn.Module, prefix: torch.Tensor, ids: torch.Tensor, graph: bool) -> torch.Tensor:
    leaf = prefix if graph else prefix.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        logits = behind(base, leaf, ids, first=-N)[:, N - 1 : -1]
    losses = cross_entropy(logits.transpose(1, 2), ids, reduction="none").mean(dim=1)
    return torch.autograd.grad(losses.sum(), leaf, create_graph=graph)[0]


def test_a_session_survives_a_save_and_another_process(tmp_path) -> None:
    model, ids = graft("qwen3"), token_ids(1, 7)
    model.save_pretrained(tmp_path / "adapter")
    with model.memory_session(1) as memory, torch.no_grad():
        model.prime(token_ids(1, 20, seed=5), memory)
        memory.save(tmp_path / "state")
        expected = model(ids, memory=memory.state).logits
    torch.save((ids, expected), tmp_path / "expected.pt")
    script = """
import sys, torch
from tests.support.tiny_models import tiny_base
from titans_ds import TitansModel
folder = sys.argv[1]
ids, expected = torch.load(folder + "/expected.pt")
model = TitansModel.from_pretrained(tiny_base("qwen3"), folder + "/adapter")
with model.memory_session(1) as memory, torch.no_grad():
    memory.load(folder + "/state")
    assert torch.equal(model(ids, memory=memory.state).logits, expected)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    other = graft("qwen3", seed=1)
    with other.memory_session(1) as memory, pytest.raises(StateError, match="another adapter"):
        memory.load(tmp_path / "state")


def test_reset_starts_a_row_from_the_initial_prefix() -> None:
    model, state = graft(), primed(graft())
    out = model.read_write(
        token_ids(2, 5), state=state.layers, reset=torch.tensor([True, False]), plan=Pass(write=False)
    )
    assert torch.equal(prefix_of(out.state)[0], model.prefix()[0])
    assert torch.equal(prefix_of(out.state)[1], prefix_of(state)[1])


def test_controls_change_the_write() -> None:
    model, text = graft(inner_steps=1), token_ids(1, 8)
    start = model.prefix()[0]
    down = prefix_of(model.read_write(text).state)[0] - start
    with model.controls(sign=-1.0):
        up = prefix_of(model.read_write(text).state)[0] - start
    torch.testing.assert_close(up, -down)
    with model.controls(inner_steps=0):
        assert torch.equal(prefix_of(model.read_write(text).state)[0], start)


def test_only_some_layers_see_the_prefix() -> None:
    ids = token_ids(2, 6)
    with torch.no_grad():
        some, every, plain = graft("llama", layers=[1])(ids).logits, graft("llama")(ids).logits, tiny_base("llama")(ids)
    assert (some - plain.logits).abs().max() > 1e-3
    assert (some - every).abs().max() > 1e-3


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"memory\.tokens is 0"):
        PrefixConfig(tokens=0)
    with pytest.raises(ConfigError, match=r"graft\.persistent_tokens is set, but a prefix memory"):
        GraftConfig(memory=PrefixConfig(), persistent_tokens=2)
    with pytest.raises(ConfigError, match="DeltaNet"):
        graft("qwen3_5", layers=[0])
