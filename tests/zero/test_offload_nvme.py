"""Offload to NVMe against none. Runs where DeepSpeed's async_io is built already: a build takes many minutes.

python -c "from titans_ds.zero.ops import prepare_ops; prepare_ops(['async_io'])"     builds it
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.kill_and_resume import prepare
from tests.zero.test_checkpoint_ranks import ROOT, checkpoint, launch, losses, options
from titans_ds.zero.ops import is_built

pytestmark = pytest.mark.skipif(not is_built("async_io"), reason="DeepSpeed's op async_io is not built; see above")

WIDE = ["--graft.memory.dim", "640"]  # tensors of less than 1 MiB a rank stay in memory


@pytest.mark.long
def test_nvme_trains_to_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizer and parameters on NVMe; and parameters alone, which resumes exactly."""
    (tmp_path / "nvme").mkdir()
    monkeypatch.setenv("TITANS_NVME_DIR", str(tmp_path / "nvme"))
    prepare(tmp_path, deepspeed=None)
    names = ("zero3", "zero3_offload_nvme", "zero3_offload_nvme_params")
    for name in names:
        config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        if "offload_param" in config["zero_optimization"]:
            config["zero_optimization"]["offload_param"]["buffer_size"] = (
                2_000_000  # the shipped one is for real models
            )
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    runs = [[*options(tmp_path, name, name), *WIDE, "--deepspeed", str(tmp_path / f"{name}.json")] for name in names]
    runs[1] += ["--checkpoint.interval", "0"]
    runs.append([*runs[2], "--run.dir", str(tmp_path / "resumed"), "--run.trust_checkpoint", "true"])
    runs[3] += ["--resume", str(checkpoint(tmp_path, names[2], 2))]
    codes, output = launch(tmp_path, "nvme_runs", runs, ranks=2)
    assert codes == [0, 0, 0, 0], output[-3000:]
    swapped = [p for p in (tmp_path / "nvme").rglob("*.swp") if p.stat().st_size > 2**18]
    assert len([p for p in swapped if "exp_avg" in p.name]) >= 4  # both moments of both ranks
    whole = losses(tmp_path / "zero3")
    for name in names[1:]:
        for step, (loss, norm) in losses(tmp_path / name).items():
            assert (loss, norm) == (pytest.approx(whole[step][0], rel=1e-5), pytest.approx(whole[step][1], rel=1e-4))
    assert losses(tmp_path / "resumed") == {s: losses(tmp_path / names[2])[s] for s in (3, 4, 5, 6)}
