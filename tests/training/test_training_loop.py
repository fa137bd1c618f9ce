"""The loop on plain torch: what memory does to a step, non-finite losses and states, stop signals, and evaluation."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import titans_ds
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base
from titans_ds.config import GraftConfig, LoraSettings
from titans_ds.errors import DataError, TrainingError
from titans_ds.memory import Pass
from titans_ds.memory.delta import DeltaConfig
from titans_ds.memory.mlp import MLPConfig
from titans_ds.training.build import enable_checkpointing, gate_names, trainable_names
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.data.packed import PackedCorpus, open_corpus
from titans_ds.training.data.segments import RepositoryReader, collate
from titans_ds.training.engine import TorchEngine
from titans_ds.training.evaluation import Evaluator, estimate
from titans_ds.training.loop import Trainer
from titans_ds.training.module import TrainingModule
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.run_folder import RunFolder
from titans_ds.training.settings import (
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    TrainConfig,
    TrainingSettings,
)
from titans_ds.training.step import Carried, commit, run_passes

SEGMENT = 8
GRAFT = GraftConfig(
    layers="attention", gate_init=0.0, segment_tokens=SEGMENT, memory=MLPConfig(dim=8, write="token", step_size=0.02)
)


@pytest.fixture
def corpus(tmp_path: Path) -> PackedCorpus:
    """Six repositories for training, five held out."""
    splits = {"train": random_repos(6, seed=1), "validation": random_repos(5, seed=2, least=10)}
    return open_corpus(write_packed(tmp_path / "corpus", splits))


def make_config(**training: Any) -> TrainConfig:
    """A short run."""
    return TrainConfig(
        model=ModelSettings(base="tiny"),
        data=DataSettings(corpus="corpus", num_lanes=2),
        graft=GRAFT,
        optimizer=OptimizerSettings(lr=1e-2, warmup_steps=0),
        training=TrainingSettings(**{"steps": 4, "order": "first", "window": 1, **training}),
        evaluation=EvaluationSettings(repositories=4, group_size=2),
        deepspeed=None,
    )


def make_engine(config: TrainConfig) -> TorchEngine:
    """A grafted tiny hybrid on plain torch."""
    model = titans_ds.attach(tiny_base("qwen3_5"), config.graft)
    module = TrainingModule(model, 16).train()
    return TorchEngine(module, make_optimizer(module, config.optimizer), 1.0, torch.device("cpu"))


def make_trainer(config: TrainConfig, corpus: PackedCorpus, folder: Path | None = None) -> Trainer:
    """With evaluation where there is a folder to write it to."""
    reader = RepositoryReader(corpus.split("train"), SEGMENT)
    lanes = Lanes(reader, config.data.num_lanes, 0, 1, config.training.seed)
    run = RunFolder.create(folder, "training: {}\n", overwrite=False) if folder else None
    held_out = RepositoryReader(corpus.split("validation", 2), SEGMENT)
    evaluator = Evaluator(held_out, config.evaluation, 0, with_memory=True) if folder else None
    return Trainer(config, make_engine(config), lanes, evaluator, run)


def poison(trainer: Trainer, value: float) -> None:
    """Set a weight of the first query projection, so that losses are not finite."""
    name = next(n for n in trainable_names(trainer.engine.module) if "query" in n)
    with torch.no_grad():
        trainer.engine.module.get_parameter(name)[0, 0] = value


def test_a_run_writes_everything_that_it_promises(tmp_path: Path, corpus: PackedCorpus) -> None:
    """Metrics, evaluation by repository, adapter, status."""
    trainer = make_trainer(make_config(), corpus, tmp_path / "run")
    outcome = trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    for line in steps:
        assert set(line["gate"]) == {"1", "3"} == set(line["inner_loss_before"]) == set(line["write_norm"])
        assert all(v > 0 for v in line["write_norm"].values())
        assert all(line["inner_loss_after"][k] < line["inner_loss_before"][k] for k in ("1", "3"))
        assert line["gate_gradient_norm"] == pytest.approx(math.hypot(*line["gate_gradient"].values()))
        assert line["gate_gradient_norm"] > 0
        assert line["tokens_per_second"] == pytest.approx(line["targets"] / line["seconds"])
        assert line["peak_memory_bytes"] > 10**6
    trained = sum(p.numel() for p in trainer.engine.module.parameters() if p.requires_grad)
    assert steps[-1]["optimizer_state_bytes"] == 2 * 4 * trained  # two fp32 moments
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["step"], status["skipped"]) == ("finished", 4, 0)
    assert outcome.evaluation is not None
    assert set(outcome.evaluation.losses) == {"memory", "wrong", "empty", "ablated"}
    by_repo = json.loads((tmp_path / "run" / "evaluation" / "step_0000004.json").read_text())["repositories"]
    assert len(by_repo) == 4
    model = titans_ds.TitansModel.from_pretrained(tiny_base("qwen3_5"), tmp_path / "run" / "adapter")
    for name, parameter in model.titans_parameters():
        original = dict(trainer.engine.module.model.titans_parameters())[name]
        torch.testing.assert_close(parameter, original)


def test_states_go_from_step_to_step_and_reset_at_repositories(corpus: PackedCorpus) -> None:
    """The state after three steps of one lane is that of the same segments written one after another."""
    config = make_config()
    engine, carried = make_engine(config), Carried()
    reader = RepositoryReader(corpus.split("train"), SEGMENT)
    lanes, again = (Lanes(reader, 1, 0, 1, seed=0) for _ in range(2))
    model, state = engine.module.model, None
    for _ in range(7):
        passes = run_passes(engine, lanes, carried, config.training, 1)
        commit(passes, carried)
        batch = again.next().batch
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.mask)
        state = None if batch.reset[0] else state
        state = model.read_write(ids, state=state, write_mask=mask).state  # type: ignore[operator]
        for layer, tensors in state.items():
            for name, tensor in tensors.items():
                torch.testing.assert_close(carried.state[layer][name], tensor)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_skips_the_step(tmp_path: Path, corpus: PackedCorpus, value: float) -> None:
    """Parameters and moments stay; the step is counted; after the limit the run stops with a message."""
    trainer = make_trainer(make_config(nonfinite_limit=3, steps=10), corpus, tmp_path / "run")
    trainer._one_step()
    poison(trainer, value)
    before = {n: p.clone() for n, p in trainer.engine.module.named_parameters()}
    for _ in range(2):
        trainer._one_step()
    assert (trainer.progress.step, trainer.progress.skipped, trainer.progress.bad_in_a_row) == (3, 2, 2)
    for name, parameter in trainer.engine.module.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())
    with pytest.raises(TrainingError, match=r"was not finite in 3 steps in a row \(last: step 4\)"):
        trainer._one_step()
    assert trainer._metrics is not None
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["loss"] is None for line in lines] == [False, True, True]
    poison(trainer, 0.1)
    trainer._one_step()
    assert trainer.progress.bad_in_a_row == 0


def test_a_lane_whose_state_is_not_finite_starts_anew(corpus: PackedCorpus) -> None:
    """It does not touch its neighbour, and its next segment reads W_0."""
    config = make_config()
    trainer = make_trainer(config, corpus)
    trainer._one_step()
    assert trainer.carried.state is not None
    trainer.carried.state[1]["w0"][0, 0, 0] = float("nan")
    trainer.carried.state[3]["w0"][0, 0, 0] = float("nan")
    neighbour = trainer.carried.state[1]["w0"][1].clone()
    passes = run_passes(trainer.engine, trainer.lanes, trainer.carried, config.training, 1)
    assert not torch.isfinite(passes.loss_sum)
    assert not commit(passes, trainer.carried)
    assert trainer.carried.restart is not None
    assert trainer.carried.restart.tolist() == [True, False]
    assert torch.isfinite(trainer.carried.state[1]["w0"]).all()
    assert not torch.equal(trainer.carried.state[1]["w0"][1], neighbour)  # the neighbour was written as usual
    trainer.engine.step(0.0, skip=True)
    passes = run_passes(trainer.engine, trainer.lanes, trainer.carried, config.training, 1)
    assert torch.isfinite(passes.loss_sum)
    assert commit(passes, trainer.carried)


def test_a_gradient_that_is_not_finite_skips_the_step(corpus: PackedCorpus) -> None:
    """Also where the loss is fine."""
    trainer = make_trainer(make_config(), corpus)
    gate = trainer.engine.module.get_parameter(next(iter(gate_names(trainer.engine.module).values())))
    handle = gate.register_hook(lambda g: g * float("nan"))
    before = gate.detach().clone()
    trainer._one_step()
    assert trainer.progress.skipped == 1
    handle.remove()
    trainer._one_step()
    assert trainer.progress.skipped == 1
    assert not torch.equal(gate, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run(tmp_path: Path, corpus: PackedCorpus, number: signal.Signals) -> None:
    """SIGTERM after the step, with the adapter saved; Ctrl-C at once. The status says stopped."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    trainer = make_trainer(make_config(steps=50), corpus, tmp_path / "run")

    class Killer:
        """Sends the signal in the second step."""

        def step(self, step: int, values: dict[str, Any]) -> None:
            """See Reporter."""
            if step == 2:
                os.kill(os.getpid(), number)

        def evaluation(self, step: int, evaluation: Any) -> None:
            """See Reporter."""

    trainer.reporter = Killer()
    try:
        if number == signal.SIGINT:
            with pytest.raises(KeyboardInterrupt):
                trainer.run()
        else:
            assert trainer.run().stopped
    finally:
        signal.signal(signal.SIGINT, before)
    if number == signal.SIGTERM:
        assert (tmp_path / "run" / "adapter" / "titans_memory.safetensors").is_file()
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "stopped"
    assert 2 <= status["step"] <= 3


def test_checkpointing_and_order_do_not_change_losses(corpus: PackedCorpus) -> None:
    """First-step losses are equal at first and second order; gradients are equal with and without checkpointing."""
    results = {}
    for order, checkpointing in (("first", False), ("first", True), ("second", False), ("second", True)):
        config = make_config(order=order, window=3, checkpointing=checkpointing)
        engine = make_engine(config)
        if checkpointing:
            enable_checkpointing(engine.module.model.base_model)
        lanes = Lanes(RepositoryReader(corpus.split("train"), SEGMENT), 2, 0, 1, seed=0)
        loss = run_passes(engine, lanes, Carried(), config.training, 1).loss_sum
        results[order, checkpointing] = loss, engine.gradients(trainable_names(engine.module))
    losses = [float(loss) for loss, _ in results.values()]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    for order in ("first", "second"):
        for name, plain in results[order, False][1].items():
            torch.testing.assert_close(results[order, True][1][name], plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("segment_writes", [True, False])
@pytest.mark.parametrize("memory", [GRAFT.memory, DeltaConfig(dim=8)], ids=["network", "delta"])
@pytest.mark.parametrize("reset", ["repository", "file"])
def test_evaluation_equals_a_plain_loop(corpus: PackedCorpus, reset: Any, memory: Any, segment_writes: bool) -> None:
    """Each repository alone, segment by segment, with its own state, its donor's, an empty one, and none."""
    config = make_config()
    evaluation = dataclasses.replace(config.evaluation, segment_writes=segment_writes)
    config = dataclasses.replace(config, graft=dataclasses.replace(GRAFT, memory=memory), evaluation=evaluation)
    engine = make_engine(config)
    reader = RepositoryReader(corpus.split("validation"), SEGMENT, reset=reset)
    evaluator = Evaluator(reader, config.evaluation, seed=3, with_memory=True)
    result, names = evaluator.run(engine), reader.split.repo_names
    assert engine.module.training
    engine.set_training(False)
    losses = {r.repo: r for r in result.repositories}
    for group in evaluator.groups:
        states = [_states(engine, reader, repo) for repo in group.repos]
        for row, repo in enumerate(group.repos):
            donor = states[int(group.donors[row])]
            assert int(group.donors[row]) != row
            expected = _plain_losses(engine, reader, repo, states[row], donor, segment_writes)
            assert losses[names[repo]].losses == pytest.approx(expected, abs=1e-5)
            assert expected["memory"] != pytest.approx(expected["wrong"], abs=1e-5)
            assert expected["empty"] != pytest.approx(expected["memory"], abs=1e-5)
            assert (expected["empty"] == pytest.approx(expected["ablated"], abs=1e-5)) == _reads_nothing(config)
    for mode in ("ablated", "empty", "wrong"):
        paired = [r.losses[mode] - r.losses["memory"] for r in result.repositories]
        assert result.differences[mode].mean == pytest.approx(np.mean(paired))
        assert result.differences[mode].standard_error == pytest.approx(np.std(paired, ddof=1) / len(paired) ** 0.5)


def test_evaluation_before_training_is_the_base_model(corpus: PackedCorpus) -> None:
    """On the same tokens; ablation keeps LoRA; forgetting is their paired difference, and LoRA still trains after."""
    config = make_config()
    model = titans_ds.attach(tiny_base("qwen3_5"), config.graft, lora=LoraSettings(rank=2, targets=["q_proj"]))
    module = TrainingModule(model, 16).train()
    engine = TorchEngine(module, make_optimizer(module, config.optimizer), 1.0, torch.device("cpu"))
    trained = trainable_names(module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.3)
    reader = RepositoryReader(corpus.split("validation"), SEGMENT)
    result = Evaluator(reader, config.evaluation, seed=3, with_memory=True, before=True).run(engine)
    original = Evaluator(reader, config.evaluation, seed=3, with_memory=True).run(make_engine(config))
    expected = {r.repo: r.losses["ablated"] for r in original.repositories}  # an untrained graft, ablated: the base
    assert {r.repo: r.losses["before"] for r in result.repositories} == expected
    paired = [r.losses["ablated"] - r.losses["before"] for r in result.repositories]
    assert all(abs(p) > 1e-4 for p in paired)
    assert result.forgetting is not None
    assert result.forgetting.mean == pytest.approx(np.mean(paired))
    assert result.forgetting.standard_error == pytest.approx(np.std(paired, ddof=1) / len(paired) ** 0.5)
    assert trainable_names(module) == trained


def _limit(reader: RepositoryReader, repo: int) -> int:
    return min(reader.num_segments(repo), EvaluationSettings().max_segments)


@torch.no_grad()
def _states(engine: TorchEngine, reader: RepositoryReader, repo: int) -> list[Any]:
    state, states = None, []
    for number in range(_limit(reader, repo)):
        segment = reader.segment(repo, number)
        state = None if segment.reset else state
        state = engine.module.model.read_write(torch.from_numpy(segment.inputs)[None], state=state).state  # type: ignore[operator]
        states.append(state)
    return states


def _reads_nothing(config: TrainConfig) -> bool:
    """Whether an empty memory is no memory: a matrix that no token of the segment writes."""
    assert config.graft is not None
    return isinstance(config.graft.memory, DeltaConfig) and not config.evaluation.segment_writes


@torch.no_grad()
def _plain_losses(
    engine: TorchEngine, reader: RepositoryReader, repo: int, own: list[Any], donor: list[Any], writes: bool
) -> dict[str, float]:
    sums, tokens = dict.fromkeys(("memory", "wrong", "empty", "ablated"), 0.0), 0
    for number in range(1, _limit(reader, repo)):
        batch = collate([reader.segment(repo, number)], SEGMENT)
        if batch.reset[0]:
            continue  # nothing was written before it
        arrays = (batch.input_ids, batch.labels, batch.mask, batch.reset)
        inputs = [torch.from_numpy(array) for array in arrays]
        wrong = donor[min(number, len(donor)) - 1]
        for mode, state, memory in (
            ("memory", own[number - 1], True),
            ("wrong", wrong, True),
            ("empty", None, True),
            ("ablated", None, False),
        ):
            with contextlib.nullcontext() if memory else engine.module.ablated():
                sums[mode] += float(engine.module(*inputs, state, Pass(write=writes))[0])
        tokens += batch.num_targets
    return {mode: value / tokens for mode, value in sums.items()}


def test_evaluation_needs_two_repositories(tmp_path: Path) -> None:
    """One repository has no wrong memory; one segment has nothing to remember."""
    folder = write_packed(tmp_path / "c", {"one": random_repos(1, seed=0), "short": [[[3, 4, 5]]] * 3})
    with pytest.raises(DataError, match=r"split 'one' .* has 1 repository; the wrong-memory control needs 2"):
        open_corpus(folder).split("one", min_repos=2)
    reader = RepositoryReader(open_corpus(folder).split("short"), SEGMENT)
    with pytest.raises(DataError, match="split 'short' has 0 repositories of two segments or more"):
        Evaluator(reader, EvaluationSettings(), 0, with_memory=True)


def test_estimate() -> None:
    """Mean and its standard error."""
    result = estimate([1.0, 2.0, 3.0, 4.0])
    assert (result.mean, result.standard_error) == (2.5, pytest.approx(math.sqrt(5 / 3) / 2))
