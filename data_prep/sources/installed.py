"""The Python packages installed in the current environment: real repositories, with licences and versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.utils import canonicalize_name

from ..licenses import home_pages_from_metadata, license_from_metadata
from .base import Source, SourceFile, Unit
from .reading import read_regular_file


@dataclass(frozen=True)
class InstalledPackages(Source):
    """Every distribution that importlib.metadata finds; a repository is a distribution.

    `exclude` names distributions to leave out (any spelling).
    """

    suffixes: tuple[str, ...] = (".py",)
    exclude: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the distributions and their versions."""
        versions = {name: dist.version for name, dist in sorted(self._distributions().items())}
        return {"kind": "installed", "distributions": versions}

    def list_units(self) -> list[Unit]:
        """Return one unit a distribution, by name."""
        return [
            Unit(name, sum(path.size or 0 for path in self._paths(dist)))
            for name, dist in sorted(self._distributions().items())
        ]

    def read(self, unit: Unit, max_file_bytes: int) -> Iterator[SourceFile]:
        """Yield the Python files of one distribution."""
        dist = metadata.distribution(unit.key)
        license_id, home_page = license_from_metadata(dist.metadata), home_pages_from_metadata(dist.metadata)
        for path in self._paths(dist):
            place, root = Path(str(dist.locate_file(path))), Path(str(dist.locate_file("")))
            content, problem = read_regular_file(place, max_file_bytes, root)
            name = PurePosixPath(path).as_posix()
            yield SourceFile(unit.key, name, content, license_id, None, dist.version, problem, home_page)

    def _distributions(self) -> dict[str, metadata.Distribution]:
        excluded = {canonicalize_name(name) for name in self.exclude}
        found: dict[str, metadata.Distribution] = {}
        for dist in metadata.distributions():
            name = canonicalize_name(dist.metadata["Name"] or "")
            # The first on the path is the one that an import would find.
            if name and name not in excluded:
                found.setdefault(name, dist)
        return found

    def _paths(self, dist: metadata.Distribution) -> list[metadata.PackagePath]:
        """Records may name scripts outside site-packages ("../../bin/x"): those are not the package's code."""
        paths = [p for p in dist.files or () if p.suffix in self.suffixes and ".." not in p.parts]
        return sorted(paths, key=lambda path: path.as_posix())
