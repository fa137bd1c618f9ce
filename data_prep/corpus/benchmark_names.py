"""Does a corpus repository have the name or the home page of a benchmark's repository?

CrossCodeEval writes "owner-name-commit"; owner and name may hold hyphens themselves, so every division is tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_COMMIT = re.compile(r"-[0-9a-f]{7,40}\Z")
_HOSTED = re.compile(r"(?:github\.com|gitlab\.com|bitbucket\.org|codeberg\.org)[/:]([\w.-]+)/([\w.-]+)", re.IGNORECASE)
_MIN_PACKAGE_LETTERS = 4


def _plain(name: str) -> str:
    return re.sub(r"[-_./]+", "-", name.lower()).strip("-")


class BenchmarkNames:
    """The names of a benchmark's repositories."""

    def __init__(self, labels: Iterable[str]) -> None:
        """`labels`: "owner-name-commit", "owner/name", or "package-version"."""
        self._full: dict[str, str] = {}
        self._packages: dict[str, str] = {}
        for label in labels:
            name = re.sub(r"-\d[\w.]*\Z", "", _COMMIT.sub("", label))
            for form in {_plain(name), _plain(_COMMIT.sub("", label))}:
                self._full.setdefault(form, label)
                self._packages.setdefault(form, label)
                parts = form.split("-")
                for start in range(1, len(parts)):
                    package = "-".join(parts[start:])
                    if len(package) >= _MIN_PACKAGE_LETTERS:
                        self._packages.setdefault(package, label)

    def match(self, repo: str, home_page: str = "") -> tuple[str, str]:
        """Return (reason, label): "name" or "home_page"; ("", "") where neither fits.

        A name with an owner must match whole; a package's name matches the end of a label, owner aside.
        """
        table = self._full if "/" in repo else self._packages
        if label := table.get(_plain(repo)):
            return "name", label
        for owner, name in _HOSTED.findall(home_page):
            if label := self._full.get(_plain(f"{owner}-{name.removesuffix('.git')}")):
                return "home_page", label
        return "", ""
