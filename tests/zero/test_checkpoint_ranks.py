"""Checkpoints of two ranks under DeepSpeed: every ZeRO stage, another number of ranks, a full disk, SIGTERM, export."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch import export_adapter, universal_checkpoint
from tests.support.clean_environment import without_ranks
from tests.support.kill_and_resume import prepare
from titans_ds.zero.pickles import problem_of_pickle
from titans_ds.zero.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
STAGES = (0, 1, 2, 3)
STEPS = ["--training.steps", "6", "--evaluation.interval", "0", "--checkpoint.interval", "2", "--checkpoint.keep", "9"]
OFFLOAD = ("zero2_offload_cpu", "zero3_offload_cpu")


def environment() -> dict[str, str]:
    """Of a launch."""
    return without_ranks(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")


def launcher(ranks: int) -> list[str]:
    """DeepSpeed's, for so many ranks of this host."""
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    return [*runner, "--master_port", str(free_port())]


def launch(place: Path, name: str, runs: list[list[str]], ranks: int) -> tuple[list[int], str]:
    """Several runs of the program in one launch; their exit codes, and the output."""
    folder = place / name
    folder.mkdir()
    common = ["--config", str(place / "config.yaml"), *STEPS, "--lora", "null"]
    (folder / "runs.json").write_text(json.dumps([[*run[:1], *common, *run[1:]] for run in runs]))
    command = [*launcher(ranks), str(ROOT / "tests" / "support" / "many_runs.py"), str(folder / "runs.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((folder / "CODES.json").read_text()), done.stdout + done.stderr


def options(place: Path, config: str, name: str, resume: Path | None = None, dtype: str = "float32") -> list[str]:
    """Arguments of one run; the first says whether its disk is full."""
    given = ["", "--deepspeed", f"ds_configs/{config}.json", "--run.dir", str(place / name), "--model.dtype", dtype]
    return given if resume is None else [*given, "--resume", str(resume), "--run.trust_checkpoint", "true"]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def checkpoint(place: Path, run: str, step: int) -> Path:
    """Of a run."""
    return place / run / "checkpoints" / f"step_{step:07d}"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 ranks, uninterrupted and resumed: every stage, bfloat16, offloaded; and a run where rank 1's disk is full."""
    folder = tmp_path_factory.mktemp("ranks")
    prepare(folder, deepspeed=None)
    runs = []
    for config in [*(f"zero{stage}" for stage in STAGES), *OFFLOAD]:
        runs.append(options(folder, config, config))
        runs.append(options(folder, config, f"{config}_resumed", checkpoint(folder, config, 2)))
    for config in ("zero1", "zero3"):
        runs.append(options(folder, config, f"{config}_bf16", dtype="bfloat16"))
        again = checkpoint(folder, f"{config}_bf16", 2)
        runs.append(options(folder, config, f"{config}_bf16_resumed", again, dtype="bfloat16"))
    full = [["disk of rank 1 is full", *options(folder, "zero2", "full_disk")[1:]]]
    codes, output = launch(folder, "two_ranks", runs + full, ranks=2)
    assert codes == [0] * len(runs) + [2], output[-3000:]
    (folder / "output.txt").write_text(output)
    return folder


@pytest.fixture(scope="module")
def other_ranks(place: Path) -> Path:
    """From step 2 to 4 (and on) with 1 rank, then from 4 to 6 with 2 ranks again, through universal checkpoints."""
    early = [
        options(place, "zero1", "refused_run", checkpoint(place, "zero1", 2)),
        [*options(place, "zero2", "untrusted", checkpoint(place, "zero2", 2))[:-1], "false"],
    ]
    codes, output = launch(place, "refused", early, ranks=1)
    assert codes == [2, 2]
    (place / "refused.txt").write_text(output)
    for before, after, step, ranks in (("", "_one", 2, 1), ("_one", "_two", 4, 2)):
        for stage in (1, 2, 3):
            assert universal_checkpoint.main([str(checkpoint(place, f"zero{stage}{before}", step))]) == 0
        runs = [
            options(place, f"zero{stage}", f"zero{stage}{after}", checkpoint(place, f"zero{stage}{before}", step))
            for stage in STAGES
        ]
        codes, output = launch(place, f"ranks{after}", runs, ranks)
        assert codes == [0] * len(runs), output[-3000:]
    return place


@pytest.mark.long
@pytest.mark.parametrize("name", [*(f"zero{s}" for s in STAGES), *OFFLOAD, "zero1_bf16", "zero3_bf16"])
def test_two_ranks_resume_exactly(place: Path, name: str) -> None:
    """Steps 3 to 6 with float equality, of losses and gradient norms, and the adapter's bytes."""
    whole, resumed = losses(place / name), losses(place / f"{name}_resumed")
    assert sorted(whole) == [1, 2, 3, 4, 5, 6]
    assert resumed == {step: whole[step] for step in (3, 4, 5, 6)}
    assert whole[1][0] != whole[6][0]
    files = [place / run / "adapter" / "titans_memory.safetensors" for run in (name, f"{name}_resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.long
@pytest.mark.parametrize("name", [*(f"zero{s}" for s in (1, 2, 3)), *OFFLOAD])
def test_offload_and_stages_train_to_the_same_losses(place: Path, name: str) -> None:
    """Optimizer, and parameters, on the CPU: the losses of ZeRO 0."""
    for step, (loss, _) in losses(place / name).items():
        assert loss == pytest.approx(losses(place / "zero0")[step][0], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_then_one_then_two(other_ranks: Path, stage: int) -> None:
    """The curve of the run that had 2 ranks all along; lane states are dealt anew. 1e-5: sums are ordered otherwise."""
    whole = losses(other_ranks / f"zero{stage}")
    for name, first in ((f"zero{stage}_one", 3), (f"zero{stage}_two", 5)):
        part = losses(other_ranks / name)
        assert sorted(part) == list(range(first, 7))
        for step, (loss, _) in part.items():
            assert loss == pytest.approx(whole[step][0], rel=1e-5), (name, step)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_export_needs_no_engine(other_ranks: Path, tmp_path: Path, stage: int) -> None:
    """What the run wrote at its end, out of the shares of two ranks; also out of the universal form."""
    run, out = other_ranks / f"zero{stage}", tmp_path / "out"
    assert export_adapter.main([str(run), "--out", str(out)]) == 0
    ours, theirs = (load_file(f / "adapter" / "titans_memory.safetensors") for f in (out, run))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    if stage:
        universal = f"{checkpoint(other_ranks, f'zero{stage}', 2)}.universal"
        plain = str(checkpoint(other_ranks, f"zero{stage}", 2))
        for number, source in enumerate((universal, plain)):
            assert export_adapter.main([source, "--out", str(tmp_path / str(number))]) == 0
        both = [load_file(tmp_path / str(n) / "adapter" / "titans_memory.safetensors") for n in range(2)]
        assert all(both[0][name].equal(both[1][name]) for name in both[0])


@pytest.mark.long
def test_a_full_disk_of_one_rank_is_known_to_all(place: Path) -> None:
    """Both ranks go on to the end, and leave together with the message; nothing half-written stays."""
    output = (place / "output.txt").read_text()
    assert "the checkpoint of step 2 could not be written" in output
    assert "Training goes on" in output
    assert "error: the checkpoint of step 6 could not be written" in output
    assert "(rank 1: " in output
    assert sorted(losses(place / "full_disk")) == [1, 2, 3, 4, 5, 6]
    assert list((place / "full_disk" / "checkpoints").iterdir()) == []


@pytest.mark.long
def test_another_number_of_ranks_is_told_the_command(other_ranks: Path) -> None:
    """Where there is no universal form yet."""
    output = (other_ranks / "refused.txt").read_text()
    assert "was written by 2 ranks, and this run has 1" in output
    assert f"python launch/universal_checkpoint.py {checkpoint(other_ranks, 'zero1', 2)}" in output


@pytest.mark.long
def test_pickles_from_elsewhere_need_trust(other_ranks: Path) -> None:
    """Said before they are loaded; and DeepSpeed's own import nothing that would be warned of."""
    assert "outside the run folder, and holds pickles" in (other_ranks / "refused.txt").read_text()
    assert "can run any code: it" not in (other_ranks / "output.txt").read_text()
    pickles = [p for p in other_ranks.rglob("checkpoints/*/engine/**/*") if p.is_file()]
    assert {p.name for p in pickles} > {"fp32.pt", "mp_rank_00_model_states.pt"}
    assert [p for p in pickles if problem_of_pickle(p)] == []


@pytest.mark.long
def test_sigterm_saves_and_leaves_on_all_ranks(place: Path) -> None:
    """Sent to the whole process group, as schedulers do; then the run goes on from that very step."""
    shutil.rmtree(place / "stopped", ignore_errors=True)
    given = ["--config", str(place / "config.yaml"), "--training.steps", "2000", "--evaluation.interval", "0"]
    given += [
        "--run.dir",
        str(place / "stopped"),
        "--deepspeed",
        "ds_configs/zero2.json",
        "--checkpoint.interval",
        "1999",
    ]
    command = [*launcher(2), str(ROOT / "launch" / "train.py"), *given]
    run = subprocess.Popen(command, cwd=ROOT, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    metrics, limit = place / "stopped" / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < limit, "the run does not come on"
        assert run.poll() is None, "the run has ended by itself"
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    run.wait(timeout=300)
    status, limit = {"state": "running"}, time.monotonic() + 300
    while time.monotonic() < limit and status["state"] == "running":  # the ranks have 30 s more than their launcher
        status = json.loads((place / "stopped" / "status.json").read_text())
        time.sleep(0.1)
    assert status["state"] == "stopped", status
    assert (place / "stopped" / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:07d}"
    assert (place / "stopped" / "adapter" / "titans_memory.safetensors").is_file()
