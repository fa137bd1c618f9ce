"""What a source of files is: a fixed list of units, and a way to read one unit in any process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from ..settings import CorpusSettings


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file as its source has it.

    `content` is None where the file was not read; then `problem` says why (a key of the manifest's `rejected` counts).
    `stars` is None where the source does not know it. `home_page`: the repository's addresses, with blanks between.
    """

    repo: str
    path: str
    content: bytes | None
    license: str = ""
    stars: int | None = None
    version: str = ""
    problem: str = ""
    home_page: str = ""


def source_file(
    repo: Any, path: Any, content: Any, license: Any = None, stars: Any = None, version: Any = None
) -> SourceFile:
    """Return one row of a table as a file. What cannot be one has no content, and a problem that is counted."""
    names = (repo, path)
    if not all(isinstance(name, str) and name for name in names):
        return SourceFile(str(repo or ""), str(path or ""), None, problem="no_name")
    if content is not None and not isinstance(content, (str, bytes)):
        return SourceFile(repo, path, None, problem="content_is_no_text")
    # Parquet has a column of whole numbers with nulls as floats, too: 5.0 stars are 5.
    whole = isinstance(stars, int) or (isinstance(stars, float) and stars.is_integer())
    if stars is not None and not (whole and abs(stars) < 2**62):
        return SourceFile(repo, path, None, problem="stars_are_no_number")
    data = content if isinstance(content, bytes) else (content or "").encode("utf-8", "surrogatepass")
    if isinstance(license, list):  # all that were found in the repository, not a choice
        license = " AND ".join(f"({name})" if " " in str(name) else str(name) for name in license)
    license = str(license or "")
    return SourceFile(repo, path, data, license, None if stars is None else int(stars), str(version or ""))


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest part of a source that is read in one go: a package, an archive, a row group.

    `num_bytes` is an estimate, used only to group units into chunks of like size.
    """

    key: str
    num_bytes: int


class Source(Protocol):
    """A picklable description of where files come from."""

    def describe(self) -> dict[str, Any]:
        """Return what identifies the source, for the plan and the manifest (JSON)."""
        ...

    def prepare(self, folder: Path, settings: CorpusSettings) -> Source:
        """Return a source that reads less where it can tell early what the filters will drop."""
        return self

    def list_units(self) -> list[Unit]:
        """Return all units, in an order that depends on the source's content alone."""
        ...

    def read(self, unit: Unit, max_file_bytes: int) -> Iterator[SourceFile]:
        """Yield the unit's files. Files above `max_file_bytes` come without content, with problem "too_large"."""
        ...

    def license_texts(self, unit: Unit) -> dict[str, str]:
        """Return the unit's licence files, by name: what must go along where its code is passed on."""
        return {}
