"""The wheel: built, installed beside the packages that are here already, and used from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", str(place), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    if done.returncode and "hatchling" in done.stderr:
        pytest.skip("no package index here has the build backend, hatchling")
    assert done.returncode == 0, done.stderr
    return next(place.glob("titans_ds-*.whl"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`titans-ds` of an environment of its own, which sees the packages of this one but not this checkout."""
    place = tmp_path_factory.mktemp("env")
    venv.create(place)
    python = place / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    Path(site, "outside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(place / "bin" / "titans-ds")


def run(command: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([command, *arguments], cwd=folder, env=kept, capture_output=True, text=True, timeout=300)


@pytest.mark.long
def test_the_wheel_holds_programs_settings_and_the_type_marker(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "titans_ds/py.typed",
        "titans_ds/programs/launch/train.py",
        "titans_ds/programs/ds_configs/zero2.json",
    } <= names
    assert "titans_ds/programs/launch/configs/quickstart.yaml" in names
    assert not {name.split("/")[0] for name in names} & {"launch", "eval", "data_prep", "tests"}


@pytest.mark.long
def test_a_memory_is_trained_with_the_wheel_alone(command: str, tmp_path: Path) -> None:
    """The demo's first steps, from a folder that holds nothing but some repositories."""
    for repo in ("one", "two", "three", "four", "five", "six", "seven", "eight"):
        for number in range(4):
            path = tmp_path / "repos" / repo / f"m{number}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"def {repo}_{number}_{n}(x):\n    return x + {n}\n" for n in range(40)]
            path.write_text("\n".join(["import m0", *lines]))
    listed = run(command, tmp_path, "--help")
    assert listed.returncode == 0
    assert "build-corpus" in listed.stdout
    build = ["build-corpus", "--folders", "repos", "--min-files", "1", "--split-ratios", "34/33/33", "--out", "corpus"]
    done = run(command, tmp_path, *build)
    assert done.returncode == 0, done.stdout + done.stderr
    where = "import titans_ds, pathlib; print(pathlib.Path(titans_ds.__file__).parent / 'assets' / 'base_hybrid')"
    python = str(Path(command).parent / "python")
    base = run(python, tmp_path, "-c", where).stdout.strip()
    assert base.startswith(str(Path(command).parents[1]))
    done = run(command, tmp_path, "pack-corpus", "--corpus", "corpus", "--tokenizer", base, "--out", "packed")
    assert done.returncode == 0, done.stdout + done.stderr
    settings = ["--training.steps=1", "--training.window=2", "--data.num_lanes=1", "--evaluation.interval=0"]
    done = run(command, tmp_path, "train", "--model.base", base, "--data.corpus", "packed", "--deepspeed", "null",
               "--graft.segment_tokens", "32", "--run.dir", "run", *settings)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "finished"
    assert (tmp_path / "run" / "adapter" / "titans_config.json").is_file()


@pytest.mark.long
def test_what_is_missing_or_misspelt_is_named(command: str, tmp_path: Path) -> None:
    done = run(command, tmp_path, "trian")
    assert (done.returncode, done.stderr) == (2, "error: titans-ds has no command 'trian'; did you mean train?\n")
    (tmp_path / "jsonargparse.py").write_text('raise ModuleNotFoundError("No module", name="jsonargparse")')
    python = str(Path(command).parent / "python")
    done = run(python, tmp_path, "-m", "titans_ds", "train")
    assert done.returncode == 2
    assert "jsonargparse is not installed; it comes with `pip install 'titans-ds[train]'`" in done.stderr
