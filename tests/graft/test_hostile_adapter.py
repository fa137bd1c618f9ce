"""Adapters, states and base models made by somebody who means harm, or cut short: refused before they take memory."""

from __future__ import annotations

import ast
import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import titans_ds
from launch.train import main
from tests.support.kill_and_resume import prepare
from tests.support.tiny_models import tiny_base
from titans_ds.errors import AdapterError, DataError, StateError
from titans_ds.graft.lora import read_settings

SMALL = {"memory": {"preset": "paper", "dim": 8, "write": "token", "query_projection": "tied"}}


def saved(folder: Path, graft: dict[str, Any] | None = None, **attach: Any) -> Path:
    model = titans_ds.attach(tiny_base("llama"), titans_ds.GraftConfig.from_dict(graft or SMALL), **attach)
    model.save_pretrained(folder)
    return folder


def change(path: Path, *keys: str, value: Any) -> None:
    """Set one value of a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("graft", "keys", "value"),
    [
        (SMALL, ("memory", "dim"), 65_536),
        (SMALL, ("memory", "dim"), 2**40),
        (SMALL, ("memory", "depth"), 10**9),
        (SMALL, ("memory", "hidden_dim"), 10**10),
        (SMALL, ("persistent_tokens",), 10**12),
        ({**SMALL, "injection": "mac"}, ("memory_tokens",), 10**12),
        ({"memory": {"preset": "gradmem"}}, ("memory", "tokens"), 10**12),
        ({"memory": {"preset": "gradmem"}}, ("memory", "inner_steps"), 10**12),
    ],
)
def test_a_small_file_takes_no_large_memory(
    tmp_path: Path, graft: dict[str, Any], keys: tuple[str, ...], value: int
) -> None:
    folder = saved(tmp_path, graft)
    change(folder / "titans_config.json", "graft", *keys, value=value)
    base = tiny_base("llama")
    tracemalloc.start()
    with pytest.raises(AdapterError, match="does not fit its own configuration"):
        titans_ds.TitansModel.from_pretrained(base, folder)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    titans_ds.attach(base, titans_ds.GraftConfig.from_dict(SMALL))  # the base is as it was


def test_a_rank_that_the_file_does_not_have_is_refused(tmp_path: Path) -> None:
    lora = titans_ds.LoraSettings(rank=2, targets=["q_proj"])
    folder = saved(tmp_path, lora=lora)
    assert read_settings(folder) == lora
    for rank, error in ((4_096, AdapterError), (10**10, AdapterError), ("2", AdapterError)):
        change(folder / "lora" / "adapter_config.json", "r", value=rank)
        with pytest.raises(error, match="rank"):
            titans_ds.TitansModel.from_pretrained(tiny_base("llama"), folder)


def test_tensors_must_be_those_of_the_configuration(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    path = folder / "titans_memory.safetensors"
    tensors = load_file(path)
    name = next(n for n, t in tensors.items() if t.dim() == 2)
    less = {n: t for n, t in tensors.items() if n != name}
    for changed, says in (
        ({**tensors, name: tensors[name][:1].clone()}, "has shape"),
        (less, "is missing"),
        ({**tensors, "own": torch.ones(1)}, "own is unknown"),
    ):
        save_file(changed, path)
        with pytest.raises(AdapterError, match=says):
            titans_ds.TitansModel.from_pretrained(tiny_base("llama"), folder)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(AdapterError, match="is damaged"):
        titans_ds.TitansModel.from_pretrained(tiny_base("llama"), folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"graft": [], "base_model": {}}', "[" * 100_000, '{"a": ' + "9" * 5000])
def test_configurations_of_another_form_are_refused(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path)
    (folder / "titans_config.json").write_text(text)
    with pytest.raises(AdapterError, match=r"titans_config\.json: .*save the adapter again"):
        titans_ds.TitansModel.from_pretrained(tiny_base("llama"), folder)


def test_states_fit_the_model_or_are_refused(tmp_path: Path) -> None:
    model = titans_ds.attach(tiny_base("llama"), titans_ds.GraftConfig.from_dict(SMALL))
    path = tmp_path / "state.safetensors"
    with model.memory_session(1) as memory:
        model.prime([[1, 2, 3]], memory)
        memory.save(path)
        before = memory.state
        memory.load(path)
        state, metadata = titans_ds.MemoryState.load(path)
        (index, layer), *others = state.layers.items()
        wide = {**layer, "w0": torch.ones(1, 65, 8)}
        for layers in (
            {index: wide, **dict(others)},
            dict(others),
            {index: layer},
            {999: {n: t.clone() for n, t in layer.items()}, **state.layers},
        ):
            titans_ds.MemoryState(layers).save(path, metadata)
            with pytest.raises(StateError, match="does not fit this model"):
                memory.load(path)
        for tensors, header in (
            ({"w0": torch.ones(1)}, {"format": "titans-ds memory state 1", "user": "{}"}),
            ({"x.w0": torch.ones(1)}, {"format": "titans-ds memory state 1", "user": "{}"}),
            ({"0.w0": torch.ones(1)}, {"format": "titans-ds memory state 1", "user": "[]"}),
            ({"0.w0": torch.ones(1)}, {"format": "titans-ds memory state 1", "user": "{"}),
            ({"0.w0": torch.ones(1)}, {}),
        ):
            save_file(tensors, path, metadata=header)
            with pytest.raises(StateError, match="memory state"):
                memory.load(path)
        assert all(torch.equal(memory.state.layers[i]["w0"], before.layers[i]["w0"]) for i in before.layers)


@pytest.mark.parametrize("ids", [[[1, 10**6]], [[-1, 2]], [[3, 4], [5, 2**40]]])
def test_tokens_that_the_model_does_not_have_are_named(ids: list[list[int]]) -> None:
    model = titans_ds.attach(tiny_base("llama"), titans_ds.GraftConfig.from_dict(SMALL))
    with model.memory_session(len(ids)) as memory:
        for call in (model.prime, lambda ids, memory: model.generate(torch.tensor(ids), memory=memory)):
            with pytest.raises(DataError, match=r"token ids go from -?\d+ to \d+, and this model knows 0 to \d+"):
                call(ids, memory)
        model.prime([[0, 1]] * len(ids), memory)


def cut(base: Path) -> None:
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garbage(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"\xff" * 5000)


def set_in_config(**values: Any) -> Callable[[Path], None]:
    def write(base: Path) -> None:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, **values}))

    return write


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases")
    prepare(folder, deepspeed=None)
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        garbage,
        lambda base: (base / "config.json").write_text("[]"),
        lambda base: (base / "config.json").write_text("{"),
        lambda base: (base / "config.json").write_bytes(b"\xff\xfe"),
        lambda base: (base / "model.safetensors").unlink(),
        set_in_config(hidden_size=-8),
        set_in_config(num_hidden_layers=-1),
        set_in_config(vocab_size=-5),
        set_in_config(hidden_size="wide"),
    ],
)
def test_a_damaged_base_gives_one_message(
    place: Path, tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    damage(base)
    options = ["--config", str(place / "config.yaml"), "--run.dir", str(tmp_path / "run"), "--model.base", str(base)]
    assert main(options) == 2
    error = capsys.readouterr().err
    assert len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    assert str(base) in error
    assert "Traceback" not in error
    assert not (tmp_path / "run").exists()
    with pytest.raises(AdapterError, match="can't be loaded"):
        titans_ds.TitansModel.from_pretrained(base, saved(tmp_path / "adapter"))


def test_the_model_card_runs_nothing_that_a_base_is_called(tmp_path: Path) -> None:
    base = tiny_base("llama")
    base.config._name_or_path = 'x"); import os; os.mkdir("y'
    model = titans_ds.attach(base, titans_ds.GraftConfig.from_dict(SMALL))
    model.save_pretrained(tmp_path)
    call = next(line for line in (tmp_path / "README.md").read_text().splitlines() if "from_pretrained" in line)
    assert [node for node in ast.walk(ast.parse(call)) if isinstance(node, ast.Import)] == []
    assert json.dumps(base.config._name_or_path) in call
