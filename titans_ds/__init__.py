"""titans-ds: test-time neural memory (Titans, TTT) grafted onto pretrained causal language models.

    model = titans_ds.attach(base_model, titans_ds.GraftConfig())

Importing this package loads neither deepspeed nor mpi4py.
"""

from titans_ds.config import GraftConfig, LoraSettings, MemoryConfig
from titans_ds.errors import TitansError
from titans_ds.graft import MemorySession, TitansModel, attach
from titans_ds.memory import MemoryState
from titans_ds.memory_config import named_memory

__version__ = "0.1.0"
__all__ = [
    "GraftConfig",
    "LoraSettings",
    "MemoryConfig",
    "MemorySession",
    "MemoryState",
    "TitansError",
    "TitansModel",
    "__version__",
    "attach",
    "named_memory",
]
