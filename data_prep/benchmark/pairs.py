"""Cross-file pairs out of real files: what one file defines, and the code of another that uses it.

From a file D and a file U that imports from it, `definitions` keeps D's imports, the definitions that U uses and what
those need from D; `usage` keeps the top-level statements of U that use them, what those need from U, and one explicit
import of the symbols. Both are cut from the source by lines, so that layout and comments inside stay as they were.
"""

from __future__ import annotations

import ast
import builtins
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..hashing import hash64
from ..sources.base import Unit
from .python_syntax import parse_quietly
from .python_targets import PythonFinder
from .renaming import Renamer
from .repository import Repository

_DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


@dataclass(frozen=True)
class Pair:
    """Two files of `repo`, and the symbols that the first defines and the second uses."""

    repo: str
    definitions_path: str
    usage_path: str
    symbols: tuple[str, ...]
    definitions: str
    usage: str

    def renamed(self, seed: int) -> Pair:
        """Return the pair with its symbols renamed the same in both files: a memorised name is of no use any more."""
        files = {"definitions.py": self.definitions, "usage.py": self.usage}
        mapping = Renamer(files, seed, only=frozenset(self.symbols)).rename
        symbols = tuple(map(mapping, self.symbols))
        return Pair(
            self.repo, self.definitions_path, self.usage_path, symbols, mapping(self.definitions), mapping(self.usage)
        )

    def uses(self) -> list[tuple[int, str]]:
        """Return (character offset, symbol) of every use in the usage file after its import."""
        pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, self.symbols))})\b")
        start = self.usage.index("\n", self.usage.index(f"from {module_of(self.definitions_path)} import")) + 1
        return [(match.start(), match[0]) for match in pattern.finditer(self.usage, start)]


def module_of(path: str) -> str:
    """Return the dotted name of a file's module, source folders left out: "src/pkg/a.py" -> "pkg.a"."""
    parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts[1:] if parts[0] in ("src", "lib", "python") and len(parts) > 1 else parts)


def make_pairs(repo: str, files: Mapping[str, str], max_pairs: int, max_characters: int) -> Iterator[Pair]:
    """Yield up to `max_pairs` pairs of one repository, chosen by a hash of the paths; both files parse."""
    used: dict[tuple[str, str], set[str]] = defaultdict(set)
    for target in PythonFinder(Repository(repo, "", "", dict(files), Unit(repo, 0))).targets():
        if target.kind == "name":
            used[target.defined_in, target.file].add(target.name)
    places = sorted(used, key=lambda place: hash64("\0".join((repo, *place)), "pair"))
    statements = {
        path: _Statements(files[path]) for path in {path for place in places[: 8 * max_pairs] for path in place}
    }
    made = 0
    # Few places fail; a bound on the tries keeps a repository of thousands of files from taking minutes.
    for source, user in places[: 8 * max_pairs]:
        pair = _make(repo, statements, source, user, used[source, user])
        if pair and max(len(pair.definitions), len(pair.usage)) <= max_characters:
            yield pair
            made += 1
            if made == max_pairs:
                return


def _make(repo: str, statements: Mapping[str, _Statements], source: str, user: str, names: set[str]) -> Pair | None:
    defining, using = statements[source], statements[user]
    symbols = tuple(sorted(name for name in names if name in defining.by_name))
    module = module_of(source)
    if not symbols or not all(part.isidentifier() for part in module.split(".")):
        return None
    wanted = defining.needed(symbols)
    users = [number for number, uses in enumerate(using.uses) if uses & set(symbols) and not using.is_import(number)]
    kept = sorted({*users, *using.needed([name for number in users for name in using.uses[number]])})
    kept = [number for number in kept if not using.imports_any(number, symbols)]
    if not users or any(symbol in using.by_name for symbol in symbols):
        return None
    definitions = defining.cut(wanted)
    usage = _with_import(using, kept, f"from {module} import {', '.join(symbols)}\n")
    if parse_quietly(definitions) is None or parse_quietly(usage) is None:
        return None
    return Pair(repo, source, user, symbols, definitions, usage)


def _with_import(using: _Statements, kept: Sequence[int], statement: str) -> str:
    """The new import follows those that the usage keeps (and `from __future__` must stay first)."""
    imports = [number for number in kept if using.is_import(number)]
    others = [number for number in kept if number not in imports]
    return using.cut(imports) + statement + "\n\n" + using.cut(others)


class _Statements:
    """A file's top-level statements, with the names that each binds and uses."""

    def __init__(self, text: str) -> None:
        tree = parse_quietly(text)
        self.statements = tree.body if tree is not None else []
        self.lines = text.split("\n")
        self.uses = [_names_used(node) for node in self.statements]
        self.by_name: dict[str, list[int]] = defaultdict(list)
        self.imported: dict[str, list[int]] = defaultdict(list)
        for number, node in enumerate(self.statements):
            for name in _names_bound(node):
                (self.imported if self.is_import(number) else self.by_name)[name].append(number)

    def is_import(self, number: int) -> bool:
        return isinstance(self.statements[number], (ast.Import, ast.ImportFrom))

    def imports_any(self, number: int, symbols: Sequence[str]) -> bool:
        node = self.statements[number]
        return self.is_import(number) and any(name in symbols for name in _names_bound(node))

    def needed(self, names: Sequence[str]) -> list[int]:
        """Return the statements that bind these names and, again and again, what those use; in the file's order."""
        found = {n for n, node in enumerate(self.statements) if getattr(node, "module", "") == "__future__"}
        waiting = list(names)
        seen: set[str] = set()
        while waiting:
            name = waiting.pop()
            if name in seen or hasattr(builtins, name):
                continue
            seen.add(name)
            for number in (*self.by_name.get(name, ()), *self.imported.get(name, ())):
                if number not in found:
                    found.add(number)
                    waiting += self.uses[number]
        return sorted(found)

    def cut(self, numbers: Sequence[int]) -> str:
        """Return the statements' lines, a blank line before and after every function and class."""
        parts = []
        for number in numbers:
            node = self.statements[number]
            first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
            block = "\n".join(self.lines[first - 1 : node.end_lineno]) + "\n"
            is_block = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            parts.append(f"\n\n{block}\n" if is_block else block)
        return re.sub(r"\n{4,}", "\n\n\n", "".join(parts)).lstrip("\n")


def _names_used(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load)}


def _names_bound(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [(alias.asname or alias.name).split(".")[0] for alias in node.names]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, _DEFINITION):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    inner = [_names_bound(child) for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return [name for names in inner for name in names]
