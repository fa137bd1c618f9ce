"""What comes along: a small base model, and trained memories."""

from __future__ import annotations

from pathlib import Path

from titans_ds.errors import AdapterError

_HERE = Path(__file__).resolve().parent


def base() -> Path:
    """The folder of the shipped base model: 12 layers of width 256 with its tokenizer, to try things and test with."""
    return _HERE / "base_hybrid"


def adapter(name: str) -> Path:
    """The folder of a trained memory: `hybrid`, for `base()`, or the name of the model that it was trained on.

    Raises:
        AdapterError: none of this name comes along; says which do.
    """
    known = sorted(folder.name.removeprefix("memory_") for folder in _HERE.glob("memory_*"))
    if name not in known:
        raise AdapterError(f"no memory named {name!r} comes along; expected one of {', '.join(known)}")
    return _HERE / f"memory_{name}"
