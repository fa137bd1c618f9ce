"""A place in a file where the next statement part needs another file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Target:
    """`start` and `end` are character offsets into the file's text; text[start:end] is the ground truth.

    `kind`: "name" (an imported name), "module_member" (after the "." of an imported module) or "member" (after the "."
    of an imported class or of an object of it). `defined_in`: the file that defines `name`.
    """

    file: str
    start: int
    end: int
    name: str
    kind: str
    defined_in: str
