"""Bad input: every case gives a message that says what to do, or a count in the manifest; nothing is executed."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import build_corpus
from data_prep.corpus.build import build
from data_prep.errors import DataPrepError
from data_prep.licenses import license_allowed, license_from_text, normalize_license
from data_prep.settings import CorpusSettings
from data_prep.shards import CORPUS
from data_prep.sources import ArchiveFolder, RepositoryFolders, StarCoderData, open_dataset
from data_prep.sources.folders import commit_of, remote_of
from data_prep.sources.starcoderdata import strip_tags
from data_prep.splits import SPLITS, parse_ratios
from tests.data_prep.test_corpus import body, read_corpus, repository, row, write_starcoderdata
from titans_ds.errors import DataError, OutputError
from titans_ds.files import atomic_folder

ALL_TRAIN = CorpusSettings(split_ratios=(1, 0, 0), near_duplicates=False)


def good_files(seed: int) -> dict[str, bytes]:
    return {f"pkg/m{i}.py": f"from pkg import m{i + 1}\n{body(seed * 50 + i)}".encode() for i in range(4)}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "data_prep.build_corpus", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_program_prints_the_message_without_a_traceback_and_ends_with_2(tmp_path: Path) -> None:
    done = run("--folders", str(tmp_path / "absent"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Expected a folder with one folder for each repository" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_hostile_files_are_counted_and_never_run(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    bad = {
        "pkg/latin.py": "# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"),
        "pkg/nul.py": b"x = 1\0\n",
        "pkg/big.py": b"x = 1\n" * 200_000,
        "pkg/broken.py": b"def f(:\n" + body(7).encode(),
        "pkg/blank.py": b"\n \n",
        "pkg/made.py": b"# This file was automatically generated, do not edit by hand.\nx = 1\n",
        "pkg/min.py": b"x = [" + b"1, " * 2000 + b"]\n",
        "setup.py": f"open({str(proof)!r}, 'w').write('x')\n{body(8)}".encode(),
    }
    root = write_folder(tmp_path / "repos" / "one", {**good_files(1), **bad}).parent
    os.symlink(root / "one", root / "one" / "loop")
    os.symlink("/etc/hostname", root / "one" / "pkg" / "link.py")
    (root / "one" / "pkg" / "endless.py").symlink_to("endless.py")
    manifest, _ = build(RepositoryFolders(str(root)), ALL_TRAIN, tmp_path / "corpus")
    assert manifest["rejected"] == {
        "empty": 1, "generated": 1, "link": 2, "long_lines": 1, "not_utf8": 1, "nul_bytes": 1, "too_large": 1,
    }  # fmt: skip
    paths = {r["path"] for r in read_corpus(tmp_path / "corpus")["train"]}
    assert paths == {*good_files(1), "pkg/broken.py", "setup.py"}
    strict = CorpusSettings(split_ratios=(1, 0, 0), near_duplicates=False, require_parse=True)
    manifest, _ = build(RepositoryFolders(str(root)), strict, tmp_path / "strict")
    assert manifest["rejected"]["does_not_parse"] == 1
    assert not proof.exists()


def test_a_file_of_100_megabytes_is_not_read(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "repos" / "one", good_files(2)).parent
    with open(root / "one" / "huge.py", "wb") as handle:
        handle.truncate(100 * 2**20)
    manifest, _ = build(RepositoryFolders(str(root)), ALL_TRAIN, tmp_path / "corpus")
    assert manifest["rejected"] == {"too_large": 1}


def _wheel(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_archives_are_read_without_unpacking_and_bad_members_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "archives"
    folder.mkdir()
    metadata = b"Metadata-Version: 2.4\nName: good\nVersion: 1.5\nLicense-Expression: MIT\n"
    bomb = {"pkg/bomb.py": b"x = 1\n" * 1_000_000}
    members = {**good_files(3), "../../escape.py": b"x = 1\n", "/root/absolute.py": b"x = 1\n", **bomb}
    _wheel(folder / "good-1.5-py3-none-any.whl", {**members, "good-1.5.dist-info/METADATA": metadata})
    (folder / "cut-1.0-py3-none-any.whl").write_bytes((folder / "good-1.5-py3-none-any.whl").read_bytes()[:2000])
    with tarfile.open(folder / "sd-2.0.tar.gz", "w:gz") as archive:
        for name, content in {
            **good_files(4),
            "../up.py": b"x = 1\n",
            "LICENSE": b"Apache License\nVersion 2.0",
        }.items():
            info = tarfile.TarInfo(name if name.startswith("..") else f"sd-2.0/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("sd-2.0/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    before = sorted(tmp_path.rglob("*"))
    manifest, _ = build(ArchiveFolder(str(folder)), ALL_TRAIN, tmp_path / "corpus")
    assert manifest["rejected"] == {"link": 1, "too_large": 1, "unreadable_archive": 1, "unsafe_member_name": 3}
    found = {r["repo"]: (r["license"], r["version"], r["files"]) for r in manifest["repositories"]}
    assert found == {"good": ("MIT", "1.5", 4), "sd": ("Apache-2.0", "2.0", 4)}
    assert [p for p in sorted(tmp_path.rglob("*")) if tmp_path / "corpus" not in (p, *p.parents)] == before


def test_parquet_that_is_cut_short_or_lacks_columns_is_named(tmp_path: Path) -> None:
    folder = write_starcoderdata(tmp_path / "data", repository("o/r", 1))
    part = folder / "part-1.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"part-1\.parquet is not a whole parquet file"):
        build(StarCoderData((str(folder),)), ALL_TRAIN, tmp_path / "out")
    pq.write_table(pa.table({"content": ["x"], "repo": ["r"]}), part)
    with pytest.raises(DataError, match="lacks max_stars_repo_name, max_stars_repo_path, max_stars_count; it has"):
        build(StarCoderData((str(folder),)), ALL_TRAIN, tmp_path / "out")
    part.write_bytes(whole[:200] + bytes(len(whole) - 400) + whole[-200:])
    with pytest.raises(DataError, match=r"part-1\.parquet"):
        build(StarCoderData((str(folder),)), ALL_TRAIN, tmp_path / "out")
    with pytest.raises(DataPrepError, match="no parquet there"):
        build(StarCoderData((str(tmp_path / "nothing"),)), ALL_TRAIN, tmp_path / "out")


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([row("o/r", "a.py", " ")] * 3, "file filters"),
        (repository("o/r", 1, num_files=2), "file filters"),
        (repository("o/r", 1, stars=None), "repository_small_or_few_stars: 4"),
        ([row("o/r", f"a{i}.py", body(i)) for i in range(4)], "'import_inside'"),
        ([row("o/r", f"{i}/a.py", body(1)) for i in range(4)], "'min_files'"),
    ],
)
def test_an_empty_result_names_the_filter(tmp_path: Path, rows: list[dict], named: str) -> None:
    source = StarCoderData((str(write_starcoderdata(tmp_path / "data", rows)),))
    with pytest.raises(DataPrepError, match="left after the f") as raised:
        build(source, ALL_TRAIN, tmp_path / "out")
    assert named in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_an_empty_split_names_the_options(tmp_path: Path) -> None:
    source = StarCoderData((str(write_starcoderdata(tmp_path / "data", repository("o/r", 1))),))
    with pytest.raises(DataPrepError, match="--split-ratios") as raised:
        build(source, CorpusSettings(), tmp_path / "out")
    assert sum(split in str(raised.value) for split in SPLITS) >= 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here, which stands for a full disk")
def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    def fill(out: Path) -> None:
        with atomic_folder(out, CORPUS) as folder:
            (folder / "file").symlink_to("/dev/full")
            (folder / "file").write_bytes(b"x")

    with pytest.raises(OutputError, match="the disk is full"):
        fill(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_out_that_cannot_be_written_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    root = write_folder(tmp_path / "repos" / "one", good_files(1)).parent
    with pytest.raises(OutputError, match="a part of the path is a file"):
        build(RepositoryFolders(str(root)), ALL_TRAIN, tmp_path / "file" / "out")


def test_a_dataset_is_read_by_its_columns(tmp_path: Path) -> None:
    files = good_files(5)
    columns = {"name": ["o/r"] * 4, "file": list(files), "text": [v.decode() for v in files.values()]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "data"))
    names = {"repo": "name", "path": "file", "content": "text"}
    source = open_dataset(str(tmp_path / "data"), "train", names, tmp_path / "work")
    build(source, ALL_TRAIN, tmp_path / "corpus")
    assert {r["path"]: r["content"].encode() for r in read_corpus(tmp_path / "corpus")["train"]} == files
    with pytest.raises(DataPrepError, match="lacks repo, path, content; it has name, file, text"):
        open_dataset(str(tmp_path / "data"), "train", {}, tmp_path / "work")
    with pytest.raises(DataPrepError, match="Cannot load the dataset"):
        open_dataset(str(tmp_path / "absent"), "train", {}, tmp_path / "work")


def test_a_corpus_can_be_the_source_of_another(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "repos" / "one", good_files(6)).parent
    build(RepositoryFolders(str(root)), ALL_TRAIN, tmp_path / "first")
    build(open_dataset(str(tmp_path / "first"), "train", {}, tmp_path / "work"), ALL_TRAIN, tmp_path / "second")
    assert read_corpus(tmp_path / "first") == read_corpus(tmp_path / "second")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "4"], "--shard"),
        (["--shard", "2/2"], "--shard 2/2"),
        (["--split-ratios", "1/2"], "--split-ratios"),
        (["--min-files", "0"], "--min-files: '0'"),
        (["--max-files-per-repo", "2"], "--max-files-per-repo 2 is below --min-files 3"),
        (["--near-duplicate-threshold", "2"], "--near-duplicate-threshold"),
        (["--require-license"], "--require-license needs --licenses"),
    ],
)
def test_options_that_cannot_work_are_named(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "repos" / "one", good_files(1)).parent
    code = build_corpus.main(["--folders", str(root), "--out", str(tmp_path / "out"), "--workers", "1", *arguments])
    assert code == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["repos"]


def test_ratios_are_parsed() -> None:
    assert parse_ratios("90/5/5") == (90.0, 5.0, 5.0)
    for text in ("90", "a/b/c", "1/-1/1", "0/1/1"):
        with pytest.raises(DataPrepError, match="--split-ratios"):
            parse_ratios(text)


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        ("<reponame>o/r<filename>a/b.py<gh_stars>10-100\nimport x\n", "import x\n"),
        ("<gh_stars>0\nx\n", "x\n"),
        ("<filename>a.py\nx\n", "x\n"),
        ("x = '<reponame>'\n", "x = '<reponame>'\n"),
        ("<other>x\n", "<other>x\n"),
    ],
)
def test_tags_of_starcoderdata_are_stripped(text: str, stripped: str) -> None:
    assert strip_tags(text.encode()) == stripped.encode()


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(GPL-3.0-only OR MIT) AND Apache-2.0", True),
        ("GPL-3.0-only", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("", False),
    ],
)
def test_licence_expressions_are_understood(expression: str, allowed: bool) -> None:
    assert license_allowed(expression, ("MIT", "Apache-2.0")) is allowed


def test_licences_are_normalised() -> None:
    assert normalize_license("Apache License, Version 2.0") == "Apache-2.0"
    assert normalize_license("UNKNOWN") == ""
    assert license_from_text("Permission is hereby granted, free of charge, to any person obtaining a copy") == "MIT"
    assert license_from_text("All rights reserved.") == ""


def test_a_clone_tells_its_commit_and_remote_without_git(tmp_path: Path) -> None:
    commit = "0123456789" * 4
    files = {
        ".git/HEAD": b"ref: refs/heads/main\n",
        ".git/packed-refs": f"# pack\n{commit} refs/heads/main\n".encode(),
        ".git/config": b'[remote "origin"]\n\turl = https://user:secret@github.com/owner/name.git\n',
    }
    assert commit_of(write_folder(tmp_path, files)) == commit
    assert remote_of(tmp_path) == "https://github.com/owner/name.git"
    (tmp_path / ".git" / "HEAD").write_text("ref: ../../etc/passwd")
    assert commit_of(tmp_path) == ""
