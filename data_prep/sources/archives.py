"""A folder of wheels, sdists and other zip and tar archives: each is one repository. Nothing is unpacked to disk.

Members are read into memory one at a time, never past the size limit, whatever size they claim. Members whose name
leaves the archive ("..", absolute) and links are left out and counted.
"""

from __future__ import annotations

import contextlib
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import IO, Any

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
                members = list(_members(archive))
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
        with _open_archive(Path(self.root, unit.key)) as archive:
            read = {m.name: _read(archive, m, _MAX_METADATA_BYTES)[0] for m in _members(archive) if _is_license(m.name)}
        return {name: content.decode("utf-8", "replace") for name, content in read.items() if content}

    def _archives(self) -> list[Path]:
        require_folder(Path(self.root), "a folder of wheels, sdists or other archives")
        found = (path for path in Path(self.root).iterdir() if path.name.endswith(ARCHIVE_SUFFIXES))
        return sorted(path for path in found if path.is_file())


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


@contextlib.contextmanager
def _open_archive(path: Path) -> Iterator[zipfile.ZipFile | tarfile.TarFile]:
    if path.name.endswith((".whl", ".zip")):
        with zipfile.ZipFile(path) as archive:
            yield archive
    else:
        with tarfile.open(path) as archive:
            yield archive


def _members(archive: zipfile.ZipFile | tarfile.TarFile) -> Iterator[_Member]:
    if isinstance(archive, zipfile.ZipFile):
        for info in archive.infolist():
            is_link = (info.external_attr >> 16) & 0o170000 == 0o120000
            if not info.is_dir():
                yield _Member(info.filename, info.file_size, is_link, info)
        return
    for entry in archive.getmembers():
        if not entry.isdir():
            yield _Member(entry.name, entry.size, not entry.isfile(), entry)


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
    for member in by_depth:
        name = PurePosixPath(member.name).name
        if name in ("METADATA", "PKG-INFO") and not version:
            content, _ = _read(archive, member, _MAX_METADATA_BYTES)
            header = HeaderParser().parsestr((content or b"").decode("utf-8", "replace"))
            license_id, version = license_from_metadata(header), header.get("Version") or ""
            home_page = home_pages_from_metadata(header)
    if license_id:
        return license_id, version, home_page
    for member in by_depth:
        if _is_license(member.name):
            content, _ = _read(archive, member, _MAX_METADATA_BYTES)
            if found := license_from_text((content or b"").decode("utf-8", "replace")):
                return found, version, home_page
    return "", version, home_page


def _is_license(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix != ".py" and path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE"))
