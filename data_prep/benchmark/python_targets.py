"""Cross-file targets in Python, by static analysis with `ast` alone.

A target is a use of something that another file of the repository defines: without the import it would be
undefined (the name is bound nowhere else in the file and is no builtin). The cursor is before the name; the target
runs to the end of the statement, for `if`, `for`, `def`, … to the colon. Only targets of one line are taken, as in
CrossCodeEval.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass

from ..corpus.imports import ImportedName, ImportResolver
from .python_syntax import (
    Spans,
    count_bindings,
    definitions,
    dotted_name,
    import_aliases,
    loaded_expressions,
    parse_quietly,
)
from .repository import Repository
from .targets import Target


@dataclass(frozen=True, slots=True)
class Imported:
    """A local name bound by an import from inside the repository: a module (symbol ""), or a symbol of one."""

    file: str
    symbol: str


class PythonFinder:
    """Finds the targets of one repository."""

    def __init__(self, repository: Repository) -> None:
        """Parses every file once; files that do not parse have no targets and define nothing."""
        self.files = repository.files
        parsed = {path: parse_quietly(text) for path, text in repository.files.items()}
        self.trees = {path: tree for path, tree in parsed.items() if tree is not None}
        self.definitions = {path: definitions(tree) for path, tree in self.trees.items()}
        self.resolver = ImportResolver(repository.files, repository.name)

    def targets(self) -> Iterator[Target]:
        """Yield all targets, file by file, in the order of the text."""
        for path in sorted(self.trees):
            found = {target.start: target for target in self._file_targets(path)}
            yield from (found[start] for start in sorted(found))

    def _file_targets(self, path: str) -> Iterator[Target]:
        tree = self.trees[path]
        imported = self._imported(path)
        if not imported:
            return
        typed = self._typed(tree, imported)
        spans = Spans(self.files[path])
        for statement, node in loaded_expressions(tree):
            use = self._use(node, imported, typed)
            if use is None:
                continue
            kind, name, defined_in, position = use
            start = spans.offset(*position)
            if spans.text[start : start + len(name)] != name:
                continue
            end = spans.end_of_statement(statement, node)
            if end is not None and "\n" not in spans.text[start:end]:
                yield Target(path, start, end, name, kind, defined_in)

    def _imported(self, path: str) -> dict[str, Imported]:
        """Return the names that only an import from inside the repository binds, with what they stand for."""
        bound = count_bindings(self.trees[path])
        found: dict[str, Imported] = {}
        for level, module, alias in import_aliases(self.trees[path]):
            local = alias.asname or alias.name
            if "." in local or bound[local] != 1 or hasattr(builtins, local):
                continue
            name = "" if module is None else alias.name
            one = ImportedName(level, alias.name if module is None else module, name)
            file = self.resolver.resolve_one(path, one)
            if not file or file == path or file not in self.definitions:
                continue
            is_module = not name or file != self.resolver.resolve_one(path, ImportedName(level, one.module, ""))
            source = Imported(file, "") if is_module else self._origin(file, name)
            if source is not None:
                found[local] = source
        return found

    def _origin(self, file: str, name: str, num_steps: int = 5) -> Imported | None:
        """Return where a name of a module is defined, through up to five files that only import it further."""
        if name in self.definitions[file].names:
            return Imported(file, name)
        for level, module, alias in import_aliases(self.trees[file]) if num_steps else ():
            if module is not None and (alias.asname or alias.name) == name:
                origin = self.resolver.resolve_one(file, ImportedName(level, module, alias.name))
                if origin in self.definitions and origin != file:
                    return self._origin(origin, alias.name, num_steps - 1)
        return None

    def _class_of(self, node: ast.expr | None, imported: dict[str, Imported]) -> Imported | None:
        """Return the imported class that an expression names: `C`, `module.C`, "C", `C | None`, `Optional[C]`."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            parsed = parse_quietly(node.value.strip())
            node = parsed.body[0].value if parsed and parsed.body and isinstance(parsed.body[0], ast.Expr) else None
        if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and node.right.value is None:
            node = node.left
        if isinstance(node, ast.Subscript) and dotted_name(node.value) == "Optional":
            node = node.slice
        if isinstance(node, ast.Name) and node.id in imported:
            found = imported[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = imported.get(node.value.id)
            if module is None or module.symbol:
                return None
            found = Imported(module.file, node.attr)
        else:
            return None
        return found if found.symbol in self.definitions[found.file].members else None

    def _typed(self, tree: ast.Module, imported: dict[str, Imported]) -> dict[int, Imported]:
        """Return, by `id` of the expression, the imported class that a variable is an object of.

        A variable counts inside the function (for `self.x`: the class) in which it is bound once: to a call of the
        class, or as a parameter annotated with it.
        """
        typed: dict[int, Imported] = {}
        if not any(
            not source.symbol or source.symbol in self.definitions[source.file].members for source in imported.values()
        ):
            return typed
        for scope in ast.walk(tree):
            if isinstance(scope, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                known = dict(self._bound_objects(scope, imported))
                if known:
                    bound = count_bindings(scope)
                    for node in ast.walk(scope):
                        name = dotted_name(node) if isinstance(node, ast.expr) else ""
                        if name in known and bound[name if "." not in name else name[4:]] == 1:
                            typed[id(node)] = known[name]
        return typed

    def _bound_objects(self, scope: ast.AST, imported: dict[str, Imported]) -> Iterator[tuple[str, Imported]]:
        parameters: dict[str, Imported] = {}
        if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for argument in [*scope.args.posonlyargs, *scope.args.args, *scope.args.kwonlyargs]:
                if source := self._class_of(argument.annotation, imported):
                    parameters[argument.arg] = source
            yield from parameters.items()
        for node in ast.walk(scope):
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.value, ast.Call):
                name, source = dotted_name(node.targets[0]), self._class_of(node.value.func, imported)
                # `self` means the class: only there are all its assignments in view.
                if name and source and ("." in name) == isinstance(scope, ast.ClassDef):
                    yield name, source

    def _use(
        self, node: ast.expr, imported: dict[str, Imported], typed: dict[int, Imported]
    ) -> tuple[str, str, str, tuple[int, int]] | None:
        """Return (kind, name, defining file, (line, byte column) of the name) where the expression is a target."""
        if isinstance(node, ast.Name) and node.id in imported and imported[node.id].symbol:
            return "name", node.id, imported[node.id].file, (node.lineno, node.col_offset)
        if not isinstance(node, ast.Attribute) or node.end_lineno is None or node.end_col_offset is None:
            return None
        position = (node.end_lineno, node.end_col_offset - len(node.attr.encode()))
        base = dotted_name(node.value)
        module = imported.get(base)
        if module and not module.symbol and node.attr in self.definitions[module.file].names:
            return "module_member", node.attr, module.file, position
        source = typed.get(id(node.value)) or (module if module and module.symbol else None)
        if source and node.attr in self.definitions[source.file].members.get(source.symbol, ()):
            return "member", node.attr, source.file, position
        return None
