"""data.corpus of a run: a packed corpus as it is, or a corpus folder of parquet files, packed on the way.

What reads parquet is imported where a corpus is packed: a run on a packed corpus needs none of it.
"""

from __future__ import annotations

from pathlib import Path

from titans_ds.errors import DataError, TitansError


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
    from data_prep.pack_corpus import pack

    try:
        return pack(folder, tokenizer)[0]
    except TitansError as error:
        raise DataError(f"data.corpus: {folder} can't be packed: {error}") from error
