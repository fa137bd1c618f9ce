"""Kill training runs with SIGKILL, resume them, and compare with a run that nobody killed.

    python tests/support/kill_and_resume.py FOLDER [--trials 20] [--kills 1] [--ranks 2] [--deepspeed FILE]

In every trial a run is killed `kills` times: at a random moment (from its start on), and every other time in the midst
of writing a checkpoint. Then it is resumed to its end. Losses, gates, evaluations and the adapter must be those of the
run that nobody killed, bit for bit. Ranks are forked from this process, which has imported everything once. Prints one
line per trial; leaves with 1 if one of them differs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import yaml

from launch import train
from tests.support.packed_corpora import random_repos, write_packed
from tests.support.tiny_models import tiny_base
from titans_ds.zero.ports import free_port

EXACT = ("loss", "grad_norm", "lr", "gate", "write_norm", "tokens", "skipped_steps", "losses", "minus_memory")
TIMEOUT = 300.0


def prepare(folder: Path, deepspeed: str | None, **memory: Any) -> None:
    """A corpus, a tiny hybrid base, and a configuration that saves often; of the default memory, or these settings."""
    write_packed(folder / "corpus", {"train": random_repos(10, 1), "validation": random_repos(5, 2, least=10)})
    tiny_base("qwen3_5").save_pretrained(folder / "base")
    config = {
        "model": {"base": str(folder / "base")},
        "data": {"corpus": str(folder / "corpus"), "num_lanes": 4},
        "graft": {"layers": "attention", "segment_tokens": 8, "memory": {"preset": "delta", "dim": 8, **memory}},
        "lora": {"rank": 2, "dropout": 0.1},  # dropout: random states matter
        "optimizer": {"lr": 1e-2, "warmup_steps": 4},
        "training": {"steps": 12, "window": 2},
        "evaluation": {"interval": 5, "repositories": 4, "group_size": 2},
        "checkpoint": {"interval": 2},
        "deepspeed": deepspeed,
        "run": {"trackers": []},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def start(folder: Path, name: str, ranks: int) -> list[int]:
    """Fork the ranks of one run; their process ids."""
    port = str(free_port())
    arguments = ["--config", str(folder / "config.yaml"), "--run.dir", str(folder / name), "--resume", "auto"]
    return [_fork(folder / f"{name}.log", arguments, rank, ranks, port) for rank in range(ranks)]


def _fork(log: Path, arguments: list[str], rank: int, ranks: int, port: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if ranks > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            os.environ.update({k: str(v) for k, v in place.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        code = train.main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill(pids: list[int], order: random.Random) -> bool:
    """SIGKILL all ranks, in a random order; whether one of them was still running."""
    killed = False
    for pid in order.sample(pids, len(pids)):
        runs = os.waitpid(pid, os.WNOHANG) == (0, 0)
        killed |= runs
        if runs:
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return killed


def wait_for_save(root: Path, pids: list[int], skip: int) -> bool:
    """Wait until a checkpoint is being written, `skip` of them later; false where the run ends before."""
    seen: set[str] = set()
    limit = time.monotonic() + TIMEOUT
    while time.monotonic() < limit:
        with contextlib.suppress(FileNotFoundError):  # the folder comes and goes while the run starts
            seen |= {p.name for p in root.glob(".step_*.part")}
        if len(seen) > skip:
            return True
        if os.waitpid(pids[0], os.WNOHANG) != (0, 0):
            return False
        time.sleep(0.0005)  # leave the processor to the run
    return False


def finish(pids: list[int]) -> bool:
    """Wait for the ranks; whether all left with 0."""
    return all([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 for pid in pids])


def result(run: Path) -> dict[str, Any]:
    """What must not differ: metrics by line without timings, and the adapter's bytes."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k in (*EXACT, "kind", "step")} for line in lines]
    weights = {p.name: p.read_bytes() for p in sorted((run / "adapter").glob("*.safetensors"))}
    return {"metrics": metrics, "weights": weights}


def trial(folder: Path, number: int, kills: int, ranks: int, seconds: float) -> tuple[str, int, int]:
    """Kill and resume one run; the run's name, how often it was killed, and how often of these while saving."""
    chance, name, killed, saving = random.Random(number), f"trial{number}", 0, 0
    while killed < kills:
        pids, while_saving = start(folder, name, ranks), (number + killed) % 2 == 1
        if while_saving:
            reached = wait_for_save(folder / name / "checkpoints", pids, chance.randrange(2))
            time.sleep(chance.random() * 0.01)
            saving += reached
        else:
            time.sleep(chance.random() * seconds)
        alive = kill(pids, chance) if not while_saving or reached else False
        killed += alive
        saving -= while_saving and reached and not alive
        if not alive:  # it had come to its end: once more from the beginning
            shutil.rmtree(folder / name)
    if not finish(start(folder, name, ranks)):
        print((folder / f"{name}.log").read_text()[-3000:], file=sys.stderr)
    return name, killed, saving


def main() -> int:
    """Run the trials; 0 if every one ended as the reference did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--deepspeed", default=None)
    options = parser.parse_args()
    if options.deepspeed:
        from titans_ds.zero.engine import import_deepspeed

        import_deepspeed()
    options.folder.mkdir(parents=True, exist_ok=True)
    prepare(options.folder, options.deepspeed)
    before = time.monotonic()
    assert finish(start(options.folder, "reference", options.ranks)), (options.folder / "reference.log").read_text()
    seconds, reference, same = time.monotonic() - before, result(options.folder / "reference"), 0
    for number in range(options.trials):
        name, killed, saving = trial(options.folder, number, options.kills, options.ranks, seconds)
        equal = result(options.folder / name) == reference
        same += equal
        verdict = "equal" if equal else "DIFFERENT"
        print(f"{name}: killed {killed} times, {saving} of them while saving: {verdict}", flush=True)
    print(
        f"{same} of {options.trials} trials equal the run that nobody killed ({len(reference['metrics'])} lines each)"
    )
    return 0 if same == options.trials else 1


if __name__ == "__main__":
    sys.exit(main())
