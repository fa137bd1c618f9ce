"""The code of the documents runs as it stands, in a copy of the project: the commands, the Python, the added files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import documents

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("titans_ds", "launch", "eval", "data_prep")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_BLOCKS = [page for page in PAGES if any(block.is_run for block in documents.blocks(page))]
SECONDS = 600  # for one page, on a busy machine


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout that a page may change: code is copied, whatever is large or only read is linked."""
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("assets"))
        if (ROOT / name / "assets").is_dir():
            shutil.copytree(ROOT / name / "assets", tmp_path / name / "assets", copy_function=os.symlink)
    for name in ("ds_configs", "benchmarks", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def environment(copy: Path) -> dict[str, str]:
    """Offline, with this copy as the installed package, and `titans-ds` as pip would make it."""
    command = copy / "bin" / "titans-ds"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m titans_ds "$@"\n')
    command.chmod(0o755)
    path = os.pathsep.join([str(command.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "GIT_CEILING_DIRECTORIES": str(copy.parent)}
    return {**os.environ, **quiet, "PATH": path, "PYTHONPATH": str(copy)}


@pytest.mark.long
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(page: Path, copy: Path) -> None:
    done = subprocess.run(
        [sys.executable, documents.__file__, str(page)],
        cwd=copy,
        env=environment(copy),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    for expected in EXPECTED.get(page.stem, ()):
        assert expected in done.stdout


# What a reader is told to look for.
EXPECTED = {
    "README": ("delta memory on layers [7, 11]", "read 8 files", "memory.html"),
    "quickstart": ("wrote shop.memory", "held out: ", "nats a token: own "),
    "training": ("step 6/6", "another repository's memory"),
    "evaluation": ("remembered: +", "memory - memory_wrong", "kv_recall: EM %"),
    "extending": ("delta memory on layers", "before: ", "after: ", "memory_reversed"),
}


def test_a_block_that_fails_ends_the_page_and_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n```bash\nfalse | true\n```\n\n```python\nprint('here', x)\n```\n")
    done = subprocess.run(
        [sys.executable, documents.__file__, str(page)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stdout.splitlines() == ["--- page.md:1", "--- page.md:5"]
    page.write_text(page.read_text().replace("false", "true"))
    done = subprocess.run(
        [sys.executable, documents.__file__, str(page)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "here 1"
