"""Who may run what: numbered claims in a shared folder, without a server and without clocks that agree.

    0001.claim.json   made once, by whoever gets the number: its owner
    0001.beat.json    a counter that the owner raises while it is at work
    0001.end.json     made once, by whoever comes first: the owner, when it is done, or another who found it dead

The next claim can be made when the one before has its end. Nothing is ever deleted or changed back, so a process that
was asleep can't mistake an old claim for its own: an owner that finds somebody else's end has lost, and kills what it
runs. An owner that can't write its beat for half of the lease kills what it runs, too; others take a claim over
when they have seen no beat for a whole lease, by their own clock.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.sweeping import files
from launch.sweeping.processes import Identity

LOST = "lost"


@dataclass(frozen=True)
class Claim:
    """One number and its owner.

    Args:
        number: from 1.
        owner: the process that made it.
        lease: seconds without a beat after which others take it for dead.
        details: what the owner wrote beside.
    """

    number: int
    owner: Identity
    lease: float
    details: dict[str, Any]


@dataclass
class Claims:
    """All claims on one thing. Each process has its own view.

    Args:
        folder: theirs alone.
    """

    folder: Path
    _seen: dict[int, tuple[Any, float]] = field(default_factory=dict)

    def numbers(self) -> list[int]:
        """Of all claims, ended or not."""
        if not self.folder.is_dir():
            return []
        return sorted(int(p.name.split(".")[0]) for p in self.folder.iterdir() if p.name.endswith(".claim.json"))

    def read(self, number: int) -> Claim | None:
        """A claim; None where it can't be read."""
        values = files.read(self._path(number, "claim"))
        if values is None:
            return None
        return Claim(number, Identity.read(values["owner"]), float(values["lease"]), values["details"])

    def take(self, number: int, owner: Identity, lease: float, details: dict[str, Any]) -> bool:
        """Try to be the owner of a number."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"owner": dataclasses.asdict(owner), "lease": lease, "at": time.time(), "details": details}
        return files.publish_once(self._path(number, "claim"), content)

    def beat(self, number: int, count: int, keeper: Identity) -> None:
        """Say that the owner is at work. OSError where that can't be written."""
        content = {"count": count, "keeper": dataclasses.asdict(keeper), "at": time.time()}
        files.overwrite(self._path(number, "beat"), content)

    def last_beat(self, number: int) -> dict[str, Any] | None:
        """What the owner wrote last."""
        return files.read(self._path(number, "beat"))

    def end(self, number: int, content: dict[str, Any]) -> bool:
        """Say how it ended, if nobody has: whether this process was first."""
        return files.publish_once(self._path(number, "end"), {"at": time.time(), **content})

    def ended(self, number: int) -> dict[str, Any] | None:
        """How it ended; None where it has not."""
        return files.read(self._path(number, "end"))

    def lost(self, number: int) -> bool:
        """Whether somebody has declared the owner dead."""
        ended = self.ended(number)
        return ended is not None and ended["state"] == LOST

    def is_dead(self, claim: Claim) -> bool:
        """Whether the owner is gone for certain, on this machine, or has been silent for its whole lease."""
        beat = self.last_beat(claim.number)
        keeper = Identity.read(beat["keeper"]) if beat else None
        if claim.owner.here and not claim.owner.alive and not (keeper and keeper.here and keeper.alive):
            return True
        return self._silent(claim, beat["count"] if beat else 0)

    def _silent(self, claim: Claim, count: int) -> bool:
        now = time.monotonic()
        before = self._seen.get(claim.number)
        if before is None or before[0] != count:
            self._seen[claim.number] = (count, now)
            return False
        return now - before[1] > claim.lease

    def _path(self, number: int, kind: str) -> Path:
        return self.folder / f"{number:04d}.{kind}.json"
