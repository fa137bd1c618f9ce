"""What every program writes through: nothing that others made is replaced, and a failure leaves all as it was."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import titans_ds
from tests.support.tiny_models import tiny_base
from titans_ds import LoraSettings, files
from titans_ds.errors import OutputError, TitansError
from titans_ds.files import Kind, atomic_file, atomic_folder, check_file, check_folder, locked, work_folder, write_json
from titans_ds.memory import MemoryState
from titans_ds.training.checkpoints import files as checkpoint_files

THING = Kind("a thing", "thing.json", rb'"thing"')
NUMBERS = rb'\A\{"number"'


def make(folder: Path, value: str) -> Path:
    """Write a folder of the kind THING, with a folder inside."""
    with atomic_folder(folder, THING) as temporary:
        write_json(temporary / "thing.json", {"thing": value})
        write_json(temporary / "inner" / "more.json", value)
    return folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, by relative path."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture
def occupied(tmp_path: Path) -> Path:
    """A folder of things that no output may replace."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    (tmp_path / "inside").symlink_to("folder")
    (tmp_path / "outside").symlink_to("/etc")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    return tmp_path


@pytest.mark.parametrize("check", [lambda p: check_folder(p, THING), lambda p: check_file(p, NUMBERS)])
@pytest.mark.parametrize(
    "name",
    [
        *("file", "folder", "inside", "outside", "dangling", "circle", "pipe", "socket", "file/below", "circle/below"),
        *("dangling/below", "pipe/below", "x" * 300, "ü" * 120, "a\0b", "\udfff", "deep/" * 1000 + "x"),
        *("..", ".", "", "/", "/dev/null", "/dev", "folder/..", "~"),
        *("absent/../file", "absent/../folder", "absent/../circle/../new", "folder/absent/../../file"),
    ],
)
def test_a_place_that_is_not_the_programs_own_is_refused(
    occupied: Path, name: str, check: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(occupied)
    monkeypatch.setenv("HOME", str(occupied / "home"))
    (occupied / "home").mkdir()
    before = tree(occupied)
    with pytest.raises(OutputError) as raised:
        check(Path(os.path.expanduser(name)))
    assert len(str(raised.value)) < 600
    assert str(raised.value)
    assert tree(occupied) == before


def test_a_place_of_the_same_kind_or_none_is_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.json").touch()
    for name in ("empty", "absent", "above/absent"):
        assert tree(make(tmp_path / name, "new")).keys() == {"inner", "inner/more.json", "thing.json"}
        make(tmp_path / name, "newer")
        assert b"newer" in (tmp_path / name / "thing.json").read_bytes()
    for name in ("empty.json", "absent.json"):
        write_json(check_file(tmp_path / name, rb'"number"'), {"number": 1})
        assert check_file(tmp_path / name, rb'"number"')
        with pytest.raises(OutputError, match="not made by this command"):
            check_file(tmp_path / name, rb'"letter"')


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root but a read-only file system")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="is read-only"):
        check_folder(tmp_path / "out", THING)
    tmp_path.chmod(0o700)


def _write_file(folder: Path) -> None:
    write_json(folder / "new" / "above" / "out.json", "new")


def _replace_file(folder: Path) -> None:
    write_json(folder / "old.json", "new")


def _write_folder(folder: Path) -> None:
    make(folder / "new" / "above" / "thing", "new")


def _replace_folder(folder: Path) -> None:
    make(folder / "old", "new")


def _lock(folder: Path) -> None:
    with locked(folder / "new" / "run", "busy"):
        write_json(folder / "new" / "run" / "config.json", "new")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("work", [_write_file, _replace_file, _write_folder, _replace_folder, _lock])
def test_a_failure_of_any_system_call_leaves_the_old_content_and_nothing_beside(
    work: Callable[[Path], None], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every call of every function that writes fails once; the next one works again."""
    for name in ("mkdir", "open", "fsync", "replace", "rename"):
        calls, failing = [""], 0
        while len(calls) > failing:
            folder = tmp_path / f"{name}-{failing}"
            write_json(folder / "old.json", "old")
            make(folder / "old", "old")
            before, refused = tree(folder), False
            calls = _fail(monkeypatch, name, failing, number)
            try:
                work(folder)
            except OutputError:
                refused = True
            monkeypatch.undo()
            after = tree(folder)
            assert after == before if refused else not any("tmp" in path for path in after), (name, failing)
            failing += 1


def _fail(monkeypatch: pytest.MonkeyPatch, name: str, failing: int, number: int) -> list[str]:
    """Let call number `failing` of os.`name` raise; the calls so far are in the list returned."""
    calls: list[str] = []
    real = getattr(os, name)

    def function(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == failing + 1:
            raise OSError(number, os.strerror(number), arguments[0] if isinstance(arguments[0], (str, Path)) else None)
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, function)
    return calls


def _save_state(folder: Path) -> None:
    MemoryState({0: {"w": torch.ones(1, 2)}}).save(folder / "old.json", {"new": "1"})


def _publish_checkpoint(folder: Path) -> None:
    partial = checkpoint_files.partial_folder(folder, 1)
    partial.mkdir(exist_ok=True)
    write_json(partial / "weights", "new")
    checkpoint_files.write_marker(partial, {"files": checkpoint_files.describe(partial, [partial / "weights"])})
    checkpoint_files.publish(partial, folder, 1)


WORKS = (_write_file, _replace_file, _write_folder, _replace_folder, _save_state, _publish_checkpoint)


@pytest.mark.parametrize("work", WORKS)
def test_a_process_that_dies_at_any_system_call_leaves_old_or_new_whole(
    work: Callable[[Path], None], tmp_path: Path
) -> None:
    """Beside it lie hidden names at most, and the same work then succeeds."""
    for name in ("mkdir", "open", "fsync", "replace", "rename", "unlink", "rmdir"):
        survived, point = False, 0
        while not survived:
            folder = tmp_path / f"{name}-{point}"
            write_json(folder / "old.json", "old")
            make(folder / "old", "old")
            before = tree(folder)
            child = os.fork()
            if child == 0:
                _die(name, point)
                work(folder)
                os._exit(0)
            survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            there = tree(folder)
            left = {path: content for path, content in there.items() if not re.search(r"(^|/)\.", path)}
            assert all(path in left or old in there.values() for path, old in before.items()), (name, point)
            work(folder)
            done = tree(folder)
            assert all(content in (before.get(path), done.get(path)) for path, content in left.items()), (name, point)
            point += 1


def _die(name: str, point: int, module: Any = os) -> None:
    """Let this process end, with nothing cleaned up, in place of call number `point` of os.`name`."""
    real, calls = getattr(module, name), itertools.count()
    setattr(module, name, lambda *a, **o: os._exit(9) if next(calls) == point else real(*a, **o))


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_adapter_saved_again_is_the_old_or_the_new_one_wherever_the_process_dies(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a mix, and the owner's own files are in both; where the system exchanges names, it is always there."""
    if not exchanges:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    lora = LoraSettings(rank=2, targets=["q_proj"])
    before, after = (titans_ds.attach(tiny_base("llama"), lora=given) for given in (lora, None))
    for name, module in (
        *((n, os) for n in ("mkdir", "open", "fsync", "rename", "link", "rmdir")),
        ("_exchange", files),
    ):
        survived, point = False, 0
        while not survived:
            folder = tmp_path / f"{name}-{point}" / "adapter"
            before.save_pretrained(folder)
            (folder / "README.md").write_text("the owner's words")
            (folder / "tokenizer").mkdir()
            (folder / "tokenizer" / "vocab.json").write_text("{}")
            old = tree(folder)
            child = os.fork()
            if child == 0:
                _die(name, point, module)
                after.save_pretrained(folder)
                os._exit(0)
            survived = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            found = tree(folder) if folder.exists() else None
            after.save_pretrained(folder)
            new = tree(folder)
            assert found in (old, new) or (found is None and not exchanges), (name, point)
            point += 1
        assert found == new
    assert set(old) - set(new) == {"lora", "lora/adapter_config.json", "lora/adapter_model.safetensors"}
    assert new["README.md"] == b"the owner's words"
    assert new["tokenizer/vocab.json"] == b"{}"


def test_links_pipes_and_the_folders_rights_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the file system has no hard links: then by a copy."""
    folder = make(tmp_path / "thing", "old")
    (folder / "mine.txt").write_text("mine")
    (folder / "nowhere").symlink_to("absent")
    (folder / ".lock").touch()
    folder.chmod(0o700)
    for linked in (True, False):
        if linked:
            os.mkfifo(folder / "pipe")
        else:
            (folder / "pipe").unlink()
            monkeypatch.setattr(os, "link", lambda *a, **o: (_ for _ in ()).throw(OSError(errno.EPERM, "no")))
        with atomic_folder(folder, THING, own=("thing.json", "inner")) as temporary:
            write_json(temporary / "thing.json", {"thing": "new"})
        assert {p.name for p in folder.iterdir()} - {"pipe"} == {"thing.json", "mine.txt", "nowhere"}
        assert (folder / "pipe").exists() == linked
        assert folder.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_an_error_inside_keeps_what_was_there(tmp_path: Path) -> None:
    make(tmp_path / "old", "old")
    before = tree(tmp_path)

    def stop(path: Path) -> None:
        with atomic_folder(path, THING) as folder:
            (folder / "half").write_text("x")
            raise KeyboardInterrupt

    for name in ("old", "above/new"):
        with pytest.raises(KeyboardInterrupt):
            stop(tmp_path / name)
        assert tree(tmp_path) == before


def test_errors_about_inputs_are_not_taken_for_the_outputs(tmp_path: Path) -> None:
    def read_while_writing() -> None:
        with atomic_file(tmp_path / "out"):
            raise PermissionError(errno.EACCES, "denied", "/elsewhere/input")

    with pytest.raises(PermissionError):
        read_while_writing()


class RustError(Exception):
    """As safetensors raises it: no OSError, but with the number in its text."""


def test_a_full_disk_is_recognised_in_a_librarys_own_error(tmp_path: Path) -> None:
    def save() -> None:
        with atomic_file(tmp_path / "out"):
            raise RustError("Error: IoError(Os { code: 28 }) No space left on device (os error 28)")

    with pytest.raises(OutputError, match="the disk is full"):
        save()


HOLD = """
import sys, time
from titans_ds.files import locked
with locked(sys.argv[1], "busy"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_refuses_a_second_process_and_dies_with_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "run"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(OutputError, match="busy"), locked(folder, "busy"):
        pass
    process.kill()
    process.wait()
    with locked(folder, "busy"), pytest.raises(OutputError, match="busy"), locked(folder, "busy"):
        pass
    assert list(folder.iterdir()) == []
    with locked(tmp_path / "empty", "busy"):
        pass
    assert not (tmp_path / "empty").exists()


def test_work_goes_with_a_refusal_and_stays_with_a_full_disk(tmp_path: Path) -> None:
    def work(identity: str, error: BaseException | None) -> list[str]:
        with work_folder(tmp_path / "out", identity) as folder:
            found = sorted(path.name for path in folder.iterdir() if path.name != "work.json")
            (folder / identity).write_text("part")
            if error is not None:
                raise error
        return found

    place = files.unfinished(tmp_path / "out")
    for error in (OutputError("full"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            work("a", error)
        assert place.exists()
    assert work("a", None) == ["a"]
    with pytest.raises(TitansError):
        work("a", TitansError("nothing is left"))
    assert not place.exists()
    with pytest.raises(OutputError):
        work("a", OutputError("full"))
    assert work("b", None) == []  # parts of other settings are of no use
    place.mkdir()
    (place / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="unfinished work"):
        work("a", None)
    assert (place / "notes.txt").read_text() == "mine"


def test_a_torn_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a"')
    assert files.whole_lines(path) == ['{"a": 1}', '{"a": 2}']
    assert path.read_bytes() == b'{"a": 1}\n\n{"a": 2}\n'
    assert files.whole_lines(tmp_path / "absent") == []


@settings(max_examples=40)
@given(name=st.text(min_size=0, max_size=300))
def test_any_path_is_written_or_refused_and_the_folder_is_as_before(
    name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("paths") / "here"
    folder.mkdir()
    (folder / "file").write_text("mine")
    before, outside = tree(folder), sorted(folder.parent.iterdir())
    path = Path(f"{folder}/{name}")
    try:
        make(path, "new")
    except OutputError:
        assert tree(folder) == before
    else:
        assert path.is_dir()
        assert (folder / "file").read_text() == "mine"
        shutil.rmtree(path)
    assert sorted(folder.parent.iterdir()) == outside or ".." in name
