"""The corpus build on generated repositories (hypothesis), in shards, stopped and resumed, and its near-duplicates."""

from __future__ import annotations

import itertools
import json
import random
import string
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.corpus import scan
from data_prep.corpus.build import build, build_shard
from data_prep.corpus.imports import ImportResolver, scan_imports
from data_prep.corpus.publish import choose_repositories
from data_prep.corpus.reading_order import depth_key, order_by_imports
from data_prep.errors import DataPrepError
from data_prep.settings import CorpusSettings
from data_prep.sources import StarCoderData
from data_prep.splits import SPLITS, split_of
from titans_ds.files import unfinished

WORDS = [a + b + c for a in "bdfg" for b in "aeiou" for c in "klmnr"]
NO_SPLIT = {"split_ratios": (1.0, 0.0, 0.0)}


def write_starcoderdata(folder: Path, rows: list[dict[str, Any]], num_files: int = 2) -> Path:
    folder.mkdir(parents=True)
    names = ("max_stars_repo_path", "max_stars_repo_name", "max_stars_count", "id", "content")
    kinds = (pa.string(), pa.string(), pa.int64(), pa.string(), pa.string())
    for number in range(num_files):
        part = rows[number::num_files]
        columns = [
            pa.array([row.get(name) for row in part], type=kind) for name, kind in zip(names, kinds, strict=True)
        ]
        pq.write_table(pa.table(columns, names=names), folder / f"part-{number}.parquet", row_group_size=7)
    return folder


def row(repo: str, path: str, content: str, stars: int | None = 10) -> dict[str, Any]:
    return {"max_stars_repo_name": repo, "max_stars_repo_path": path, "max_stars_count": stars, "content": content}


def body(seed: int) -> str:
    """Code that no other seed's is a near-duplicate of."""
    words = [WORDS[(seed * 7919 + i * i * 31 + i) % len(WORDS)] + str((seed * 13 + i) % 97) for i in range(40)]
    return "\n".join(f"{word} = {word!r}" for word in words) + "\n"


def repository(repo: str, seed: int, num_files: int = 4, stars: int | None = 10) -> list[dict[str, Any]]:
    """A repository whose file i imports file i + 1."""
    return [
        row(repo, f"pkg/m{i}.py", f"from pkg import m{i + 1}\n" + body(seed * 100 + i), stars) for i in range(num_files)
    ]


def read_corpus(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [r for path in sorted(folder.glob(f"{split}-*.parquet")) for r in pq.read_table(path).to_pylist()]
        for split in SPLITS
    }


@st.composite
def _repositories(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 8))):
        stars = draw(st.sampled_from([None, 3, 5, 900]))
        num_files = draw(st.integers(1, 6))
        folders = [draw(st.sampled_from(["", "a/", "a/b/"])) for _ in range(num_files)]
        paths = [f"{folder}f{i}.py" for i, folder in enumerate(folders)]
        for path in paths:
            target = draw(st.integers(0, num_files - 1))
            module = paths[target].removesuffix(".py").replace("/", ".")
            text = f"import {module}\n" if draw(st.booleans()) else "import os\n"
            seed = draw(st.integers(0, 40))
            tags = f"<reponame>o/r{number}<filename>{path}<gh_stars>0\n" if draw(st.booleans()) else ""
            kind = draw(st.sampled_from(["ok"] * 6 + ["empty", "nul", "generated"]))
            content = {
                "ok": text + body(seed),
                "empty": " \n",
                "nul": "a\0b",
                "generated": "# Automatically generated\n",
            }
            rows.append(row(f"o/r{number}", path, tags + content[kind], stars))
    return draw(st.permutations(rows))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=_repositories(), order=st.sampled_from(["depth", "imports"]))
def test_every_invariant_on_generated_repositories(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], order: str
) -> None:
    folder = tmp_path_factory.mktemp("generated")
    source = StarCoderData((str(write_starcoderdata(folder / "data", rows)),))
    config = CorpusSettings(order=order, near_duplicates=False, **NO_SPLIT)
    try:
        manifest, _ = build(source, config, folder / "corpus")
    except DataPrepError as error:
        if "left after the f" not in str(error):
            raise
        return
    check_invariants(folder / "corpus", manifest, config)


def check_invariants(folder: Path, manifest: dict[str, Any], config: CorpusSettings) -> None:
    corpus = read_corpus(folder)
    seen: dict[str, str] = {}
    contents: list[str] = []
    for split, rows in corpus.items():
        repositories: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for r in rows:
            repositories[r["repo"]].append(r)
        assert [r["repo"] for r in rows] == [r["repo"] for files in repositories.values() for r in files]
        for repo, files in repositories.items():
            assert seen.setdefault(repo, split) == split
            assert split == split_of(repo, config.split_ratios, config.split_seed)
            check_repository(repo, files, config)
            contents += [r["content"] for r in files]
    assert len(set(contents)) == len(contents)
    check_counts(corpus, manifest)


def check_repository(repo: str, files: list[dict[str, Any]], config: CorpusSettings) -> None:
    paths = [r["path"] for r in files]
    assert [r["file_index"] for r in files] == list(range(len(files)))
    assert len(set(paths)) == len(paths) >= config.min_files
    assert len({(r["license"], r["stars"], r["version"]) for r in files}) == 1
    assert files[0]["stars"] is None or files[0]["stars"] >= config.min_stars
    resolver = ImportResolver(paths, repo)
    needs = {r["path"]: resolver.resolve(r["path"], scan_imports(r["content"])) for r in files}
    assert any(needs.values()) or config.max_files_per_repo
    if config.max_files_per_repo is None:
        assert paths == (order_by_imports(paths, needs) if config.order == "imports" else sorted(paths, key=depth_key))
    for r in files:
        assert r["n_bytes"] == len(r["content"].encode()) <= config.max_file_bytes
        assert r["content"].strip()
        assert "\0" not in r["content"]
        assert not r["content"].startswith(("<reponame>", "<filename>", "<gh_stars>", "\ufeff"))


def check_counts(corpus: dict[str, list[dict[str, Any]]], manifest: dict[str, Any]) -> None:
    filters = manifest["filters"]
    left = {entry["filter"]: entry["files"] for entry in filters}
    assert left["read"] == left["file_filters"] + sum(manifest["rejected"].values())
    assert all(before["files"] >= after["files"] for before, after in itertools.pairwise(filters))
    assert filters[-1]["files"] == sum(map(len, corpus.values()))
    assert filters[-1]["repositories"] == len(manifest["repositories"]) == sum(manifest["licenses"].values())
    for split, rows in corpus.items():
        assert manifest["splits"][split]["files"] == len(rows)
        assert manifest["splits"][split]["repositories"] == len({r["repo"] for r in rows})


@pytest.fixture
def forty(tmp_path: Path) -> StarCoderData:
    rows = [r for number in range(40) for r in repository(f"own{number}/repo", number)]
    random.Random(0).shuffle(rows)
    return StarCoderData((str(write_starcoderdata(tmp_path / "data", rows, num_files=3)),))


def _digests(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: entry["sha256"] for split in manifest["splits"].values() for name, entry in split["shards"].items()}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a few row groups, so that a small corpus has many."""
    monkeypatch.setattr("data_prep.corpus.plan.MIN_CHUNK_BYTES", 4_000)
    monkeypatch.setattr("data_prep.corpus.plan.MAX_CHUNK_BYTES", 8_000)
    monkeypatch.setattr("data_prep.corpus.plan.BUCKET_BYTES", 20_000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shards_merge_to_the_same_corpus_whatever_their_number(
    forty: StarCoderData, tmp_path: Path, count: int
) -> None:
    config = CorpusSettings(split_ratios=(6, 2, 2))
    build(forty, config, tmp_path / "whole")
    done = [build_shard(forty, config, tmp_path / "merged", index, count) for index in reversed(range(count))]
    assert sum(done) > 5
    assert not (tmp_path / "merged").exists()
    manifest, reused = build(forty, config, tmp_path / "merged")
    assert not reused
    assert _digests(tmp_path / "merged") == _digests(tmp_path / "whole")
    check_invariants(tmp_path / "merged", manifest, config)


@pytest.mark.usefixtures("small_chunks")
def test_a_stopped_build_goes_on_without_doing_work_twice(
    forty: StarCoderData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CorpusSettings(split_ratios=(6, 2, 2))
    build(forty, config, tmp_path / "whole")
    written: list[str] = []
    real = scan.write_run

    def write_until_stopped(path: Path, *arguments: Any) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        real(path, *arguments)
        written.append(path.name)

    monkeypatch.setattr(scan, "write_run", write_until_stopped)
    with pytest.raises(KeyboardInterrupt):
        build(forty, config, tmp_path / "stopped")
    first, written[:] = list(written), []
    monkeypatch.setattr(scan, "write_run", lambda *arguments: (written.append(arguments[0].name), real(*arguments)))
    build(forty, config, tmp_path / "stopped")
    assert len(first) == 4
    assert not set(first) & set(written)
    assert _digests(tmp_path / "stopped") == _digests(tmp_path / "whole")
    assert not unfinished(tmp_path / "stopped").exists()


def test_two_workers_make_what_one_makes(forty: StarCoderData, tmp_path: Path) -> None:
    config = CorpusSettings(split_ratios=(6, 2, 2))
    build(forty, config, tmp_path / "one", num_workers=1)
    build(forty, config, tmp_path / "two", num_workers=2)
    assert _digests(tmp_path / "one") == _digests(tmp_path / "two")


def test_a_finished_corpus_is_left_as_it_is(forty: StarCoderData, tmp_path: Path) -> None:
    config = CorpusSettings(split_ratios=(6, 2, 2))
    out = tmp_path / "corpus"
    build(forty, config, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    _, reused = build(forty, config, out)
    assert reused
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(DataPrepError, match="with other settings"):
        build(forty, CorpusSettings(split_ratios=(6, 2, 2), min_files=4), out)
    manifest, reused = build(forty, CorpusSettings(split_ratios=(6, 2, 2), min_files=4), out, restart=True)
    assert not reused
    assert manifest["settings"]["min_files"] == 4


def test_datasets_opens_the_corpus(forty: StarCoderData, tmp_path: Path) -> None:
    manifest, _ = build(forty, CorpusSettings(split_ratios=(6, 2, 2)), tmp_path / "corpus")
    opened = datasets.load_dataset(str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in opened.items()} == {
        split: record["files"] for split, record in manifest["splits"].items()
    }
    assert opened["train"].column_names == [
        "repo", "path", "content", "license", "stars", "version", "file_index", "n_bytes",
    ]  # fmt: skip


def test_a_repository_never_moves_when_others_come(tmp_path: Path) -> None:
    config = CorpusSettings(split_ratios=(6, 2, 2))
    splits = []
    for count in (30, 60):
        rows = [r for number in range(count) for r in repository(f"own{number}/repo", number)]
        source = StarCoderData((str(write_starcoderdata(tmp_path / f"data{count}", rows)),))
        manifest, _ = build(source, config, tmp_path / f"corpus{count}")
        splits.append({record["repo"]: record["split"] for record in manifest["repositories"]})
    assert splits[0].items() <= splits[1].items()
    assert len(splits[1]) == 60


def test_the_choice_of_repositories_grows_and_never_changes(forty: StarCoderData) -> None:
    records = [{"repo": f"o/{letter}"} for letter in string.ascii_letters]
    chosen = [{r["repo"] for r in choose_repositories(records, number, seed=1)} for number in (5, 20)]
    assert len(chosen[0]) == 5
    assert chosen[0] < chosen[1]
    assert {r["repo"] for r in choose_repositories(records, 5, seed=2)} != chosen[0]


def test_exact_duplicates_keep_the_copy_with_the_most_stars(tmp_path: Path) -> None:
    rows = [*repository("o/few", 1, stars=6), *repository("o/many", 1, stars=60), *repository("o/other", 2, stars=7)]
    source = StarCoderData((str(write_starcoderdata(tmp_path / "data", rows)),))
    manifest, _ = build(source, CorpusSettings(**NO_SPLIT), tmp_path / "corpus")
    assert [record["repo"] for record in manifest["repositories"]] == ["o/many", "o/other"]
    assert {e["filter"]: e["files"] for e in manifest["filters"]}["exact_duplicates"] == 8


def test_near_duplicates_go_and_different_files_stay(tmp_path: Path) -> None:
    original = repository("o/original", 1, stars=60)
    changed = [{**r, "max_stars_repo_name": "o/changed", "max_stars_count": 6} for r in original]
    changed = [{**r, "content": r["content"] + f"extra{i} = {i}\n"} for i, r in enumerate(changed)]
    source = StarCoderData((str(write_starcoderdata(tmp_path / "data", original + changed + repository("o/z", 9))),))
    manifest, _ = build(source, CorpusSettings(**NO_SPLIT), tmp_path / "with")
    assert [record["repo"] for record in manifest["repositories"]] == ["o/original", "o/z"]
    manifest, _ = build(source, CorpusSettings(near_duplicates=False, **NO_SPLIT), tmp_path / "without")
    assert [record["repo"] for record in manifest["repositories"]] == ["o/changed", "o/original", "o/z"]


def test_limits_keep_the_first_files_in_reading_order(forty: StarCoderData, tmp_path: Path) -> None:
    config = CorpusSettings(max_files_per_repo=3, max_repos=30, order="imports", split_ratios=(6, 2, 2))
    manifest, _ = build(forty, config, tmp_path / "corpus")
    rows = [r for split in read_corpus(tmp_path / "corpus").values() for r in split]
    assert len({r["repo"] for r in rows}) == 30
    # m0 imports m1 imports m2 imports m3: the last is read first.
    assert {(r["file_index"], r["path"]) for r in rows} == {(i, f"pkg/m{3 - i}.py") for i in range(3)}
    check_invariants(tmp_path / "corpus", manifest, config)
