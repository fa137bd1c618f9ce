"""What `prime`, `complete` and `inspect` share: files for a memory to read, and the model that reads them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from data_prep.corpus.reading_order import order_by_depth
from data_prep.sources.listing import walk_files
from data_prep.sources.reading import read_regular_file
from eval.devices import device_named
from titans_ds import TitansModel, assets
from titans_ds.errors import DataError
from titans_ds.program import some_text
from titans_ds.training.build import load_tokenizer
from titans_ds.training.settings import ModelSettings

MOST_BYTES = 1_000_000  # of a file


@dataclass(frozen=True)
class TokenFile:
    """A text as token ids, and what to call it."""

    name: str
    ids: list[int]


def add_model_options(parser: argparse.ArgumentParser, default: bool = True) -> None:
    """--base, --adapter, --device; by default the base and the memory that come with this project."""
    base, adapter = (str(assets.base()), str(assets.adapter("hybrid"))) if default else (None, None)
    where = "the one that comes with titans-ds" if default else "what the memory's file names"
    parser.add_argument("--base", type=some_text, default=base, help=f"folder or hub id (default: {where})")
    parser.add_argument("--adapter", type=some_text, default=adapter, help=f"folder or hub id (default: {where})")
    parser.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: a GPU where there is one)")


def load_model(base: str, adapter: str, device: str) -> tuple[TitansModel, Any]:
    """Model and tokenizer, ready to read.

    Raises:
        TitansError: base, adapter or device is not there, or they don't fit.
    """
    place = device_named(device)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = TitansModel.from_pretrained(base, adapter).eval()
    tokenizer = load_tokenizer(ModelSettings(base=base, tokenizer=base))
    return model.to(place), tokenizer


def read_files(paths: Sequence[Path], suffixes: Sequence[str]) -> list[tuple[str, str]]:
    """Names and texts: files as they are given, folders with their files of these suffixes, shallow ones first.

    Links, files above a megabyte and such that aren't UTF-8 are left out of folders.

    Raises:
        DataError: a path is not there, a given file can't be read, or nothing is left.
    """
    found: list[tuple[str, str]] = []
    for path in paths:
        if path.is_dir():
            below = [p.relative_to(path).as_posix() for p in walk_files(path, tuple(suffixes))]
            texts = {name: read_regular_file(path / name, MOST_BYTES, path)[0] for name in below}
            for name in order_by_depth([name for name, content in texts.items() if content]):
                text = decoded(texts[name] or b"")
                found += [] if text is None else [(name, text)]
            continue
        try:
            text = decoded(path.read_bytes())
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror}); give a folder or a text file") from error
        if text is None:
            raise DataError(f"{path} is not UTF-8 text; give a folder or a text file")
        found.append((path.name, text))
    if not any(text for _, text in found):
        raise DataError(
            f"{', '.join(map(str, paths))}: no text to read; of folders files in {' '.join(suffixes)} are read, others "
            "with --suffix"
        )
    return found


def decoded(content: bytes) -> str | None:
    """The text of UTF-8, without its byte-order mark; None where it is none."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def tokenize(tokenizer: Any, texts: Sequence[tuple[str, str]], most: int) -> tuple[list[TokenFile], int]:
    """The files as token ids, cut after `most` tokens in all; and how many tokens there would have been."""
    whole = [
        TokenFile(name, tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for name, text in texts
    ]
    kept, room = [], most
    for file in whole:
        if room > 0 and file.ids:
            kept.append(TokenFile(file.name, file.ids[:room]))
            room -= len(kept[-1].ids)
    return kept, sum(len(file.ids) for file in whole)
