"""data.corpus of a run: a packed corpus as it is, or a corpus folder of parquet files, packed on the way.

What reads parquet is imported where a corpus is packed: a run on a packed corpus needs none of it.
"""

from __future__ import annotations

from pathlib import Path

from titans_ds.errors import DataError

_COLUMNS = ("repo", "content", "n_bytes")


def packed_corpus(corpus: str, tokenizer: str | None) -> Path:
    """Where the packed corpus is; packs a folder of parquet files into a subfolder at first use.

    Args:
        corpus: data.corpus.
        tokenizer: folder, hub id or tokenizer.json file to pack with.

    Raises:
        DataError: there is no such folder, or it holds neither form; no tokenizer; a missing column; packing failed.
    """
    folder = Path(corpus)
    if not folder.is_dir():
        raise DataError(
            f"data.corpus: the folder {folder} does not exist; make one with python -m data_prep.build_corpus"
        )
    if (folder / "packed.json").is_file():
        return folder
    if not any(folder.glob("*.parquet")):
        raise DataError(
            f"data.corpus: {folder} holds neither packed.json nor parquet files; make a corpus with "
            "python -m data_prep.build_corpus"
        )
    if tokenizer is None:
        raise DataError(f"data.corpus: {folder} is not packed; set model.tokenizer to pack it with")
    for path in sorted(folder.glob("*.parquet")):
        _check_columns(path)
    return _pack(folder, tokenizer)


def _pack(folder: Path, tokenizer: str) -> Path:
    from data_prep.errors import DataPrepError
    from data_prep.pack_corpus import pack

    try:
        return pack(folder, tokenizer)[0]
    except DataPrepError as error:
        raise DataError(f"data.corpus: {folder} can't be packed: {error}") from error


def _check_columns(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_schema(path).names
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data.corpus: {path} is not a readable parquet file: {error}") from error
    missing = [name for name in _COLUMNS if name not in columns]
    if missing:
        raise DataError(
            f"data.corpus: {path} lacks the column {', '.join(missing)} (it has {', '.join(columns)}); make the corpus "
            "with python -m data_prep.build_corpus"
        )
