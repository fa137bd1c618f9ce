"""Hashes that are the same on every machine and in every process (Python's own `hash` is not)."""

from __future__ import annotations

from hashlib import blake2b


def hash64(text: str | bytes, salt: str = "") -> int:
    """Return 64 bits of BLAKE2b of the text, keyed by `salt` (at most 16 bytes of it are used)."""
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    digest = blake2b(data, digest_size=8, person=salt.encode()[:16])
    return int.from_bytes(digest.digest(), "big")


def hash128(data: bytes) -> tuple[int, int]:
    """Return 128 bits of BLAKE2b as two 64-bit numbers: what tells whether two files are the same."""
    digest = blake2b(data, digest_size=16).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")
