"""The default memory: one matrix a head, written token by token with the (gated) delta rule. Read naive.py first."""

from titans_ds.memory.delta.config import PRESETS, DeltaConfig
from titans_ds.memory.delta.memory import DeltaMemory

__all__ = ["PRESETS", "DeltaConfig", "DeltaMemory"]
