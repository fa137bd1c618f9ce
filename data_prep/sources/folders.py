"""A folder of repositories: each folder in it is one repository, as cloned or unpacked."""

from __future__ import annotations

import os
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
            content, problem = read_regular_file(path, max_file_bytes, Path(self.root))
            name = path.relative_to(folder).as_posix()
            yield SourceFile(unit.key, name, content, license_id, None, version, problem, home_page)

    def license_texts(self, unit: Unit) -> dict[str, str]:
        """Return the texts of the licence files at the repository's root."""
        return _license_files(Path(self.root, unit.key))

    def _repositories(self) -> list[str]:
        require_folder(Path(self.root), "a folder with one folder for each repository")
        pattern = "/".join(["*"] * self.depth)
        found = [path.relative_to(self.root) for path in Path(self.root).glob(pattern) if path.is_dir()]
        real = os.path.realpath(self.root)
        # A link, also one on the way to a repository, may lead anywhere.
        inside = [path for path in found if os.path.realpath(Path(self.root, path)) == os.path.join(real, path)]
        return sorted(path.as_posix() for path in inside if not path.name.startswith("."))


def _license_files(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        if _LICENSE_NAME.match(path.name):
            content, _ = read_regular_file(path, _MAX_LICENSE_BYTES, folder)
            if content:
                found[path.name] = content.decode("utf-8", "replace")
    return found


def _license_of(folder: Path) -> str:
    return next(filter(None, map(license_from_text, _license_files(folder).values())), "")


def commit_of(folder: Path) -> str:
    """Return the commit that a clone has checked out, read from .git without running git; "" where it cannot be
    told."""
    head = _git_file(folder, "HEAD")
    found = [head]
    if head.startswith("ref: "):
        # Whoever made the folder wrote this name: only git's own refs are opened, wherever the text points.
        reference = head.removeprefix("ref: ")
        if not reference.startswith("refs/") or ".." in reference.split("/"):
            return ""
        packed = re.search(rf"^([0-9a-f]+) {re.escape(reference)}$", _git_file(folder, "packed-refs"), re.MULTILINE)
        found = [_git_file(folder, reference), packed[1] if packed else ""]
    return next((commit for commit in found if re.fullmatch(r"[0-9a-f]{40,64}", commit)), "")


def remote_of(folder: Path) -> str:
    """Return the addresses of a clone's remotes, read from .git/config; "" where there are none."""
    urls = re.findall(r"^[ \t]*url[ \t]*=[ \t]*(\S+)[ \t]*$", _git_file(folder, "config"), re.MULTILINE)
    # A password in an address must not end up in a manifest.
    return " ".join(re.sub(r"//[^/@]*@", "//", url) for url in urls)


def _git_file(folder: Path, name: str) -> str:
    content, _ = read_regular_file(folder / ".git" / name, 10_000_000, folder)
    return (content or b"").decode("utf-8", "replace").strip()
