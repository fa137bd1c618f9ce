"""Which split a repository belongs to. It depends on the name, the seed and the ratios alone.

So a repository never moves when others are added or removed, or when the corpus is built in shards.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from .errors import DataPrepError
from .hashing import hash64

SPLITS = ("train", "validation", "test")


def split_of(repo: str, ratios: tuple[float, float, float], seed: int) -> str:
    """Return "train", "validation" or "test" for a repository name."""
    position = hash64(repo, f"split{seed}") / 2**64 * sum(ratios)
    if position < ratios[0]:
        return "train"
    return "validation" if position < ratios[0] + ratios[1] else "test"


def parse_ratios(text: str) -> tuple[float, float, float]:
    """Parse "90/5/5": shares of train, validation and test, of any sum."""
    try:
        train, validation, test = (float(part) for part in text.split("/"))
    except ValueError:
        raise DataPrepError(f"--split-ratios {text!r}: expected three numbers as in 90/5/5.") from None
    if not all(0 <= share < math.inf for share in (train, validation, test)) or train <= 0:
        raise DataPrepError(f"--split-ratios {text!r}: expected finite shares of 0 or more, and train above 0.")
    return train, validation, test


def require_filled(counts: Mapping[str, int], ratios: tuple[float, float, float]) -> None:
    """Raise DataPrepError when a split whose share is above 0 has no repository."""
    empty = [name for name, share in zip(SPLITS, ratios, strict=True) if share > 0 and not counts.get(name)]
    if empty:
        total = sum(counts.values())
        raise DataPrepError(
            f"No repository falls into {' and '.join(empty)}: only {total} are left after the filters. A repository's "
            "split depends on its name alone, so change the shares (--split-ratios 80/10/10), or take another "
            "--split-seed, or give more repositories."
        )
