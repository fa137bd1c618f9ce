"""titans-ds: test-time neural memory (Titans, TTT) grafted onto pretrained causal language models.

    model = titans_ds.attach(base_model, titans_ds.GraftConfig())

Importing this package loads neither deepspeed nor mpi4py, and torch only when one of the names below is used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from titans_ds.errors import TitansError

if TYPE_CHECKING:
    from titans_ds import assets as assets
    from titans_ds.config import GraftConfig, LoraSettings
    from titans_ds.graft import MemorySession, TitansModel, attach
    from titans_ds.graft.compare import Comparison, compare
    from titans_ds.graft.families import register_family
    from titans_ds.memory import MemoryState
    from titans_ds.memory.delta import DeltaConfig
    from titans_ds.memory.mlp import MLPConfig
    from titans_ds.memory.prefix import PrefixConfig
    from titans_ds.memory.registry import preset

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "DeltaConfig",
    "GraftConfig",
    "LoraSettings",
    "MLPConfig",
    "MemorySession",
    "MemoryState",
    "PrefixConfig",
    "TitansError",
    "TitansModel",
    "__version__",
    "assets",
    "attach",
    "compare",
    "preset",
    "register_family",
]
_HOMES = {
    "Comparison": "graft.compare",
    "DeltaConfig": "memory.delta",
    "GraftConfig": "config",
    "LoraSettings": "config",
    "MLPConfig": "memory.mlp",
    "MemorySession": "graft",
    "MemoryState": "memory",
    "PrefixConfig": "memory.prefix",
    "TitansModel": "graft",
    "attach": "graft",
    "compare": "graft.compare",
    "preset": "memory.registry",
    "register_family": "graft.families",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: data_prep, which needs no torch, imports this package."""
    if name == "assets":
        return import_module("titans_ds.assets")
    if name not in _HOMES:
        raise AttributeError(f"module 'titans_ds' has no attribute {name!r}")
    value = getattr(import_module(f"titans_ds.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
