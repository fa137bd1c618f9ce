"""Every token of a tokenizer as the bytes it writes: what token healing and exact decoding stand on.

Byte-level vocabularies (GPT-2, Llama 3, Qwen, StarCoder) and SentencePiece ones (Llama 2, Gemma) are read from their
own alphabet. Any other tokenizer is asked to decode each token after an anchor; tokens that it cannot show as text
take no part in healing.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE_MARK = "▁"


class TokenBytes:
    """The vocabulary as bytes, searchable by prefix.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._table = _build_table(tokenizer)
        entries = sorted((text, token) for token, text in enumerate(self._table) if text)
        self._sorted_bytes = [text for text, _ in entries]
        self._sorted_ids = [token for _, token in entries]
        self.longest = max(map(len, self._sorted_bytes), default=0)
        self._spelling_cache: dict[bytes, list[int]] = {}

    def __len__(self) -> int:
        return len(self._table)

    def of(self, token: int) -> bytes | None:
        """Return the token's bytes.

        None for special tokens, for ids beyond the vocabulary, and where it cannot be said.
        """
        return self._table[token] if token < len(self._table) else None

    def join(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of a sequence; special tokens write nothing."""
        return b"".join(self.of(token) or b"" for token in tokens)

    def text(self, tokens: Iterable[int]) -> str:
        """Return the text of a sequence; bytes that are no UTF-8 become the replacement character."""
        return self.join(tokens).decode("utf-8", "replace")

    def starting_with(self, prefix: bytes) -> Sequence[int]:
        """Return the tokens whose bytes begin with `prefix` (which is not empty)."""
        low = bisect_left(self._sorted_bytes, prefix)
        high = bisect_left(self._sorted_bytes, _after(prefix)) if _after(prefix) else len(self._sorted_bytes)
        return self._sorted_ids[low:high]

    def equal_to(self, text: bytes) -> Sequence[int]:
        """Return the tokens that write exactly `text`."""
        low = bisect_left(self._sorted_bytes, text)
        high = bisect_left(self._sorted_bytes, text + b"\0")
        return self._sorted_ids[low:high]

    def extends(self, text: bytes) -> bool:
        """Return whether some token begins with `text` and goes on after it."""
        low = bisect_left(self._sorted_bytes, text + b"\0")
        return low < len(self._sorted_bytes) and self._sorted_bytes[low].startswith(text)

    def spelling(self, text: bytes) -> list[int]:
        """Return the tokens that may come next where `text` must still be written: they begin it, or begin with it."""
        if text not in self._spelling_cache:
            tokens = list(self.starting_with(text))
            for end in range(1, len(text)):
                tokens += self.equal_to(text[:end])
            self._spelling_cache[text] = tokens
        return self._spelling_cache[text]


def _after(prefix: bytes) -> bytes:
    """Return the least byte string above all that begin with `prefix`; empty where there is none."""
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b""


def _build_table(tokenizer: Any) -> list[bytes | None]:
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    read = _reader(tokenizer, names)
    table = [read(token, name) if name is not None else None for token, name in enumerate(names)]
    for token, added in tokenizer.added_tokens_decoder.items():
        if token < len(table):
            table[token] = None if added.special else added.content.encode("utf-8")
    for token in tokenizer.all_special_ids:
        if token < len(table):
            table[token] = None
    return table


def _reader(tokenizer: Any, names: Sequence[str | None]) -> Any:
    decoder = _decoder_types(tokenizer)
    if "ByteLevel" in decoder:
        alphabet = _byte_alphabet()
        return lambda _, name: _from_alphabet(name, alphabet)
    if {"ByteFallback", "Metaspace"} & decoder or any(name and name.startswith(_SPACE_MARK) for name in names):
        return lambda _, name: _from_sentencepiece(name)
    return _AnchoredDecoder(tokenizer)


def _decoder_types(tokenizer: Any) -> set[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return {part.get("type", "") for part in [decoder, *decoder.get("decoders", [])]}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, reversed."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _from_alphabet(name: str, alphabet: dict[str, int]) -> bytes:
    if all(character in alphabet for character in name):
        return bytes(alphabet[character] for character in name)
    return name.encode("utf-8")  # a token that was added as plain text


def _from_sentencepiece(name: str) -> bytes:
    byte = _BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte.group(1), 16)]) if byte else name.replace(_SPACE_MARK, " ").encode("utf-8")


class _AnchoredDecoder:
    """For other tokenizers: what a token adds to the text after an ordinary one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode("a", add_special_tokens=False)
        self._before = self._decode(self._anchor)

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def __call__(self, token: int, name: str) -> bytes | None:
        text = self._decode([*self._anchor, token])
        if not text.startswith(self._before) or "\ufffd" in text:
            return None
        return text[len(self._before) :].encode("utf-8")
