"""What the builder needs to know about a language. To add one, write a finder and name it in FINDERS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .python_targets import PythonFinder
from .repository import Repository
from .targets import Target


@dataclass(frozen=True)
class Language:
    """`find` yields the cross-file targets of one repository; `suffixes` are its files'."""

    name: str
    suffixes: tuple[str, ...]
    find: Callable[[Repository], Iterator[Target]]


LANGUAGES = {"python": Language("python", (".py",), lambda repository: PythonFinder(repository).targets())}
