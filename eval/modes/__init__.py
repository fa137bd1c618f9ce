"""The modes of an evaluation. A new one is one file in this folder with a `MODES` list (see `mode.py`)."""

from .mode import Mode, ModeInputs, Priming
from .registry import available_modes, get_modes

__all__ = ["Mode", "ModeInputs", "Priming", "available_modes", "get_modes"]
