"""How large the house is, that no files import one another in a circle, and how many of them a training step enters."""

from __future__ import annotations

import ast
import graphlib
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import titans_ds
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base
from titans_ds.config import GraftConfig
from titans_ds.memory.delta import DeltaConfig
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.data.packed import open_corpus
from titans_ds.training.data.segments import RepositoryReader
from titans_ds.training.engine import TorchEngine
from titans_ds.training.module import TrainingModule
from titans_ds.training.optimizer import make_optimizer
from titans_ds.training.settings import OptimizerSettings, TrainingSettings
from titans_ds.training.step import Carried, run_passes

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("titans_ds", "launch", "eval", "data_prep", "benchmarks")
MOST_FILES = 20  # side by side in a folder
# Lines of code at most. A number goes down with what is removed; it goes up with a capability that is worth it.
MOST_LINES = {"titans_ds/memory": 3_915, "benchmarks": 1_200, "": 27_000}
MOST_ENTERED = 15  # files of the library, from a step of the loop to the first write
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def sources() -> list[Path]:
    """The Python files of the project, without its tests."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def code_lines(path: Path) -> int:
    """Lines that hold code: blank lines, comments and docstrings are free."""
    text = path.read_text()
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node, clean=False
        ):
            lines -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return len(lines)


@pytest.mark.parametrize("folder", MOST_LINES)
def test_the_code_is_no_longer_than_it_may_be(folder: str) -> None:
    inside = [path for path in sources() if path.is_relative_to(ROOT / folder)]
    assert sum(code_lines(path) for path in inside) <= MOST_LINES[folder]


def test_comments_and_docstrings_are_free(tmp_path: Path) -> None:
    path = tmp_path / "some.py"
    quoted = 'x = """\ntwo\n"""  # three\n\n\ndef f():\n    """Doc.\n\n    More.\n    """\n    # why\n    return x\n'
    path.write_text(f'"""Doc."""\n\n{quoted}')
    assert code_lines(path) == 5


def test_no_folder_holds_more_files_than_one_can_look_over() -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in sources())
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def imports(path: Path, name: str, modules: dict[str, Path]) -> set[str]:
    """Modules of the project that a file imports when it is loaded: neither inside functions nor for types alone."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    left: list[ast.AST] = [ast.parse(path.read_text())]
    while left:
        node = left.pop()
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.add(whole if whole in modules else base)
        left.extend(ast.iter_child_nodes(node))
    return {module for module in found if module in modules and module != name}


def test_no_circle_of_files_import_one_another() -> None:
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in sources()
    }
    graph = {name: imports(path, name, modules) for name, path in modules.items()}
    assert graph["titans_ds.training.step"] >= {"titans_ds.training.engine", "titans_ds.training.settings"}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_training_step_comes_to_the_write_of_a_token_through_few_files(tmp_path: Path) -> None:
    """From the step that launch/train.py's loop takes to the delta rule of the default memory, in plain torch."""
    corpus = open_corpus(write_packed(tmp_path / "corpus", {"train": random_repos(4, seed=1)}))
    graft = GraftConfig(layers=[1, 2], segment_tokens=8, memory=DeltaConfig(dim=16, backend="chunkwise"))
    module = TrainingModule(titans_ds.attach(tiny_base("llama"), graft), 64).train()
    engine = TorchEngine(module, make_optimizer(module, OptimizerSettings()), 1.0, torch.device("cpu"))
    lanes = Lanes(RepositoryReader(corpus.split("train"), 8), 2, 0, 1, 0)
    settings, carried = TrainingSettings(window=2), Carried()
    entered: list[str] = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        written = any(name.endswith("delta/chunkwise.py") for name in entered)
        if event == "call" and not written and path.is_relative_to(ROOT / "titans_ds"):
            name = path.relative_to(ROOT).as_posix()
            if name not in entered:
                entered.append(name)

    sys.setprofile(trace)
    try:
        run_passes(engine, lanes, carried, settings, 1)
    finally:
        sys.setprofile(None)
    assert entered[0] == "titans_ds/training/step.py"
    assert entered[-1] == "titans_ds/memory/delta/chunkwise.py"
    assert len(entered) <= MOST_ENTERED, "\n".join(entered)
    page = (ROOT / "docs/reading_the_code.md").read_text()
    assert [name for name in entered if f"`{name.removeprefix('titans_ds/')}`" not in page] == []
