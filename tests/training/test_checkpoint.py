"""Checkpoints of one process: exact resume, torn and foreign ones, a full disk, export."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import titans_ds
from launch import export_adapter
from launch.arguments import parse
from launch.memory import footprint
from launch.train import main
from tests.support.kill_and_resume import prepare, result
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base
from titans_ds.files import locked
from titans_ds.training.checkpoints import files
from titans_ds.training.checkpoints.lane_states import load_lane_states, save_lane_states
from titans_ds.training.step import Carried

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base, and one run of 12 steps with all its checkpoints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    prepare(folder, deepspeed=None)
    assert train(folder, "full", "--checkpoint.keep", "99") == 0
    return folder


def train(place: Path, name: str, *options: str) -> int:
    """One run of the program; its exit code."""
    return main(["--config", str(place / "config.yaml"), "--run.dir", str(place / name), *options])


def cut_at(place: Path, name: str, step: int) -> Path:
    """A copy of the full run as it was left when it was killed some time after the checkpoint of `step`."""
    run = place / name
    shutil.copytree(place / "full", run)
    shutil.rmtree(run / "adapter")
    for path in files.candidates(run / "checkpoints"):
        if path.name > files.name_of(step):
            shutil.rmtree(path)
    (run / "checkpoints" / files.LATEST).write_text(files.name_of(step))
    (run / "status.json").write_text('{"state": "running"}')
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"kind": "train", "step": 13, "lo')
    return run


@pytest.mark.parametrize("step", [4, 10])
def test_a_resumed_run_is_the_run_that_nobody_stopped(place: Path, step: int) -> None:
    """Every number of every line, and the adapter, bit for bit; lines after the checkpoint are written once."""
    run = cut_at(place, f"from{step}", step)
    assert train(place, run.name, "--resume", "auto") == 0
    assert result(run) == result(place / "full")


@pytest.mark.long
def test_a_memory_in_the_midst_of_a_chunk_is_resumed(tmp_path: Path) -> None:
    """A network's chunks of 5 tokens end between segments of 8: what is pending is in the checkpoint."""
    prepare(tmp_path, deepspeed=None, preset="titans", rule={"chunk_size": 5})
    first = ["--training.order=first"]
    assert train(tmp_path, "full", "--checkpoint.keep", "99", *first) == 0
    run = cut_at(tmp_path, "cut", 6)
    assert train(tmp_path, run.name, "--resume", "auto", *first) == 0
    assert result(run) == result(tmp_path / "full")


def test_only_the_newest_checkpoints_stay(place: Path) -> None:
    assert train(place, "kept", "--checkpoint.keep", "2", "--training.steps", "7", "--evaluation.interval", "0") == 0
    names = sorted(p.name for p in (place / "kept" / "checkpoints").iterdir())
    assert names == ["latest", "step_0000006", "step_0000007"]
    assert (place / "kept" / "checkpoints" / "latest").read_text().strip() == "step_0000007"


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("damage", "name", "says"),
    [
        (truncate, "engine/engine.safetensors", "bytes instead of"),
        (flip, "engine/engine.safetensors", "content of engine/engine.safetensors has changed"),
        (Path.unlink, "rng_00000.safetensors", "rng_00000.safetensors is missing"),
        (truncate, "checkpoint.json", "no complete checkpoint.json"),
    ],
)
def test_a_torn_checkpoint_is_skipped_for_the_one_before(
    place: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], name: str, says: str
) -> None:
    """With a message, and to the same end."""
    run = cut_at(place, "torn", 10)
    try:
        damage(run / "checkpoints" / "step_0000010" / name)
        assert train(place, "torn", "--resume", "auto") == 0
        assert says in caplog.text
        assert "trying the one before" in caplog.text
        assert result(run) == result(place / "full")
    finally:
        shutil.rmtree(run)


def test_where_all_checkpoints_are_torn_the_run_stops(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It neither starts over nor loads one of them; nor is a torn one loaded by its path."""
    run = cut_at(place, "alltorn", 4)
    for path in files.candidates(run / "checkpoints"):
        (path / files.MARKER).unlink()
    assert train(place, "alltorn", "--resume", "auto") == 2
    assert "none of the 2 checkpoints" in capsys.readouterr().err
    assert train(place, "new", "--resume", str(run / "checkpoints" / "step_0000004")) == 2
    assert "is torn: it has no complete checkpoint.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--optimizer.lr", "0.5"], "optimizer.lr is 0.5 here, 0.01 there"),
        (["--data.num_lanes", "8"], "data.num_lanes is 8 here, 4 there"),
        (["--model.base", "OTHER_BASE"], "model.base is 'a folder with fingerprint"),
        (["--data.corpus", "OTHER_CORPUS"], "data.corpus is"),
        (["--lora", "null"], "lora.alpha is absent here, 64.0 there"),
        (["--deepspeed", "ds_configs/zero1.json"], "engine is 'ZeRO-1' here, 'torch' there"),
    ],
)
def test_a_foreign_checkpoint_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    """The message names what differs."""
    others = {"OTHER_BASE": place / "other_base", "OTHER_CORPUS": place / "other_corpus"}
    if not others["OTHER_BASE"].exists():
        tiny_base("qwen3_5", num_key_value_heads=4).save_pretrained(others["OTHER_BASE"])
        write_packed(others["OTHER_CORPUS"], {"train": random_repos(9, 7), "validation": random_repos(5, 2, least=10)})
    given = [str(others.get(option, option)) for option in options]
    assert train(place, "foreign", "--resume", str(place / "full"), *given) == 2
    assert says in capsys.readouterr().err
    assert not (place / "foreign").exists()


def test_settings_that_change_no_number_may_differ(place: Path) -> None:
    """Also the place of base and corpus."""
    moved = shutil.copytree(place / "base", place / "moved_base")
    run = cut_at(place, "moved", 10)
    assert train(place, "moved", "--resume", "auto", "--model.base", str(moved), "--checkpoint.interval", "5") == 0
    assert result(run) == result(place / "full")


def test_a_finished_run_is_not_begun_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither by itself nor by run.resume auto, which has nothing to do; a killed one without checkpoints is."""
    assert train(place, "full") == 2
    assert "set run.resume to auto" in capsys.readouterr().err
    before = result(place / "full")
    assert train(place, "full", "--resume", "auto", "--checkpoint.keep", "99") == 0
    assert result(place / "full") == before
    young = cut_at(place, "young", 4)
    shutil.rmtree(young / "checkpoints")
    assert train(place, "young", "--resume", "auto") == 0
    assert result(young) == before


FULL_DISK = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from launch.train import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.long
def test_a_disk_that_is_full_leaves_the_checkpoint_before(place: Path) -> None:
    """Files end at a limit that the engine's part does not fit: training goes on, and ends with a message."""
    run = cut_at(place, "full_disk", 4)
    size = (run / "checkpoints" / "step_0000004" / "engine" / "engine.safetensors").stat().st_size
    arguments = ["--config", str(place / "config.yaml"), "--run.dir", str(run), "--resume", "auto"]
    command = [sys.executable, "-c", FULL_DISK, str(size - 100), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "the checkpoint of step 6 could not be written" in done.stderr
    assert "Training goes on" in done.stderr
    assert "error: the checkpoint of step 12 could not be written" in done.stderr
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step_0000002", "step_0000004"]
    assert train(place, run.name, "--resume", "auto") == 0
    assert result(run) == result(place / "full")


def test_a_save_that_fails_at_the_end_keeps_the_checkpoint_and_says_so(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the adapter is written; the run then ends from its checkpoint."""
    run = cut_at(place, "unsaved", 10)

    def full(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("Error while serializing: No space left on device (os error 28)")

    with monkeypatch.context() as patched:
        patched.setattr("titans_ds.graft.adapter.save_file", full)
        assert train(place, run.name, "--resume", "auto") == 2
    error = capsys.readouterr().err
    assert "the disk is full" in error
    assert "The checkpoint of step 12 is whole: with run.resume auto" in error
    assert "Traceback" not in error
    assert not (run / "adapter").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert train(place, run.name, "--resume", "auto") == 0
    assert result(run) == result(place / "full")


def test_a_second_training_in_a_run_folder_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = cut_at(place, "shared", 10)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with locked(run, "busy"):
        assert train(place, run.name, "--resume", "auto") == 2
        assert train(place, run.name, "--run.overwrite", "true") == 2
    assert capsys.readouterr().err.count("another training runs in") == 2
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_the_exported_adapter_is_the_one_that_the_run_wrote(place: Path, tmp_path: Path) -> None:
    """From the last checkpoint; and it loads."""
    assert export_adapter.main([str(place / "full"), "--out", str(tmp_path / "out")]) == 0
    for path in (place / "full" / "adapter").glob("*.safetensors"):
        assert (tmp_path / "out" / "adapter" / path.name).read_bytes() == path.read_bytes()
    model = titans_ds.TitansModel.from_pretrained(str(place / "base"), tmp_path / "out" / "adapter")
    assert set(model.layer_indices) == {1, 3}
    assert export_adapter.main([str(place / "full"), "--out", str(tmp_path / "out")]) == 2


def test_lane_states_are_dealt_anew_by_global_number(tmp_path: Path) -> None:
    """Six lanes written by two ranks, read by three and by one; restart marks go with their lanes."""
    tensor = torch.arange(6.0).reshape(6, 1, 1).expand(6, 2, 3).contiguous()
    for lanes, restart in ((slice(0, 3), [False, True, False]), (slice(3, 6), None)):
        state = {1: {"w0": tensor[lanes]}}
        save_lane_states(tmp_path, Carried(state, None if restart is None else torch.tensor(restart)), lanes)
    device = torch.device("cpu")
    for lanes in (slice(0, 2), slice(2, 4), slice(4, 6), slice(0, 6)):
        carried = load_lane_states(tmp_path, lanes, device)
        assert carried.state is not None
        assert torch.equal(carried.state[1]["w0"], tensor[lanes])
        marks = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(1), True)[lanes]
        assert marks.any() == (carried.restart is not None)
        assert carried.restart is None or torch.equal(carried.restart, marks)


def test_the_footprint_of_a_run_comes_from_its_settings(place: Path) -> None:
    """Without loading weights: the parameter count is the loaded model's."""
    config, _ = parse(["--config", str(place / "config.yaml"), "--training.checkpointing", "true"])
    settings = {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}
    model, setup = footprint(config, settings, world_size=2)
    assert model.parameters == sum(p.numel() for p in tiny_base("qwen3_5").parameters())
    assert (setup.lanes, setup.stage, setup.offload_parameters, setup.offload_optimizer) == (2, 3, True, False)
    assert setup.checkpointing


def test_the_yaml_of_a_checkpoint_is_the_runs(place: Path) -> None:
    """So that a checkpoint explains itself."""
    values: dict[str, Any] = yaml.safe_load((place / "full/checkpoints/step_0000012/config.yaml").read_text())
    assert values["optimizer"]["lr"] == 0.01
    marker = json.loads((place / "full/checkpoints/step_0000012/checkpoint.json").read_text())
    assert marker["progress"]["step"] == 12
