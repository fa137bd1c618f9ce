"""Imports: the scanner against `ast` on real files, the resolver on every layout, and the order that follows."""

from __future__ import annotations

import ast
import importlib.util
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.corpus.imports import ImportedName, ImportResolver, scan_imports
from data_prep.corpus.reading_order import depth_key, order_by_depth, order_by_imports


def _by_ast(text: str) -> list[tuple[int, str, str]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tree = ast.parse(text)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module or "", alias.name) for alias in node.names]
    return sorted(found)


def _by_scan(text: str) -> list[tuple[int, str, str]]:
    return sorted((found.level, found.module, found.name) for found in scan_imports(text))


@pytest.mark.parametrize("package", ["hypothesis", "datasets", "rich", "numpy", "_pytest"])
def test_scanner_agrees_with_ast_on_real_files(package: str) -> None:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    files = sorted(Path(spec.origin).parent.rglob("*.py"))[:100]
    assert len(files) > 20
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert _by_scan(text) == _by_ast(text), file


@pytest.mark.parametrize(
    "text",
    [
        "'''\nimport a\n'''\nimport b\n",
        'x = "import a"; import b as c, d.e\n',
        "from . import (\n  a, # import x)\n  b as c,\n)\n",
        "from .. a . b import c\n",
        "from a \\\n  import b, \\\n  c\n",
        "if x: import a\ntry: from b import c\nexcept E: pass\n",
        "x = r'\\'; import a'\n",
        "f'''{x}\nimport a\n'''\n",
        "# import a\nif 1:\n\timportlib.x()\nimport_ = 3\n",
        "from a import *\r\nimport b\r\n",
    ],
)
def test_scanner_agrees_with_ast_on_hard_text(text: str) -> None:
    assert _by_scan(text) == _by_ast(text)


def test_scanner_reads_files_that_do_not_parse() -> None:
    assert _by_scan("print 'python 2'\nfrom a import b\n") == [(0, "a", "b")]


@pytest.mark.parametrize(
    ("paths", "importer", "statement", "target"),
    [
        (["pkg/a.py", "pkg/b.py"], "pkg/a.py", "import pkg.b", "pkg/b.py"),
        (["pkg/a.py", "pkg/b.py"], "pkg/a.py", "from pkg import b", "pkg/b.py"),
        (["pkg/__init__.py", "pkg/a.py"], "pkg/a.py", "from pkg import name", "pkg/__init__.py"),
        (["pkg/a.py", "pkg/b.py"], "pkg/a.py", "from .b import x", "pkg/b.py"),
        (["pkg/a.py", "pkg/b.py"], "pkg/a.py", "from . import b", "pkg/b.py"),
        (["pkg/sub/a.py", "pkg/b.py"], "pkg/sub/a.py", "from ..b import x", "pkg/b.py"),
        (["a.py", "b.py"], "a.py", "from ...b import x", ""),
        (["src/pkg/a.py", "tests/test_a.py"], "tests/test_a.py", "from pkg.a import x", "src/pkg/a.py"),
        (["python/pkg/a.py", "run.py"], "run.py", "import pkg.a", "python/pkg/a.py"),
        (
            ["deep/project/pkg/a.py", "deep/project/run.py"],
            "deep/project/run.py",
            "import pkg.a",
            "deep/project/pkg/a.py",
        ),
        (["models.py", "train.py"], "train.py", "from my_repo.models import M", "models.py"),
        (["src/models.py", "train.py"], "train.py", "from my_repo import models", "src/models.py"),
        (["scripts/a.py", "scripts/b.py"], "scripts/a.py", "import b", "scripts/b.py"),
        (["pkg/__init__.py", "pkg/a.py", "pkg/b.py"], "pkg/a.py", "import b", ""),
        (["types.py", "a.py"], "a.py", "import types", ""),
        (["a.py"], "a.py", "import a", ""),
        (["pkg/a.py", "pkg/b.py"], "pkg/a.py", "import numpy", ""),
    ],
)
def test_resolver_knows_every_layout(paths: list[str], importer: str, statement: str, target: str) -> None:
    resolver = ImportResolver(paths, "owner/my-repo")
    assert resolver.resolve(importer, scan_imports(statement)) == ([target] if target else [])


def test_each_needed_file_comes_once_in_the_order_of_the_imports() -> None:
    resolver = ImportResolver(["a.py", "b.py", "c.py"])
    imports = [ImportedName(0, "c", "x"), ImportedName(0, "b", ""), ImportedName(0, "c", "y")]
    assert resolver.resolve("a.py", imports) == ["c.py", "b.py"]


_PATHS = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(lambda parts: "/".join(parts) + ".py"),
    unique=True,
    max_size=12,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_order_by_imports_respects_every_import_outside_cycles(data: st.DataObject) -> None:
    paths = data.draw(_PATHS)
    needs = {path: data.draw(st.lists(st.sampled_from(paths), max_size=4)) for path in paths}
    ordered = order_by_imports(paths, needs)
    assert sorted(ordered) == sorted(paths)
    place = {path: number for number, path in enumerate(ordered)}
    for path in paths:
        for needed in needs[path]:
            if path not in _reachable(needed, needs):
                assert place[needed] < place[path]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_order_by_imports_keeps_cycles_together_and_ignores_the_input_order(data: st.DataObject) -> None:
    paths = data.draw(_PATHS)
    needs = {path: data.draw(st.lists(st.sampled_from(paths), max_size=3)) for path in paths}
    ordered = order_by_imports(paths, needs)
    assert order_by_imports(list(reversed(paths)), needs) == ordered
    for path in paths:
        cycle = {other for other in _reachable(path, needs) if path in _reachable(other, needs)} | {path}
        places = [ordered.index(member) for member in cycle]
        assert max(places) - min(places) == len(cycle) - 1


def _reachable(start: str, needs: dict[str, list[str]]) -> set[str]:
    found: set[str] = set()
    stack = [start]
    while stack:
        for other in needs[stack.pop()]:
            if other not in found:
                found.add(other)
                stack.append(other)
    return found | {start}


def test_order_by_depth_is_the_papers() -> None:
    assert order_by_depth(["b/c/d.py", "b/a.py", "z.py", "a/z.py"]) == ["z.py", "a/z.py", "b/a.py", "b/c/d.py"]
    assert depth_key("a/b.py") < depth_key("a/b/c.py")


def test_without_imports_both_orders_are_the_same() -> None:
    paths = ["b/c.py", "a.py", "b/a.py"]
    assert order_by_imports(paths, {}) == order_by_depth(paths)
