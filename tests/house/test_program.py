"""How every program ends: one message and exit code 2, or 130; a traceback only where it is asked for."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import positive_control
from titans_ds.errors import TitansError
from titans_ds.files import locked, write_json
from titans_ds.program import plain_console, program, real_number, some_text, whole_number
from titans_ds.training.checkpoints import files as checkpoint_files
from titans_ds.training.run_folder import RunFolder

PROGRAMS = [
    *(f"data_prep.{name}" for name in ("build_corpus", "build_benchmark", "benchmark2026", "cross_file_pairs")),
    *(f"data_prep.{name}" for name in ("decontaminate", "pack_corpus", "train_tokenizer")),
    *(f"eval.{name}" for name in ("crosscodeeval", "capacity", "positive_control")),
    *(f"launch.{name}" for name in ("train", "train_fan", "export_adapter", "universal_checkpoint", "deepspeed_env")),
    *(f"launch.{name}" for name in ("scaling", "run_study", "demo")),
]


@program("run it again")
def main(arguments: list[str]) -> int:
    """A program that ends as its first argument says."""
    if arguments == ["titans"]:
        raise TitansError("a [b]setting[/b] is wrong")
    if arguments == ["file"]:
        Path("/nowhere/at/all").read_text()
    if arguments == ["defect"]:
        raise OSError("of nobody's file")
    if arguments == ["memory"]:
        torch.empty(2**45)
    if arguments == ["more memory"]:
        np.zeros(2**45)
    if arguments == ["interrupt"]:
        raise KeyboardInterrupt
    if arguments == ["usage"]:
        argparse.ArgumentParser().parse_args(["--unknown"])
    return len(arguments)


def test_errors_and_interrupts_end_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for argument, code, said in (
        ("titans", 2, "error: a [b]setting[/b] is wrong\n"),
        ("file", 2, "error: /nowhere/at/all: No such file or directory\n"),
        ("memory", 2, "; make what is computed at once smaller\n"),
        ("more memory", 2, "; make what is computed at once smaller\n"),
        ("interrupt", 130, "stopped: run it again\n"),
    ):
        assert main([argument]) == code
        error = capsys.readouterr().err
        assert error == said or (code == 2 and error.startswith("error: out of memory (") and error.endswith(said))
        assert main([argument, "--debug"]) == code
        error = capsys.readouterr().err
        assert error.startswith("Traceback")
        assert error.endswith(said)
        monkeypatch.setenv("TITANS_DS_DEBUG", "1")
        assert main([argument]) == code
        assert capsys.readouterr().err.startswith("Traceback")
        monkeypatch.delenv("TITANS_DS_DEBUG")
    assert main(["usage"]) == 2
    assert main(["a", "b", "c"]) == 3
    with pytest.raises(OSError, match="nobody"):
        main(["defect"])
    monkeypatch.setattr(sys, "argv", ["program", "titans"])
    assert main() == 2


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_ends_with_2_for_an_unknown_option(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert importlib.import_module(name).main(["--no-such-option", "1"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error


OUTPUTS = {
    "data_prep.build_corpus": ["--folders", "none", "--restart"],
    "data_prep.build_benchmark": ["--folders", "none"],
    "data_prep.benchmark2026": [],
    "data_prep.cross_file_pairs": ["--corpus", "none"],
    "data_prep.decontaminate": ["--corpus", "none", "--benchmark", "none"],
    "data_prep.pack_corpus": ["--corpus", "../corpus", "--tokenizer", "none"],
    "data_prep.train_tokenizer": ["--corpus", "none"],
    "eval.crosscodeeval": ["run", "--base", "none", "--data", "none", "--modes", "vanilla"],
    "eval.capacity": [],
    "eval.positive_control": ["kv_recall"],
    "launch.run_study": ["--arms", "hybrid-v2", "--benchmarks", "packages2026"],
    "launch.demo": [],
    "benchmarks.ranks": [],
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_no_program_begins_where_it_would_replace_something_else(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even one file of it, such as a table beside the results that are not there."""
    main = importlib.import_module(name).main
    folder = tmp_path / "folder"
    folder.mkdir()
    for file in ("notes.txt", "manifest.json", "config.json", "status.json", "capacity.md", "results.md"):
        (folder / file).write_text('{"state": "mine"}')
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "train-00000-of-00001.parquet").touch()
    write_json(tmp_path / "corpus" / "manifest.json", {"identity": "0"})
    monkeypatch.chdir(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for out in (folder, folder / "notes.txt", folder / "notes.txt" / "below", "", "/", "/dev/null"):
        assert main([*OUTPUTS[name], "--out", str(out)]) == 2
        assert str(out) in capsys.readouterr().err
        assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_several_controls_replace_no_table_of_the_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "comparison.md").write_text("mine")
    for given in (["--compare", "a", "b"], ["--config", "a.yaml", "b.yaml"]):
        assert positive_control.main(["kv_recall", *given, "--out", str(tmp_path)]) == 2
        assert "comparison.md is there already" in capsys.readouterr().err


def test_numbers_out_of_range_are_refused() -> None:
    for convert, texts in (
        (whole_number(0, 9), ["-1", "10", "1.0", "nan", "x", "", "1" * 30, "1" * 5000]),
        (real_number(0, 1), ["-0.1", "1.1", "nan", "inf", "-inf", "1e999", "x", ""]),
        (real_number(0, 1, above=True), ["0", "-1"]),
        (some_text, ["", " ", "\t"]),
    ):
        for text in texts:
            with pytest.raises(argparse.ArgumentTypeError) as raised:
                convert(text)
            assert len(str(raised.value)) < 200
    assert (whole_number(0, 9)("9"), real_number(0, 1)("1"), some_text("a")) == (9, 1.0, "a")


def test_a_path_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    plain_console().print("x[/b] [red]y", soft_wrap=True)
    assert capsys.readouterr().out == "x[/b] [red]y\n"


MARKER = {
    "format": 1,
    "progress": {"step": 3, "skipped": 0, "bad_in_a_row": 0, "tokens": 5},
    "lanes": {"num_lanes": 1, "positions": [[0, 0]]},
    "world_size": 1,
    "universal": False,
    "vocab_size": 9,
    "identity": {"engine": "torch"},
    "files": {"a": {"bytes": 1, "sha256": "0"}},
}


def test_a_marker_with_a_field_missing_or_of_another_kind_is_none(tmp_path: Path) -> None:
    checkpoint_files.write_marker(tmp_path, MARKER)
    assert checkpoint_files.read_marker(tmp_path) == MARKER
    damages = [{name: value for name, value in MARKER.items() if name != gone} for gone in MARKER if gone != "format"]
    damages += [MARKER | {"progress": {"step": 3}}, MARKER | {"files": {"a": {"bytes": "1"}}}, MARKER | {"lanes": []}]
    damages += [MARKER | {"progress": MARKER["progress"] | {"more": 1}}, [], {}]
    for content in damages:
        (tmp_path / checkpoint_files.MARKER).write_text(json.dumps(content))
        assert checkpoint_files.read_marker(tmp_path) is None, content
    for text in (b"[" * 1000, b"\xff", b'{"a": ' + b"1" * 5000 + b"}", b""):
        (tmp_path / checkpoint_files.MARKER).write_bytes(text)
        assert checkpoint_files.read_marker(tmp_path) is None


def test_a_pointer_that_is_not_utf8_points_nowhere(tmp_path: Path) -> None:
    for step in (3, 5):
        (tmp_path / checkpoint_files.name_of(step)).mkdir()
    (tmp_path / checkpoint_files.LATEST).write_bytes(b"\xff\xfe")
    assert [path.name for path in checkpoint_files.candidates(tmp_path)] == ["step_0000005", "step_0000003"]


def test_torn_lines_of_metrics_are_dropped_when_a_run_goes_on(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "run", "", overwrite=False).path
    good = ['{"kind": "train", "step": 1}', '{"kind": "train", "step": 2}']
    torn = ["[]", "{}", '{"kind": "train"}', '{"kind": "train", "step": "2"}', "[" * 1000, '{"kind": "tr']
    (folder / "metrics.jsonl").write_bytes("\n".join([*good, *torn]).encode() + b"\xff")
    RunFolder.reopen(folder, "", step=1, evaluate_again=False)
    assert (folder / "metrics.jsonl").read_text() == good[0] + "\n"


def test_a_run_folder_replaces_no_other_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for status in ("", '{"state": "NY"}', '{"of": {"state": "running"}}'):
        (tmp_path / "mine" / "status.json").write_text(status)
        for overwrite in (False, True):
            with pytest.raises(TitansError, match="something else than a run"):
                RunFolder.create(tmp_path / "mine", "", overwrite)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    run = RunFolder.create(tmp_path / "run", "", overwrite=False)
    (run.path / "notes.txt").write_text("mine")
    run.write("evaluation/step_0000001.json", "{}")
    with locked(run.path, "busy"):
        RunFolder.create(run.path, "new", overwrite=True)
        with pytest.raises(TitansError, match="busy"), locked(run.path, "busy"):
            pass
    assert (run.path / "config.yaml").read_text() == "new"
    assert (run.path / "notes.txt").read_text() == "mine"
    assert not (run.path / "evaluation").exists()
    shutil.rmtree(run.path)
