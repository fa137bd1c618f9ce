"""Python syntax trees: what a file defines, binds and imports, and where its statements end. Nothing is executed."""

from __future__ import annotations

import ast
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

_COMPOUND = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.AsyncFor, ast.While, ast.If, ast.With,
    ast.AsyncWith, ast.Try, ast.Match,
)  # fmt: skip


def parse_quietly(text: str) -> ast.Module | None:
    """Return the syntax tree, None where Python cannot parse the text. Nothing is executed or printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None


@dataclass(frozen=True)
class Definitions:
    """What a file defines at its top level, and the members of its classes (with attributes set on `self`)."""

    names: frozenset[str]
    members: dict[str, frozenset[str]]


def definitions(tree: ast.Module) -> Definitions:
    """Return the top-level names and the class members that a file defines itself."""
    names: set[str] = set()
    members: dict[str, frozenset[str]] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            members[node.name] = frozenset(class_members(node))
    return Definitions(frozenset(names), members)


def class_members(node: ast.ClassDef) -> Iterator[str]:
    """Yield a class's methods, class attributes and the attributes that its methods set on `self`."""
    for item in node.body:
        if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield item.name
            for inner in ast.walk(item):
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store) and _is_self(inner.value):
                    yield inner.attr
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            yield item.target.id
        elif isinstance(item, ast.Assign):
            yield from (target.id for target in item.targets if isinstance(target, ast.Name))


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def dotted_name(node: ast.expr) -> str:
    """Return "x" or "self.x" for such an expression, "" for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and _is_self(node.value):
        return f"self.{node.attr}"
    return ""


def count_bindings(tree: ast.AST) -> Counter[str]:
    """Count how often the file binds each name, in any scope; attributes set on an object count as ".name"."""
    bound: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound[node.id] += 1
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            bound["." + node.attr] += 1
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            bound[node.name] += 1
        elif isinstance(node, ast.arg):
            bound[node.arg] += 1
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            bound[node.name] += 1
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            bound.update(node.names)
    for _, _, alias in import_aliases(tree):
        bound[(alias.asname or alias.name).partition(".")[0]] += 1
    return bound


def import_aliases(tree: ast.AST) -> Iterator[tuple[int, str | None, ast.alias]]:
    """Yield (level, module, alias) of every import; module is None for `import x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, None, alias) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias) for alias in node.names)


def loaded_expressions(tree: ast.Module) -> Iterator[tuple[ast.stmt, ast.expr]]:
    """Yield every loaded name and attribute with the innermost statement that holds it."""
    stack: list[tuple[ast.stmt | None, ast.AST]] = [(None, tree)]
    while stack:
        statement, node = stack.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
            # Inside an f-string, older Pythons give no positions.
            continue
        if isinstance(node, ast.stmt):
            statement = node
        if statement and isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Load):
            yield statement, node
        stack += [(statement, child) for child in ast.iter_child_nodes(node)]


class Spans:
    """Turns ast's positions (lines from 1, columns in UTF-8 bytes) into offsets of the text."""

    def __init__(self, text: str) -> None:
        self.text = text
        # As Python's tokenizer counts them: form feeds and the like do not end a line.
        self.lines = text.split("\n")
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line) + 1)

    def offset(self, line: int, column: int) -> int:
        text = self.lines[line - 1]
        return self.starts[line - 1] + (column if text.isascii() else len(text.encode()[:column].decode()))

    def end_of_statement(self, statement: ast.stmt, node: ast.expr) -> int | None:
        """Return where the target ends; None where that cannot be told."""
        for decorator in getattr(statement, "decorator_list", ()):
            if _contains(decorator, node):
                return self.offset(decorator.end_lineno, decorator.end_col_offset)
        if not isinstance(statement, _COMPOUND):
            return self.offset(statement.end_lineno or 1, statement.end_col_offset or 0)
        line, column = _header_end(statement)
        end = self.offset(line, column)
        colon = self.text.find(":", end)
        between = self.text[end:colon]
        return colon + 1 if colon >= 0 and not between.strip("() \t,") else None


def _contains(outer: ast.expr, inner: ast.expr) -> bool:
    return any(node is inner for node in ast.walk(outer))


def _header_end(statement: ast.stmt) -> tuple[int, int]:
    """Return the end of the last expression before a compound statement's body."""
    first = statement.body[0] if getattr(statement, "body", None) else statement
    start = (first.lineno, first.col_offset)
    last = (statement.lineno, statement.col_offset)
    for node in ast.walk(statement):
        end = getattr(node, "end_lineno", None), getattr(node, "end_col_offset", None)
        if end[0] is not None and last < end <= start and not isinstance(node, ast.stmt):
            last = end
    return last
