"""Load any fast tokenizer as transformers loads it, with a hash that says which one it is."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .errors import DataPrepError


@dataclass(frozen=True)
class LoadedTokenizer:
    """`backend` is a `tokenizers.Tokenizer` that takes special tokens in a text for plain text.

    sha256: of the UTF-8 bytes of `backend.to_str()`, without truncation and padding. vocab_size: largest id + 1.
    """

    backend: Any
    vocab_size: int
    eos_token_id: int | None
    sha256: str


@lru_cache(maxsize=2)
def load_tokenizer(name: str) -> LoadedTokenizer:
    """Return the tokenizer of a folder or Hub id; DataPrepError where there is none, or only a slow one."""
    # Each worker is one process already; threads inside it would fight for the same cores.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Loaded through transformers, because it can change a tokenizer.json on the way (it imports torch, so not above).
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a damaged folder raises any kind
        raise DataPrepError(
            f"Cannot load a tokenizer from {name!r}: {str(error).partition(chr(10))[0]}. Expected a folder with "
            "tokenizer.json or a Hub id. `python -m data_prep.train_tokenizer` makes one."
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataPrepError(f"The tokenizer {name!r} has no fast version. Give one with a tokenizer.json.")
    backend.no_truncation()
    backend.no_padding()
    # Source code may spell "<|endoftext|>": that is text, not the end of a file.
    backend.encode_special_tokens = True
    vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    digest = hashlib.sha256(backend.to_str().encode()).hexdigest()
    return LoadedTokenizer(backend, vocab_size, tokenizer.eos_token_id, digest)
