"""Checkpoints that somebody else wrote: nothing in them runs, and nothing is taken from them unchecked."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from launch import export_adapter, universal_checkpoint
from launch.train import main
from tests.support.kill_and_resume import prepare
from titans_ds.training.checkpoints import files
from titans_ds.zero.pickles import problem_of_pickle

STEP = "step_0000002"


class Runs:
    """What unpickling it runs: a file is made."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, a base, and a run of 2 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trust")
    prepare(folder, deepspeed=None)
    assert train(folder, "full") == 0
    return folder


def train(place: Path, name: str, *options: str) -> int:
    """One short run of the program; its exit code."""
    short = ["--training.steps", "2", "--evaluation.interval", "0", "--checkpoint.interval", "1"]
    return main(["--config", str(place / "config.yaml"), "--run.dir", str(place / name), *short, *options])


@pytest.fixture
def foreign(place: Path, tmp_path: Path) -> Path:
    """A copy of the run's last checkpoint, outside any run folder."""
    return Path(shutil.copytree(place / "full" / "checkpoints" / STEP, tmp_path / STEP))


def list_all(folder: Path) -> None:
    """Let the marker list what lies there."""
    marker = json.loads((folder / files.MARKER).read_text())
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != files.MARKER)
    files.write_marker(folder, {**marker, "files": files.describe(folder, paths)})


def change_marker(folder: Path, **changes: Any) -> None:
    marker = json.loads((folder / files.MARKER).read_text())
    (folder / files.MARKER).write_text(json.dumps({**marker, **changes}))


@pytest.mark.parametrize("listed", ["nothing", "all but the pickle"])
def test_a_pickle_that_the_marker_does_not_list_is_never_loaded(
    place: Path, foreign: Path, tmp_path: Path, listed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "ran"
    torch.save({"module": Runs(proof)}, foreign / "engine" / "mp_rank_00_model_states.pt")
    if listed == "nothing":
        change_marker(foreign, files={})
    for deepspeed in ("null", "ds_configs/zero0.json"):
        assert train(place, "never", "--resume", str(foreign), "--deepspeed", deepspeed) == 2
        assert "which its checkpoint.json does not list" in capsys.readouterr().err
    for program in (export_adapter, universal_checkpoint):
        given = ["--out", str(tmp_path / "out")] if program is export_adapter else []
        assert program.main([str(foreign), *given]) == 2
        assert "which its checkpoint.json does not list" in capsys.readouterr().err
    assert not proof.exists()
    assert not (place / "never").exists()


def test_a_listed_pickle_from_elsewhere_needs_trust_and_a_strange_one_is_named(
    place: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "ran"
    torch.save({"module": Runs(proof)}, foreign / "engine" / "mp_rank_00_model_states.pt")
    list_all(foreign)
    assert train(place, "never", "--resume", str(foreign)) == 2
    assert "set run.trust_checkpoint to true" in capsys.readouterr().err
    # In the run's own folder no flag is needed, but for what no checkpoint of this project holds.
    own = Path(shutil.copytree(place / "full", place / "own"))
    shutil.rmtree(own / "checkpoints" / STEP)
    shutil.copytree(foreign, own / "checkpoints" / STEP)
    assert train(place, "own", "--resume", "auto") == 2
    said = capsys.readouterr().err
    assert "mp_rank_00_model_states.pt imports posix.mkdir" in said
    assert export_adapter.main([str(foreign), "--out", str(tmp_path / "out")]) == 2
    assert "give --trust-checkpoint" in capsys.readouterr().err
    assert not proof.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("found", [{}, {"training.seed": 0}, {"engine": "torch", "model.base": None}])
def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(
    place: Path, foreign: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    change_marker(foreign, identity=found)
    assert train(place, "never", "--resume", str(foreign)) == 2
    assert "does not say what it is of" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_loaded_leaves_the_run_folder_as_it_was(
    place: Path, foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its marker says that it is whole, so that only loading shows what is wrong."""
    own = Path(shutil.copytree(place / "full", place / "unloadable"))
    (own / "status.json").write_text('{"state": "failed"}')
    for folder in (foreign, own / "checkpoints" / STEP):
        (folder / "engine" / "engine.safetensors").write_bytes(b"\xff" * 100)
        list_all(folder)
    before = {path: path.read_bytes() for path in own.rglob("*") if path.is_file()}
    assert train(place, own.name, "--resume", "auto") == 2
    assert "can't be loaded: SafetensorError" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in own.rglob("*") if path.is_file()} == before
    assert train(place, "never", "--resume", str(foreign)) == 2
    assert "Remove it to go on from the one before" in capsys.readouterr().err
    assert not (place / "never").exists()


def link_out(folder: Path) -> None:
    shutil.move(folder / "engine" / "engine.safetensors", folder.parent / "elsewhere")
    (folder / "engine" / "engine.safetensors").symlink_to(folder.parent / "elsewhere")


def link_folder(folder: Path) -> None:
    shutil.move(folder / "engine", folder.parent / "elsewhere")
    (folder / "engine").symlink_to(folder.parent / "elsewhere")


def list_outside(folder: Path) -> None:
    marker = json.loads((folder / files.MARKER).read_text())
    change_marker(folder, files={**marker["files"], "../../secret": {"bytes": 1, "sha256": "x"}})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (link_out, "engine/engine.safetensors is a link"),
        (link_folder, "engine is a link"),
        (list_outside, "../../secret is missing"),
        (lambda folder: (folder / "note.txt").write_text("mine"), "it holds note.txt, which"),
        (lambda folder: (folder / files.MARKER).write_text("[" * 100_000), "no complete checkpoint.json"),
        (lambda folder: (folder / files.MARKER).write_text('{"files": ' + "9" * 5000 + "}"), "no complete"),
        (lambda folder: (folder / files.MARKER).write_bytes(b"\xff\xfe{}"), "no complete"),
        (lambda folder: (folder / files.MARKER).write_text('{"files": {}}'), "no complete"),
        *(
            (lambda folder, n=name: change_marker(folder, **{n: None}), "no complete")
            for name in files._Marker.__annotations__
        ),
        (lambda folder: change_marker(folder, progress={"step": "2"}), "no complete"),
        (lambda folder: change_marker(folder, lanes={"num_lanes": 4, "positions": [[0]]}), "no complete"),
        (lambda folder: change_marker(folder, files={"config.yaml": {}}), "no complete"),
    ],
)
def test_whatever_is_damaged_the_run_goes_on_from_the_checkpoint_before(
    place: Path, tmp_path: Path, change: Callable[[Path], None], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    from titans_ds.training.checkpoints.resume import _newest

    root = Path(shutil.copytree(place / "full" / "checkpoints", tmp_path / "checkpoints"))
    change(root / STEP)
    (root / files.LATEST).write_bytes(b"\xff\xfe")
    found = _newest(root)
    assert found is not None
    assert found.step == 1
    assert says in caplog.text


TORN = b'{"kind": "train"}\n[1]\n{"kind": "train", "step": "x"}\n\xff\xfe\n[[[[\n' + b"[" * 100_000 + b"\n"


def test_torn_lines_of_metrics_and_status_do_not_stop_a_run(place: Path) -> None:
    """The checkpoints tell that it is one."""
    run = Path(shutil.copytree(place / "full", place / "torn"))
    whole = (run / "metrics.jsonl").read_bytes()
    for status in ('{"state": "runni', "", '{"state": "NY"}'):
        (run / "metrics.jsonl").write_bytes(whole + TORN + b'{"kind": "train", "step": 9')
        (run / "status.json").write_text(status)
        assert train(place, "torn", "--resume", "auto") == 0
        assert (run / "metrics.jsonl").read_bytes() == whole
        assert json.loads((run / "status.json").read_text())["state"] == "finished"


@pytest.mark.parametrize(
    "content",
    [
        b"c" + b"os\nsystem\n(S'true'\ntR.",  # a bare pickle, as torch.load also reads
        pickle.dumps({"a": 1}),
        b"",
        b"PK\x03\x04 and no more",
    ],
)
def test_what_torch_save_did_not_write_is_no_checkpoint(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    assert problem_of_pickle(tmp_path / "a.pt")


def repack(path: Path, name: str, content: bytes) -> None:
    """Put a record into a file of torch.save, in place of one of its name."""
    with zipfile.ZipFile(path) as archive:
        records = {n: archive.read(n) for n in archive.namelist()}
        root = archive.namelist()[0].split("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for record, value in {**records, f"{root}/{name}": content}.items():
            archive.writestr(record, value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data.pkl", b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "imports os.system"),
        ("data.pkl", b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "imports something by name"),
        ("data.pkl", b"(S'true'\nios\nsystem\n.", "imports something by name"),
        ("data.pkl", b"\x80\x02cbuiltins\neval\n.", "imports builtins.eval"),
        ("data.pkl", b"\x80\x02ctorch\nload\n.", "imports torch.load"),
        ("data.pkl", b"\x80\x02\x82\x01.", "imports something by name"),
        ("data.pkl", b"\x80\x02}", "can't be read"),
        ("constants.pkl", b"\x80\x02}.", "holds constants.pkl"),
        ("code/__torch__.py", b"", "holds code/__torch__.py"),
    ],
)
def test_a_pickle_is_read_without_running_it(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({"weight": torch.nn.Parameter(torch.ones(2)), "shape": torch.Size([2])}, path)
    assert problem_of_pickle(path) is None
    repack(path, name, content)
    assert says in str(problem_of_pickle(path))


def poisoned_base(place: Path, proof: Path) -> Path:
    """A base model whose configuration comes with code that makes a folder."""
    base = Path(shutil.copytree(place / "base", proof.with_name("base")))
    config = json.loads((base / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own"}
    (base / "config.json").write_text(json.dumps(config))
    (base / "own.py").write_text(f"import os\nos.mkdir({str(proof)!r})\n")
    return base


def test_the_checkpoints_own_configuration_gives_no_trust(
    place: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = tmp_path / "ran"
    config = yaml.safe_load((foreign / files.CONFIG).read_text())
    config["model"] |= {"base": str(poisoned_base(place, proof)), "trust_remote_code": True, "allow_pickle": True}
    (foreign / files.CONFIG).write_text(yaml.safe_dump(config))
    list_all(foreign)
    assert export_adapter.main([str(foreign), "--out", str(tmp_path / "out")]) == 2
    assert "can't be loaded" in capsys.readouterr().err
    assert not proof.exists()
    assert export_adapter.main([str(foreign), "--out", str(tmp_path / "out"), "--trust-remote-code"]) == 2
    assert proof.exists()  # the base is as poisonous as it claims to be


@pytest.mark.parametrize("change", ["dim", "longer", "shorter"])
def test_tensors_of_another_shape_are_never_cut_to_size(
    place: Path, foreign: Path, tmp_path: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if change == "dim":
        config = yaml.safe_load((foreign / files.CONFIG).read_text())
        config["graft"]["memory"]["dim"] = 4
        (foreign / files.CONFIG).write_text(yaml.safe_dump(config))
    else:
        path = foreign / "engine" / "engine.safetensors"
        tensors = load_file(path)
        name = next(n for n, t in tensors.items() if n.startswith("parameter.") and t.dim() == 2)
        wide = tensors[name]
        save_file({**tensors, name: torch.cat([wide, wide[:1]]) if change == "longer" else wide[:1].clone()}, path)
    list_all(foreign)
    assert export_adapter.main([str(foreign), "--out", str(tmp_path / "out")]) == 2
    assert "has shape" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    if change != "dim":
        assert train(place, f"never_{change}", "--resume", str(foreign)) == 2
        assert "has shape" in capsys.readouterr().err
