"""Benchmark samples: targets, retrieval against a reference, renaming, and the committed benchmark."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import io
import json
import math
import re
import symtable
import tokenize
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep import benchmark2026, build_benchmark
from data_prep.benchmark import build
from data_prep.benchmark.python_targets import PythonFinder
from data_prep.benchmark.renaming import Renamer
from data_prep.benchmark.repository import Repository
from data_prep.benchmark.retrieval import BM25, Embeddings, Retriever, cut_file
from data_prep.benchmark.sample_filters import SampleLimits, choose, reason_against
from data_prep.benchmark.targets import Target
from data_prep.corpus.imports import ImportResolver
from data_prep.crosscodeeval import build_crossfile_text, load_rows
from data_prep.errors import DataPrepError
from data_prep.licenses import PERMISSIVE, license_allowed
from data_prep.sources.base import Unit


def _repository(files: dict[str, str], name: str = "owner/pkg") -> Repository:
    return Repository(name, "1.0", "MIT", files, Unit("pkg", 0))


def _package(name: str) -> dict[str, str]:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent
    return {
        path.relative_to(root.parent).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*.py"))
    }


DEFINITIONS = """LIMIT = 3
class Engine:
    power = 1
    def __init__(self):
        self.speed = 2
    def start(self, fast):
        return fast
def make(x):
    return x
"""


def _found(usage: str) -> list[tuple[str, str]]:
    files = {"pkg/core.py": DEFINITIONS, "pkg/use.py": usage, "pkg/__init__.py": "from .core import make\n"}
    finder = PythonFinder(_repository(files))
    return [(t.kind, usage[t.start : t.end]) for t in finder.targets() if t.file == "pkg/use.py"]


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ("from pkg.core import make\ny = make(1) + 2  # note\n", [("name", "make(1) + 2")]),
        ("from .core import make as m\nif m(1) > 2:\n    pass\n", [("name", "m(1) > 2:")]),
        ("from pkg import make\nreturn_ = [make(1)]; z = 2\n", [("name", "make(1)]")]),
        ("from pkg import core\ny = core.make(1)\n", [("module_member", "make(1)")]),
        ("import pkg.core as c\nwhile c.LIMIT: break\n", [("module_member", "LIMIT:")]),
        (
            "from pkg.core import Engine\ne = Engine()\ne.start(fast=1)\n",
            [("name", "Engine()"), ("member", "start(fast=1)")],
        ),
        (
            "from pkg.core import Engine\ndef f(e: Engine):\n    return e.speed\n",
            [("name", "Engine):"), ("member", "speed")],
        ),
        ('from pkg.core import Engine\ndef f(e: "Engine | None"):\n    return e.power\n', [("member", "power")]),
        (
            "from pkg.core import Engine\nclass A:\n    def __init__(self):\n        self.e = Engine()\n"
            "    def g(self):\n        self.e.start(1)\n",
            [("name", "Engine()"), ("member", "start(1)")],
        ),
        ("from pkg.core import make\n@make\ndef f():\n    pass\n", [("name", "make")]),
        ("from pkg.core import make\né = 'é', make('é')\n", [("name", "make('é')")]),
        # Bound a second time, so it is not undefined without the import.
        ("from pkg.core import make\nmake = make or 1\n", []),
        ("try:\n    from pkg.core import make\nexcept ImportError:\n    make = None\nmake(1)\n", []),
        # A member that the class does not define; a variable that may be something else.
        ("from pkg.core import Engine\ne = Engine()\ne.unknown()\n", [("name", "Engine()")]),
        ("from pkg.core import Engine\ndef f(e: Engine):\n    e = g()\n    return e.speed\n", [("name", "Engine):")]),
        # Targets of several lines are left out; so is what comes from elsewhere.
        ("from pkg.core import make\ny = make(1,\n  2)\n", []),
        ("from os import path\npath.join(1)\n", []),
    ],
)
def test_targets_are_uses_of_what_another_file_defines(usage: str, expected: list[tuple[str, str]]) -> None:
    assert _found(usage) == expected


def _without_inner_imports(path: str, files: dict[str, str]) -> ast.Module:
    resolver = ImportResolver(files, "x")
    tree = ast.parse(files[path])

    class Remove(ast.NodeTransformer):
        def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
            from data_prep.corpus.imports import ImportedName

            inside = [
                resolver.resolve_one(path, ImportedName(node.level, node.module or "", a.name)) for a in node.names
            ]
            # Under this one, symbol tables leave annotations out.
            return ast.Pass() if any(inside) or node.module == "__future__" else node

    return ast.fix_missing_locations(Remove().visit(tree))


def _undefined(path: str, files: dict[str, str]) -> set[str]:
    """Names used as globals that the module never binds, by the standard library's own symbol tables."""
    table = symtable.symtable(ast.unparse(_without_inner_imports(path, files)), path, "exec")
    bound = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    used: set[str] = set()
    stack = [table]
    while stack:
        scope = stack.pop()
        stack += scope.get_children()
        for symbol in scope.get_symbols():
            if symbol.is_referenced() and (symbol.is_global() or scope is table):
                used.add(symbol.get_name())
    return used - bound


@pytest.mark.parametrize("package", ["rich", "jinja2"])
def test_named_targets_are_undefined_without_the_repositorys_imports(package: str) -> None:
    files = _package(package)
    targets = [target for target in PythonFinder(_repository(files, package)).targets() if target.kind == "name"]
    assert len(targets) > 100
    undefined = {path: _undefined(path, files) for path in {target.file for target in targets}}
    for target in targets:
        assert target.name in undefined[target.file], target


@pytest.mark.parametrize("package", ["jinja2", "anyio"])
def test_targets_end_where_a_statement_does(package: str) -> None:
    files = _package(package)
    body_starts = {path: _body_starts(text) for path, text in files.items()}
    for target in PythonFinder(_repository(files, package)).targets():
        text = files[target.file]
        truth = text[target.start : target.end]
        assert re.match(rf"{re.escape(target.name)}\b", truth) or target.kind == "name"
        assert not re.match(r"\w", text[target.end : target.end + 1])
        # What follows on the line is nothing, a comment, the next statement, or the body of a one-line block.
        after = text[target.end :].split("\n", 1)[0].strip()
        assert not after or after[0] in "#;" or truth.endswith(":"), (target, after)
        if truth.endswith(":"):
            between = text[target.end : min(s for s in body_starts[target.file] if s >= target.end)]
            assert all(not line.strip() or line.strip().startswith("#") for line in between.split("\n")), between


def _body_starts(text: str) -> list[int]:
    """Where the first statement of every block begins, as an offset of the text."""
    lines = text.split("\n")
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    bodies = [node.body for node in ast.walk(ast.parse(text)) if isinstance(getattr(node, "body", None), list)]
    firsts = [body[0] for body in bodies if body]
    first = [min([s, *getattr(s, "decorator_list", [])], key=lambda n: n.lineno) for s in firsts]
    return [starts[n.lineno - 1] + len(lines[n.lineno - 1].encode()[: n.col_offset].decode()) for n in first]


def _filter_case(**changes: str) -> dict[str, str]:
    files = {
        "a.py": "import b\n" + "".join(f"x{i} = {i}\n" for i in range(12)) + "y = helper(1, z)\n",
        "b.py": "pass\n",
    }
    return {**files, **changes}


def _target(files: dict[str, str], truth: str = "helper(1, z)") -> Target:
    start = files["a.py"].rindex(truth)
    return Target("a.py", start, start + len(truth), "helper", "name", "b.py")


def test_filters_name_their_reason() -> None:
    limits = SampleLimits()
    files = _filter_case()
    assert reason_against(_target(files), files, limits) == ""
    assert reason_against(_target(files), files, SampleLimits(min_prompt_lines=13)) == "prompt_too_short"
    assert reason_against(_target(files), files, SampleLimits(max_target_tokens=4)) == "target_length"
    assert reason_against(_target(files), files, SampleLimits(max_file_characters=20)) == "file_too_long"
    trivial = {**files, "a.py": files["a.py"].replace("helper(1, z)", "helper()")}
    assert reason_against(_target(trivial, "helper()"), trivial, limits) == "target_trivial"
    elsewhere = _filter_case(**{"b.py": "q = helper(1, z)\n"})
    assert reason_against(_target(elsewhere), elsewhere, limits) == "target_in_other_file"
    twice = {**files, "a.py": files["a.py"] + "k = helper(1, z)\n"}
    assert reason_against(_target(twice), twice, limits) == "target_in_prompt"


def test_choice_keeps_the_limits_and_follows_the_seed() -> None:
    files = _package("jinja2")
    finder = PythonFinder(_repository(files, "jinja2"))
    limits = SampleLimits(max_per_file=1, max_per_repository=7)
    chosen, dropped = choose(finder.targets(), files, limits, "jinja2", seed=0)
    assert len(chosen) == 7 == len({target.file for target in chosen})
    assert sum(dropped.values()) + len(chosen) == len(list(finder.targets()))
    assert choose(finder.targets(), files, limits, "jinja2", seed=1)[0] != chosen


def _reference_bm25(chunks: list[str], query: str) -> list[float]:
    """Okapi BM25 as Lucene has it, written down from the formula in double precision."""
    tokens = [re.findall(r"\w+", chunk) for chunk in chunks]
    mean = sum(map(len, tokens)) / len(tokens)
    counts = [Counter(words) for words in tokens]
    holding = Counter(word for count in counts for word in count)
    scores = []
    for words, count in zip(tokens, counts, strict=True):
        score = 0.0
        for word in re.findall(r"\w+", query):
            frequency = count[word]
            weight = math.log(1 + (len(tokens) - holding[word] + 0.5) / (holding[word] + 0.5))
            score += weight * frequency / (frequency + 1.5 * (1 - 0.75 + 0.75 * len(words) / mean))
        scores.append(score)
    return scores


def _reference_retrieve(files: dict[str, str], file: str, prompt: str, target: str, mode: str) -> list[tuple[str, str]]:
    chunks: list[tuple[str, str]] = []
    for path in sorted(files):
        lines = [line for line in files[path].split("\n") if line.strip()]
        chunks += [(path, "\n".join(lines[i : i + 10])) for i in range(0, len(lines), 10)]
    query = "\n".join([line for line in prompt.split("\n") if line.strip()][-10:])
    scores = _reference_bm25([text for _, text in chunks], query + (target if mode == "oracle" else ""))
    order = sorted(range(len(chunks)), key=lambda i: (-round(scores[i], 4), i))
    found = []
    for i in [i for i in order if chunks[i][0] != file][:5]:
        follows = mode == "rg1" and i + 1 < len(chunks) and chunks[i + 1][0] == chunks[i][0]
        found.append(chunks[i + 1] if follows else chunks[i])
    return found


@pytest.mark.parametrize("mode", ["rg1", "oracle"])
def test_retrieval_agrees_with_a_reference_chunk_by_chunk(mode: str) -> None:
    files = _package("jinja2")
    retriever = Retriever(files, BM25())
    targets = list(PythonFinder(_repository(files, "jinja2")).targets())[::60]
    assert len(targets) >= 10
    for target in targets:
        prompt, truth = files[target.file][: target.start], files[target.file][target.start : target.end]
        found = retriever.retrieve(target.file, prompt, truth, mode)
        assert [(chunk.filename, chunk.retrieved_chunk) for chunk in found] == _reference_retrieve(
            files, target.file, prompt, truth, mode
        )
        assert len(found) == 5
        assert all(chunk.filename != target.file for chunk in found)


def test_a_query_of_unknown_words_still_returns_chunks() -> None:
    found = Retriever({"a.py": "x = 1\n", "b.py": "y = 2\n"}, BM25()).retrieve("a.py", "ζζζ", "", "rg1")
    assert [(chunk.filename, chunk.score) for chunk in found] == [("b.py", 0.0)]


def test_chunks_hold_ten_lines_that_are_not_blank() -> None:
    text = "\n\n".join(f"line{i}" for i in range(23)) + "\n  \n"
    chunks = cut_file("a.py", text)
    assert [len(chunk.text.split("\n")) for chunk in chunks] == [10, 10, 3]
    assert "\n".join(chunk.text for chunk in chunks) == "\n".join(f"line{i}" for i in range(23))


def test_renaming_is_one_to_one_and_keeps_every_other_token() -> None:
    files = _package("jinja2")
    renamer = Renamer(files, seed=0)
    assert len(renamer.mapping) > 200
    assert len(set(renamer.mapping.values())) == len(renamer.mapping)
    renamed = renamer.rename_files(files)
    assert len(renamed) == len(files)
    used = {word for text in files.values() for word in re.findall(r"\w+", text)}
    assert not used & set(renamer.mapping.values())
    for path, text in files.items():
        new = renamed[renamer.rename(path)]
        ast.parse(new)
        before, after = (list(tokenize.generate_tokens(io.StringIO(t).readline)) for t in (text, new))
        assert [token.type for token in before] == [token.type for token in after]
        for old, token in zip(before, after, strict=True):
            if old.type == tokenize.NAME:
                assert token.string == renamer.mapping.get(old.string, old.string)
            elif old.type in (tokenize.OP, tokenize.NUMBER):
                assert token.string == old.string


def test_renaming_leaves_what_others_know_by_name() -> None:
    files = {
        "pkg/a.py": "import numpy as np\nfrom torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n"
        "        return np.concatenate(x)\nclass Mine:\n    def compute_all(self):\n        self.results = {}.items()\n"
        "    def concatenate(self): ...\n    def __len__(self): return 0\n",
        "pkg/b.py": "from pkg.a import Mine\nMine().compute_all()\n# compute_all of Mine in pkg\n",
    }
    renamer = Renamer(files, seed=3)
    assert {"Net", "Mine", "compute_all", "results", "pkg"} <= set(renamer.mapping)
    assert not {"forward", "concatenate", "items", "__len__", "np", "numpy", "nn", "Module"} & set(renamer.mapping)
    new = renamer.mapping
    assert renamer.rename_files(files)["/".join([new["pkg"], "b.py"])] == (
        f"from {new['pkg']}.a import {new['Mine']}\n{new['Mine']}().{new['compute_all']}()\n"
        f"# {new['compute_all']} of {new['Mine']} in {new['pkg']}\n"
    )
    assert new["Mine"][0].isupper()
    assert re.fullmatch(r"[a-z]+_[a-z]+", new["compute_all"])


def _folder_of_repositories(root: Path) -> Path:
    for name in ("anyio", "jinja2"):
        for path, text in _package(name).items():
            target = root / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
    (root / "anyio" / "LICENSE").write_text(
        "Permission is hereby granted, free of charge, to any person obtaining a copy"
    )
    return root


def test_the_command_writes_rows_that_rebuild_their_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, out = _folder_of_repositories(tmp_path / "repos"), tmp_path / "out"
    build_benchmark.main(["--folders", str(root), "--rename", "--max-per-repository", "8", "--out", str(out)])
    manifest = json.loads((out / "manifest.json").read_text())
    for variant in ("as_is", "renamed"):
        plain = load_rows(out / variant / "python" / "line_completion.jsonl")
        assert len(plain) == manifest["samples"] == 16
        for mode in ("rg1", "oracle"):
            rows = load_rows(out / variant / "python" / f"line_completion_{mode}_bm25.jsonl")
            assert [r.prompt for r in rows] == [r.prompt for r in plain]
            for r in rows:
                assert build_crossfile_text(r.crossfile_list, "python") == r.crossfile_text
                assert len(r.crossfile_list) == 5
                ast.parse(r.prompt + r.groundtruth + r.right_context)
    for r in load_rows(out / "as_is" / "python" / "line_completion.jsonl"):
        repo = r.repository.split("-")[0]
        assert r.prompt + r.groundtruth + r.right_context == (root / repo / r.file).read_text()
        assert r.metadata["groundtruth_start_lineno"] == r.prompt.count("\n")
    none = ["--folders", str(root), "--min-prompt-lines", "100000", "--out", str(tmp_path / "none")]
    assert build_benchmark.main(none) == 2
    assert "No sample is left" in capsys.readouterr().err
    assert not (tmp_path / "none.unfinished").exists()
    assert not (tmp_path / "none").exists()


def test_a_stopped_build_goes_on_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, out = _folder_of_repositories(tmp_path / "repos"), tmp_path / "out"
    command = ["--folders", str(root), "--rename", "--max-per-repository", "8"]
    build_benchmark.main([*command, "--out", str(tmp_path / "whole")])
    analysed: list[str] = []
    find, rows_of = build.LANGUAGES["python"].find, build._variant_rows

    def counting(repository: Any) -> Any:
        analysed.append(repository.name)
        return find(repository)

    def stopped(*given: Any) -> Any:
        if given[3] > 0:  # the second repository's rows
            raise KeyboardInterrupt
        return rows_of(*given)

    language = dataclasses.replace(build.LANGUAGES["python"], find=counting)
    monkeypatch.setitem(build.LANGUAGES, "python", language)
    monkeypatch.setattr(build, "_variant_rows", stopped)
    assert build_benchmark.main([*command, "--out", str(out)]) == 130
    assert not out.exists()
    first = len(analysed)
    assert first >= 2
    monkeypatch.setattr(build, "_variant_rows", rows_of)
    build_benchmark.main([*command, "--out", str(out)])
    assert len(analysed) == first  # nothing was analysed again
    assert not out.with_name("out.unfinished").exists()
    for path in (tmp_path / "whole").rglob("*.jsonl"):
        assert (out / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    (root / sorted(p.name for p in root.iterdir())[0] / "new.py").write_text("import os\n")
    build_benchmark.main([*command, "--out", str(tmp_path / "changed")])
    assert len(analysed) > first  # other files, other parts


def test_the_committed_benchmark(tmp_path: Path) -> None:
    assert benchmark2026.ASSET.stat().st_size < 3_000_000
    out = benchmark2026.unpack(tmp_path / "benchmark")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["samples"] >= 300
    assert len(manifest["repositories"]) >= 30
    assert all(license_allowed(record["license"], PERMISSIVE) for record in manifest["repositories"])
    for variant in ("as_is", "renamed"):
        ids = []
        for mode in ("", "_rg1_bm25", "_oracle_bm25"):
            rows = load_rows(out / variant / "python" / f"line_completion{mode}.jsonl")
            ids.append([r.task_id for r in rows])
            for r in rows:
                ast.parse(r.prompt + r.groundtruth + r.right_context)
                assert not mode or build_crossfile_text(r.crossfile_list, "python") == r.crossfile_text
        assert ids[0] == ids[1] == ids[2]
        assert len(set(ids[0])) == manifest["samples"]


def test_embedding_retrieval_ranks_by_cosine(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="encoders are loaded through transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "alpha", "beta", "gamma", "delta"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    options = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **options).save_pretrained(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    files = {"a.py": "alpha beta", "b.py": "gamma gamma delta", "c.py": "beta beta alpha alpha"}
    ranker = Embeddings(str(tmp_path))
    found = Retriever(files, ranker).retrieve("a.py", "gamma gamma delta", "", "oracle")
    # The same text has cosine 1, however the batch is padded.
    assert (found[0].filename, found[0].score) == ("b.py", 1.0)
    assert found[1].score < 1
    assert ranker.name.endswith("_cosine_sim")
    with pytest.raises(DataPrepError, match="Cannot load the embedding model"):
        Embeddings(str(tmp_path / "absent"))
