"""Repositories cut into segments: what one forward pass sees of a file.

A segment of T tokens starting at s has the inputs x[s : s + T] and the labels x[s + 1 : s + T + 1]: segments overlap by
one token, so that every token but a document's first is a target exactly once. A document's last token is no input.

Two layouts:
    files        a document is a file; a segment never holds tokens of two files
    repository   a document is a whole repository, its files joined in reading order, each led by a separator if the
                 tokenizer has one. For base pretraining without memory.

A segment that starts a repository starts its row's memory anew; one that starts a file does so where asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from titans_ds.training.data.packed import Integers, PackedSplit

Layout = Literal["files", "repository"]
Reset = Literal["repository", "file"]
IGNORED = -100  # the label of a position that is no target


@dataclass(frozen=True)
class Segment:
    """Inputs and labels (int64, equally long, at most segment_tokens) of one segment, and where it comes from."""

    inputs: Integers
    labels: Integers
    repo: int
    reset: bool


@dataclass(frozen=True)
class Batch:
    """Segments of several lanes, right-padded to one length.

    Args:
        input_ids: int64 [B, T]; 0 where padded.
        labels: int64 [B, T], already shifted; IGNORED where padded.
        mask: bool [B, T]; true where there is a token (which may be read, written and counted).
        reset: bool [B]; true where a row starts a repository, or a file where memories start anew at each.
        repos: int64 [B]; -1 where a row is empty.
    """

    input_ids: Integers
    labels: Integers
    mask: npt.NDArray[np.bool_]
    reset: npt.NDArray[np.bool_]
    repos: Integers

    @property
    def num_targets(self) -> int:
        """Target tokens in it."""
        return int((self.labels != IGNORED).sum())


@dataclass(frozen=True)
class Separators:
    """Special tokens that join a repository's files, where the tokenizer has them."""

    repo: int | None = None
    file: int | None = None


class RepositoryReader:
    """Gives the segments of a repository by number, without reading the rest of it.

    Args:
        split: where the tokens are.
        segment_tokens: T.
        layout: see the module's text.
        separators: for the layout `repository`.
        reset: where memories start anew: at every repository, or at every file (layout `files`).
    """

    def __init__(
        self,
        split: PackedSplit,
        segment_tokens: int,
        layout: Layout = "files",
        separators: Separators = Separators(),
        reset: Reset = "repository",
    ) -> None:
        self.split, self.segment_tokens, self.layout, self.separators = split, segment_tokens, layout, separators
        self.reset = reset
        lengths = np.maximum(split.file_length - 1, 0)
        self._file_segments: Integers = -(-lengths // segment_tokens)

    def num_segments(self, repo: int) -> int:
        """How many segments repository `repo` has; 0 where none of its files has two tokens."""
        if self.layout == "repository":
            return int(-(-max(self.num_tokens(repo) - 1, 0) // self.segment_tokens))
        return int(self._file_segments[self._files(repo)].sum())

    def num_carried(self, repo: int, limit: int) -> int:
        """How many of the first `limit` segments of a repository take a memory over from the segment before."""
        segments = min(self.num_segments(repo), limit)
        if self.reset == "repository":
            return max(segments - 1, 0)
        ends = np.cumsum(self._file_segments[self._files(repo)])
        starts = np.unique(np.concatenate([[0], ends]))  # a file of one token has no segment
        return segments - int((starts < segments).sum())

    def num_tokens(self, repo: int) -> int:
        """Tokens of a repository's documents, separators included."""
        files = self._files(repo)
        count = int(self.split.file_length[files].sum())
        if self.layout == "files":
            return count
        number = files.stop - files.start
        return int(count + (self.separators.repo is not None) + number * (self.separators.file is not None))

    def segment(self, repo: int, number: int) -> Segment:
        """Segment `number` of a repository."""
        if self.layout == "repository":
            return self._cut(self.document(repo), number, repo, number == 0)
        files = self._files(repo)
        ends = np.cumsum(self._file_segments[files])
        position = int(np.searchsorted(ends, number, side="right"))
        before = int(ends[position - 1]) if position else 0
        reset = number == before if self.reset == "file" else number == 0
        return self._cut(self.split.file(files.start + position), number - before, repo, reset)

    def document(self, repo: int) -> Integers:
        """A whole repository as one document (layout `repository`)."""
        parts = [] if self.separators.repo is None else [np.array([self.separators.repo])]
        for index in range(self._files(repo).start, self._files(repo).stop):
            if self.separators.file is not None:
                parts.append(np.array([self.separators.file]))
            parts.append(self.split.file(index).astype(np.int64))
        return np.concatenate(parts).astype(np.int64)

    def _files(self, repo: int) -> slice:
        return slice(int(self.split.repo_files[repo]), int(self.split.repo_files[repo + 1]))

    def _cut(self, document: npt.NDArray[np.generic], number: int, repo: int, reset: bool) -> Segment:
        start = number * self.segment_tokens
        piece = document[start : start + self.segment_tokens + 1].astype(np.int64)
        return Segment(piece[:-1], piece[1:], repo, reset)


def collate(segments: list[Segment | None], length: int) -> Batch:
    """Rows of one batch, right-padded to `length`; None gives an empty row."""
    rows = len(segments)
    input_ids = np.zeros((rows, length), dtype=np.int64)
    labels = np.full((rows, length), IGNORED, dtype=np.int64)
    reset, repos = np.zeros(rows, dtype=np.bool_), np.full(rows, -1, dtype=np.int64)
    for row, segment in enumerate(segments):
        if segment is not None:
            input_ids[row, : len(segment.inputs)] = segment.inputs
            labels[row, : len(segment.labels)] = segment.labels
            reset[row], repos[row] = segment.reset, segment.repo
    return Batch(input_ids, labels, labels != IGNORED, reset, repos)
