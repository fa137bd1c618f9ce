"""Rename a repository's own identifiers, the same everywhere, so that a pretrained model cannot have memorised them.

Renamed are the names that the repository defines: functions, classes, methods, attributes set on `self`, module
constants,
modules and packages. Left alone are names that something outside may know by name: builtins, members of builtin types,
whatever is imported from outside or reached through it, dunder names, names from the standard library, and methods of
classes with a base from outside. Every occurrence as a whole word is replaced, in code, strings, comments and paths.
"""

from __future__ import annotations

import ast
import builtins
import collections
import io
import keyword
import logging
import pathlib
import re
import sys
import threading
from collections.abc import Iterator, Mapping

from ..hashing import hash64
from .python_syntax import class_members, parse_quietly

_WORD = re.compile(r"[^\W\d]\w*")
_PART = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[A-Z]|\d+|_+|[^\W\d_]+")
_BUILTIN_TYPES = (
    str, bytes, bytearray, int, float, complex, list, dict, set, frozenset, tuple, object, type, BaseException, range,
    slice, property, memoryview, collections.deque, collections.Counter, collections.OrderedDict, re.Pattern, re.Match,
    pathlib.Path, io.TextIOWrapper, io.BytesIO, logging.Logger, logging.LogRecord, threading.Thread, threading.Event,
    ast.AST, type(parse_quietly), type(i for i in ()),
)  # fmt: skip
_MIN_LETTERS = 3
# Plain words, none of which Python or its library uses as a name.
_WORD_LIST = """
    acorn amber anvil apron arbor aspen atlas autumn badge bamboo barley basil beacon birch bison bramble breeze
    brook cactus canoe canyon carrot cedar cellar chalk cherry cinder clover cobalt comet copper coral cotton
    crane cricket crystal cypress dahlia daisy dune eagle ember falcon feather fennel ferry fiddle fjord flint
    forest fossil fountain gallop garnet ginger glacier goblet granite grove hamlet harbor hazel heron hollow
    indigo island ivory jasmine juniper kettle lagoon lantern lavender ledger lemon lichen lilac linen lotus lupin
    magnet mango maple marble meadow mercury mitten moss nectar nettle nutmeg oasis olive onyx orchard osprey
    otter paddle parsley pebble pepper petal pine plover pollen poppy prairie pumpkin quail quarry quartz raven
    reed ribbon river robin rosemary saddle saffron sage salmon sandal sapphire satchel shell sorrel sparrow
    spruce squash starling summit sunset swallow tansy teapot thicket thimble thistle thyme timber topaz trellis
    tulip tundra turnip umber valley velvet vessel violet walnut warbler willow winter wren yarrow zephyr
"""
_WORDS = tuple(_WORD_LIST.split())


def own_names(files: Mapping[str, str]) -> frozenset[str]:
    """Return the identifiers to rename."""
    defined: set[str] = set()
    foreign: set[str] = set()
    inside = {part for path in files for part in re.split(r"[/.]", path.removesuffix(".py"))}
    trees = [tree for text in files.values() if (tree := parse_quietly(text)) is not None]
    classes = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    for tree in trees:
        foreign.update(_foreign_names(tree, inside, classes))
        defined.update(_defined_names(tree))
    defined |= inside - {"", "src", "lib", "tests", "test", "python", "__init__"}
    return frozenset(name for name in defined - foreign if _may_change(name))


def _may_change(name: str) -> bool:
    return (
        len(name.strip("_")) >= _MIN_LETTERS
        and _has_letters(name)
        and not (name.startswith("__") and name.endswith("__"))
        and name not in _FIXED
        and bool(_WORD.fullmatch(name))
    )


def _has_letters(name: str) -> bool:
    """Digits and underscores alone have no other form."""
    return any(map(str.isalpha, name))


def _fixed_names() -> frozenset[str]:
    names = {
        *dir(builtins),
        *keyword.kwlist,
        *keyword.softkwlist,
        *sys.stdlib_module_names,
        "self",
        "cls",
        "args",
        "kwargs",
    }
    for kind in _BUILTIN_TYPES:
        names.update(dir(kind))
    return frozenset(names)


_FIXED = _fixed_names()


def _defined_names(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name
        elif isinstance(node, ast.ClassDef):
            yield node.name
            yield from class_members(node)
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        yield from (target.id for target in targets if isinstance(target, ast.Name))


def _foreign_names(tree: ast.Module, inside: set[str], classes: set[str]) -> Iterator[str]:
    """Yield the names that belong to something outside the repository."""
    outside: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] not in inside:
                    yield from alias.name.split(".")
                    outside.add((alias.asname or alias.name).split(".")[0])
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] not in inside:
            yield from (node.module or "").split(".")
            yield from (alias.name for alias in node.names)
            outside |= {alias.asname or alias.name for alias in node.names}
    yield from outside
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _root_name(node) in outside:
            yield node.attr
        elif isinstance(node, ast.Call) and _root_name(node.func) in outside:
            yield from (word.arg for word in node.keywords if word.arg)
        elif isinstance(node, ast.ClassDef) and any(_last_name(base) not in classes for base in node.bases):
            yield from class_members(node)


def _root_name(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def _last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


class Renamer:
    """A one-to-one map of identifiers; `rename` applies it to any text of the repository."""

    def __init__(self, files: Mapping[str, str], seed: int, only: frozenset[str] | None = None) -> None:
        """Rename `own_names(files)`, or just the names in `only`.

        The new names keep the shape of the old ones (snake_case, CamelCase, underscores, digits).
        """
        used = {word for text in files.values() for word in _WORD.findall(text)} | _FIXED
        self.mapping: dict[str, str] = {}
        for name in sorted(own_names(files) if only is None else filter(_has_letters, only)):
            attempt = 0
            while (new := _new_name(name, seed, attempt)) in used:
                attempt += 1
            used.add(new)
            self.mapping[name] = new

    def rename(self, text: str) -> str:
        """Return the text with every whole-word occurrence of the repository's names replaced."""
        return _WORD.sub(lambda match: self.mapping.get(match[0], match[0]), text)

    def rename_files(self, files: Mapping[str, str]) -> dict[str, str]:
        """Return the repository with names replaced in its texts and paths."""
        return {self.rename(path): self.rename(text) for path, text in files.items()}


def _new_name(name: str, seed: int, attempt: int) -> str:
    parts = _PART.findall(name)
    # Only the last part changes between attempts, so that names of one family stay alike.
    letters = [number for number, part in enumerate(parts) if part[0].isalpha()]
    return "".join(
        _new_part(part, seed, attempt if number == letters[-1] else 0) if number in letters else part
        for number, part in enumerate(parts)
    )


def _new_part(part: str, seed: int, attempt: int) -> str:
    number = hash64(f"{part.lower()}\0{attempt}", f"rename{seed}")
    word = _WORDS[number % len(_WORDS)]
    if attempt > 3:
        word += _WORDS[number // len(_WORDS) % len(_WORDS)]
    if part.isupper() and len(part) > 1:
        return word.upper()
    return word.capitalize() if part[0].isupper() else word
