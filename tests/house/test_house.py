"""The house itself: pins, commands and documents that must agree with one another."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
NOT_IN_CI = frozenset({"harness", "deltanet", "torchao"})  # big, and the tests that use them skip without them
OWN = {"titans_ds", "launch", "eval", "data_prep", "tests", "benchmarks"}


def pins() -> dict[str, str]:
    """Name -> version of everything that `make setup` installs after torch."""
    lines = (ROOT / "requirements/ci.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def declared(leave_out: frozenset[str] = frozenset()) -> list[Requirement]:
    """Every requirement of pyproject.toml, but for some extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [texts for name, texts in project["optional-dependencies"].items() if name not in leave_out]
    return [Requirement(text) for group in (project["dependencies"], *extras) for text in group]


def test_every_declared_requirement_is_pinned_within_its_range() -> None:
    versions = pins()
    chosen = (ROOT / "requirements/install.sh").read_text()
    for name in ("torch", "triton"):  # chosen apart
        versions[name] = re.search(rf"{name.upper()}_VERSION=(\S+)", chosen)[1]
    requirements = declared(leave_out=NOT_IN_CI)
    missing = [r.name for r in requirements if canonicalize_name(r.name) not in versions]
    assert missing == [], "run `make lock` after installing them"
    outside = [str(r) for r in requirements if not r.specifier.contains(versions[canonicalize_name(r.name)])]
    assert outside == []


def imported(path: Path) -> Iterator[str]:
    """Top-level names of the absolute imports of a file, wherever they stand in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def test_everything_imported_is_declared() -> None:
    """What comes along with something else today may be gone tomorrow."""
    names, distributions = {canonicalize_name(r.name) for r in declared()}, packages_distributions()
    known = OWN | sys.stdlib_module_names | {"torch", "fla"}  # of the interpreter outside; flash-linear-attention
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for folder in OWN
        for path in (ROOT / folder).rglob("*.py")
        for name in imported(path)
        if name not in known and not any(canonicalize_name(d) in names for d in distributions.get(name, [name]))
    }
    assert undeclared == set()


def test_pins_choose_no_torch_and_no_cuda() -> None:
    """They would undo the choice of build that requirements/install.sh makes."""
    assert [name for name in pins() if name == "torch" or name.startswith("nvidia-") or name == "triton"] == []


def test_shell_scripts_parse() -> None:
    for script in (".ci/run", "requirements/install.sh"):
        assert os.access(ROOT / script, os.X_OK), f"{script} is not executable"
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    command = [str(ROOT / "requirements/install.sh"), str(tmp_path / "venv"), str(old), "auto"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Python 3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_readme_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []
