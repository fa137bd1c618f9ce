"""What only whole runs show about several ranks on this machine's GPUs: checkpoints that other numbers go on from.

    python -m benchmarks.rank_checks --corpus PACKED --work DIR --out checks.json

Short runs of the shipped base with a memory: a checkpoint of two ranks that one goes on from, and the other way round;
and a rank that freezes, which the other notices. `make test` checks the same over gloo. Losses of several ranks, and
their speed, are benchmarks.ranks'. PACKED is a corpus in the base's tokens (data_prep.pack_corpus).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from benchmarks.program import kill_tree, new_report, save, table
from launch.stages.demo import SHIPPED, launcher
from titans_ds.program import program
from titans_ds.training.data.packed import open_corpus

ROOT = Path(__file__).resolve().parent.parent
HALF, STEPS = 6, 12
HEARTBEAT = 10  # seconds
SETTINGS: dict[str, Any] = {
    "model": {"base": str(SHIPPED)},
    "data": {"num_lanes": 4},
    "graft": {"layers": [11], "segment_tokens": 256, "memory": {"preset": "delta", "dim": 256}},
    "training": {"steps": STEPS, "window": 2},
    "optimizer": {"warmup_steps": 2},
    "evaluation": {"interval": 0},
    "checkpoint": {"interval": HALF, "keep": 9},
    "deepspeed": "ds_configs/zero2.json",
    "run": {"trackers": []},
}


class CheckError(Exception):
    """What a check found wrong."""


@program("--out has the checks that were made")
def main(argv: list[str]) -> int:
    """Run the program; returns its exit code, 1 where a check fails."""
    report = measure(_options(argv), argv)
    rows = ([name, row["verdict"], row["found"], str(row["seconds"])] for name, row in report["rows"].items())
    print(f"{report['gpus']} x {report['device']}\n\n{table(('check', '', 'found', 'seconds'), rows)}")
    return int(any(row["verdict"] != "good" for row in report["rows"].values()))


def measure(options: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """All checks, one after the other. Raises TitansError where the corpus is none."""
    open_corpus(options.corpus)
    options.work.mkdir(parents=True, exist_ok=True)
    config = options.work / "config.yaml"
    data = {**SETTINGS["data"], "corpus": str(options.corpus.resolve())}
    config.write_text(yaml.safe_dump({**SETTINGS, "data": data}))
    checks = Checks(options.work.resolve(), config.resolve(), options.zero)
    report = new_report("rank_checks", argv, torch.device("cuda" if torch.cuda.is_available() else "cpu"), options.out)
    for name in options.checks:
        start = time.perf_counter()
        try:
            found, verdict = CHECKS[name](checks), "good"
        except CheckError as error:
            found, verdict = str(error), "WRONG"
        seconds = round(time.perf_counter() - start, 1)
        report["rows"][name] = {"verdict": verdict, "found": found, "seconds": seconds}
        print(name, report["rows"][name], file=sys.stderr, flush=True)
        save(report, options.out)
    return report


class Checks:
    """The checks, each of which returns what it found, or raises CheckError.

    Args:
        work: folder of everything made.
        config: of the runs.
        stages: ZeRO stages to resume at.
    """

    def __init__(self, work: Path, config: Path, stages: list[int]) -> None:
        self.work, self.config, self.stages = work, config, stages

    def two_to_one(self) -> str:
        """One rank goes on from a checkpoint of two."""
        return self._resume(2, 1)

    def one_to_two(self) -> str:
        """Two ranks go on from a checkpoint of one."""
        return self._resume(1, 2)

    def frozen_rank(self) -> str:
        """Rank 1 is stopped in its tracks: the other says so and ends, within a minute."""
        run_dir = self._fresh("frozen")
        arguments = self._arguments(run_dir, 2, ["--training.steps", "100000", "--checkpoint.interval", "0"])
        variables = {**os.environ, "TITANS_HEARTBEAT_SECONDS": str(HEARTBEAT)}
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [*launcher(2), *arguments], cwd=ROOT, env=variables, stdout=pipe, stderr=pipe, text=True
        )
        try:
            _wait(lambda: len(self._losses(run_dir)) >= 4, process)
            victim = _rank(process, 1)
            victim.send_signal(signal.SIGSTOP)
            start = time.perf_counter()
            _, err = process.communicate(timeout=120)
            seconds = time.perf_counter() - start
        except subprocess.TimeoutExpired as error:
            raise CheckError("the others were still waiting after 120 s") from error
        finally:
            kill_tree(process.pid)
            process.wait()
        if "no sign of life" not in err or process.returncode == 0:
            raise CheckError(f"exit code {process.returncode}, and no word of a lost rank: {err.strip()[-200:]}")
        if seconds > 60:
            raise CheckError(f"it took {seconds:.0f} s")
        return f"the launcher ended after {seconds:.0f} s (limit {HEARTBEAT} s of silence)"

    def _resume(self, before: int, after: int) -> str:
        found = []
        for stage in self.stages:
            whole = self._losses(self._train(f"whole{stage}-{after}", after, stage))
            first = self._train(f"first{stage}-{before}", before, stage)
            mark = f"step_{HALF:07d}"
            self._call([sys.executable, "launch/universal_checkpoint.py", f"{first}/checkpoints/{mark}"])
            resume = ["--run.resume", f"{first}/checkpoints/{mark}.universal", "--run.trust_checkpoint", "true"]
            losses = self._losses(self._train(f"on{stage}-{before}-{after}", after, stage, resume))
            found.append(f"ZeRO-{stage}: {_compare(whole, losses, STEPS - HALF)}")
        return "; ".join(found)

    def _train(self, name: str, count: int, stage: int, more: list[str] | None = None) -> str:
        run_dir = self._fresh(name)
        self._call([*launcher(count), *self._arguments(run_dir, stage, more or [])])
        return run_dir

    def _arguments(self, run_dir: str, stage: int, more: list[str]) -> list[str]:
        given = ["--config", str(self.config), "--run.dir", run_dir, "--deepspeed", f"ds_configs/zero{stage}.json"]
        return ["launch/train.py", *given, *more]

    def _losses(self, run_dir: str) -> dict[int, float]:
        path = Path(run_dir) / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return {line["step"]: line["loss"] for line in lines if "loss" in line}

    def _fresh(self, name: str) -> str:
        number = sum(1 for _ in self.work.glob(f"{name}.*"))
        return str(self.work / f"{name}.{number}")

    def _call(self, command: list[str]) -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip())[-300:]
            raise CheckError(f"exit code {done.returncode} of {' '.join(command[:6])} …: {said}")
        return done.stdout


CHECKS: dict[str, Callable[[Checks], str]] = {
    "two_to_one": Checks.two_to_one,
    "one_to_two": Checks.one_to_two,
    "frozen_rank": Checks.frozen_rank,
}


def _compare(wanted: dict[int, float], found: dict[int, float], steps: int) -> str:
    both = sorted(wanted.keys() & found.keys())
    if len(both) < steps:
        raise CheckError(f"{len(both)} steps to compare; expected {steps}")
    off = max(abs(found[step] - wanted[step]) / abs(wanted[step]) for step in both)
    if off > 1e-4:
        raise CheckError(f"losses differ by up to {off:.1e}")
    return f"losses within {off:.1e} of one another, {len(both)} steps"


def _wait(ready: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 180) -> None:
    limit = time.monotonic() + seconds
    while not ready():
        if process.poll() is not None or time.monotonic() > limit:
            raise CheckError("the run did not come to its fourth step")
        time.sleep(0.2)


def _rank(process: subprocess.Popen[str], number: int) -> psutil.Process:
    """The process of one rank."""
    children = psutil.Process(process.pid).children(recursive=True)
    return next(p for p in children if f"--local_rank={number}" in p.cmdline())


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="a corpus packed with the shipped base's tokenizer")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--zero", type=int, nargs="+", default=[1, 2, 3], help="stages to resume at (default: 1 2 3)")
    parser.add_argument("--checks", nargs="+", choices=list(CHECKS), default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--out", type=Path, help="write the report as JSON after every check")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
