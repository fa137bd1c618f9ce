"""Runs of tokens that two texts share, by hashes of every run.

Tokens are words and signs; white space and Python comments do not count (licence headers are shared by everybody).
A run's hash is a polynomial of its tokens' hashes modulo 2^64, computed for all runs of a file at once.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from ..hashing import hash64

# Every string matches, also one that nobody closed: else each of its quotes would be tried up to the end of the text.
_COMMENT = re.compile(
    r"""(\"{3}(?:[^\\]|\\.)*?(?:\"{3}|\Z)|'{3}(?:[^\\]|\\.)*?(?:'{3}|\Z)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?)"""
    r"|#[^\n]*",
    re.DOTALL,
)
# A sign repeated ("-----") is one token: rulers are shared by everybody.
_TOKEN = re.compile(r"\w+|([^\w\s])\1*")
# Odd, so that it has an inverse modulo 2^64.
_FACTOR = 0x9E3779B97F4A7C15
_INVERSE = pow(_FACTOR, -1, 2**64)


def tokens_of(text: str) -> list[str]:
    """Return the words and signs of a text, without Python comments."""
    if "#" in text:
        text = _COMMENT.sub(lambda match: match[1] or "", text)
    return [match[0] for match in _TOKEN.finditer(text)]


@lru_cache(maxsize=1 << 18)
def _token_hash(token: str) -> int:
    return hash64(token, "token")


def run_hashes(text: str, run_length: int) -> np.ndarray:
    """Return the hash of every run of `run_length` tokens, uint64 [tokens - run_length + 1] ([0] for a shorter
    text)."""
    tokens = tokens_of(text)
    count = len(tokens) - run_length + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    values = np.fromiter(map(_token_hash, tokens), dtype=np.uint64, count=len(tokens))
    # Unsigned arithmetic wraps: everything below is modulo 2^64.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values * _powers(_FACTOR, len(tokens)), dtype=np.uint64)])
    return (sums[run_length:] - sums[:count]) * _powers(_INVERSE, count)


def _powers(factor: int, count: int) -> np.ndarray:
    powers = np.full(count, factor, dtype=np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)
