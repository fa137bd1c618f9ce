"""A folder of wheels, sdists and other zip and tar archives: each is one repository. Nothing is unpacked to disk.

Members are read into memory one at a time, never past the size limit, whatever size they claim. Members whose name
leaves the archive ("..", absolute) and links are left out and counted.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)

from ..errors import DataPrepError
from ..licenses import home_pages_from_metadata, license_from_metadata, license_from_text
from .base import Source, SourceFile, Unit
from .listing import listing_hash, require_folder, size_of

ARCHIVE_SUFFIXES = (".whl", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar")
_MAX_METADATA_BYTES = 2_000_000
_MAX_MEMBERS = 200_000
_MAX_HEADER_BYTES = 2**28  # of all members of a tar file, unpacked: names and PAX records
_MAX_RATIO = 100  # of unpacked to packed bytes; source code has 4 to 20
_MAX_METADATA_FILES = 20
_DECOMPRESSORS: dict[str, Any] = {"gz": gzip.open, "tgz": gzip.open, "bz2": bz2.open, "xz": lzma.open, "tar": open}
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, RuntimeError,
           NotImplementedError, ValueError)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Member:
    name: str
    size: int
    is_link: bool
    handle: Any


@dataclass(frozen=True)
class ArchiveFolder(Source):
    """Every archive in `root` (not in folders below it). A wheel's licence and version come from its metadata."""

    root: str
    suffixes: tuple[str, ...] = (".py",)

    def describe(self) -> dict[str, Any]:
        """Return the folder, a hash of its listing and the archives' names."""
        paths = self._archives()
        names = [path.name for path in paths]
        return {"kind": "archives", "root": self.root, "listing": listing_hash(paths), "archives": names}

    def list_units(self) -> list[Unit]:
        """Return one unit an archive, by name; DataPrepError where there is none."""
        archives = self._archives()
        if not archives:
            raise DataPrepError(
                f"{self.root} has no archives. Expected files that end in {', '.join(ARCHIVE_SUFFIXES)}."
            )
        # Source code shrinks to about a quarter.
        return [Unit(path.name, 4 * size_of(path)) for path in archives]

    def read(self, unit: Unit, max_file_bytes: int) -> Iterator[SourceFile]:
        """Yield the archive's files. A broken archive yields one file with problem "unreadable_archive"."""
        repo, version = archive_identity(unit.key)
        try:
            with _open_archive(Path(self.root, unit.key)) as archive:
                members = _members(archive)
                license_id, stated, home_page = _metadata(archive, members)
                for member in members:
                    if member.name.endswith(self.suffixes):
                        content, problem = _read(archive, member, max_file_bytes)
                        yield SourceFile(
                            repo, member.name, content, license_id, None, version or stated, problem, home_page
                        )
        except _BROKEN:
            yield SourceFile(repo, unit.key, None, problem="unreadable_archive")

    def license_texts(self, unit: Unit) -> dict[str, str]:
        """Return the texts of the archive's LICENSE, NOTICE and COPYING files."""
        found: dict[str, str] = {}
        with contextlib.suppress(*_BROKEN), _open_archive(Path(self.root, unit.key)) as archive:
            for member in _members(archive):
                content = _read(archive, member, _MAX_METADATA_BYTES)[0] if _is_license(member.name) else None
                if content:
                    found[member.name] = content.decode("utf-8", "replace")
        return found

    def _archives(self) -> list[Path]:
        require_folder(Path(self.root), "a folder of wheels, sdists or other archives")
        found = (path for path in Path(self.root).iterdir() if path.name.endswith(ARCHIVE_SUFFIXES))
        root = os.path.realpath(self.root)
        # A link that leads out of the folder may name any archive of the user's.
        return sorted(p for p in found if p.is_file() and os.path.dirname(os.path.realpath(p)) == root)


def archive_identity(filename: str) -> tuple[str, str]:
    """Return (repository, version) that a file name states; of other archives the stem and ""."""
    try:
        if filename.endswith(".whl"):
            name, version, _, _ = parse_wheel_filename(filename)
            return str(name), str(version)
        name, version = parse_sdist_filename(filename)
        return str(name), str(version)
    except (InvalidWheelFilename, InvalidSdistFilename):
        suffix = next(suffix for suffix in ARCHIVE_SUFFIXES if filename.endswith(suffix))
        return canonicalize_name(filename.removesuffix(suffix)), ""


class _Bounded:
    """An unpacked file of which so many bytes can be read, up to some place. tarfile reads a PAX record or a long name
    in one go, as large as the header says, before anyone can look at its size; and passes over members of any size."""

    def __init__(self, file: Any, left: float, end: int) -> None:
        self._file, self.left, self._end = file, left, end
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError("the headers are too large")
        return bytes(self._file.read(size))

    def seek(self, place: int) -> int:
        if place > self._end:
            raise tarfile.ReadError("unpacked it is too large")
        return int(self._file.seek(place))


@contextlib.contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    if path.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(path) as archive:
            yield archive
    else:
        with _DECOMPRESSORS[path.name.rsplit(".", 1)[1]](path, "rb") as unpacked:
            bounded = _Bounded(unpacked, _MAX_HEADER_BYTES, _MAX_RATIO * path.stat().st_size + _MAX_HEADER_BYTES)
            with tarfile.open(fileobj=bounded, mode="r:") as archive:
                yield archive


def _members(archive: zipfile.ZipFile | tarfile.TarFile) -> list[_Member]:
    """Return all files and links; what comes after too many members, or too large headers, is a broken archive."""
    if isinstance(archive, zipfile.ZipFile):
        _check_count(len(archive.infolist()))
        infos = [info for info in archive.infolist() if not info.is_dir()]
        links = ((info.external_attr >> 16) & 0o170000 == 0o120000 for info in infos)
        return [_Member(i.filename, i.file_size, link, i) for i, link in zip(infos, links, strict=True)]
    found = []
    for number, entry in enumerate(archive, start=1):
        _check_count(number)
        if not entry.isdir():
            found.append(_Member(entry.name, entry.size, not entry.isfile(), entry))
    cast(_Bounded, archive.fileobj).left = float("inf")  # from here on a member's size is known before it is read
    return found


def _check_count(number: int) -> None:
    if number > _MAX_MEMBERS:
        raise tarfile.ReadError(f"it has more than {_MAX_MEMBERS:,} members")


def is_unsafe(name: str) -> bool:
    """Tell whether a member's name would leave the folder that it is unpacked into."""
    parts = PurePosixPath(name.replace("\\", "/"))
    return parts.is_absolute() or ".." in parts.parts or (len(name) > 1 and name[1] == ":") or "\0" in name


def _read(archive: zipfile.ZipFile | tarfile.TarFile, member: _Member, max_bytes: int) -> tuple[bytes | None, str]:
    if is_unsafe(member.name):
        return None, "unsafe_member_name"
    if member.is_link:
        return None, "link"
    if member.size > max_bytes:
        return None, "too_large"
    opened: IO[bytes] | None
    opened = archive.open(member.handle) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(member.handle)
    if opened is None:
        return None, "not_a_file"
    with opened:
        content = opened.read(max_bytes + 1)
    return (content, "") if len(content) <= max_bytes else (None, "too_large")


def _metadata(archive: zipfile.ZipFile | tarfile.TarFile, members: list[_Member]) -> tuple[str, str, str]:
    """Return (licence, version, home page) of the METADATA or PKG-INFO nearest to the root, else of a LICENSE
    file's text."""
    license_id = version = home_page = ""
    by_depth = sorted(members, key=lambda member: (member.name.count("/"), member.name))
    stated = [member for member in by_depth if PurePosixPath(member.name).name in ("METADATA", "PKG-INFO")]
    # A few: each may take unpacking the archive from its start.
    for member in stated[:_MAX_METADATA_FILES]:
        if not version:
            content, _ = _read(archive, member, _MAX_METADATA_BYTES)
            header = HeaderParser().parsestr((content or b"").decode("utf-8", "replace"))
            license_id, version = license_from_metadata(header), header.get("Version") or ""
            home_page = home_pages_from_metadata(header)
    if license_id:
        return license_id, version, home_page
    for member in [member for member in by_depth if _is_license(member.name)][:_MAX_METADATA_FILES]:
        content, _ = _read(archive, member, _MAX_METADATA_BYTES)
        if found := license_from_text((content or b"").decode("utf-8", "replace")):
            return found, version, home_page
    return "", version, home_page


def _is_license(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix != ".py" and path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE"))
