"""What an import may load: checked in fresh interpreters, since this one has loaded everything already."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROBE = """
import importlib, json, sys
names, forbidden = json.loads(sys.argv[1]), json.loads(sys.argv[2])
for name in names:
    importlib.import_module(name)
print(json.dumps(sorted(name for name in forbidden if name in sys.modules)))
"""


def modules_of(package: str) -> list[str]:
    """All modules of a package of this project, the ones that run as programs left out."""
    found = pkgutil.walk_packages([str(ROOT / package)], prefix=f"{package}.")
    return [package] + [module.name for module in found if not module.name.endswith("__main__")]


def loaded_by(modules: list[str], forbidden: list[str]) -> list[str]:
    """Those of `forbidden` that a fresh interpreter holds after importing `modules`."""
    command = [sys.executable, "-c", PROBE, json.dumps(modules), json.dumps(forbidden)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded: list[str] = json.loads(done.stdout.splitlines()[-1])
    return loaded


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("titans_ds", ["deepspeed", "mpi4py"]),
        ("data_prep", ["torch", "transformers", "deepspeed", "titans_ds.config", "eval", "launch"]),
        ("eval", ["deepspeed", "mpi4py", "launch"]),
    ],
)
def test_no_module_of_the_package_loads_a_forbidden_one(package: str, forbidden: list[str]) -> None:
    assert loaded_by(modules_of(package), forbidden) == []


def test_importing_the_library_is_light() -> None:
    """`import titans_ds` alone: none of the distributed machinery, and no program of the project."""
    assert loaded_by(["titans_ds"], ["torch", "deepspeed", "mpi4py", "datasets", "launch", "eval", "data_prep"]) == []


def test_the_probe_sees_a_forbidden_import() -> None:
    assert loaded_by(["json.tool"], ["argparse", "deepspeed"]) == ["argparse"]
