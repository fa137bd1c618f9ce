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
