"""Data made by somebody who means harm: names, links, archives, patterns and markup do nothing but be data."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from email.message import Message
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import build_benchmark
from data_prep.corpus.imports import scan_imports
from data_prep.corpus.token_runs import tokens_of
from data_prep.licenses import PERMISSIVE, license_allowed, license_from_metadata
from data_prep.sources import ArchiveFolder, RepositoryFolders
from data_prep.sources.base import Unit
from data_prep.sources.folders import commit_of, remote_of
from data_prep.sources.reading import path_component, read_regular_file
from eval.reporting import markdown
from eval.scoring.metrics import replace_strings
from eval.scoring.postprocess import first_line

COMMIT = "0123456789abcdef" * 2 + "01234567"
HOSTILE_NAMES = (
    "..", ".", "", "/", "a/b", "../../x", "/etc/passwd", "a\0b", "a\nb", "-rf", ".hidden", "a\\..\\b", "x" * 300,
    "ü" * 200, "\ud800", "C:\\x", "a b", "nul|", "1.0/../../../../NAME/y",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_any_text_becomes_one_name_inside_its_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / path_component(name)
    path.write_text("here")
    assert list(tmp_path.iterdir()) == [path]
    assert path.resolve().parent == tmp_path.resolve()


def test_safe_names_stay_and_hostile_ones_stay_apart() -> None:
    for name in ("owner-name-1.5", "LICENSE.txt", "a_b+local", "naïve"):
        assert path_component(name) == name
    assert len({path_component(name) for name in HOSTILE_NAMES}) == len(HOSTILE_NAMES)


def test_a_version_in_metadata_never_leads_out_of_the_benchmark(tmp_path: Path) -> None:
    import jinja2

    folder, out = tmp_path / "archives", tmp_path / "deep" / "er" / "out"
    folder.mkdir()
    files = {f"jinja2/{p.name}": p.read_bytes() for p in Path(jinja2.__file__).parent.glob("*.py")}
    hostile = b"Metadata-Version: 2.4\nName: j\nLicense-Expression: MIT\nVersion: x/../../../../../NAME/y\n"
    with zipfile.ZipFile(folder / "j.zip", "w") as archive:
        for name, content in {**files, "LICENSE": b"the text", "j.dist-info/METADATA": hostile}.items():
            archive.writestr(name, content)
    before = {p for p in tmp_path.rglob("*") if out not in p.parents}
    build_benchmark.main(["--archives", str(folder), "--max-per-repository", "2", "--out", str(out)])
    assert {p for p in tmp_path.rglob("*") if out not in p.parents} == {*before, out.parent.parent, out.parent, out}
    (license_file,) = (p for p in (out / "licenses").rglob("*") if p.is_file())
    assert license_file.read_text() == "the text"
    assert license_file.resolve().parent.parent == (out / "licenses").resolve()


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ("ref: refs/heads/main\n", COMMIT),
        (COMMIT, COMMIT),
        ("ref: {secret}", ""),
        ("ref: refs/../../../secret", ""),
        ("ref: refs/heads/link", ""),
        ("ref: refs/heads/text", ""),
        ("ref: config", ""),
        ("the secret", ""),
    ],
)
def test_only_a_commit_under_refs_is_read_from_a_clone(head: str, expected: str, tmp_path: Path) -> None:
    secret, clone = tmp_path / "secret", tmp_path / "clone"
    secret.write_text(COMMIT)  # even where it looks like a commit
    heads = clone / ".git" / "refs" / "heads"
    heads.mkdir(parents=True)
    (heads / "main").write_text(COMMIT + "\n")
    (heads / "text").write_text("the user's own words")
    (heads / "link").symlink_to(secret)
    (clone / ".git" / "HEAD").write_text(head.format(secret=secret))
    assert commit_of(clone) == expected


def test_nothing_outside_a_scanned_folder_is_read(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "root"
    (outside / "pkg").mkdir(parents=True)
    (outside / "pkg" / "a.py").write_text("secret = 1\n")
    (outside / "HEAD").write_text(COMMIT)
    (root / "owner" / "repo").mkdir(parents=True)
    (root / "owner" / "repo" / "b.py").write_text("x = 1\n")
    (root / "linked").symlink_to(outside)
    (root / "owner" / "repo" / ".git").symlink_to(outside)
    source = RepositoryFolders(str(root), depth=2)
    assert [unit.key for unit in source.list_units()] == ["owner/repo"]
    assert [(f.path, f.version) for f in source.read(Unit("owner/repo", 0), 1000)] == [("b.py", "")]
    assert read_regular_file(root / "linked" / "pkg" / "a.py", 1000, root) == (None, "link")
    assert read_regular_file(root / "owner/repo/../../../outside/pkg/a.py", 1000, root) == (None, "link")
    with zipfile.ZipFile(outside / "private.zip", "w") as archive:
        archive.writestr("a.py", "secret = 1\n")
    (root / "linked.zip").symlink_to(outside / "private.zip")
    (root / "own.zip").write_bytes((outside / "private.zip").read_bytes())
    assert [unit.key for unit in ArchiveFolder(str(root)).list_units()] == ["own.zip"]


def _tar_with(kind: bytes, size: int, packed: Callable[[bytes], bytes]) -> bytes:
    """A tar file whose first header says that so many bytes of a name or of PAX records follow, and they do."""
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return packed(info.tobuf(tarfile.GNU_FORMAT) + bytes(size))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize(("suffix", "packed"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_large_tar_headers_are_refused_before_they_are_read(
    kind: bytes, suffix: str, packed: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_prep.sources.archives._MAX_HEADER_BYTES", 2**20)
    (tmp_path / f"a.tar.{suffix}").write_bytes(_tar_with(kind, 2**24, packed))
    tracemalloc.start()
    found = list(ArchiveFolder(str(tmp_path)).read(Unit(f"a.tar.{suffix}", 0), 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [file.problem for file in found] == ["unreadable_archive"]
    assert peak < 2**24  # what the header asks for


def _tar_of(infos: list[tarfile.TarInfo], path: Path) -> None:
    path.write_bytes(gzip.compress(b"".join(info.tobuf() for info in infos) + bytes(1024), 1))


def test_archives_of_too_many_or_too_large_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.archives._MAX_MEMBERS", 1_000)

    def problems(name: str) -> list[str]:
        return [file.problem for file in ArchiveFolder(str(tmp_path)).read(Unit(name, 0), 1000)]

    folder, far, negative, good = (tarfile.TarInfo(n) for n in ("d", "far.py", "negative.py", "good.py"))
    folder.type, far.size, good.size = tarfile.DIRTYPE, 2**50, 0
    _tar_of([folder] * 1_001, tmp_path / "many.tar.gz")
    _tar_of([far, good], tmp_path / "far.tar.gz")
    _tar_of([good], tmp_path / "good.tar.gz")
    negative.pax_headers = {"size": "-5"}
    (tmp_path / "negative.tar.gz").write_bytes(gzip.compress(negative.tobuf(tarfile.PAX_FORMAT) + bytes(1024)))
    assert problems("many.tar.gz") == ["unreadable_archive"]
    assert problems("far.tar.gz") == ["unreadable_archive"]
    assert problems("good.tar.gz") == [""]
    list(ArchiveFolder(str(tmp_path)).read(Unit("negative.tar.gz", 0), 1000))


def test_a_damaged_licence_costs_its_text_alone(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("COPYING", "first")
        archive.writestr("LICENSE", "damaged here")
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(whole.replace(b"damaged", b"DAMAGED", 1))
    assert ArchiveFolder(str(tmp_path)).license_texts(Unit("a.zip", 0)) == {"COPYING": "first"}


def _seconds(function: Callable[[str], object], text: str) -> float:
    start = time.process_time()
    function(text)
    return time.process_time() - start


UNITS = (
    '"\\', "'\\", '"""\\', "'''a\n", '"\\\n', "'\"\\", " ", "\n", " \n", "#", "from a import (\n",
    "from a import (#aa\n", "from a" + " " * 40, "from . ", "import a,\\\n", "url =\n", "\turl",
)  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_patterns_take_time_in_proportion_to_the_text(unit: str, tmp_path: Path) -> None:
    """Sixteen times the text in far less than 256 times the time, also where a comment or import sets them off."""

    def remotes(text: str) -> str:
        (tmp_path / ".git" / "config").write_text(text)
        return remote_of(tmp_path)

    (tmp_path / ".git").mkdir()
    starts = {scan_imports: "import a\n", tokens_of: "#\n", first_line: "", remotes: ""}
    functions: dict[Callable[[str], object], str] = {**starts, lambda text: replace_strings(text, str.upper): ""}
    for function, start in functions.items():
        short, long = (_seconds(function, start + unit * count) for count in (2_000, 32_000))
        assert long < 60 * short + 0.2


def test_comments_in_an_open_import_are_not_tried_in_every_way() -> None:
    """Each could be cut in several places: 3 to the power of their number."""
    assert [i.name for i in scan_imports("from a import (#bb\n" + "#bb\n" * 200)] == []
    assert [i.name for i in scan_imports("from a import (b, # (\n c)\n")] == ["b", "c"]


_UPSTREAM = re.compile(r""""([^"\\]*(\\.[^"\\]*)*)"|'([^'\\]*(\\.[^'\\]*)*)'""")


@given(st.text("\"'\\\n ab", max_size=40))
def test_strings_are_those_that_crosscodeeval_finds(code: str) -> None:
    assert replace_strings(code, lambda string: f"<{string}>") == _UPSTREAM.sub(lambda m: f"<{m.group()}>", code)


@given(st.text(" \n\tab\r", max_size=40))
def test_the_first_line_ends_where_it_did(code: str) -> None:
    found = re.match(r"\s*?[^\n]*\S[^\n]*(?=\n)", code)
    assert first_line(code) == (found.group() if found else code)


@pytest.mark.parametrize(
    ("fields", "permissive"),
    [
        ({"Classifier": ["License :: OSI Approved :: MIT License"]}, True),
        ({"Classifier": ["License :: OSI Approved", "License :: OSI Approved :: MIT License"]}, True),
        ({"Classifier": [f"License :: OSI Approved :: {name}" for name in ("MIT License", "BSD License")]}, True),
        (
            {"Classifier": [
                "License :: OSI Approved :: MIT License",
                "License :: OSI Approved :: GNU General Public License v3 (GPLv3)",
            ]},
            False,
        ),
        ({"Classifier": ["License :: OSI Approved :: MIT License", "License :: Other/Proprietary License"]}, False),
        ({"License": ["MIT"], "Classifier": ["License :: OSI Approved :: GNU General Public License (GPL)"]}, False),
        ({"License-Expression": ["MIT OR GPL-3.0-only"]}, True),
        ({"License-Expression": ["MIT AND GPL-3.0-only"]}, False),
    ],
)  # fmt: skip
def test_only_an_expression_gives_a_choice_of_licences(fields: dict[str, list[str]], permissive: bool) -> None:
    metadata = Message()
    for name, values in fields.items():
        for value in values:
            metadata[name] = value
    assert license_allowed(license_from_metadata(metadata), PERMISSIVE) is permissive


def test_text_from_data_stays_text_in_markdown() -> None:
    assert markdown.plain("a <b> | c ` \\<img> [x](y)\n# d") == r"a \<b> \| c \` \\\<img> [x]\(y) # d"
    assert markdown.plain("<0.001 +1.2 [-1, 2] (n=3)") == "<0.001 +1.2 [-1, 2] (n=3)"
    assert markdown.code("a`b\r\n\r\n<b>") == "`a'b ⏎  ⏎ <b>`"
    assert markdown.fenced("```\n<b>\n````") == "`````\n```\n<b>\n````\n`````"
