"""Memory into a model: families, injection, TitansModel, adapters."""

from titans_ds.graft.call import MemoryOutput
from titans_ds.graft.session import MemorySession
from titans_ds.graft.titans_model import TitansModel, attach

__all__ = ["MemoryOutput", "MemorySession", "TitansModel", "attach"]
