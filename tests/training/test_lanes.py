"""Lanes: the same stream whatever the number of ranks, and every token but a file's first a target exactly once."""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.packed_corpora import write_packed
from titans_ds.errors import ConfigError, DataError
from titans_ds.training.data.lanes import Lanes
from titans_ds.training.data.packed import PackedSplit, open_corpus
from titans_ds.training.data.segments import IGNORED, Layout, RepositoryReader, Separators

REPOS = st.lists(st.lists(st.integers(0, 23), min_size=1, max_size=4), min_size=1, max_size=6)


def corpus_of(lengths: list[list[int]]) -> PackedSplit:
    """Repositories of files of these lengths; every token is its own number, so that it can be recognised."""
    counter = iter(range(3, 60_000))
    repos = [[[next(counter) for _ in range(length)] for length in files] for files in lengths]
    folder = write_packed(Path(tempfile.mkdtemp()), {"train": repos}, vocab_size=60_000)
    return open_corpus(folder).split("train")


def lanes_of(
    split: PackedSplit, segment: int, num_lanes: int, rank: int = 0, world: int = 1, layout: Layout = "files"
) -> Lanes:
    """Lanes of one rank."""
    return Lanes(RepositoryReader(split, segment, layout), num_lanes, rank, world, seed=7)


def has_targets(lengths: list[list[int]]) -> bool:
    """Whether there is anything to train on."""
    return any(length >= 2 for files in lengths for length in files)


@settings(max_examples=60, deadline=None)
@given(REPOS.filter(has_targets), st.integers(2, 9), st.sampled_from([(4, 2), (6, 3), (4, 4)]))
def test_same_stream_whatever_the_number_of_ranks(
    lengths: list[list[int]], segment: int, shape: tuple[int, int]
) -> None:
    """The ranks' rows put together are the one rank's rows, and all ranks know the same number of targets."""
    (num_lanes, world), split = shape, corpus_of(lengths)
    alone = lanes_of(split, segment, num_lanes)
    together = [lanes_of(split, segment, num_lanes, rank, world) for rank in range(world)]
    for _ in range(12):
        whole, parts = alone.next(), [lanes.next() for lanes in together]
        for name in ("input_ids", "labels", "mask", "reset", "repos"):
            joined = np.concatenate([getattr(part.batch, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole.batch, name))
        assert {part.total_targets for part in parts} == {whole.total_targets} == {whole.batch.num_targets}
    assert all(lanes.state_dict() == alone.state_dict() for lanes in together)


@settings(max_examples=60, deadline=None)
@given(REPOS.filter(has_targets), st.integers(2, 9))
def test_every_token_but_a_files_first_is_a_target_once(lengths: list[list[int]], segment: int) -> None:
    """One lane, one epoch: targets are exactly the tokens that have one before them in their file, each after it."""
    split = corpus_of(lengths)
    lanes, targets = lanes_of(split, segment, num_lanes=1), Counter()
    files = [split.file(i).tolist() for i in range(len(split.file_length))]
    before = {b: a for file in files for a, b in itertools.pairwise(file)}
    for _ in range(sum(-(-max(len(file) - 1, 0) // segment) for file in files)):
        batch = lanes.next().batch
        kept = batch.mask[0]
        assert (batch.labels[0] == IGNORED).tolist() == (~kept).tolist()
        for token, label in zip(batch.input_ids[0][kept].tolist(), batch.labels[0][kept].tolist(), strict=True):
            assert before[label] == token
            targets[label] += 1
    assert targets == Counter(dict.fromkeys(before, 1))


@settings(max_examples=40, deadline=None)
@given(REPOS.filter(has_targets), st.integers(2, 9), st.integers(1, 5))
def test_resets_mark_the_first_segment_of_a_repository(lengths: list[list[int]], segment: int, num_lanes: int) -> None:
    """A row resets where its lane goes to the next repository, and only there; padding is on the right."""
    split = corpus_of(lengths)
    lanes, reader = lanes_of(split, segment, num_lanes), RepositoryReader(split, segment)
    left = [0] * num_lanes
    for _ in range(15):
        batch = lanes.next().batch
        for row in range(num_lanes):
            assert bool(batch.reset[row]) == (left[row] == 0)
            left[row] = (left[row] or reader.num_segments(int(batch.repos[row]))) - 1
            assert not np.diff(batch.mask[row].astype(int)).max(initial=0) > 0
            assert batch.mask[row].any()


@settings(max_examples=40, deadline=None)
@given(REPOS.filter(has_targets), st.integers(2, 9), st.integers(1, 5))
def test_resets_at_files_mark_every_files_first_segment(lengths: list[list[int]], segment: int, num_lanes: int) -> None:
    """Nothing but the marks differs from resets at repositories; a row resets exactly where a file's first token is."""
    split = corpus_of(lengths)
    reader = RepositoryReader(split, segment, reset="file")
    lanes, others = Lanes(reader, num_lanes, 0, 1, seed=7), lanes_of(split, segment, num_lanes)
    firsts = {int(split.file(i)[0]) for i in range(len(split.file_length)) if split.file_length[i]}
    for _ in range(15):
        batch, other = lanes.next().batch, others.next().batch
        np.testing.assert_array_equal(batch.labels, other.labels)
        assert batch.reset.tolist() == [int(token) in firsts for token in batch.input_ids[:, 0]]
        assert (batch.reset | ~other.reset).all()
    for repo in range(split.num_repos):
        for limit in (1, 3, 100):
            number = min(limit, reader.num_segments(repo))
            carried = sum(not reader.segment(repo, n).reset for n in range(number))
            assert reader.num_carried(repo, limit) == carried


@settings(max_examples=40, deadline=None)
@given(
    REPOS.filter(has_targets),
    st.integers(2, 9),
    st.integers(1, 3),
    st.integers(0, 20),
    st.sampled_from(["files", "repository"]),
)
def test_a_lanes_position_resumes_exactly(
    lengths: list[list[int]], segment: int, num_lanes: int, after: int, layout: Layout
) -> None:
    """Lanes made anew and given the position go on with the same batches."""
    split = corpus_of(lengths)
    lanes = lanes_of(split, segment, num_lanes, layout=layout)
    for _ in range(after):
        lanes.next()
    resumed = lanes_of(split, segment, num_lanes, layout=layout)
    resumed.load_state_dict(lanes.state_dict())
    for _ in range(5):
        np.testing.assert_array_equal(lanes.next().batch.labels, resumed.next().batch.labels)


@settings(max_examples=40, deadline=None)
@given(REPOS.filter(has_targets), st.integers(2, 9))
def test_repository_layout_fills_every_segment(lengths: list[list[int]], segment: int) -> None:
    """No padding; the segments joined are the repositories' documents joined, separators in front of repo and file."""
    split = corpus_of(lengths)
    reader = RepositoryReader(split, segment, "repository", Separators(repo=0, file=1))
    lanes = Lanes(reader, 1, 0, 1, seed=7)
    stream: list[int] = []
    for _ in range(10):
        batch = lanes.next().batch
        assert batch.mask.all()
        assert batch.input_ids.shape == (1, segment)
        np.testing.assert_array_equal(batch.input_ids[0, 1:], batch.labels[0, :-1])
        stream += batch.input_ids[0].tolist()
    files = {tuple(split.file(i).tolist()) for i in range(len(split.file_length))}
    assert stream[:2] == [0, 1]
    pieces, current = [], []
    for token in stream:
        if token in (0, 1):
            pieces.append(tuple(current))
            current = []
        else:
            current.append(token)
    assert {piece for piece in pieces if piece} <= files


def test_epochs_are_shuffled_anew_and_visit_every_repository_once() -> None:
    """Two epochs over 20 repositories: each visited twice, in two orders."""
    split = corpus_of([[4]] * 20)
    lanes = lanes_of(split, 8, num_lanes=2)
    visits = [int(r) for _ in range(20) for r in lanes.next().batch.repos]
    assert sorted(visits[:20]) == sorted(visits[20:]) == list(range(20))
    assert visits[:20] != visits[20:]


def test_lanes_that_ranks_cannot_share_are_refused() -> None:
    """The message names counts that work."""
    with pytest.raises(ConfigError, match=r"data.num_lanes is 5, which 2 ranks can't share evenly.* such as 4 or 6"):
        lanes_of(corpus_of([[4]]), 8, num_lanes=5, world=2)


def test_another_number_of_lanes_is_refused_at_resume() -> None:
    """A position belongs to its number of lanes."""
    split = corpus_of([[4], [5]])
    with pytest.raises(ConfigError, match=r"the checkpoint has 2 lanes, data.num_lanes is 3"):
        lanes_of(split, 8, num_lanes=3).load_state_dict(lanes_of(split, 8, num_lanes=2).state_dict())


def test_a_corpus_without_targets_is_refused() -> None:
    """Files of one token have nothing to predict."""
    with pytest.raises(DataError, match="no file of split 'train' has two tokens"):
        lanes_of(corpus_of([[1], [0]]), 8, num_lanes=1)
