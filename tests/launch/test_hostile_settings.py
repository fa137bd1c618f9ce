"""Settings made by somebody who means harm or errs: one line that names what is wrong, and nothing is imported."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from launch.arguments import parse
from launch.study.settings import load_study
from launch.train_fan import parse as parse_fan
from titans_ds.errors import ConfigError, TitansError
from titans_ds.zero.config import read_config

ENOUGH = "model: {base: B, trainable: all}\ndata: {corpus: C}\n"
MODULE = "imported_by_a_setting"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A class that anybody could name, in a module that notices when it is imported."""
    (tmp_path / f"{MODULE}.py").write_text("class Settings:\n    def __init__(self, **_):\n        raise SystemExit\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return f"{MODULE}.Settings"


def refused(tmp_path: Path, text: str, *options: str) -> str:
    """The one line that a file and options are refused with."""
    path = tmp_path / "own.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        parse(["--config", str(path), *options])
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert MODULE not in sys.modules
    return message.replace(f"{path}: ", "").replace(str(path), "FILE")


@pytest.mark.parametrize("section", ["graft", "optimizer", "lora", "graft.memory", "graft.memory.rule", "run"])
@pytest.mark.parametrize("value", ["{module}", "{{class_path: {module}}}", "[]", "3", "true", "[{module}]"])
def test_a_section_is_a_mapping_in_file_and_option(tmp_path: Path, module: str, section: str, value: str) -> None:
    shown = value.format(module=module)
    *outer, last = section.split(".")
    text = ENOUGH + "".join(f"{'  ' * depth}{name}:\n" for depth, name in enumerate(outer))
    expected = r"expected a section, a mapping of its settings|key \S+class_path is unknown"
    assert re.search(expected, refused(tmp_path, f"{text}{'  ' * len(outer)}{last}: {shown}\n"))
    for option in ([f"--{section}={shown}"], [f"--{section}", shown]):
        assert re.search(expected, refused(tmp_path, ENOUGH, *option))


@pytest.mark.parametrize("value", ["{class_path: MODULE}", "[{class_path: MODULE}]", "{a: {init_args: {}}}"])
def test_free_form_settings_make_no_objects(tmp_path: Path, module: str, value: str) -> None:
    value = value.replace("MODULE", module)
    text = f"data: {{corpus: C}}\nmodel: {{trainable: all, architecture: {{model_type: llama, extra: {value}}}}}\n"
    assert "would make an object of a class" in refused(tmp_path, text)
    for option in (f"--model.architecture={{model_type: llama, x: {value}}}", f"--model.architecture.x={value}"):
        assert "would make an object of a class" in refused(tmp_path, "data: {corpus: C}\n", option)
    assert "would make" in refused(tmp_path, ENOUGH, f"--model.architecture.class_path={module}")
    assert "expected a mapping" in refused(tmp_path, f"data: {{corpus: C}}\nmodel: {{architecture: {module}}}\n")


def test_free_form_settings_are_kept_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("data: {corpus: C}\nmodel: {trainable: all, architecture: {model_type: llama, a: [1, {b: x.Y}]}}\n")
    config, _ = parse(["--config", str(path), "--model.architecture.hidden_size=8", "--lora", "null"])
    assert config.model.architecture == {"model_type": "llama", "a": [1, {"b": "x.Y"}], "hidden_size": 8}


BOMB = "a: &a [x, x]\n" + "".join(
    f"{n}: &{n} [*{m}, *{m}]\n" for m, n in zip("abcdefghijkl", "bcdefghijklm", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "optimizer: {lr: 0.1}\nrun: {}\noptimizer: {eps: 1}",
            "optimizer stands twice, in lines 3 and 5; take one out",
        ),
        ("optimizer: {lr: 0.1, lr: 0.2}", "lr stands twice, in lines 3 and 3"),
        (BOMB, "it has more than 20 aliases"),
        ("optimizer: null", "optimizer is null; expected a section, a mapping of its settings by name"),
        ("graft: {memory: null}", "graft.memory is null; expected a section"),
        ("a: " + "[" * 3000, "FILE is not YAML: it is nested too deep"),
        ("training: {steps: " + "9" * 5000 + "}", "FILE is not YAML: Exceeds the limit"),
        ("training: {seed: " + "9" * 400 + "}", "training.seed is 999"),
        ("x: !!python/object/apply:os.system [ls]", "FILE is not YAML: could not determine a constructor"),
        ("optimizer: {lr: .inf}", "optimizer.lr is inf; expected float (finite)"),
        ("optimizer: {betas: [0.9, .nan]}", "optimizer.betas is [0.9, nan]; expected a list of float"),
        ("graft: {gate_init: .nan}", "graft.gate_init is nan; expected float (finite)"),
        ("graft: {layers: [3, 3]}", "layers [3, 3] names a layer twice"),
        ("graft:\n  layers: 3,7", "graft.layers is 3,7; expected a list of int or one of 'auto', 'attention'"),
        ("graft: {layers: []}", "layers is an empty list; name at least one layer"),
        ("graft: {memory: {rule: {chunk_size: many}}}", "graft.memory.rule.chunk_size is many; expected int"),
        ("data: {num_lanes: 100000000, corpus: C}\nmodel: {base: B}", "data.num_lanes is 100000000; it must be"),
        ("lora: {rank: 10000000000}", "lora.rank is 10000000000; it must be"),
    ],
)
def test_files_that_are_wrong_say_where(tmp_path: Path, text: str, says: str) -> None:
    assert says in refused(tmp_path, text if "corpus" in text else ENOUGH + text + "\n")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--graft.layers=[3,3]", "layers [3, 3] names a layer twice"),
        ("--graft.layers=[1", "graft.layers is [1; expected a list of int or one of 'auto', 'attention'"),
        ("--optimizer.lr=.nan", "optimizer.lr is .nan; expected float (finite)"),
        ("--optimizer.lr=-.inf", "optimizer.lr is -.inf; expected float (finite)"),
        (
            "--graft.memory.step_size=1e400",
            "graft.memory.step_size is 1e400; expected one of 'constant', 'learned'",
        ),
        ("--optimizer.betas=[0.9]", "optimizer.betas is [0.9]; expected a list of float (finite), float (finite)"),
        ("--graft={memory: {dim: 4}, memory: {dim: 5}}", "graft is {memory"),
    ],
)
def test_options_that_are_wrong_say_it_in_one_line(tmp_path: Path, option: str, says: str) -> None:
    assert says in refused(tmp_path, ENOUGH, option)


def test_numbers_and_texts_are_read_as_before(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("model: {base: B}\ndata: {corpus: C}\noptimizer: {lr: 1e-4, betas: [0.8, 0.9]}\ngraft: &g {}\n")
    config, _ = parse(["--config", str(path), "--run.dir", "123", "--graft", "{memory: {dim: 8}}", "--lora={rank: 4}"])
    assert (config.optimizer.lr, config.optimizer.betas, config.run.dir) == (1e-4, (0.8, 0.9), "123")
    assert config.graft is not None
    assert config.lora is not None
    assert (config.graft.memory.dim, config.lora.rank) == (8, 4)


def test_other_programs_read_their_files_the_same_way(tmp_path: Path, module: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(f"model: {module}\n")
    with pytest.raises(ConfigError, match=r"model is .*; expected a section"):
        parse_fan(["--config", str(path), "--adapter", "a", "--out", "b"])
    path.write_text("arms: {a: {base: x, config: y}}\narms: {}\n")
    with pytest.raises(ConfigError, match="arms stands twice, in lines 1 and 2"):
        load_study(path)
    assert MODULE not in sys.modules


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"zero_optimisation": {"stage": 3}}', "did you mean 'zero_optimization'?"),
        ('{"zero_optimization": null}', "'zero_optimization' to null; expected an object of settings. Leave it out"),
        ('{"zero_optimization": []}', "'zero_optimization' to []; expected an object"),
        ('{"aio": null}', "'aio' to null; expected an object"),
        ('{"wall_clock_breakdown": null}', "'wall_clock_breakdown' to null; expected a value"),
        ('{"aio": {"blok_size": 3}}', "aio.blok_size, which is unknown; did you mean 'block_size'?"),
        (
            '{"zero_optimization": {"stge": 2}}',
            "zero_optimization.stge, which DeepSpeed does not know; did you mean 'stage'",
        ),
        (
            '{"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}',
            "zero_optimization.offload_optimizer.devise, which DeepSpeed does not know; did you mean 'device'?",
        ),
        (
            '{"zero_optimization": {"offload_param": {"device": "gpu"}}}',
            'offload_param.device to "gpu": Input should be',
        ),
        ('{"zero_optimization": {"stage": "two"}}', 'zero_optimization.stage to "two": Input should be 0, 1, 2'),
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {}}', "zero_optimization stands twice"),
        ("[" * 100_000, "not JSON ("),
        ('{"a": ' + "9" * 5000 + "}", "not JSON ("),
        ("\xff", "not JSON ("),
    ],
)
def test_deepspeed_files_that_are_wrong_name_the_key(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "ds.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(TitansError, match=re.escape(says)) as caught:
        read_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
