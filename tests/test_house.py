"""The house itself: pins, commands and documents that must agree with one another."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]


def pins() -> dict[str, str]:
    """Name -> version of everything that `make setup` installs after torch."""
    lines = (ROOT / "requirements/ci.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    return [Requirement(text) for group in (project["dependencies"], *extras) for text in group]


def test_every_declared_requirement_is_pinned_within_its_range() -> None:
    versions = pins()
    versions["torch"] = re.search(r"TORCH_VERSION=(\S+)", (ROOT / "requirements/install.sh").read_text())[1]
    missing = [r.name for r in declared() if canonicalize_name(r.name) not in versions]
    assert missing == [], "run `make lock` after installing them"
    outside = [str(r) for r in declared() if not r.specifier.contains(versions[canonicalize_name(r.name)])]
    assert outside == []


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


def test_readme_names_only_files_that_exist() -> None:
    """Relative links and `path/like/this.py` in backticks."""
    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\((?!https?:|#)([^)]+)\)", text)
    paths = re.findall(r"`((?:titans_ds|launch|eval|data_prep|ds_configs|docs|tests|benchmarks)/[\w./-]+)`", text)
    assert [name for name in links + paths if not (ROOT / name).exists()] == []


def test_readme_commands_are_make_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, flags=re.MULTILINE)] == []
