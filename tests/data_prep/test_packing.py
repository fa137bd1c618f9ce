"""The tokenizer and the packed arrays: what the trainer reads is what the corpus holds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from data_prep import pack_corpus, train_tokenizer
from data_prep.corpus.build import build
from data_prep.errors import DataPrepError
from data_prep.settings import CorpusSettings
from data_prep.sources import StarCoderData
from tests.data_prep.test_corpus import read_corpus, repository, write_starcoderdata
from titans_ds.errors import DataError

transformers = pytest.importorskip("transformers", reason="tokenizers are loaded through transformers")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    rows = [r for number in range(30) for r in repository(f"own{number}/repo", number)]
    for r in rows[::5]:
        r["content"] += "text = 'é <|endoftext|> <|fim_prefix|>'\n\tx  =  1\r\n"
    source = StarCoderData((str(write_starcoderdata(folder / "data", rows)),))
    build(source, CorpusSettings(split_ratios=(6, 2, 2), near_duplicates=False), folder / "corpus")
    return folder / "corpus"


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Path:
    out = corpus.parent / "tokenizer"
    train_tokenizer.main(["--corpus", str(corpus), "--vocab-size", "500", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def packed(corpus: Path, tokenizer: Path) -> Path:
    out, _ = pack_corpus.pack(corpus, str(tokenizer))
    return out


def test_trained_tokenizer_loads_and_knows_its_special_tokens(tokenizer: Path) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    # The text is small: there are fewer pairs to merge than the vocabulary has room for.
    assert 300 < len(loaded) <= 500
    assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
    assert loaded.eos_token_id != loaded.pad_token_id
    for token in train_tokenizer.SPECIAL_TOKENS:
        assert loaded(token, add_special_tokens=False).input_ids == [loaded.convert_tokens_to_ids(token)]
    text = "def f(x):\n    return 'é' + \t x12 \r\n"
    assert loaded.decode(loaded(text).input_ids) == text


def test_every_packed_file_decodes_to_its_content(corpus: Path, tokenizer: Path, packed: Path) -> None:
    loaded = transformers.AutoTokenizer.from_pretrained(str(tokenizer))
    header = json.loads((packed / "packed.json").read_text())
    assert packed.name == f"packed-{header['tokenizer_sha256'][:12]}"
    for split, rows in read_corpus(corpus).items():
        index = np.load(packed / f"{split}.index.npz")
        tokens = np.memmap(packed / f"{split}.tokens.bin", dtype="<u2", mode="r")
        start, length, repo = (index[name] for name in ("file_start", "file_length", "file_repo"))
        assert (start.dtype, length.dtype, repo.dtype) == (np.int64, np.int64, np.int32)
        assert header["splits"][split] == {"files": len(rows), "repos": len(index["repo_names"]), "tokens": len(tokens)}
        assert np.array_equal(start[1:], (start + length)[:-1])
        assert np.all(np.diff(repo) >= 0)
        assert [index["repo_names"][number] for number in repo] == [r["repo"] for r in rows]
        for r, first, count in zip(rows, start, length, strict=True):
            file = tokens[first : first + count]
            assert loaded.decode(file[:-1]) == r["content"]
            # The end of the file is the only one: text that spells the token is text.
            assert np.flatnonzero(file == loaded.eos_token_id).tolist() == [count - 1]


def test_packing_again_changes_nothing_and_two_workers_agree(corpus: Path, tokenizer: Path, packed: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in packed.iterdir()}
    assert pack_corpus.pack(corpus, str(tokenizer))[0] == packed
    assert {path.name: path.stat().st_mtime_ns for path in packed.iterdir()} == before
    other, _ = pack_corpus.pack(corpus, str(tokenizer), packed.parent.parent / "two", num_workers=2)
    for split in ("train", "validation", "test"):
        assert (other / f"{split}.tokens.bin").read_bytes() == (packed / f"{split}.tokens.bin").read_bytes()


def test_a_stopped_packing_goes_on(
    corpus: Path, tokenizer: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "packed"
    with monkeypatch.context() as patched:
        patched.setattr(pack_corpus, "_join", stop)
        with pytest.raises(KeyboardInterrupt):
            pack_corpus.pack(corpus, str(tokenizer), out)
    assert not out.exists()
    with monkeypatch.context() as patched:
        patched.setattr(pack_corpus, "_encode", stop)
        pack_corpus.pack(corpus, str(tokenizer), out)
    assert (out / "train.tokens.bin").read_bytes() == (packed / "train.tokens.bin").read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in packed.iterdir())


def test_datasets_still_opens_a_corpus_that_holds_packed_arrays(corpus: Path, packed: Path, tmp_path: Path) -> None:
    opened = datasets.load_dataset(str(corpus), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in opened.items()} == {k: len(v) for k, v in read_corpus(corpus).items()}


def test_what_cannot_be_packed_is_explained(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json: No such file"):
        pack_corpus.pack(tmp_path, str(tokenizer))
    damaged = shutil.copytree(tokenizer, tmp_path / "damaged")
    (damaged / "tokenizer_config.json").write_text("[]")
    for folder in (tmp_path, damaged):
        with pytest.raises(DataPrepError, match="Cannot load a tokenizer"):
            pack_corpus.pack(corpus, str(folder))
    with pytest.raises(DataPrepError, match="at least 264"):
        train_tokenizer.train(corpus, 100, tmp_path / "tokenizer")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "packed.json").write_text('{"tokenizer_sha256": "1"}')
    with pytest.raises(DataPrepError, match="made from another corpus or tokenizer"):
        pack_corpus.pack(corpus, str(tokenizer), tmp_path / "other")
