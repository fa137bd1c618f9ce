"""Lanes: endless streams of segments, one per row of the batch, the same whatever the number of ranks.

The number of lanes is global and fixed. Every rank follows all of them (a lane's position is two integers) and
materialises the rows of its own: rank r of w owns the lanes [r L / w, (r + 1) L / w). So every rank knows the number of
target tokens of the whole batch without asking the others, and the complete data position is on every rank.

Epoch e visits all repositories in an order drawn from (seed, e); lane l takes every L-th of this endless sequence, from
the l-th on. Reset marks stand at a repository's first segment, or at every file's where the reader says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from titans_ds.errors import ConfigError, DataError
from titans_ds.training.data.packed import Integers
from titans_ds.training.data.segments import Batch, RepositoryReader, Segment, collate

_LENGTHS_PER_SEGMENT = 8  # a batch is cut to its longest row, rounded up to one of this many lengths


@dataclass(frozen=True)
class Step:
    """One batch of this rank's lanes, and what it is part of.

    Args:
        batch: rows of this rank's lanes.
        total_targets: target tokens of all lanes.
    """

    batch: Batch
    total_targets: int


class Visits:
    """The endless sequence of repositories: visit n is repository order[n % R] of epoch n // R."""

    def __init__(self, repos: list[int], seed: int) -> None:
        self._repos, self._seed = np.array(repos, dtype=np.int64), seed
        self._orders: dict[int, Integers] = {}

    def repo(self, visit: int) -> int:
        """The index of the repository that a visit reads."""
        epoch, place = divmod(visit, len(self._repos))
        if epoch not in self._orders:
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 2}  # lanes drift apart a little
            self._orders[epoch] = np.random.default_rng([self._seed, epoch]).permutation(self._repos)
        return int(self._orders[epoch][place])


class Lane(Protocol):
    """One endless stream of segments, with a position of two integers."""

    position: tuple[int, int]

    def length(self) -> int:
        """Tokens of the next segment."""

    def read(self) -> Segment:
        """The next segment."""

    def advance(self) -> None:
        """Go on to the segment after it."""


class FileLane:
    """Layout `files`: position = (visit, segment of its repository)."""

    def __init__(self, reader: RepositoryReader, visits: Visits, number: int, num_lanes: int) -> None:
        self._reader, self._visits, self._stride = reader, visits, num_lanes
        self.position = (number, 0)

    def length(self) -> int:
        """Tokens of the next segment."""
        return len(self.read().inputs)

    def read(self) -> Segment:
        """The next segment."""
        visit, segment = self.position
        return self._reader.segment(self._visits.repo(visit), segment)

    def advance(self) -> None:
        """Go on to the segment after it, of this repository or the next."""
        visit, segment = self.position
        if segment + 1 < self._reader.num_segments(self._visits.repo(visit)):
            self.position = (visit, segment + 1)
        else:
            self.position = (visit + self._stride, 0)


class PackedLane:
    """Layout `repository`: full segments across repositories; position = (visit, token in its document)."""

    def __init__(self, reader: RepositoryReader, visits: Visits, number: int, num_lanes: int) -> None:
        self._reader, self._visits, self._stride = reader, visits, num_lanes
        self.position = (number, 0)
        self._document = lru_cache(maxsize=2)(reader.document)  # thousands of segments come from one document

    def length(self) -> int:
        """Tokens of the next segment: always full."""
        return self._reader.segment_tokens

    def read(self) -> Segment:
        """The next segment_tokens + 1 tokens, across the ends of repositories."""
        visit, offset = self.position
        first, parts, missing = self._visits.repo(visit), [], self._reader.segment_tokens + 1
        while missing > 0:
            part = self._document(self._visits.repo(visit))[offset : offset + missing]
            parts.append(part)
            visit, offset, missing = visit + self._stride, 0, missing - len(part)
        tokens = np.concatenate(parts)
        return Segment(tokens[:-1], tokens[1:], first, self.position[1] == 0)

    def advance(self) -> None:
        """Go on by segment_tokens tokens."""
        visit, offset = self.position
        offset += self._reader.segment_tokens
        while offset >= (tokens := self._reader.num_tokens(self._visits.repo(visit))):
            visit, offset = visit + self._stride, offset - tokens
        self.position = (visit, offset)


class Lanes:
    """All lanes, and the rows of this rank.

    Args:
        reader: cuts repositories into segments.
        num_lanes: L, over all ranks.
        rank: of this process.
        world_size: number of ranks; must divide L.
        seed: of the order of repositories.

    Raises:
        ConfigError: L is not divisible by the number of ranks.
        DataError: no repository has a segment.
    """

    def __init__(self, reader: RepositoryReader, num_lanes: int, rank: int, world_size: int, seed: int) -> None:
        check_divisible(num_lanes, world_size)
        repos = [r for r in range(reader.split.num_repos) if reader.num_segments(r) > 0]
        if not repos:
            raise DataError(f"no file of split {reader.split.name!r} has two tokens; there is nothing to train on")
        self.reader, self.num_lanes = reader, num_lanes
        self.owned = slice(rank * num_lanes // world_size, (rank + 1) * num_lanes // world_size)
        kind = PackedLane if reader.layout == "repository" else FileLane
        visits = Visits(repos, seed)
        self._lanes: list[Lane] = [kind(reader, visits, number, num_lanes) for number in range(num_lanes)]

    def next(self) -> Step:
        """This rank's rows of the next batch; every lane goes on by one segment."""
        lengths = [lane.length() for lane in self._lanes]
        rows: list[Segment | None] = [lane.read() for lane in self._lanes[self.owned]]
        for lane in self._lanes:
            lane.advance()
        return Step(collate(rows, _round_up(max(lengths), self.reader.segment_tokens)), sum(lengths))

    def state_dict(self) -> dict[str, Any]:
        """The data position of all lanes: plain numbers, the same on every rank."""
        return {"num_lanes": self.num_lanes, "positions": [list(lane.position) for lane in self._lanes]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`, made with any number of ranks. Raises ConfigError for another number of lanes."""
        if state["num_lanes"] != self.num_lanes:
            raise ConfigError(
                f"the checkpoint has {state['num_lanes']} lanes, data.num_lanes is {self.num_lanes}; they must be equal"
            )
        for lane, (visit, offset) in zip(self._lanes, state["positions"], strict=True):
            lane.position = (int(visit), int(offset))


def check_divisible(num_lanes: int, world_size: int) -> None:
    """Raise ConfigError where the lanes can't be dealt out evenly."""
    if num_lanes % world_size:
        near = max(num_lanes // world_size, 1) * world_size
        raise ConfigError(
            f"data.num_lanes is {num_lanes}, which {world_size} ranks can't share evenly; use a multiple of "
            f"{world_size}, such as {near} or {near + world_size}"
        )


def _round_up(length: int, segment_tokens: int) -> int:
    step = max(segment_tokens // _LENGTHS_PER_SEGMENT, 1)
    return min(-(-length // step) * step, segment_tokens)
