"""A repository in memory, as the benchmark builder reads it: path to text, nothing executed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ..corpus.file_filters import rejection
from ..settings import CorpusSettings
from ..sources.base import Source, Unit


@dataclass(frozen=True)
class Repository:
    """A repository's files that passed the file filters. `rejected` counts the others by reason."""

    name: str
    version: str
    license: str
    files: dict[str, str]
    unit: Unit
    rejected: dict[str, int] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The name as in CrossCodeEval's metadata: "owner-name-version"."""
        return "-".join(part for part in (self.name.replace("/", "-"), self.version[:40]) if part)


def read_repositories(source: Source, settings: CorpusSettings) -> Iterator[Repository]:
    """Yield the source's repositories in the order of its units. Units that belong to one repository must follow
    each other."""
    current: Repository | None = None
    for unit in source.list_units():
        for file in source.read(unit, settings.max_file_bytes):
            if current is None or current.name != file.repo:
                if current is not None:
                    yield current
                current = Repository(file.repo, file.version, file.license, {}, unit)
            reason = rejection(file, settings)
            if reason or file.content is None:
                current.rejected[reason] = current.rejected.get(reason, 0) + 1
            else:
                current.files.setdefault(file.path, file.content.decode("utf-8-sig").replace("\r\n", "\n"))
    if current is not None:
        yield current
