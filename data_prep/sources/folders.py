"""A folder of repositories: each folder in it is one repository, as cloned or unpacked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataPrepError
from ..licenses import license_from_text
from .base import Source, SourceFile, Unit
from .listing import listing_hash, require_folder, size_of, walk_files
from .reading import read_regular_file

_LICENSE_NAME = re.compile(r"(?:licen[sc]e|copying)(?:[.-].*)?\Z", re.IGNORECASE)
_MAX_LICENSE_BYTES = 200_000


@dataclass(frozen=True)
class RepositoryFolders(Source):
    """The folders in `root` are repositories; with `depth` 2 those in root/OWNER/, named OWNER/NAME.

    The licence is that of the LICENSE or COPYING file; the version is the commit that .git/HEAD names.
    """

    root: str
    depth: int = 1
    suffixes: tuple[str, ...] = (".py",)

    def describe(self) -> dict[str, Any]:
        """Return the folder and a hash of its listing."""
        files = [path for repo in self._repositories() for path in walk_files(Path(self.root, repo), self.suffixes)]
        return {"kind": "folders", "root": self.root, "depth": self.depth, "listing": listing_hash(files)}

    def list_units(self) -> list[Unit]:
        """Return one unit a repository, by name; DataPrepError where there is none."""
        repositories = self._repositories()
        if not repositories:
            raise DataPrepError(f"{self.root} has no folders. Expected one folder for each repository.")
        return [
            Unit(repo, sum(map(size_of, walk_files(Path(self.root, repo), self.suffixes)))) for repo in repositories
        ]

    def read(self, unit: Unit, max_file_bytes: int) -> Iterator[SourceFile]:
        """Yield the repository's files; links are not followed."""
        folder = Path(self.root, unit.key)
        license_id, version, home_page = _license_of(folder), commit_of(folder), remote_of(folder)
        for path in walk_files(folder, self.suffixes):
            content, problem = read_regular_file(path, max_file_bytes)
            name = path.relative_to(folder).as_posix().encode("utf-8", "replace").decode()
            yield SourceFile(unit.key, name, content, license_id, None, version, problem, home_page)

    def license_texts(self, unit: Unit) -> dict[str, str]:
        """Return the texts of the licence files at the repository's root."""
        return _license_files(Path(self.root, unit.key))

    def _repositories(self) -> list[str]:
        require_folder(Path(self.root), "a folder with one folder for each repository")
        pattern = "/".join(["*"] * self.depth)
        found = (path for path in Path(self.root).glob(pattern) if path.is_dir() and not path.is_symlink())
        return sorted(path.relative_to(self.root).as_posix() for path in found if not path.name.startswith("."))


def _license_files(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if _LICENSE_NAME.match(path.name):
            content, _ = read_regular_file(path, _MAX_LICENSE_BYTES)
            if content:
                found[path.name] = content.decode("utf-8", "replace")
    return found


def _license_of(folder: Path) -> str:
    return next(filter(None, map(license_from_text, _license_files(folder).values())), "")


def commit_of(folder: Path) -> str:
    """Return the commit that a clone has checked out, read from .git without running git; "" where it cannot be
    told."""
    head = _git_file(folder, "HEAD")
    if not head.startswith("ref: "):
        return head if re.fullmatch(r"[0-9a-f]{40,64}", head) else ""
    reference = head.removeprefix("ref: ")
    if ".." in reference:
        return ""
    packed = re.search(rf"^([0-9a-f]+) {re.escape(reference)}$", _git_file(folder, "packed-refs"), re.MULTILINE)
    return _git_file(folder, reference) or (packed[1] if packed else "")


def remote_of(folder: Path) -> str:
    """Return the addresses of a clone's remotes, read from .git/config; "" where there are none."""
    urls = re.findall(r"^\s*url\s*=\s*(\S+)\s*$", _git_file(folder, "config"), re.MULTILINE)
    # A password in an address must not end up in a manifest.
    return " ".join(re.sub(r"//[^/@]*@", "//", url) for url in urls)


def _git_file(folder: Path, name: str) -> str:
    content, _ = read_regular_file(folder / ".git" / name, 10_000_000)
    return (content or b"").decode("utf-8", "replace").strip()
