"""Steps of fixed shapes: the results of growing ones, in buffers that stay, without a wait for the device."""

from __future__ import annotations

import json
import logging
import random
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import titans_ds
from eval import crosscodeeval
from eval.generation import static_rows
from eval.generation.decoding import Decoder, DecodeSettings, Job
from eval.generation.healing import heal
from eval.generation.likelihood import healed_target, plain_target
from eval.generation.model import Subject
from eval.generation.packed_attention import attend, packed_queries
from eval.generation.static_cache import StaticBuffers
from tests.eval.test_generation import VOCAB, byte_level_tokenizer
from tests.support.tiny_models import tiny_base
from titans_ds import GraftConfig, MLPConfig, PrefixConfig, preset
from titans_ds.cuda_graphs.capture import CudaCapture, no_collection
from titans_ds.cuda_graphs.replay import StaticFunction

_CODE = "def get_value(self):\n    return self.get_total(values)\nclass Total:\n    def add(self, other.values):\n"
_SNIPPETS = ("def get(self):\n    return 1", "class Total:\n    values = self.add", "import other.values\nx = 2")
_MEMORIES = {
    "additive": GraftConfig(layers="attention", gate_init=3.0, memory=MLPConfig(dim=16, step_size=0.3)),
    "mac": GraftConfig(
        layers="attention",
        injection="mac",
        memory_tokens=3,
        gate_init=3.0,
        memory=MLPConfig(dim=16, step_size=0.3, query_projection="tied"),
    ),
    "ttt_linear": GraftConfig(layers="attention", gate_init=3.0, memory=preset("ttt_linear", dim=16)),
    "titans": GraftConfig(layers="attention", gate_init=3.0, persistent_tokens=2, memory=preset("titans", dim=16)),
    "prefix": GraftConfig(memory=PrefixConfig()),
    "convolved": GraftConfig(layers="attention", gate_init=3.0, memory=preset("titans", dim=16)),
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer()


def _subject(tokenizer: Any, family: str, memory: str | None = None, **settings: Any) -> Subject:
    base = tiny_base(family, vocab_size=VOCAB, max_position_embeddings=512, **settings)
    if memory is None:
        return Subject(base, None, tokenizer)
    grafted = titans_ds.attach(base, _MEMORIES[memory]).eval()
    if memory == "convolved":  # an untrained convolution is the identity, and looks at nothing before a token
        for layer in grafted.memories.values():
            torch.nn.init.normal_(layer.memory.query_convolution.weight, generator=torch.Generator().manual_seed(0))
    return Subject(base, grafted, tokenizer)


def _jobs(subject: Subject, count: int = 7) -> list[Job]:
    """Prompts of many lengths, each with its own snippets."""
    generator, tokenizer, vocabulary = random.Random(0), subject.tokenizer, subject.vocabulary
    jobs = []
    for number in range(count):
        prompt = _CODE[: generator.randint(8, len(_CODE))]
        healed = heal(tokenizer.encode(prompt, add_special_tokens=False), vocabulary)
        target = generator.choice(["get_total(values)", "add(other)", "values"])
        targets = {
            "heal": healed_target(tokenizer, vocabulary, prompt, target, healed),
            "plain": plain_target(tokenizer, target),
        }
        priming = _SNIPPETS[: number % 4] if subject.titans_model else ()
        both = ("heal", "plain")
        jobs.append(Job(f"t{number}", healed.kept, healed.removed, healed.text, both, targets, priming, None, number))
    return jobs


def _decoder(subject: Subject, batch_size: int, fixed: bool, **settings: Any) -> Decoder:
    settings = {"max_new_tokens": 10, "eos_tokens": frozenset(range(2, VOCAB, 9))} | settings
    return Decoder(subject, subject.vocabulary, DecodeSettings(batch_size, fixed_shapes=fixed, **settings))


def _run(subject: Subject, decoder: Decoder, jobs: list[Job]) -> dict[tuple[str, str], Any]:
    with subject.on_path("graft" if subject.titans_model else "vanilla"):
        return {(c.key, c.boundary): c for c in decoder.run(jobs)}


def _check_same(expected: dict[tuple[str, str], Any], found: dict[tuple[str, str], Any]) -> None:
    assert expected.keys() == found.keys()
    for key, completion in expected.items():
        assert found[key].tokens == completion.tokens
        assert (found[key].text, found[key].finish_reason) == (completion.text, completion.finish_reason)
        assert found[key].nats == pytest.approx(completion.nats, rel=1e-5, abs=1e-5)


_CASES = [
    *(("qwen2", memory) for memory in (None, "additive", "mac", "titans")),
    *(("qwen3_5", memory) for memory in (None, "additive", "mac", "ttt_linear", "convolved")),
    ("gpt_neox", None),
]


@pytest.mark.parametrize(("family", "memory"), _CASES)
def test_fixed_shapes_give_what_growing_ones_give(
    family: str, memory: str | None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_rows, "_LEAST_CAPACITY", 8)
    monkeypatch.setattr(static_rows, "_ALIGNMENT", 8)
    subject = _subject(tokenizer, family, memory)
    jobs = _jobs(subject)
    expected = _run(subject, _decoder(subject, 4, False), jobs)
    assert len({len(c.tokens) for c in expected.values()}) > 3
    shapes: set[tuple[int, int]] = set()
    for batch_size in (1, 4, 32):
        decoder = _decoder(subject, batch_size, True)
        _check_same(expected, _run(subject, decoder, jobs))
        shapes |= set(decoder.step_shapes)
        assert len({slots for slots, _ in decoder.step_shapes}) > 1
        assert decoder.num_prefills >= len(jobs) / batch_size
    assert len({positions for _, positions in shapes}) > 1


def test_sampling_and_an_additive_mask_and_short_pieces_of_a_batch(tokenizer: Any) -> None:
    subject = _subject(tokenizer, "qwen3_5", "additive", attn_implementation="eager")
    jobs = _jobs(subject)
    for settings in ({"temperature": 1.3, "top_p": 0.9}, {}):
        expected = _run(subject, _decoder(subject, 1, False, **settings), jobs)
        decoder = _decoder(subject, 6, True, read_tokens=40, **settings)
        _check_same(expected, _run(subject, decoder, jobs))
        assert decoder.step_shapes
        assert decoder.num_prefills > len(jobs) / 3


def test_out_of_memory_halves_the_slots_and_loses_nothing(tokenizer: Any) -> None:
    subject = _subject(tokenizer, "qwen3_5")
    jobs = _jobs(subject)
    expected = _run(subject, _decoder(subject, 2, False), jobs)

    class Small(Subject):
        def __call__(self, ids: Any, *args: Any, **kwargs: Any) -> Any:
            if ids.shape[0] > 4 and ids.shape[1] == 1:  # a decode step
                raise torch.OutOfMemoryError("out of memory")
            return super().__call__(ids, *args, **kwargs)

    small = Small(subject.base_model, None, tokenizer)
    decoder = _decoder(small, 16, True)
    _check_same(expected, _run(small, decoder, jobs))
    assert decoder.batch_size == 4
    assert max(slots for slots, _ in decoder.step_shapes) == 4


def test_a_cache_that_cannot_be_static_takes_growing_steps_and_says_why(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "sliding_window": 6}
    torch.manual_seed(0)
    subject = Subject(
        AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **sizes)).eval(), None, tokenizer
    )
    jobs = _jobs(subject, 4)
    decoder = _decoder(subject, 4, True, read_tokens=40)
    with caplog.at_level(logging.WARNING):
        found = _run(subject, decoder, jobs)
    _check_same(_run(subject, _decoder(subject, 4, False), jobs), found)
    assert decoder.step_shapes == []
    assert [r.getMessage() for r in caplog.records if "DynamicSlidingWindowLayer" in r.getMessage()][1:] == []
    assert "DynamicSlidingWindowLayer" in caplog.text


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("memory", ["additive", "convolved"])
def test_steps_from_a_cache_are_what_one_pass_over_the_whole_text_gives(
    memory: str, fixed: bool, tokenizer: Any
) -> None:
    subject = _subject(tokenizer, "qwen2", memory)
    jobs = _jobs(subject, 4)
    found = _run(subject, _decoder(subject, 8, fixed, eos_tokens=frozenset()), jobs)
    with subject.on_path("graft"), torch.no_grad():
        for job in jobs:
            state = subject.memory_for([job.priming])
            start, scored = job.prefix + job.removed, job.targets["plain"].tokens
            for tokens in (found[job.key, "plain"].tokens, scored):
                ids = torch.tensor([start + tokens])
                mask = torch.ones_like(ids)
                logits = subject(ids, mask, mask.cumsum(1) - 1, None, state, last_only=False)[0][0, len(start) - 1 : -1]
                if tokens is scored:
                    nats = -torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
                    assert found[job.key, "plain"].nats == pytest.approx(nats.tolist(), abs=1e-4)
                else:
                    assert logits.argmax(-1).tolist() == tokens


def test_a_prefix_memory_takes_growing_steps_and_its_ablation_fixed_ones(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    subject = _subject(tokenizer, "qwen3_5", "prefix")
    jobs = _jobs(subject, 2)
    decoder = _decoder(subject, 4, True, max_new_tokens=2)
    assert len(_run(subject, decoder, jobs)) == 4
    assert decoder.step_shapes == []
    assert "its memory is a prefix" in caplog.text
    ablated = _decoder(subject, 4, True, max_new_tokens=2)
    with subject.on_path("ablation"):
        assert len(list(ablated.run(jobs))) == 4
    assert ablated.step_shapes


class _NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a device, or a device for the host: none of it can be captured."""

    refused = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal.default")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        by_mask = name.startswith("index") and _has_mask(args)
        if name.startswith(self.refused) or by_mask:
            raise AssertionError(f"{name} inside a step")
        return func(*args, **(kwargs or {}))


def _has_mask(args: Any) -> bool:
    return any(
        getattr(index, "dtype", None) == torch.bool for index in (args[1] if isinstance(args[1], (list, tuple)) else ())
    )


def test_the_guard_against_waiting_sees_what_waits() -> None:
    x = torch.ones(3)
    for wait in (lambda: x.sum().item(), lambda: x[x > 0], lambda: torch.tensor([1.0, 2.0]), lambda: bool(x.any())):
        with pytest.raises(AssertionError, match="inside a step"), _NoWaiting():
            wait()


@pytest.mark.parametrize(("family", "memory"), _CASES)
def test_a_step_never_waits_for_the_device_and_its_buffers_stay(
    family: str, memory: str | None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    addresses: dict[tuple[str, int], set[int]] = {}
    original = static_rows.StaticRows._function

    def watched(self: Any, num_slots: int, capacity: int) -> Any:
        step = original(self, num_slots, capacity)

        def run() -> None:
            with _NoWaiting():
                step()
            for layer in self._cache._layers:
                for i, tensor in enumerate([*layer._attention, *layer._conv.values(), *layer._recurrent.values()]):
                    addresses.setdefault((id(layer), i), set()).add(tensor.data_ptr())

        return run

    monkeypatch.setattr(static_rows.StaticRows, "_function", watched)
    subject = _subject(tokenizer, family, memory)
    decoder = _decoder(subject, 4, True, max_new_tokens=4)
    assert _run(subject, decoder, _jobs(subject, 3))
    assert addresses
    assert all(len(seen) == 1 for seen in addresses.values())


class _NoHost(TorchDispatchMode):
    """Refuses operations on tensors of the host. (What asks for a value fails on the device `meta` by itself.)"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        assert all(t.device.type == "meta" for t in tensors), f"{func} on a tensor of the host"
        return out


@pytest.mark.parametrize(("family", "memory"), _CASES)
def test_a_step_on_a_device_without_values_touches_none_of_the_hosts_tensors(
    family: str, memory: str | None, tokenizer: Any
) -> None:
    subject = _subject(tokenizer, family, memory)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    ones = torch.ones_like(ids)
    with subject.on_path("graft" if memory else "vanilla"), torch.no_grad():
        given = subject.memory_for([(), ()])
        _, cache, _ = subject(ids, ones, ones.cumsum(1) - 1, None, given, last_only=True)
        buffers = StaticBuffers(cache, 2, 16)
        for layer in buffers._layers:
            layer._attention = [t.to("meta") for t in layer._attention]
            for states in (layer._conv, layer._recurrent):
                states.update({index: t.to("meta") for index, t in states.items()})
        (subject.titans_model or subject.base_model).to("meta")
        given = subject.reading_copy(given).to("meta") if memory else None
        tokens, lengths = (
            torch.zeros(2, 1, dtype=torch.long, device="meta"),
            torch.zeros(2, dtype=torch.long, device="meta"),
        )
        static = buffers.view(2, 16, lengths)
        with _NoHost():
            seen = torch.arange(16, device="meta") <= lengths[:, None]
            mask = subject.attention_mask(seen[:, None, None])
            logits, *_ = subject(tokens, mask, lengths[:, None], static, given, last_only=True)
    assert logits.shape == (2, 1, VOCAB)


def test_what_is_not_finite_in_a_slot_reaches_neither_neighbours_nor_who_comes_after(tokenizer: Any) -> None:
    subject = _subject(tokenizer, "qwen3_5", "additive")
    jobs = _jobs(subject, 8)
    expected = _run(subject, _decoder(subject, 1, False), jobs)
    poisoned = "def poison(): pass"
    memory_for = subject.memory_for

    def poisoning(primings: Any) -> Any:
        mask = torch.tensor([poisoned in texts for texts in primings])
        state = memory_for(primings)
        return state.map(lambda t: torch.where(mask.view(-1, *[1] * (t.dim() - 1)), torch.full_like(t, torch.nan), t))

    subject.memory_for = poisoning  # type: ignore[method-assign]
    longest = max(jobs, key=lambda job: len(job.prefix))
    bad = [
        Job(f"bad{i}", longest.prefix, longest.removed, longest.healed_text, ("plain",), {}, (poisoned,), None, i)
        for i in range(2)
    ]
    for job, at_most in zip(bad, (1, 4), strict=True):
        object.__setattr__(job, "prefix", job.prefix[:at_most] + job.prefix)
    decoder = _decoder(subject, 4, True)
    found = _run(subject, decoder, bad + jobs)
    assert decoder.step_shapes
    _check_same(expected, {key: c for key, c in found.items() if not key[0].startswith("bad")})


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5"])
def test_a_slot_holds_what_the_row_read_and_nothing_of_the_row_before(family: str) -> None:
    base, ids = tiny_base(family), torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        cache = base(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).past_key_values
    buffers = StaticBuffers(cache, 5, 16)
    tensors = [t for layer in buffers._layers for t in (*layer._attention, *layer._conv.values())]
    tensors += [t for layer in buffers._layers for t in layer._recurrent.values()]
    for tensor in tensors:
        tensor.fill_(torch.nan)
    buffers.put([3, 1], [5, 9], cache)
    buffers.move(3, 0, 5)
    for tensor in tensors:
        assert tensor[[0, 1, 3]].isfinite().all()
        assert tensor[[2, 4]].isnan().all()
        assert torch.equal(tensor[0], tensor[3])
    attention = next(layer for layer in buffers._layers if layer._attention)
    dynamic = cache.layers[buffers._layers.index(attention)]
    for mine, theirs in zip(attention._attention, (dynamic.keys, dynamic.values), strict=True):
        assert torch.equal(mine[3, :, :5], theirs[0, :, 4:])
        assert torch.equal(mine[1, :, :9], theirs[1])
        assert not mine[1, :, 9:].any()


def test_packed_queries_are_the_attention_of_the_library(tokenizer: Any) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    query, key, value = torch.randn(3, 8, 1, 16), torch.randn(3, 2, 20, 16), torch.randn(3, 2, 20, 16)
    mask = torch.rand(3, 1, 1, 20) < 0.5
    for given in (mask, torch.zeros_like(mask, dtype=torch.float).masked_fill(~mask, -1e4)):
        expected = sdpa_attention_forward(module, query, key, value, given, scaling=0.3)[0]
        torch.testing.assert_close(attend(module, query, key, value, given, scaling=0.3)[0], expected)
    subject = _subject(tokenizer, "qwen2", "mac")
    jobs = _jobs(subject, 3)
    expected_text = _run(subject, _decoder(subject, 4, False), jobs)
    with packed_queries():
        _check_same(expected_text, _run(subject, _decoder(subject, 4, True), jobs))


def test_the_setting_is_recorded_and_changes_no_prediction(tokenizer: Any, tmp_path: Path) -> None:
    base = tiny_base("qwen3_5", vocab_size=VOCAB, max_position_embeddings=512)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    titans_ds.attach(base, _MEMORIES["additive"]).save_pretrained(tmp_path / "adapter")
    rows = [
        {
            "prompt": "import values\n" * (n + 1) + f"x{n} = self.",
            "groundtruth": "get(values)",
            "right_context": "",
            "metadata": {"task_id": f"t/{n}", "repository": f"r{n}", "file": "a.py"},
            "crossfile_context": {"text": "# get\n", "list": [{"retrieved_chunk": "def get(): 1", "filename": "m.py"}]},
        }
        for n in range(3)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for setting, recorded in (("auto", "off"), ("on", "on")):
        out = tmp_path / setting
        arguments = ["run", "--base", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"), "--no-report"]
        arguments += ["--data", str(tmp_path / "rows.jsonl"), "--modes", "memory,concat", "--boundary", "both"]
        arguments += ["--device", "cpu", "--max-new-tokens", "5", "--out", str(out), "--decode-graphs", setting]
        assert crosscodeeval.main(arguments) == 0
        config = json.loads((out / "config.json").read_text())
        assert (config["decode_graphs"], config["compile"]) == (recorded, "none")
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
        found[setting] = {(r["task_id"], r["mode"], r["boundary"]): r for r in lines}
    assert len(found["on"]) == 12
    for key, record in found["auto"].items():
        assert found["on"][key]["prediction"] == record["prediction"]
        assert found["on"][key]["config_hash"] == record["config_hash"]
        assert found["on"][key]["likelihood"]["target_nats"] == pytest.approx(
            record["likelihood"]["target_nats"], rel=1e-5
        )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("memory", [None, "additive", "mac"])
def test_captured_steps_give_what_growing_ones_give(memory: str | None, tokenizer: Any) -> None:
    base = tiny_base("qwen2", vocab_size=VOCAB, max_position_embeddings=512).cuda()
    grafted = titans_ds.attach(base, _MEMORIES[memory]).eval().cuda() if memory else None
    subject = Subject(base, grafted, tokenizer)
    jobs, found = _jobs(subject), []
    for fixed in (False, True):
        settings = DecodeSettings(4, 10, eos_tokens=frozenset([2]), fixed_shapes=fixed)
        decoder = Decoder(subject, subject.vocabulary, settings, subject.device)
        found.append(_run(subject, decoder, jobs))
    assert decoder._slots is not None
    assert any(step.is_captured for step in decoder._slots._steps.values())
    for key, completion in found[0].items():
        assert found[1][key].tokens == completion.tokens


@pytest.mark.parametrize("memory", [None, "additive"])
def test_slots_that_nobody_needs_are_gone_at_once(memory: str | None, tokenizer: Any) -> None:
    """Before the next run makes its own, and before a batch is tried again at half its size."""
    subject = _subject(tokenizer, "qwen2", memory)
    decoder = _decoder(subject, 4, True)
    with no_collection():
        _run(subject, decoder, _jobs(subject))
        assert decoder.step_shapes
        slots = weakref.ref(decoder._slots)
        decoder._slots = None
        assert slots() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_function_that_waits_is_not_captured_and_runs_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    total = torch.zeros((), device="cuda")

    def waits() -> None:
        total.add_(1)
        total.item()

    function = StaticFunction(waits, CudaCapture(torch.device("cuda"), "decode steps"))
    for _ in range(4):
        function()
    assert total.item() == 4
    assert caplog.text.count("decode steps can't be captured") == 1
