"""Training: the loop of launch/train.py, and the same step as a transformers Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titans_ds.training.trainer import MemoryTrainer, RepositoryCollator

__all__ = ["MemoryTrainer", "RepositoryCollator"]


def __getattr__(name: str) -> Any:
    """Import transformers' Trainer, and accelerate with it, when one of these names is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'titans_ds.training' has no attribute {name!r}")
    return getattr(import_module("titans_ds.training.trainer"), name)
