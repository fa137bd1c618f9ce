"""Cross-file pairs and decontamination, on a corpus made from real packages that are installed."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_prep import cross_file_pairs, decontaminate
from data_prep.benchmark.pairs import make_pairs, module_of
from data_prep.corpus.benchmark_names import BenchmarkNames
from data_prep.corpus.build import build
from data_prep.corpus.token_runs import run_hashes, tokens_of
from data_prep.cross_file_pairs import VARIANTS
from data_prep.decontaminate import decontaminate as clean
from data_prep.settings import CorpusSettings
from data_prep.sources import InstalledPackages
from data_prep.sources.base import Unit

PACKAGES = ("anyio", "iniconfig", "httpx2", "jinja2", "pluggy", "filelock", "hjson")


class FewPackages(InstalledPackages):
    """The small packages among the installed ones."""

    def list_units(self) -> list[Unit]:
        return [unit for unit in super().list_units() if unit.key in PACKAGES]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("few") / "corpus"
    build(FewPackages(), CorpusSettings(split_ratios=(1, 0, 0), near_duplicates=False), out)
    return out


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.fixture(scope="module")
def pairs(corpus: Path) -> Path:
    out = corpus.parent / "pairs"
    cross_file_pairs.main(["--corpus", str(corpus), "--out", str(out), "--workers", "1", "--max-pairs-per-repo", "4"])
    return out


def test_pairs_parse_and_define_what_they_use(pairs: Path) -> None:
    records = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    assert len(records) >= 8
    rows = {variant: _rows(pairs / variant) for variant in VARIANTS}
    for variant in VARIANTS:
        assert [row["repo"] for row in rows[variant][::2]] == [record["pair"] for record in records]
        assert [row["file_index"] for row in rows[variant]] == [0, 1] * len(records)
        for row in rows[variant]:
            ast.parse(row["content"])
    for number, record in enumerate(records):
        definitions, usage = (rows["pairs"][2 * number + i]["content"] for i in (0, 1))
        for symbol in record["symbols"]:
            assert symbol in _top_level(definitions)
            assert symbol not in _top_level(usage)
        assert f"from {module_of(record['definitions_path'])} import {', '.join(record['symbols'])}\n" in usage
        assert record["uses"]
        for use in record["uses"]:
            assert usage.startswith(use["symbol"], use["offset"])


def _top_level(text: str) -> set[str]:
    names = set()
    for node in ast.parse(text).body:
        names |= {node.name} if hasattr(node, "name") else set()
        names |= {t.id for t in getattr(node, "targets", ()) if isinstance(t, ast.Name)}
        names |= {node.target.id} if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) else set()
    return names


def test_code_of_a_pair_comes_from_the_real_files(corpus: Path, pairs: Path) -> None:
    real = {(row["repo"], row["path"]): row["content"] for row in _rows(corpus)}
    for row in _rows(pairs / "pairs"):
        lines = set(real[row["repo"].split("#")[0], row["path"]].split("\n"))
        made = [line for line in row["content"].split("\n") if line.strip() and line not in lines]
        # The only line that was not there is the explicit import of the symbols.
        assert len(made) <= (1 if row["file_index"] else 0)
        assert all(re.match(r"from [\w.]+ import \w+", line) for line in made)


def test_renamed_control_changes_the_symbols_alone_and_in_both_files(pairs: Path) -> None:
    records = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    before, after = _rows(pairs / "pairs"), _rows(pairs / "renamed")
    for number, record in enumerate(records):
        mapping: dict[str, str] = {}
        for old, new in zip(before[2 * number : 2 * number + 2], after[2 * number : 2 * number + 2], strict=True):
            words = [re.findall(r"\w+|\W+", row["content"]) for row in (old, new)]
            for left, right in zip(*words, strict=True):
                if left != right:
                    assert left in record["symbols"]
                    assert mapping.setdefault(left, right) == right
        assert set(mapping) == set(record["symbols"])


def test_broken_control_has_definitions_without_the_symbols(pairs: Path) -> None:
    records = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    whole, broken = _rows(pairs / "pairs"), _rows(pairs / "broken")
    for number, record in enumerate(records):
        assert broken[2 * number + 1]["content"] == whole[2 * number + 1]["content"]
        definitions = broken[2 * number]["content"]
        assert not any(re.search(rf"\b{symbol}\b", definitions) for symbol in record["symbols"])
        assert definitions in [row["content"] for row in whole[::2]]


def test_pairs_are_left_as_they_are_when_finished(
    corpus: Path, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (pairs / "pairs.jsonl").stat().st_mtime_ns
    cross_file_pairs.main(["--corpus", str(corpus), "--out", str(pairs), "--max-pairs-per-repo", "4"])
    assert (pairs / "pairs.jsonl").stat().st_mtime_ns == before
    assert cross_file_pairs.main(["--corpus", str(corpus), "--out", str(pairs), "--seed", "5"]) == 2
    assert "made from something else" in capsys.readouterr().err


def test_a_pair_keeps_what_its_code_needs() -> None:
    files = {
        "p/a.py": "from __future__ import annotations\nimport os\nimport re\nBASE = 2\ndef low(x):\n    return x * "
        "BASE\n"
        "def high(x):\n    return low(x) + len(os.sep)\ndef other():\n    return re.X\n",
        "p/b.py": "import sys\nfrom p.a import high, other as o\nLIMIT = 3\ndef run():\n    return high(LIMIT)\ndef "
        "no(): ...\n",
    }
    (pair,) = make_pairs("p", files, max_pairs=3, max_characters=10_000)
    assert pair.symbols == ("high",)
    assert "def low" in pair.definitions
    assert "BASE = 2" in pair.definitions
    assert "import os\n" in pair.definitions
    assert "other" not in pair.definitions
    assert "import re\n" not in pair.definitions
    assert pair.usage == "from p.a import high\n\n\nLIMIT = 3\n\n\ndef run():\n    return high(LIMIT)\n\n"
    assert pair.uses() == [(pair.usage.index("high(LIMIT)"), "high")]


def _benchmark(path: Path, rows: list[dict[str, Any]], repository: str) -> Path:
    lines = []
    for number, row in enumerate(rows):
        text = row["content"]
        metadata = {"task_id": f"t/{number}", "repository": repository, "file": row["path"]}
        record = {"prompt": text[: len(text) // 2], "groundtruth": "", "right_context": text[len(text) // 2 :]}
        lines.append(json.dumps({**record, "metadata": metadata}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def _content(corpus: Path, repo: str) -> list[dict[str, Any]]:
    return [row for row in _rows(corpus) if row["repo"] == repo]


def test_a_copied_repository_goes_by_content_whatever_its_name(corpus: Path, tmp_path: Path) -> None:
    rows = max((_content(corpus, repo) for repo in PACKAGES), key=len)
    repo = rows[0]["repo"]
    largest = sorted(rows, key=lambda row: -row["n_bytes"])[:2]
    removed, _ = clean(
        corpus, [_benchmark(tmp_path / "b.jsonl", largest, "someone-renamedproject-abcdef0")], tmp_path / "o"
    )
    assert [(r["repo"], r["reason"]) for r in removed if not r["path"]] == [(repo, "content")]
    left = _rows(tmp_path / "o")
    assert repo not in {row["repo"] for row in left}
    manifest = json.loads((tmp_path / "o" / "manifest.json").read_text())
    assert sum(entry["files"] for entry in manifest["repositories"]) == len(left)
    assert manifest["filters"][-1] == {
        "filter": "decontamination",
        "files": len(left),
        "repositories": len(PACKAGES) - 1,
    }


def test_a_file_that_shares_fifty_tokens_goes_and_its_neighbours_stay(corpus: Path, tmp_path: Path) -> None:
    rows = _content(corpus, "jinja2")
    row = max(rows, key=lambda r: r["n_bytes"])
    words = tokens_of(row["content"])
    for count, gone in ((50, 1), (49, 0)):
        shared = " ".join(words[200 : 200 + count])
        fake = {"path": "x.py", "content": " ".join(f"unseen{i}" for i in range(3000)) + "\n" + shared}
        benchmark = _benchmark(tmp_path / f"{count}.jsonl", [fake], "no-body-abcdef0")
        removed, _ = clean(corpus, [benchmark], tmp_path / f"out{count}")
        assert [(r["repo"], r["path"], r["reason"]) for r in removed] == [("jinja2", row["path"], "shared_run")] * gone
        left = _content(tmp_path / f"out{count}", "jinja2")
        assert [r["path"] for r in left] == [r["path"] for r in rows if not gone or r["path"] != row["path"]]
        assert [r["file_index"] for r in left] == list(range(len(left)))


def test_the_command_prints_what_went_and_keeps_a_finished_result(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = {"path": "x.py", "content": " ".join(f"unseen{i}" for i in range(99))}
    benchmark = _benchmark(tmp_path / "b.jsonl", [fake], "pallets-jinja2-0123abc")
    out = tmp_path / "out"
    arguments = ["--corpus", str(corpus), "--benchmark", str(benchmark), "--out", str(out), "--workers", "1"]
    decontaminate.main(arguments)
    assert capsys.readouterr().out == "name\tjinja2\t(whole repository)\tpallets-jinja2-0123abc\n"
    removed = [json.loads(line) for line in (tmp_path / "out" / "removed.jsonl").read_text().splitlines()]
    assert removed == [{"repo": "jinja2", "path": "", "reason": "name", "matched": "pallets-jinja2-0123abc"}]
    before = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    decontaminate.main(arguments)
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == before
    assert decontaminate.main([*arguments[:3], str(tmp_path / "out"), *arguments[4:]]) == 2
    assert "no line_completion" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("repo", "home_page", "label", "reason"),
    [
        ("turboderp/exllama", "", "turboderp-exllama-a544085", "name"),
        ("Turboderp/ExLlama", "", "turboderp-exllama-a544085", "name"),
        ("exllama", "", "turboderp-exllama-a544085", "name"),
        ("ex_llama_x", "https://github.com/turboderp/exllama.git", "turboderp-exllama-a544085", "home_page"),
        ("m3dref-clip", "", "3dlg-hcvc-M3DRef-CLIP-420419e", "name"),
        ("someone/exllama", "", "turboderp-exllama-a544085", ""),
        ("clip", "", "a-clip-with-more-420419e", ""),
        ("other", "https://github.com/other/exllama", "turboderp-exllama-a544085", ""),
        ("seiskit", "", "seiskit-0.1.0", "name"),
    ],
)
def test_names_and_home_pages(repo: str, home_page: str, label: str, reason: str) -> None:
    assert BenchmarkNames([label]).match(repo, home_page) == (reason, label if reason else "")


def test_run_hashes_are_those_of_the_runs_alone() -> None:
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in generator.integers(0, 30, size=400)]
    hashes = run_hashes(" ".join(words), 7)
    assert len(hashes) == 394
    for start in range(0, 394, 13):
        assert hashes[start] == run_hashes("  \n ".join(words[start : start + 7]), 7)[0]
    runs = {tuple(words[i : i + 7]) for i in range(394)}
    assert len(np.unique(hashes)) == len(runs)
    assert len(run_hashes("a b c", 7)) == 0


def test_tokens_leave_out_comments_but_not_strings() -> None:
    assert tokens_of("x = '# no' # yes\n# all\n----- y") == ["x", "=", "'", "#", "no", "'", "-----", "y"]
