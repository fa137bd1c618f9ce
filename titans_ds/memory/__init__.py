"""The memory of one layer: tensors in, tensors out. Knows neither transformers nor deepspeed.

Here is what every kind of memory shares; each kind has a folder (`delta`, `mlp`).
"""

from titans_ds.memory.graphs import Answer, LayerMemory
from titans_ds.memory.interface import READ, WRITE, Controls, LayerTrace, Pass, SegmentTrace
from titans_ds.memory.state import LayerState, MemoryState

__all__ = [
    "READ",
    "WRITE",
    "Answer",
    "Controls",
    "LayerMemory",
    "LayerState",
    "LayerTrace",
    "MemoryState",
    "Pass",
    "SegmentTrace",
]
