"""Forward Alignment Networks: predicted write gradients, their training, and the program."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import titans_ds
from launch.train_fan import FanConfig, main, parse
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base, token_ids
from titans_ds import GraftConfig, MLPConfig, TitansModel, preset
from titans_ds.errors import ConfigError
from titans_ds.memory import Pass
from titans_ds.memory.mlp import MLPMemory, RuleConfig, network
from titans_ds.memory.mlp.fan import ForwardAlignment, Lesson
from titans_ds.training import alignment
from titans_ds.training.data.segments import IGNORED, Batch

ROOT = Path(__file__).resolve().parents[2]
WRITE = Pass()


def memory(**settings: object) -> MLPMemory:
    rule = RuleConfig(gradient="fan", fan_width=8, **settings.pop("rule", {}))  # type: ignore[arg-type]
    config = MLPConfig(**{"dim": 8, "depth": 2, "write": "token", "step_size": 0.1, "rule": rule, **settings})  # type: ignore[arg-type]
    return MLPMemory(12, config, 0)


def hidden(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_prediction_is_the_equation() -> None:
    fan = ForwardAlignment((4, 6, 4), 5, seed=0)
    with torch.no_grad():
        fan.outer[0].normal_()
    weights = tuple(hidden(2, *shape, seed=i) for i, shape in enumerate(((6, 4), (4, 6))))
    keys, values = hidden(2, 3, 4, seed=5), hidden(2, 3, 4, seed=6)
    form = network.Form(hidden_scale=0.5)
    inputs, deltas = fan(weights, keys, values, form, torch.ones(2, 3))
    exact = network.terms(weights, keys, values, form)
    assert torch.equal(deltas[-1], exact.deltas[-1]), "the last factor is the error, which the forward pass gives"
    assert all(torch.equal(a, b) for a, b in zip(inputs, exact.inputs, strict=True))
    for n in range(2):
        for t in range(3):
            z = weights[0][n] @ keys[n, t]
            s = torch.sigmoid(z)
            x, e = 0.5 * z * s, weights[1][n] @ (0.5 * z * s) - values[n, t]
            seen = torch.cat([keys[n, t] / keys[n, t].norm(), e / e.norm(), x / x.norm()])
            learned = fan.outer[0] @ torch.nn.functional.silu(fan.inner[0] @ seen)
            slope = s * (1 + z * (1 - s))
            expected = e.norm() * slope * (fan.feedback[0] @ (e / e.norm()) + learned)
            torch.testing.assert_close(deltas[0][n, t], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "titans", "heads", "steps"])
def test_the_rule_writes_what_the_network_says(name) -> None:
    """With feedback that is the transpose of a W_2 that does not move, the prediction is exact, and so is the write."""
    titans = preset("titans", dim=8, heads=2).rule
    settings: dict[str, dict[str, object]] = {
        "plain": {},
        "titans": {"rule": {k: v for k, v in vars(titans).items() if k not in ("gradient", "fan_width", "chunk_size")}},
        "heads": {"heads": 2, "rule": {"chunk_size": 4}},
        "steps": {"inner_steps": 3, "rule": {"max_gradient_norm": 0.01}},
    }
    own = {**settings[name]}
    step_sizes = {"step_sizes": [0.1, 0.0]}
    ours = memory(**{**own, "rule": {**own.get("rule", {}), **step_sizes}})  # type: ignore[dict-item]
    rule = dataclasses.replace(ours.config.rule, gradient="exact")
    exact = MLPMemory(12, dataclasses.replace(ours.config, rule=rule), 0)
    h = hidden(2, 11, 12)
    feedback = ours.initial_w1 if ours.config.heads == 1 else ours.initial_w1[0]
    with torch.no_grad():
        if ours.config.heads > 1:
            ours.initial_w1.copy_(feedback.expand(2, -1, -1))
            exact.initial_w1.copy_(ours.initial_w1)
        random = ours(h, None, plan=WRITE)[1]["w0"]
        ours.fan.feedback[0].copy_(feedback.mT)
        assert set(dict(exact.named_parameters())) == {n for n, _ in ours.named_parameters() if not n.startswith("fan")}
        predicted, wanted = ours(h, None, plan=WRITE)[1]["w0"], exact(h, None, plan=WRITE)[1]["w0"]
    torch.testing.assert_close(predicted, wanted, atol=1e-6, rtol=1e-5)
    assert (random - wanted).abs().max() > 1e-4


def test_feedback_starts_as_the_way_back_through_the_initial_weights() -> None:
    fan, form = ForwardAlignment((4, 6, 5, 4), 3, seed=0), network.Form(activation="linear", hidden_scale=0.5)
    initial = [hidden(*shape, seed=i) for i, shape in enumerate(((6, 4), (5, 6), (4, 5)))]
    fan.start_from(initial, form)
    weights = tuple(w.expand(2, -1, -1) for w in initial)
    keys, values = hidden(2, 3, 4, seed=5), hidden(2, 3, 4, seed=6)
    _, deltas = fan(weights, keys, values, form, torch.ones(2, 3))
    for ours, exact in zip(deltas, network.terms(weights, keys, values, form).deltas, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-4, rtol=1e-4)


def test_padding_writes_nothing_and_samples_stay_apart() -> None:
    ours, h = memory(token_shift=True), hidden(3, 9, 12)
    mask = torch.tensor([[True] * 9, [True] * 4 + [False] * 5, [False] * 9])
    with torch.no_grad():
        together = ours(h, None, mask, plan=WRITE)[1]
        alone = ours(h[1:2, :4], None, plan=WRITE)[1]
    torch.testing.assert_close(together["w0"][1:2], alone["w0"])
    assert torch.equal(together["w0"][2], ours.initial_w0)


def test_a_lesson_leaves_the_write_as_it_is_said_to_be() -> None:
    ours, h = memory(), hidden(2, 9, 12)
    exact = MLPMemory(12, dataclasses.replace(ours.config, rule=RuleConfig()), 0)
    for follow, other in ((False, exact), (True, ours)):
        with torch.no_grad():
            expected = other(h, None, plan=WRITE)[1]["w0"]
            ours.fan.lesson = lesson = Lesson(follow)
            torch.testing.assert_close(ours(h, None, plan=WRITE)[1]["w0"], expected)
        ours.fan.lesson = None
        assert len(lesson.losses) == len(lesson.cosines) == len(lesson.total) == 1
    ours.fan.bypassed = True
    with torch.no_grad():
        torch.testing.assert_close(ours(h, None, plan=WRITE)[1]["w0"], exact(h, None, plan=WRITE)[1]["w0"])


def test_a_row_that_is_not_finite_teaches_nothing() -> None:
    ours, h = memory(), hidden(3, 9, 12)
    state = {name: tensor.clone() for name, tensor in ours.initial_state(3, h).items()}
    state["w1"][1] = float("inf")
    ours.fan.requires_grad_(True)
    ours.fan.lesson = lesson = Lesson(True)
    with torch.no_grad():
        ours(h, state, torch.tensor([[True] * 9, [True] * 9, [False] * 9]), plan=WRITE)
    assert lesson.cosines[0].shape == (1,)
    lesson.losses[0].backward()
    assert all(bool(torch.isfinite(p.grad).all()) for p in ours.fan.parameters())


def test_the_cosine_is_that_of_the_gradients() -> None:
    ours, h = memory(), hidden(2, 9, 12)
    ours.fan.lesson = lesson = Lesson(False)
    with torch.no_grad():
        ours(h, None, plan=WRITE)
        keys, values = ours.key_projection(h), ours.value_projection(h)
        weights = tuple(w.expand(2, -1, -1) for w in (ours.initial_w0, ours.initial_w1))
        ours.fan.lesson = None
        shares = torch.full((2, 9), 1 / 9)
        inputs, deltas = ours.fan(weights, keys, values, ours.form(2), shares)
        _, exact = network.loss_and_gradient(weights, keys, values, shares, ours.form(2))
        mine = network.gradient(network.Terms(inputs, deltas), shares)
    for row in range(2):
        a, b = mine[0][row].flatten(), exact[0][row].flatten()
        assert float(lesson.cosines[0][row]) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-5)


def test_training_brings_predictions_into_line(tmp_path) -> None:
    """On one base and random text, memories written by the networks themselves: from no alignment to a good one."""
    model = networks_on_a_saved_adapter(tmp_path)
    batch = Batch(*(x.numpy() for x in fixed_batch()))
    assert alignment.summarise(alignment.observe(model, batch, None, own=True)[0]).mean > 0.999, "W_0 is fed back"
    with torch.no_grad():
        for fan in alignment.networks(model).values():
            fan.feedback[0].copy_(torch.randn_like(fan.feedback[0]))
    before = alignment.summarise(alignment.observe(model, batch, None, own=True)[0])
    assert abs(before.mean) < 0.5
    trainer = alignment.AlignmentTrainer(model, Same(batch), optimizer(), 150, "alternate")  # type: ignore[arg-type]
    steps = list(trainer.run())
    after = alignment.summarise(alignment.observe(model, batch, None, own=True)[0])
    assert steps[-1][1] < steps[0][1]
    assert after.mean > 0.9
    assert after.whole > 0.9
    assert not any(p.requires_grad for p in model.parameters())


class Same:
    """Lanes that hold one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def next(self):  # type: ignore[no-untyped-def]
        from titans_ds.training.data.lanes import Step

        return Step(self.batch, self.batch.num_targets)


def optimizer():  # type: ignore[no-untyped-def]
    from titans_ds.training.settings import OptimizerSettings

    return OptimizerSettings(lr=1e-2, weight_decay=0.0, warmup_steps=5)


def fixed_batch() -> list[torch.Tensor]:
    ids = token_ids(4, 16)
    mask, reset = torch.ones(4, 16, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    return [ids, torch.full_like(ids, IGNORED), mask, reset, torch.arange(4)]


def networks_on_a_saved_adapter(folder: Path) -> TitansModel:
    base = tiny_base("llama", num_hidden_layers=2)
    config = GraftConfig(segment_tokens=16, memory=MLPConfig(dim=16, write="token", step_size=0.05))
    titans_ds.attach(base, config).save_pretrained(folder / "exact")
    return alignment.with_networks(tiny_base("llama", num_hidden_layers=2), folder / "exact", 8)


def test_the_new_adapter_keeps_the_old_one_s_tensors_and_loads(tmp_path) -> None:
    model, ids = networks_on_a_saved_adapter(tmp_path), token_ids(2, 20)
    model.save_pretrained(tmp_path / "fan")
    again = TitansModel.from_pretrained(tiny_base("llama", num_hidden_layers=2), tmp_path / "fan")
    exact = TitansModel.from_pretrained(tiny_base("llama", num_hidden_layers=2), tmp_path / "exact")
    assert again.graft.memory.rule.gradient == "fan"
    logits = []
    for loaded in (model, again, exact):
        with torch.no_grad(), loaded.memory_session(2) as session:
            loaded.prime(ids, session)
            logits.append(loaded(ids, memory=session.state).logits)
    assert torch.equal(logits[0], logits[1])
    assert not torch.allclose(logits[0], logits[2])
    for fan in alignment.networks(again).values():
        fan.bypassed = True
    with torch.no_grad(), again.memory_session(2) as session:
        again.prime(ids, session)
        torch.testing.assert_close(again(ids, memory=session.state).logits, logits[2], atol=1e-5, rtol=1e-4)


def test_lora_beside_the_memory_is_kept(tmp_path) -> None:
    config = GraftConfig(memory=MLPConfig(dim=8))
    lora = titans_ds.config.LoraSettings(rank=2, targets=["q_proj"])
    titans_ds.attach(tiny_base("llama"), config, lora=lora).save_pretrained(tmp_path / "exact")
    model = alignment.with_networks(tiny_base("llama"), tmp_path / "exact", 8)
    model.save_pretrained(tmp_path / "fan")
    assert TitansModel.from_pretrained(tiny_base("llama"), tmp_path / "fan").lora is not None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    splits = {"train": random_repos(8, seed=1), "validation": random_repos(7, seed=2, files=4, least=12)}
    write_packed(folder / "corpus", splits)
    base = tiny_base("qwen3_5", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    base.save_pretrained(folder / "base")
    memory_ = MLPConfig(dim=8, write="token", step_size=0.05, output_projection="learned")
    titans_ds.attach(base, GraftConfig(segment_tokens=8, memory=memory_)).save_pretrained(folder / "adapter")
    config = {
        "model": {"base": str(folder / "base")},
        "data": {"corpus": str(folder / "corpus"), "num_lanes": 4},
        "adapter": str(folder / "adapter"),
        "out": str(folder / "fan"),
        "width": 8,
        "steps": 30,
        "optimizer": {"lr": 0.01, "warmup_steps": 1, "weight_decay": 0.0},
        "evaluation": {"repositories": 6, "group_size": 2, "max_segments": 4},
    }
    (folder / "fan.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_the_program_trains_measures_and_saves(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(place / "fan.yaml")]) == 0
    assert "held-out loss, memory unwritten" in capsys.readouterr().out
    report = json.loads((place / "fan" / "fan.json").read_text())
    assert 0.9 < report["cosine"]["whole"] < 1.0
    assert set(report["cosine"]["by_layer"]) == set(report["cosine_before"]["by_layer"]) == {"1"}
    losses = {writer: found["mean"] for writer, found in report["held_out_loss"]["losses"].items()}
    assert set(losses) == {"exact", "fan", "unwritten", "ablated"}
    assert len(set(np.round(list(losses.values()), 7))) == 4
    difference = report["held_out_loss"]["minus_exact"]["fan"]["mean"]
    assert difference == pytest.approx(losses["fan"] - losses["exact"], abs=1e-9)
    assert sorted(p.name for p in place.iterdir() if p.name.startswith(".fan")) == []
    loaded = TitansModel.from_pretrained(
        tiny_base("qwen3_5", num_hidden_layers=2, layer_types=["linear_attention", "full_attention"]), place / "fan"
    )
    assert loaded.graft.memory.rule.fan_width == 8
    assert main(["--config", str(place / "fan.yaml")]) == 2
    assert "exists already" in capsys.readouterr().err
    (mine := place / "mine").mkdir()
    (mine / "notes.txt").write_text("mine")
    assert main(["--config", str(place / "fan.yaml"), "--out", str(mine), "--overwrite", "true"]) == 2
    assert "holds something else than an adapter" in capsys.readouterr().err
    assert [path.name for path in mine.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--adapter", "/nowhere", "--out", "X"], "cannot read /nowhere/titans_config.json"),
        (["--widht", "3"], "widht"),
        (["--steps", "0", "--out", "X"], "1 or more"),
        (["--config", "/nowhere.yaml"], "nowhere"),
        (["--data.corpus", "/nowhere", "--out", "X"], "nowhere"),
    ],
)
def test_what_it_refuses(place: Path, options: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(place / "fan.yaml"), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]  # above it the bar of a base that was loaded
    assert error.startswith("error: ")
    assert told in error


def test_the_shipped_configuration_loads() -> None:
    config = parse(["--config", str(ROOT / "launch/configs/fan.yaml")])
    assert isinstance(config, FanConfig)
    assert config.follow == "alternate"


def test_a_memory_without_a_backward_pass_is_refused() -> None:
    with pytest.raises(ConfigError, match="depth 2 or more"):
        MLPConfig(depth=1, rule=RuleConfig(gradient="fan"))
