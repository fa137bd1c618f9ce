"""A corpus of more than 100 real packages, downloaded from the package index: every invariant, in test-sized time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import data_prep
from data_prep.corpus.build import build
from data_prep.settings import CorpusSettings
from data_prep.sources import ArchiveFolder
from tests.data_prep.test_corpus import check_invariants

PACKAGES = Path(data_prep.__file__).parent / "assets" / "packages.txt"


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["-d", str(folder), "-r", str(PACKAGES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("the packages cannot be downloaded here within 400 s")
    if done.returncode:
        pytest.skip(f"the packages cannot be downloaded here: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.long
def test_a_corpus_of_a_hundred_real_packages(wheels: Path, tmp_path: Path) -> None:
    config = CorpusSettings(order="imports")
    manifest, _ = build(ArchiveFolder(str(wheels)), config, tmp_path / "corpus", num_workers=2)
    assert len(manifest["repositories"]) >= 100
    assert manifest["filters"][-1]["files"] > 5_000
    known = [record for record in manifest["repositories"] if record["license"]]
    assert len(known) >= 0.9 * len(manifest["repositories"])
    assert all(record["version"] for record in manifest["repositories"])
    check_invariants(tmp_path / "corpus", manifest, config)
