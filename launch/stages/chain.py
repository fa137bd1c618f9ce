"""A chain of commands that can be stopped and repeated: what is done is skipped, what changed is done again.

Each stage is one command with one product. After it has succeeded a stamp is written that holds a hash of the command,
of the files it reads its settings from, and of all stages before it; a stage with a fitting stamp and its product in
place is skipped. One that was stopped goes on where its command can do that; otherwise it starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import TypedDict

from titans_ds.errors import DataError, TitansError
from titans_ds.files import Kind, write_json
from titans_ds.reading import read_json, strict_record

CHAIN = Kind("products of a chain of commands", "stamps")


class StageError(TitansError):
    """A command of the chain failed; its own message stands above."""


@strict_record
class _Stamp(TypedDict):
    fingerprint: str


@dataclass(frozen=True)
class Stage:
    """One command.

    Args:
        title: what it does, in a few words.
        program: what runs it: an interpreter or a launcher, with its own options. Another one makes the same product.
        arguments: what it does.
        product: folder or file that it makes. Removed before it runs, so it must be the chain's own.
        settings: files among the arguments whose change makes another product.
        environment: variables of this command alone, which change no product.
        speed: arguments that change how fast it runs, and no product.
        resume: arguments with which the command goes on with a product that it has begun; none where it cannot.
    """

    title: str
    program: Sequence[str]
    arguments: Sequence[str]
    product: Path
    settings: Sequence[Path] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    speed: Sequence[str] = ()
    resume: Sequence[str] = ()

    @property
    def command(self) -> list[str]:
        """As it is run."""
        return [*self.program, *self.arguments, *self.speed]


def run_stages(
    stages: Sequence[Stage], stamps: Path, cwd: Path, environment: dict[str, str], say: Callable[[str], None]
) -> list[Stage]:
    """Run what is not done yet; returns the stages that ran.

    Args:
        stages: in order; each may use the products of those before.
        stamps: folder of the stamps.
        cwd: where the commands run.
        environment: added to this process's.
        say: takes one line of progress.

    Raises:
        StageError: a command failed. The stages before it stay done.
    """
    ran, before = [], ""
    for number, stage in enumerate(stages, start=1):
        before = _fingerprint(before, stage)
        stamp = stamps / f"{stage.product.name}.json"
        if _is_done(stamp, before, stage.product):
            say(f"[{number}/{len(stages)}] {stage.title}: done already")
            continue
        say(f"[{number}/{len(stages)}] {stage.title} …")
        # A product inside another one comes and goes with that.
        if not any(other.product in stage.product.parents for other in stages):
            _check_own(stamp, stage.product)
        seconds = _run(stage, stamp, before, cwd, environment)
        _write_stamp(stamp, stage, {"fingerprint": before, "seconds": round(seconds, 1)})
        ran.append(stage)
        say(f"[{number}/{len(stages)}] {stage.title}: {seconds:.0f} s")
    return ran


def _fingerprint(before: str, stage: Stage) -> str:
    texts = [path.read_text() for path in stage.settings]
    return hashlib.sha256(json.dumps([before, list(stage.arguments), texts]).encode()).hexdigest()


def _is_done(stamp: Path, fingerprint: str, product: Path) -> bool:
    if not (stamp.is_file() and product.exists()):
        return False
    try:
        return bool(read_json(stamp, _Stamp)["fingerprint"] == fingerprint)
    except DataError:
        return False


def _run(stage: Stage, stamp: Path, fingerprint: str, cwd: Path, environment: dict[str, str]) -> float:
    begun = stamp.with_suffix(".begun")
    goes_on = bool(stage.resume) and _is_done(begun, fingerprint, stage.product)
    if not goes_on:
        _write_stamp(begun, stage, {"fingerprint": fingerprint})
        _remove(stage.product)
    stamp.unlink(missing_ok=True)
    start = time.perf_counter()
    variables = {**os.environ, **environment, **stage.environment}
    command = [*stage.command, *stage.resume] if goes_on else stage.command
    done = subprocess.run(command, cwd=cwd, env=variables, check=False)
    if done.returncode or not stage.product.exists():
        raise StageError(
            f"{stage.title}: the command ended with exit code {done.returncode} (its own message stands above):\n  "
            + " ".join(command)
        )
    begun.unlink()
    return time.perf_counter() - start


def _check_own(stamp: Path, product: Path) -> None:
    """Nothing is removed that no stamp names, such as a folder of the user's by the same name."""
    if product.exists() and not (stamp.exists() or stamp.with_suffix(".begun").exists()):
        raise StageError(f"{product} is there already, and was not made by this program. Give another --out.")


def _remove(product: Path) -> None:
    if product.is_dir():
        shutil.rmtree(product)
    else:
        product.unlink(missing_ok=True)


def _write_stamp(stamp: Path, stage: Stage, values: Mapping[str, object]) -> None:
    write_json(stamp, {**values, "command": stage.command})
