"""Every file and folder that a program of this project writes: whole or absent, and never in place of something else.

A program calls `check_file` or `check_folder` before any work, then writes through `atomic_file`, `atomic_folder` or
`write_*`: beside the target, flushed to the disk, renamed. Whatever goes wrong, what stood at the path stays as it
was, and neither a half-written file nor a new folder above it is left. Loads no torch: data_prep uses it, too.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titans_ds.errors import OutputError, TitansError

logger = logging.getLogger("titans_ds")

LOCK = ".lock"
_MAX_NAME_BYTES = 220  # file systems take 255; names beside the output need the rest
_MAX_PATH_BYTES = 3800  # of the system's 4096
_RECOGNISED_BYTES = 1 << 16
_HERE, _RENAME_EXCHANGE = -100, 2  # Linux: AT_FDCWD, and a flag of renameat2
_TEMPORARY = re.compile(r"\..+\.\d+\.(?:tmp|old)")
_REASONS = {
    errno.ENOSPC: "the disk is full; free some space, or give a path on another disk",
    errno.EDQUOT: "the disk quota is used up; free some space, or give a path on another disk",
    errno.EACCES: "permission denied; give a path that you may write to",
    errno.EPERM: "permission denied; give a path that you may write to",
    errno.EROFS: "the file system is read-only; give a path that can be written",
    errno.ENOTDIR: "a part of the path is a file; give a path below folders only",
    errno.EISDIR: "there is a folder of that name; give another path",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
    errno.ENOENT: "the system takes no new folder there; give another path",
    errno.EBUSY: "something is mounted there; give a path below it",
    errno.ELOOP: "the path goes through links in a circle; give another path",
}


class Kind(NamedTuple):
    """How a folder that a program made is recognised, so that nothing else is ever replaced.

    Args:
        name: what it is, for messages: "a corpus".
        marker: a file that each such folder holds, or without a pattern a folder.
        pattern: a regular expression found at the marker's beginning, its first 64 KiB.
    """

    name: str
    marker: str
    pattern: bytes = b""


_WORK = Kind("unfinished work", "work.json", rb'\A\{"work of": ')


def check_folder(path: str | Path, kind: Kind) -> Path:
    """Return `path` where a folder of that kind can be written: absent, empty, or of the same kind already.

    Raises OutputError for anything else: the root, home or working folder or one above it, a link, a device, a place
    that is read-only or below a file, a folder of another kind, a name too long.
    """
    path = _check_place(path)
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; {kind.name} is a folder. Give another path.")
    if path.is_dir() and _strangers(path) and not _matches(path / kind.marker, kind.pattern):
        raise OutputError(
            f"{path} holds something else than {kind.name} (such as {_strangers(path)[0]!r}), and is left as it is. "
            "Give a path that is absent or an empty folder."
        )
    return path


def check_file(path: str | Path, pattern: bytes) -> Path:
    """Return `path` where a file can be written: absent, empty, or one whose beginning matches `pattern`.

    Raises OutputError for anything else, as `check_folder` does.
    """
    path = _check_place(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; expected the path of a file. Give another path.")
    if path.exists() and path.stat().st_size and not _matches(path, pattern):
        raise OutputError(f"{path} is there already, and was not made by this command. Give another path.")
    return path


def _check_place(path: str | Path) -> Path:
    """What holds for files and folders alike."""
    path = Path(path)
    _check_names(path)
    if path.name == "..":
        raise OutputError(f"the output path {str(path)!r} ends in `..`. Give the path of something new.")
    if ".." in path.parts and not os.path.lexists(path.parent):
        # What it leads to can't be looked at before that folder is made.
        raise OutputError(
            f"the output path {str(path)!r} goes back by `..` from a folder that is not there; leave it out"
        )
    with _explained(path):
        here, home = Path.cwd(), Path(os.path.expanduser("~"))
        # An unset variable in a shell gives an empty text, which pathlib takes for the working folder.
        resolved = Path(os.path.realpath(path))
        for place, name in ((here, "the working folder"), (home, "the home folder")):
            if resolved == place.resolve() or resolved in place.resolve().parents:
                what = name if resolved == place.resolve() else f"above {name}"
                raise OutputError(f"the output path {str(path)!r} is {what}. Give the path of something new.")
        if path.is_symlink():
            raise OutputError(f"{path} is a link to {os.readlink(path)}; give the path that it leads to")
        _check_type(path)
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "", str(above))
        for folder in [above, *([path] if path.is_dir() else [])]:
            if not os.access(folder, os.W_OK | os.X_OK):
                # As root, only a read-only file system says no.
                raise OutputError(f"cannot write {path}: {folder} is read-only for you; give another path")
    return path


def _check_names(path: Path) -> None:
    try:
        sizes = [len(os.fsencode(part)) for part in path.absolute().parts]
    except ValueError:  # half of a surrogate pair
        sizes = [_MAX_PATH_BYTES]
    if (
        "\0" in str(path)
        or sizes[-1] > _MAX_NAME_BYTES
        or max(sizes) > 255
        or sum(sizes) + len(sizes) > _MAX_PATH_BYTES
    ):
        raise OutputError(
            f"cannot write {str(path)[:60]!r}: a path holds valid text only, names of at most {_MAX_NAME_BYTES} bytes, "
            f"and at most {_MAX_PATH_BYTES} bytes in all; give another"
        )


def _check_type(path: Path) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OutputError(f"{path} is a link, device, pipe or socket; an output replaces files and folders only")


def _strangers(folder: Path) -> list[str]:
    """What a folder holds beside locks, and beside what a killed process left half-written."""
    return sorted(name for name in os.listdir(folder) if name != LOCK and not _TEMPORARY.fullmatch(name))


def _matches(path: Path, pattern: bytes) -> bool:
    if not path.is_file():
        return path.is_dir() and not pattern
    with open(path, "rb") as handle:
        return re.search(pattern, handle.read(_RECOGNISED_BYTES), re.DOTALL) is not None


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """A full disk, a read-only place, …: an OutputError that names the path."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        # Libraries in Rust (safetensors, tokenizers) raise errors of their own, with the number in the text.
        found = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(found[1]) if found else None
        if number not in _REASONS or (isinstance(error, OSError) and _is_input(error, path)):
            raise
        raise OutputError(f"cannot write {path}: {_REASONS[number]}") from error


def _is_input(error: OSError, path: Path) -> bool:
    """Whether an error is about a file elsewhere, as of something that is read while the output is written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or not isinstance(error.filename, (str, bytes, os.PathLike)):
        return False
    name = Path(os.fsdecode(error.filename)).absolute()
    parent = path.absolute().parent
    return not (name in (parent, *parent.parents) or parent in name.parents)


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make the folders above `path`; where the block fails, take away those that were not there."""
    missing = [folder for folder in path.absolute().parents if not os.path.lexists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{suffix}")


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; flush it and rename it to `path` when the block ends well.

    Raises OutputError where that cannot be written, also for a full disk inside the block; `path` is then as before.
    """
    path = Path(path)
    temporary = _beside(path, "tmp")
    with _explained(path), _parents(path):
        _check_type(path)
        try:
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            yield temporary
            temporary.chmod(mode)  # safetensors makes files that their owner alone can read
            sync(temporary)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        _sync_names(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, kind: Kind, own: Container[str] | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; when the block ends well, it takes the place of `path`.

    Args:
        path: of the folder.
        kind: of it.
        own: names that the block writes; what an older folder holds beside them stays in it. None: nothing stays.

    Raises OutputError where `check_folder` would, or where that cannot be written; `path` is then as before.
    """
    path = check_folder(path, kind)
    temporary = _beside(path, "tmp")
    with _explained(path), _parents(path):
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if own is not None and path.is_dir():
                _carry_over(path, temporary, own)
            yield temporary
            replace_folder(temporary, path, kind)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _carry_over(old: Path, new: Path, own: Container[str]) -> None:
    """Give what a folder holds besides `own` to another, too: by hard links, or copies where there are none."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [n for n in names if Path(folder) == old and (n in own or n == LOCK or _TEMPORARY.fullmatch(n))]

    shutil.copytree(old, new, symlinks=True, ignore=left_out, copy_function=link, dirs_exist_ok=True)


def replace_folder(source: Path, target: Path, kind: Kind) -> None:
    """Flush a finished folder and rename it to `target`; an older one of its kind goes.

    Where the system can exchange two names, there is no moment without a folder of that name.
    """
    check_folder(target, kind)
    with _explained(target):
        for path in sorted(source.rglob("*")):
            kept = path.lstat()  # what is linked from the older folder is on the disk already
            if stat.S_ISDIR(kept.st_mode) or (stat.S_ISREG(kept.st_mode) and kept.st_nlink == 1):
                sync(path)
        sync(source)
        if not target.exists():
            os.rename(source, target)
        elif _exchange(source, target):
            _sync_names(target.parent)
            shutil.rmtree(source, ignore_errors=True)
        else:
            aside = _beside(target, "old")
            os.rename(target, aside)
            try:
                os.rename(source, target)
            except BaseException:
                os.rename(aside, target)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        _sync_names(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step (renameat2); false where system or file system can't."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    return renameat2 is not None and renameat2(_HERE, names[0], _HERE, names[1], _RENAME_EXCHANGE) == 0


def unfinished(out: Path) -> Path:
    """Return where finished parts of an output are kept until all of it is there."""
    return out.with_name(out.name + ".unfinished")


def start_work(folder: Path, identity: str) -> None:
    """Make a folder of finished parts, or take up one again; parts of another `identity` go."""
    claim = json.dumps({"work of": identity}) + "\n"
    marker = check_folder(folder, _WORK) / _WORK.marker
    if marker.exists():
        if marker.read_text(encoding="utf-8") == claim:
            return
        shutil.rmtree(folder)
    write_text(marker, claim)


@contextlib.contextmanager
def work_folder(out: Path, identity: str) -> Iterator[Path]:
    """Yield a folder beside `out` for finished parts: a program that was stopped goes on from them.

    Parts of another `identity` go first. The folder itself goes at the end, and after an error that the same command
    would meet again, which is every TitansError but an OutputError.
    """
    work = unfinished(out)
    with _explained(work), _parents(work):
        start_work(work, identity)
        try:
            yield work
        except TitansError as error:
            if not isinstance(error, OutputError):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    """Flush a rename: what was renamed is whole already, and some file systems flush no folders."""
    with contextlib.suppress(OSError):
        sync(folder)


def write_text(path: str | Path, text: str) -> Path:
    """Write a UTF-8 text file, whole or not at all, and return its path. Half of a surrogate pair becomes `?`."""
    path = Path(path)
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return path


def write_json(path: str | Path, value: Any) -> Path:
    """Write indented JSON, whole or not at all, and return its path."""
    return write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> Path:
    """Write one JSON object a line, whole or not at all, and return its path."""
    return write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def whole_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file that only grows; a last one that a killed process left torn is cut off the file."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with atomic_file(path) as temporary:
            temporary.write_bytes(whole)
    return [line for line in whole.decode("utf-8", "replace").split("\n") if line]


@contextlib.contextmanager
def locked(folder: str | Path, busy: str) -> Iterator[Path]:
    """Hold a folder for this process alone, made where it is missing; the hold dies with the process.

    A folder that was made here and is still empty at the end goes again. Raises OutputError(`busy`) where another
    process holds the folder.
    """
    folder = _check_place(folder)
    made = not folder.exists()
    with _explained(folder), _parents(folder):
        folder.mkdir(exist_ok=True)
        try:
            descriptor = _take(folder / LOCK, busy)
            try:
                yield folder
            finally:
                # Removed while it is still held: who opened it meanwhile sees that its file is gone, and tries again.
                with contextlib.suppress(OSError):
                    (folder / LOCK).unlink()
                os.close(descriptor)
        finally:
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _take(path: Path, busy: str) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(busy) from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                logger.warning("%s cannot be locked on this file system; let no second process write there", path)
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """Return the file's SHA-256 in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
