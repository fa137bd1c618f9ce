"""A network as the memory: Titans, TTT and the rule of "Parametric Memory Cannot Replace Retrieval", as presets.

Read naive.py first: it says what this kind does, one token at a time. Every other path is compared with it.
"""

from titans_ds.memory.mlp.config import (
    PRESETS,
    FeatureConfig,
    MLPConfig,
    RuleConfig,
)
from titans_ds.memory.mlp.memory import MLPMemory

__all__ = [
    "PRESETS",
    "FeatureConfig",
    "MLPConfig",
    "MLPMemory",
    "RuleConfig",
]
