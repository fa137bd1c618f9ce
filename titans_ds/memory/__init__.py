"""One neural memory, for one layer: tensors in, tensors out. Knows neither transformers nor deepspeed."""

from titans_ds.memory.neural_memory import Access, NeuralMemory
from titans_ds.memory.replay import Record, Tape
from titans_ds.memory.rule import Controls
from titans_ds.memory.state import LayerState, MemoryState

__all__ = ["Access", "Controls", "LayerState", "MemoryState", "NeuralMemory", "Record", "Tape"]
