"""Settings of a run: what is refused, with which message; every shipped configuration loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from launch.arguments import parse
from titans_ds import PrefixConfig
from titans_ds.config import GraftConfig
from titans_ds.errors import ConfigError, TitansError
from titans_ds.memory.mlp import write_function
from titans_ds.memory.mlp.network import Form
from titans_ds.training.optimizer import lr_at
from titans_ds.training.settings import (
    DataSettings,
    EvaluationSettings,
    ModelSettings,
    OptimizerSettings,
    TrainConfig,
    TrainingSettings,
)
from titans_ds.zero.config import complete_config, read_config, zero_stage
from titans_ds.zero.footprint import Model, Setup, total_bytes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(p for p in (ROOT / "launch" / "configs").glob("*.yaml") if p.stem != "fan")  # of another program
ENOUGH = ["--model.base=B", "--data.corpus=C", "--graft.memory.dim=8"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    """From YAML to a valid configuration, with a DeepSpeed file that exists, in the run folder of its name."""
    config, text = parse(["--config", str(path)])
    assert config.deepspeed is not None
    assert zero_stage(read_config(ROOT / config.deepspeed)) in (0, 1, 2, 3)
    assert config.run.dir == f"runs/{path.stem}"
    assert "segment_tokens" in text


def test_the_papers_numbers() -> None:
    """V2 with a frozen base and a gate floor."""
    config, _ = parse(["--config", str(ROOT / "launch/configs/v2_frozen_gate_floor.yaml")])
    graft = config.graft
    assert graft is not None
    assert (config.model.base, config.model.trainable) == ("Qwen/Qwen3.5-9B-Base", "memory")
    assert (graft.layers, graft.injection, graft.segment_tokens) == ("attention", "additive", 2048)
    assert (graft.gate_init, graft.gate_floor, graft.gate_floor_mode) == (0.0, 0.15, "clamp")
    memory = graft.memory
    assert (memory.dim, memory.depth, memory.activation, memory.write) == (512, 2, "silu", "pooled")
    assert (memory.step_size, memory.inner_steps, memory.learn_initial_weights) == (0.01, 1, False)
    assert (memory.key_projection, memory.value_projection) == ("orthogonal", "orthogonal")
    assert (memory.query_projection, memory.output_projection) == ("learned", "orthogonal")
    assert (config.training.steps, config.training.order) == (10_000, "first")


@pytest.mark.parametrize(
    ("name", "injection", "reset", "rank", "steps"),
    [("v1_mac_lora", "mac", "file", 32, 6200), ("v2_additive_lora", "additive", "repository", 64, 5000)],
)
def test_the_papers_lora_runs(name: str, injection: str, reset: str, rank: int, steps: int) -> None:
    """V1 and V2 with LoRA on the attention layers' projections; 8 memory tokens of a memory of dim 512."""
    config, _ = parse(["--config", str(ROOT / f"launch/configs/{name}.yaml")])
    graft, lora = config.graft, config.lora
    assert graft is not None
    assert lora is not None
    assert (config.model.base, config.model.dtype) == ("Qwen/Qwen3.5-9B-Base", "bfloat16")
    assert (graft.layers, graft.injection, graft.memory_tokens, graft.memory.dim) == ("attention", injection, 8, 512)
    assert (lora.rank, lora.targets) == (rank, ["q_proj", "k_proj", "v_proj", "o_proj"])
    assert (config.data.reset, config.training.steps, config.training.checkpointing) == (reset, steps, True)


def test_the_titans_rule_run_learns_through_every_part() -> None:
    """Second order, token gates, convolutions: what the first-order runs can't train."""
    config, _ = parse(["--config", str(ROOT / "launch/configs/v3_titans_rule.yaml")])
    assert config.graft is not None
    memory, rule = config.graft.memory, config.graft.memory.rule
    assert (config.training.order, config.training.window) == ("second", 4)
    assert (memory.write, memory.key_projection, memory.learn_initial_weights) == ("token", "learned", True)
    assert (rule.optimizer, rule.chunk_size, rule.gate_scope) == ("momentum", 64, "token")
    assert all((rule.token_step_size, rule.token_momentum, rule.token_forget_gate, memory.features.convolution))


def test_the_second_order_run_goes_in_two_phases() -> None:
    """Windows of 4 files; all that only writes use is learned, and its rule has a backward pass by hand."""
    config, _ = parse(["--config", str(ROOT / "launch/configs/v3_second_order.yaml")])
    assert config.graft is not None
    memory, training = config.graft.memory, config.training
    assert (training.scheme, training.window, training.backwards_per_step) == ("two_phase", 4, 5)
    assert (memory.key_projection, memory.value_projection, memory.learn_step_size) == ("learned", "learned", True)
    assert training.write_backward == "derived"
    assert write_function.covers(memory.rule, Form())


@pytest.mark.parametrize("stage", range(4))
def test_shipped_deepspeed_configs(stage: int) -> None:
    """Each is of its stage, and is completed from the run's settings."""
    config = read_config(ROOT / "ds_configs" / f"zero{stage}.json")
    assert zero_stage(config) == stage
    complete = complete_config(config, rows=2, backwards_per_step=3, world_size=4, clip=1.0, bf16=True)
    assert complete["train_batch_size"] == 24
    assert complete["bf16"] == {"enabled": True}


def test_linear_maps_are_pytorchs_own_at_stage_3_where_activations_are_recomputed() -> None:
    def linear(recomputed: bool, zero: dict[str, Any]) -> Any:
        whole = {"zero_optimization": zero}
        made = complete_config(whole, 1, 1, world_size=2, clip=0.0, bf16=True, recomputed=recomputed)
        return made["zero_optimization"].get("memory_efficient_linear")

    assert linear(True, {"stage": 3}) is False
    assert linear(False, {"stage": 3}) is None
    assert linear(True, {"stage": 2}) is None
    assert linear(True, {"stage": 3, "memory_efficient_linear": True}) is True


def test_options_override_the_file(tmp_path: Path) -> None:
    """A dotted option replaces one value, also inside the graft; the launcher's --local_rank is dropped."""
    path = tmp_path / "own.yaml"
    path.write_text("model: {base: B}\ndata: {corpus: C}\ngraft: {memory: {preset: paper, dim: 8, depth: 1}}\n")
    config, _ = parse(["--local_rank=1", "--config", str(path), "--graft.memory.dim", "16", "--training.steps=7"])
    assert config.graft is not None
    assert (config.graft.memory.dim, config.graft.memory.depth, config.training.steps) == (16, 1, 7)
    assert config.run.dir == "runs/own"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--training.stpes", "5"], r"option --training.stpes is unknown; did you mean training.steps\?"),
        (["--lr=1"], r"option --lr is unknown; did you mean optimizer.lr\?"),
        (["--training.steps", "many"], r"training.steps is many; expected int"),
        (["--graft.memory.dim", "x"], r"graft.memory.dim is x; expected int"),
        (["--training.order", "third"], r"training.order is third; expected .*first.*second"),
        (["--data.reset=file", "--data.layout=repository"], r"data.reset is 'file', but data.layout 'repository' has"),
        (["--config", "nowhere.yaml"], r"nowhere.yaml does not exist; see launch/configs/"),
        (["--graft.gate_floor", "1.5"], r"gate_floor is 1.5; it must be in \[0, 1\)"),
        (
            ["--graft.memory.value_projection", "learned"],
            r"value_projection is no setting of the preset 'delta'; it is one of paper, titans, ttt_linear",
        ),
        (["--graft.memory.preset", "titan"], r"preset is 'titan', which is no preset; did you mean 'titans'\?"),
        (["--graft.memory", "8"], r"graft.memory is 8; expected a section.*as \{preset: delta\}"),
        (["--training.window", "1"], r"training.window is 1.*Set training.window to 2 or more"),
        (["--graft", "null"], r"graft is null and model.trainable is 'memory': nothing to train"),
        (["--data.layout", "repository"], r"a memory needs data.layout 'files'"),
        (["--optimizer.lr", "0"], r"optimizer.lr is 0.*; it must be above 0"),
        (["--evaluation.group_size", "1"], r"evaluation.group_size is 1; it must be 2 or more"),
        (["--training.seed=-1"], r"training.seed is -1; it must be 0 or more"),
        (["--run.dir=~"], r"run.dir is null; give the folder of the run"),
        (["--model.base="], r"model.base is empty; is a variable of your shell unset\?"),
        (["--model.architecture.model_type", "llama"], r"either model.base .* or model.architecture"),
    ],
)
def test_bad_arguments_get_one_clear_line(arguments: list[str], message: str) -> None:
    """Every message is a single line that says what was wrong."""
    with pytest.raises(ConfigError, match=message) as caught:
        parse([*ENOUGH, *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training: {stpes: 5}", r"key training.stpes is unknown; did you mean training.steps\?"),
        ("graft: {memory: {width: 5, dmi: 3}}", r"key graft.memory.(width|dmi) is unknown"),
        ("a: [", r"is not YAML"),
        ("- 1", r"must hold sections"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    """The same for YAML files, which are named."""
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        parse([*ENOUGH, "--config", str(path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelSettings(base="B", dtype="float64"), r"model.dtype is 'float64'; expected one of"),  # type: ignore[arg-type]
        (lambda: ModelSettings(architecture={"hidden_size": 8}), r"model.architecture needs a model_type"),
        (lambda: DataSettings(), r"data.corpus is not set"),
        (lambda: TrainingSettings(steps=0), r"training.steps is 0; it must be 1 or more"),
        (lambda: EvaluationSettings(interval=-1), r"evaluation.interval is -1"),
        (lambda: OptimizerSettings(betas=(0.9, 1.0)), r"optimizer.betas are \(0.9, 1.0\)"),
    ],
)
def test_bad_settings_are_refused_in_python_too(make: Any, message: str) -> None:
    """The dataclasses check themselves."""
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not JSON"),
        ("[]", r"all of it is \[\]; expected a valid JSON object"),
        ('{"optimizer": {}}', r"sets 'optimizer', but AdamW comes from the section optimizer"),
        ('{"bf16": {"enabled": true}}', r"precision comes from model.dtype"),
    ],
)
def test_bad_deepspeed_files(tmp_path: Path, content: str, message: str) -> None:
    """What the run's settings decide may not be set a second time."""
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(TitansError, match=message):
        read_config(path)


def test_deepspeed_file_may_not_contradict_the_run(tmp_path: Path) -> None:
    """A batch size that differs is refused; "auto" is fine; a stage that does not exist is refused."""
    fixed = {"gradient_accumulation_steps": 8, "train_batch_size": "auto"}
    with pytest.raises(ConfigError, match="sets gradient_accumulation_steps to 8, the run's settings make it 3"):
        complete_config(fixed, rows=2, backwards_per_step=3, world_size=1, clip=0.0, bf16=False)
    with pytest.raises(ConfigError, match=r"stage is 7; it must be 0, 1, 2 or 3"):
        zero_stage({"zero_optimization": {"stage": 7}})
    with pytest.raises(TitansError, match=r"none\.json: No such file"):
        read_config(tmp_path / "none.json")
    assert json.dumps(fixed)


@pytest.mark.parametrize(
    ("training", "segments"),
    [({}, 1), ({"order": "second"}, 1), ({"order": "second", "second_order": "through_base"}, 3)],
)
def test_segments_in_graph(training: dict[str, Any], segments: int) -> None:
    """Two phases keep the base graph of one segment; offload keeps what one layer works on."""
    assert TrainingSettings(window=3, **training).segments_in_graph == segments
    model = Model(10**6, 10**4, 0, layers=8, hidden=64, vocab=100)
    run = Setup(0, 1, lanes=2, segment_tokens=16, checkpointing=False, segments_in_graph=segments, loss_chunk_tokens=8)
    least = total_bytes(model, dataclasses.replace(run, segments_in_graph=1, offload_activations=True))
    assert total_bytes(model, dataclasses.replace(run, offload_activations=True)) == least
    assert total_bytes(model, run) - least == 2 * 16 * 64 * 34 * 2 * (8 * segments - 1)


def test_a_prefix_takes_one_graph() -> None:
    """It is written through the base model: two phases are replaced, and refused where asked for."""
    data, model = DataSettings(corpus="C"), ModelSettings(base="B")
    prefix = GraftConfig(memory=PrefixConfig())
    config = TrainConfig(model, data, prefix, training=TrainingSettings(order="second", window=2))
    assert (config.training.second_order, config.backwards_per_step) == ("through_base", 1)
    asked = TrainingSettings(order="second", window=2, second_order="two_phase")
    with pytest.raises(ConfigError, match="is 'two_phase', but a prefix memory is written through the base"):
        TrainConfig(model, data, prefix, training=asked)


@pytest.mark.parametrize(
    ("training", "backwards"),
    [({"order": "first"}, 6), ({}, 8)]
    + [({"order": "second", "second_order": kind}, 2) for kind in ("window", "through_base")],
)
def test_backwards_per_step(training: dict[str, Any], backwards: int) -> None:
    """One a segment at first order, and one more a window in two phases; one a window in one graph."""
    settings = TrainingSettings(window=3, accumulation=2, **training)
    config = TrainConfig(ModelSettings(base="B"), DataSettings(corpus="C"), GraftConfig(), training=settings)
    assert config.backwards_per_step == backwards


def test_learning_rate() -> None:
    """Warm-up ends at lr, the cosine at lr * min_lr_ratio, half way between them in the middle."""
    settings = OptimizerSettings(lr=2.0, warmup_steps=4, min_lr_ratio=0.5)
    rates = [lr_at(step, 24, settings) for step in range(25)]
    assert rates[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates[14] == pytest.approx(1.5)
    assert rates[24] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))
