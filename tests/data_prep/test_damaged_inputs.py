"""Damaged and odd inputs of data_prep: the right corpus, or one message that names the field, and nothing left over."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typing_extensions import TypedDict

from data_prep import build_corpus, cross_file_pairs, decontaminate, pack_corpus, train_tokenizer
from data_prep.corpus.build import build
from data_prep.corpus.imports import ImportedName, ImportResolver
from data_prep.crosscodeeval import load_rows
from data_prep.settings import CorpusSettings
from data_prep.shards import read_manifest
from data_prep.sources import RepositoryFolders, StarCoderData
from tests.data_prep.test_corpus import body, read_corpus, repository, row, write_starcoderdata
from tests.data_prep.test_inputs import ALL_TRAIN, good_files, write_folder
from titans_ds.errors import DataError, TitansError
from titans_ds.reading import checked, parsed, read_json, strict_record


def column(folder: Path, name: str, values: list[Any], kind: pa.DataType) -> StarCoderData:
    """A StarCoderData file of one good repository of four files, with one column replaced."""
    file = next(write_starcoderdata(folder, repository("o/r", 1), num_files=1).iterdir())
    table = pq.read_table(file)
    place = table.schema.get_field_index(name)
    pq.write_table(table.set_column(place, name, pa.array(values, type=kind)), file)
    return StarCoderData((str(folder),))


@pytest.mark.parametrize(
    ("values", "kind", "problem"),
    [
        ([10.0, 10.0, 10.0, math.nan], pa.float64(), "stars_are_no_number"),
        ([10.0, 10.0, 10.0, math.inf], pa.float64(), "stars_are_no_number"),
        ([10.0, 10.0, 10.0, 1e300], pa.float64(), "stars_are_no_number"),
        ([10.0, 10.0, 10.0, None], pa.float64(), None),
        ([10, 10, 10, None], pa.int64(), None),
    ],
)
def test_stars_of_other_types_are_read_or_counted(
    tmp_path: Path, values: list[Any], kind: pa.DataType, problem: str | None
) -> None:
    manifest, _ = build(column(tmp_path / "d", "max_stars_count", values, kind), ALL_TRAIN, tmp_path / "out")
    assert manifest["rejected"] == ({problem: 1} if problem else {})
    assert manifest["splits"]["train"]["files"] == (3 if problem else 4)


def test_stars_that_are_text_leave_nothing_and_say_so(tmp_path: Path) -> None:
    source = column(tmp_path / "d", "max_stars_count", ["many"] * 4, pa.string())
    with pytest.raises(TitansError, match="repository_small_or_few_stars: 4"):
        build(source, ALL_TRAIN, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_content_of_other_types_is_read_or_counted(tmp_path: Path) -> None:
    texts = [r["content"].encode() for r in repository("o/r", 1)]
    for name, values, kind, rejected in (
        ("binary", texts, pa.binary(), {}),
        ("large", [t.decode() for t in texts], pa.large_string(), {}),
        ("invalid", [b"\xff\xfe", *texts[1:]], pa.binary(), {"not_utf8": 1}),
        ("null", [None, *texts[1:]], pa.binary(), {"empty": 1}),
    ):
        manifest, _ = build(column(tmp_path / name, "content", values, kind), ALL_TRAIN, tmp_path / f"{name}-out")
        assert manifest["rejected"] == rejected, name
    for values, kind in (([1, 2, 3, 4], pa.int64()), ([[1]] * 4, pa.list_(pa.int64()))):
        shutil.rmtree(tmp_path / "other", ignore_errors=True)
        with pytest.raises(TitansError, match="content_is_no_text: 4"):
            build(column(tmp_path / "other", "content", values, kind), ALL_TRAIN, tmp_path / "out")


def test_text_that_is_not_utf8_inside_a_text_column_is_counted(tmp_path: Path) -> None:
    """Arrow does not look, and Python raises an error for the batch."""
    texts = [b"\xff", *[r["content"].encode() for r in repository("o/r", 1)][1:]]
    source = column(tmp_path / "d", "content", texts, pa.binary())
    file = next((tmp_path / "d").iterdir())
    table = pq.read_table(file)
    place = table.schema.get_field_index("content")
    pq.write_table(table.set_column(place, "content", table["content"].combine_chunks().view(pa.string())), file)
    manifest, _ = build(source, ALL_TRAIN, tmp_path / "out")
    assert manifest["rejected"] == {"not_utf8": 1}


def test_a_damaged_page_is_counted_and_the_rest_is_kept(tmp_path: Path) -> None:
    rows = [r for number in range(4) for r in repository(f"o/r{number}", number)]
    folder = write_starcoderdata(tmp_path / "d", rows, num_files=2)
    part = folder / "part-1.parquet"
    group = pq.ParquetFile(part).metadata.row_group(0).column(4)
    content = bytearray(part.read_bytes())
    start = group.dictionary_page_offset or group.data_page_offset
    content[start : start + 40] = b"\xff" * 40
    part.write_bytes(content)
    settings_ = CorpusSettings(split_ratios=(1, 0, 0), near_duplicates=False, min_files=2, require_import=False)
    manifest, _ = build(StarCoderData((str(folder),)), settings_, tmp_path / "out")
    assert manifest["rejected"]["damaged_page"] == 1
    assert manifest["splits"]["train"]["files"] >= 8


def test_odd_names_and_depths_are_counted_and_skipped(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "repos" / "one", good_files(1)).parent
    write_folder(root / "one", {f"pkg/{os.fsdecode(bytes([0xFF]))}.py": body(900).encode()})
    write_folder(root / os.fsdecode(b"\xfe"), good_files(2))
    deep = root / "one" / "deep"
    descriptor = os.open(root / "one", os.O_RDONLY)
    for _ in range(1200):  # deeper than Python calls itself, with a path longer than the system takes
        os.mkdir("deep", dir_fd=descriptor)
        below = os.open("deep", os.O_RDONLY, dir_fd=descriptor)
        os.close(descriptor)
        descriptor = below
    os.close(descriptor)
    try:
        manifest, _ = build(RepositoryFolders(str(root)), ALL_TRAIN, tmp_path / "corpus")
    finally:
        subprocess.run(["rm", "-rf", str(deep)], check=True)  # shutil.rmtree calls itself, and pytest's own end, too
    assert manifest["rejected"] == {"name_not_utf8": 1 + len(good_files(2))}
    assert {r["path"] for r in read_corpus(tmp_path / "corpus")["train"]} == set(good_files(1))


@pytest.mark.parametrize("path", ["/a.py", "/pkg/a.py", "//a.py", "///", "../a.py", "a//b.py", ".", ""])
def test_a_path_that_begins_with_a_slash_comes_to_an_end(path: str, tmp_path: Path) -> None:
    resolver = ImportResolver([path, "pkg/b.py"], "o/r")
    assert resolver.resolve(path, [ImportedName(0, "pkg.b", ""), ImportedName(2, "pkg", "b")])[:1] == ["pkg/b.py"]
    rows = [*repository("o/r", 1), row("o/r", path, "import pkg.m1\n" + body(77))]
    source = StarCoderData((str(write_starcoderdata(tmp_path / "data", rows)),))
    build(source, CorpusSettings(split_ratios=(1, 0, 0), near_duplicates=False, order="imports"), tmp_path / "out")
    kept = {r["path"] for r in read_corpus(tmp_path / "out")["train"]}
    assert (path in kept) == bool(path)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus with one split."""
    folder = tmp_path_factory.mktemp("damaged")
    rows = [r for number in range(6) for r in repository(f"own{number}/repo", number)]
    build(StarCoderData((str(write_starcoderdata(folder / "data", rows)),)), ALL_TRAIN, folder / "corpus")
    return folder / "corpus"


def _table(change: Callable[[pa.Table], pa.Table]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(change(pq.read_table(path)), path)


def _set(name: str, values: Callable[[int], pa.Array]) -> Callable[[Path], None]:
    return _table(lambda t: t.set_column(t.schema.get_field_index(name), name, values(t.num_rows)))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(2).data_page_offset
    content[start : start + 60] = b"\xff" * 60
    path.write_bytes(content)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = {
    "cut": _cut,
    "flipped": _flip,
    "garbage": lambda path: path.write_bytes(b"\xff" * 100),
    "a folder": _folder,
    "no content": _table(lambda t: t.drop_columns(["content"])),
    "null content": _set("content", lambda n: pa.array([None] * n, type=pa.large_string())),
    "number as content": _set("content", lambda n: pa.array([1] * n)),
    "no utf-8": _set("content", lambda n: pa.array([b"\xff"] * n, type=pa.large_binary()).view(pa.large_string())),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named_by_every_program_and_nothing_is_left(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    bad, out = shutil.copytree(corpus, tmp_path / "corpus"), str(tmp_path / "out")
    shard = next(bad.glob("train-*.parquet"))
    DAMAGES[damage](shard)
    metadata = {"task_id": "t", "repository": "o-r-1234567", "file": "a.py"}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "x = 1", "groundtruth": "y", "metadata": metadata}))
    common = ["--corpus", str(bad), "--out", out]
    for run in (
        lambda: train_tokenizer.main([*common, "--vocab-size", "300"]),
        lambda: decontaminate.main([*common, "--benchmark", str(rows), "--workers", "1"]),
        lambda: cross_file_pairs.main([*common, "--workers", "1"]),
        lambda: pack_corpus.main([*common, "--tokenizer", str(tmp_path / "absent"), "--workers", "1"]),
    ):
        code, error = run(), capsys.readouterr().err
        if "Cannot load a tokenizer" in error:
            continue  # what cannot be seen without reading every page comes after the tokenizer
        assert code == 2, damage
        assert str(shard) in error
        assert "Traceback" not in error
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "rows.jsonl"]


@pytest.mark.parametrize("text", ["[]", "{}", "[" * 1000, "null", "", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_manifest_that_is_none_is_named(
    corpus: Path, tmp_path: Path, text: str | bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = shutil.copytree(corpus, tmp_path / "corpus")
    (bad / "manifest.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    for main, more in ((cross_file_pairs.main, []), (pack_corpus.main, ["--tokenizer", "x"])):
        if main is pack_corpus.main and text == "{}":
            continue  # packing reads nothing of it
        assert main(["--corpus", str(bad), "--out", str(tmp_path / "out"), *more]) == 2
        assert "manifest.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def outcome(task: Callable[[], Any]) -> tuple[str, Any]:
    """The text of the DataError that a task raised, or "" and what it returned."""
    try:
        return "", task()
    except DataError as error:
        return str(error), None


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [place for key, inner in items for place in _places(inner, (*path, key))]


@settings(max_examples=60)
@given(data=st.data())
def test_an_edited_manifest_is_read_or_names_its_field(corpus: Path, data: st.DataObject) -> None:
    """One place, chosen at random, is removed or gets a value of another kind."""
    manifest = json.loads((corpus / "manifest.json").read_text())
    *above, last = data.draw(st.sampled_from(_places(manifest)))
    holder = manifest
    for key in above:
        holder = holder[key]
    change = data.draw(st.sampled_from(["remove", None, 17, -1.5, "text", [], {}, True]))
    if change == "remove":
        del holder[last]
    else:
        holder[last] = change
    folder = corpus.parent / "edited"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    told, found = outcome(lambda: read_manifest(folder))
    assert ("manifest.json: " in told and len(told) < 400) if found is None else isinstance(found["identity"], str)
    for repository_ in [] if found is None else found["repositories"]:
        assert isinstance(repository_["repo"], str)
        assert isinstance(repository_["files"], int)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda v: st.lists(v) | st.dictionaries(st.text(), v),
)


@settings(max_examples=60)
@given(record=st.dictionaries(st.sampled_from(["prompt", "groundtruth", "metadata", "crossfile_context"]), VALUES))
def test_any_row_is_read_or_names_its_line(record: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"any\.jsonl, line 1: "):
        load_rows(path)


def test_any_bytes_are_json_or_one_error(tmp_path: Path) -> None:
    @settings(max_examples=100)
    @given(st.binary())
    def check(content: bytes) -> None:
        (tmp_path / "x.json").write_bytes(content)
        told, found = outcome(lambda: read_json(tmp_path / "x.json", dict[str, int]))
        assert told.startswith(str(tmp_path / "x.json")) if found is None else isinstance(found, dict)

    check()
    assert parsed(b'\xef\xbb\xbf{"a": 1}', "f", "") == {"a": 1}
    with pytest.raises(DataError, match=r"f: a is '1'; expected a valid integer\. Mend it\."):
        checked({"a": "1"}, Numbers, "f", "Mend it.")


@strict_record
class Numbers(TypedDict):
    """A schema of one field that takes whole numbers alone."""

    a: int


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--folders", ""], "is a variable of your shell unset"),
        (["--dataset", ""], "is a variable of your shell unset"),
        (["--archives", " "], "is a variable of your shell unset"),
        (["--starcoderdata", ""], "is a variable of your shell unset"),
        (["--folders", "REPOS", "--repo-depth", "0"], "--repo-depth"),
        (["--folders", "REPOS", "--repo-depth", "-1"], "--repo-depth"),
        (["--folders", "REPOS", "--repo-depth", "1000"], "--repo-depth"),
        (["--folders", "REPOS", "--repo-depth", "1" + "0" * 20], "--repo-depth"),
        (["--folders", "REPOS", "--workers", "-1"], "--workers"),
        (["--folders", "REPOS", "--max-file-bytes", "1" + "0" * 20], "--max-file-bytes"),
        (["--folders", "REPOS", "--split-ratios", "nan/1/1"], "--split-ratios"),
        (["--folders", "REPOS", "--split-ratios", "inf/1/1"], "--split-ratios"),
        (["--folders", "REPOS", "--near-duplicate-threshold", "nan"], "--near-duplicate-threshold"),
        (["--folders", "REPOS", "--seed", "-1"], "--seed"),
    ],
)
def test_options_out_of_range_are_named_and_nothing_is_written(
    tmp_path: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_folder(tmp_path / "repos" / "one", good_files(1)).parent
    given_ = [str(root) if text == "REPOS" else text for text in arguments]
    assert build_corpus.main([*given_, "--out", str(tmp_path / "out")]) == 2
    assert told in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["repos"]


@pytest.mark.parametrize("out", ["x[/b]", "~x"])
def test_signs_in_a_path_mean_nothing(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither markup for the console nor a home folder for the database that looks for duplicates."""
    monkeypatch.chdir(tmp_path)
    root = write_folder(tmp_path / "[red]re[/b]pos" / "one", good_files(1)).parent
    more = ["--split-ratios", "1/0/0", "--no-near-duplicates", "--workers", "1"]
    assert build_corpus.main(["--folders", str(root), "--out", out, *more]) == 0
    assert (tmp_path / out / "manifest.json").exists()
