"""Frozen layers as graphs compute what they computed before, and run as they are wherever they can't be replayed."""

from __future__ import annotations

import dataclasses
import gc
import inspect
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launch import export_adapter
from launch.arguments import parse
from launch.train import check_stage
from tests.support.eager_capture import StaticCallables
from tests.support.tiny_models import VOCAB, tiny_base
from titans_ds.config import GraftConfig, LoraSettings
from titans_ds.cuda_graphs.layers import LayerGraphs
from titans_ds.errors import ConfigError
from titans_ds.graft.families import layers_of
from titans_ds.memory import Pass
from titans_ds.memory.mlp import MLPConfig
from titans_ds.training.build import make_module
from titans_ds.training.checkpoints import files
from titans_ds.training.data.segments import IGNORED, Batch
from titans_ds.training.engine import TorchEngine
from titans_ds.training.module import run_segment
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import DataSettings, ModelSettings, OptimizerSettings, TrainConfig, TrainingSettings
from titans_ds.training.speed.layer_graphs import graph_layers
from titans_ds.training.step import Carried, Step, commit, run_passes
from titans_ds.zero.footprint import Model, Setup, check_fits, total_bytes

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
ENOUGH = ["--model.base=B", "--data.corpus=C", "--graft.memory.dim=8"]
LOSS: dict[str, Any] = {"loss_chunk_tokens": 16, "loss_kernel": "chunked"}
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a CUDA GPU")


class Lanes:
    """Segments of 12 and 8 tokens by turns, the same every time; the last tokens of a row are padding now and then."""

    def __init__(self, lengths: tuple[int, ...] = (12, 12, 8)) -> None:
        self._lengths, self._count = lengths, 0

    def next(self) -> Step:
        """The next one."""
        generator = torch.Generator().manual_seed(self._count)
        tokens = self._lengths[self._count % len(self._lengths)]
        ids = torch.randint(3, VOCAB, (2, tokens), generator=generator).numpy()
        mask = (torch.arange(tokens) < torch.tensor([[tokens], [tokens - 3 * (self._count % 2)]])).numpy()
        labels = ids.copy()
        labels[~mask] = IGNORED
        reset = torch.tensor([self._count % 4 == 0, self._count % 3 == 0]).numpy()
        self._count += 1
        batch = Batch(ids, labels, mask, reset, torch.zeros(2, dtype=torch.int64).numpy())
        return Step(batch, batch.num_targets)


def make_engine(
    family: str, lora: LoraSettings | None = None, dtype: torch.dtype = torch.float32, **options: Any
) -> TorchEngine:
    """A tiny model with memories on its attention layers, on the third layer where it has no others."""
    layers: Any = "attention" if family == "qwen3_5" else [2]
    graft = GraftConfig(segment_tokens=12, layers=layers, memory=MLPConfig(dim=8), gate_init=0.0)
    config = TrainConfig(
        model=ModelSettings(base="B"),
        data=DataSettings("C"),
        graft=graft,
        lora=lora,
        training=TrainingSettings(**{"order": "first", "window": 1, **options}, **LOSS),
        deepspeed=None,
    )
    module = make_module(tiny_base(family).to(dtype), config).to(DEVICE)
    return TorchEngine(module, make_optimizer(module, OptimizerSettings()), 1.0, DEVICE)


def train(engine: TorchEngine, steps: int = 8, lengths: tuple[int, ...] = (12, 12, 8), **options: Any) -> list[Tensor]:
    """Losses and gradients' norms of some steps, held-out passes in between, and the parameters after them."""
    settings = TrainingSettings(**{"order": "first", "window": 1, **options})
    lanes, carried, found = Lanes(lengths), Carried(), []
    for step in range(steps):
        passes = run_passes(engine, lanes, carried, settings, 1)
        commit(passes, carried)
        found.append(passes.loss_sum.cpu())
        found.append(torch.tensor(engine.step(1e-2, skip=False)[0]))
        if step % 3 == 1:
            with torch.no_grad():
                found.append(run_segment(engine, Lanes().next().batch, carried.state, Pass()).row_losses.cpu())
    return found + [p.detach().cpu() for p in engine.module.parameters() if p.requires_grad]


@pytest.mark.parametrize("family", ["qwen3_5", "qwen2", "gpt_neox"])
@pytest.mark.parametrize(
    "options",
    [{}, {"window": 2, "accumulation": 2}, {"window": 2, "order": "second"}],
    ids=["one", "windows", "second"],
)
def test_training_is_what_it_was(family: str, options: dict[str, Any]) -> None:
    """From the second pass of a shape on layers are replayed; held-out passes between steps are not."""
    plain, ours, make = make_engine(family), make_engine(family), StaticCallables()
    count = graph_layers(ours.module.model.base_model, None if GPU else make)
    assert count == (2 if family == "qwen3_5" else 3)
    torch.testing.assert_close(train(ours, **options), train(plain, **options), atol=1e-5, rtol=1e-4)
    if not GPU:
        segments = 8 * options.get("window", 1) * options.get("accumulation", 1)
        assert make.captures == 2
        assert make.forwards == count * (segments - 2)
        below = 1 if family == "qwen3_5" else 2  # the lowest memory
        assert make.backwards == (count - below) * (segments - 2)


def test_each_pass_has_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """What layers are given beside the hidden states is copied to its place, once for all of them."""
    (engine, other), make = (make_engine("qwen2"), make_engine("qwen2")), StaticCallables()
    base: Any = engine.module.model.base_model
    expected = other.module.model.base_model
    graph_layers(base, make)
    ids = torch.randint(3, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    copies, copy = [], Tensor.copy_
    for padding in (1, 1, 2, 4):
        mask = (torch.arange(6) >= torch.tensor([[padding], [0]])).long().to(DEVICE)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "copy_", lambda a, b: (copies.append(a.dim()), copy(a, b))[1])
            with engine.module.model.reading(engine.module.model.init_state(2)):
                ours = base(ids, attention_mask=mask, use_cache=False).logits
        with other.module.model.reading(other.module.model.init_state(2)):
            theirs = expected(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()])
        assert copies.count(4) == (1 if make.forwards else 0)
        copies.clear()
    assert make.forwards == 3 * 3


def test_parameters_that_move_end_it(caplog: pytest.LogCaptureFixture) -> None:
    plain, ours, make = make_engine("qwen2"), make_engine("qwen2"), StaticCallables()
    base = ours.module.model.base_model
    graph_layers(base, make)
    for engine in (plain, ours):
        train(engine, 4)
    assert make.captures == 1
    for parameter in layers_of(base)[0].parameters():
        parameter.data = 2 * parameter.data
    for parameter in layers_of(plain.module.model.base_model)[0].parameters():
        parameter.data *= 2
    before = make.forwards
    with caplog.at_level(logging.WARNING):
        first = TrainingSettings(order="first", window=1)
        found = [run_passes(engine, Lanes(), Carried(), first, 1).loss_sum for engine in (plain, ours)]
    assert make.forwards == before
    assert [r.message for r in caplog.records if "parameters have moved" in r.message] != []
    torch.testing.assert_close(found[1], found[0])


def test_a_capture_that_fails_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine("qwen2")
    graph_layers(engine.module.model.base_model, StaticCallables(fail=True))
    with caplog.at_level(logging.WARNING):
        found = train(engine)
    torch.testing.assert_close(found, train(make_engine("qwen2")), atol=1e-5, rtol=1e-4)
    said = [r.message for r in caplog.records if "CUDA graphs" in r.message]
    assert said == [
        "frozen layers run kernel by kernel from here on, not as CUDA graphs: operation not permitted when stream is "
        "capturing. A run with training.layer_graphs switched off takes less memory"
    ]


def test_nothing_is_collected_during_a_capture() -> None:
    """An older graph destroyed meanwhile would break it."""
    enabled, engine = [], make_engine("qwen2")

    def make(*args: Any, pool: object) -> Any:
        enabled.append(gc.isenabled())
        return StaticCallables()(*args, pool)

    graph_layers(engine.module.model.base_model, make)
    train(engine, 3, lengths=(12,))
    assert enabled == [False]
    assert gc.isenabled()


def test_layers_that_learn_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """With LoRA on all attention layers of a model without others."""
    engine, make = make_engine("qwen2", LoraSettings(rank=2, targets=["q_proj"])), StaticCallables()
    with caplog.at_level(logging.WARNING):
        assert graph_layers(engine.module.model.base_model, make) == 0
    assert "nothing to replay" in caplog.text
    assert make.captures == 0


def test_two_tensors_for_one_place_are_not_replayed(caplog: pytest.LogCaptureFixture) -> None:
    """Layers were given one mask when they were captured, and are given two later."""
    layers = [nn.Linear(4, 4).requires_grad_(False) for _ in range(2)]
    for layer in layers:
        layer.forward = lambda hidden, mask, plain=layer.forward: plain(hidden) * mask
    plain, make = [layer.forward for layer in layers], StaticCallables()
    graphs = LayerGraphs(layers, make)
    for index, layer in enumerate(layers):
        layer.forward = graphs.wrapped(index)
    for number in range(4):
        masks = [torch.full((1, 1, 1), 1.0 + number)] * 2 if number < 3 else [torch.ones(1, 1, 1), -torch.ones(1, 1, 1)]
        given, found = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(number)), []
        for functions in (plain, [layer.forward for layer in layers]):
            x = given.clone().requires_grad_()
            functions[1](functions[0](x, masks[0]), masks[1]).square().sum().backward()
            found.append(x.grad)
        torch.testing.assert_close(found[1], found[0])
    assert make.forwards == 2 * 2 + 1


def test_more_shapes_than_are_captured() -> None:
    """Nothing is noted of the others."""
    engine, make = make_engine("qwen2"), StaticCallables()
    graph_layers(engine.module.model.base_model, make)
    graphs = inspect.getclosurevars(layers_of(engine.module.model.base_model)[0].forward).nonlocals["self"]
    lengths = tuple(length for length in range(5, 12) for _ in range(2))
    train(engine, len(lengths), lengths)
    assert make.captures == len(graphs._captured) == 4
    assert graphs._seen == {}


@pytest.mark.skipif(GPU, reason="where there is a GPU there is no error")
def test_without_a_gpu_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="no CUDA GPU"):
        make_engine("qwen2", layer_graphs=True)


@pytest.mark.parametrize("option", ["--training.layer_graphs=true", "--training.compile=mlp"])
def test_under_zero3_it_is_refused_before_anything_is_loaded(option: str) -> None:
    config, _ = parse([*ENOUGH, option])
    with pytest.raises(ConfigError, match="on under ZeRO-3"):
        check_stage(config, 3)
    check_stage(config, 2)
    check_stage(parse(ENOUGH)[0], 3)


def test_advice_about_memory_can_be_followed() -> None:
    """Recomputation and offloading come with the graphs switched off."""
    model = Model(10**9, 10**7, 0, layers=32, hidden=4096, vocab=10**5)
    run = Setup(0, 1, lanes=8, segment_tokens=4096, checkpointing=False, layer_graphs=True)
    assert total_bytes(model, run) > total_bytes(model, dataclasses.replace(run, layer_graphs=False))
    with pytest.raises(ConfigError, match=r"training\.layer_graphs false and training\.checkpointing true"):
        check_fits(model, run, 20 * 2**30)


def test_an_export_needs_no_gpu(tmp_path: Path) -> None:
    text = "model: {base: B}\ndata: {corpus: C}\ngraft: {memory: {dim: 8}}\ntraining: {layer_graphs: true}\n"
    (tmp_path / files.CONFIG).write_text(text)
    exported = export_adapter._config(SimpleNamespace(path=tmp_path), None)  # type: ignore[arg-type]
    assert not exported.training.layer_graphs


def test_a_partitioned_base_is_refused() -> None:
    base = tiny_base("qwen2")
    next(base.parameters()).ds_id = 0
    with pytest.raises(ConfigError, match="ZeRO-3"):
        graph_layers(base, StaticCallables())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--training.checkpointing=true"], "keeps no activations"),
        (["--training.offload_activations=true"], "can't leave the GPU"),
        (["--model.trainable=all"], "no layer is frozen"),
        (["--graft.memory.preset=gradmem"], "a prefix memory is written through"),
        (["--training.order=second", "--training.window=2", "--training.second_order=window"], "'two_phase' goes"),
    ],
)
def test_what_it_does_not_go_with(options: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse(["--model.base=B", "--data.corpus=C", "--training.layer_graphs=true", *options])
    assert not parse(["--model.base=B", "--data.corpus=C", *options])[0].training.layer_graphs


@needs_gpu
@pytest.mark.parametrize("family", ["qwen3_5", "qwen2"])
def test_cuda_graphs_of_compiled_layers_in_bf16(
    family: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As the frozen step of a large model runs, DeltaNet by whatever kernels there are; by PyTorch's own capture."""
    captured, make = [], torch.cuda.make_graphed_callables
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda *a, **k: (captured.append(a), make(*a, **k))[1])
    found = []
    for layer_graphs in (False, True):
        engine = make_engine(family, dtype=torch.bfloat16, compile="mlp", layer_graphs=layer_graphs)
        with caplog.at_level(logging.WARNING):
            found.append(train(engine, lengths=(12, 12, 12, 8, 8, 12))[: -len(list(engine.named_masters()))])
    assert [r.message for r in caplog.records if "CUDA graphs" in r.message] == []
    assert len(captured) == 2
    torch.testing.assert_close(found[1], found[0], atol=2e-2, rtol=2e-2)  # losses and norms of several replays
