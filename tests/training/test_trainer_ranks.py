"""MemoryTrainer under accelerate launch, on two ranks: DDP and ZeRO 1, 2 and 3, in both orders, as on one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.clean_environment import without_ranks
from tests.support.trainer_ranks import CASES, Case
from titans_ds.zero.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = str(ROOT / "tests" / "support" / "trainer_ranks.py")
LAUNCH = ["launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]


def run(launcher: list[str], out: Path) -> dict[str, Any]:
    """All cases, and what they gave."""
    given = without_ranks(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([*launcher, PROGRAM, str(out)], env=given, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    results: dict[str, Any] = json.loads((out / "losses.json").read_text())
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The folder, and the results on one process and on two."""
    folder = tmp_path_factory.mktemp("trainer")
    accelerate = [str(Path(sys.executable).parent / "accelerate"), *LAUNCH, "--dynamo_backend", "no"]
    one = run([sys.executable], folder / "one")
    two = run([*accelerate, "--main_process_port", str(free_port())], folder / "two")
    assert (one["world"], two["world"]) == (1, 2)
    return folder, one, two


@pytest.mark.long
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_two_ranks_do_what_one_process_does(both: tuple[Path, dict[str, Any], dict[str, Any]], case: Case) -> None:
    """Losses, gradient norms, both evaluations, and every tensor that is saved."""
    folder, one, two = both
    for name, tolerance in (("losses", 1e-5), ("norms", 1e-5), ("evaluation", 1e-5)):
        assert two[case.name][name] == pytest.approx(one[case.name][name], abs=tolerance), name
    assert len(two[case.name]["losses"]) == 4
    files = ["titans_memory.safetensors", *(["lora/adapter_model.safetensors"] if case.lora else [])]
    for file in files:
        alone, together = (load_file(folder / name / case.name / "adapter" / file) for name in ("one", "two"))
        assert alone.keys() == together.keys()
        for name in alone:
            torch.testing.assert_close(together[name], alone[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
def test_a_deepspeed_checkpoint_goes_on(both: tuple[Path, dict[str, Any], dict[str, Any]]) -> None:
    """The resumed cases' losses are those of the whole run, from the step after the checkpoint."""
    resumed = [case for case in CASES if case.resumed]
    assert {case.stage for case in resumed} == {2, 3}
    for case in resumed:
        folder = both[0] / "two" / case.name / "checkpoint-2"
        assert (folder / "titans_config.json").is_file()
        assert os.listdir(folder / "global_step2")
