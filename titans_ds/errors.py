"""The errors that a user of this library can cause.

Every message says what was wrong, what was expected and what to do. Command-line programs catch `TitansError`, print
the message without a traceback and leave with exit code 2.
"""

from __future__ import annotations


class TitansError(Exception):
    """Base class: something a user can mend."""


class ConfigError(TitansError):
    """A setting has a value that cannot work, alone or together with another."""


class UnsupportedModelError(TitansError):
    """The base model's type has no entry in `titans_ds.graft.families`."""


class AdapterError(TitansError):
    """An adapter folder is missing, damaged, or made for another base model."""


class DataError(TitansError):
    """A corpus or benchmark file is missing, empty, damaged or lacks a column."""


class StateError(TitansError):
    """A memory state does not fit the model or the batch it is used with."""


class TrainingError(TitansError):
    """A run can't go on: its losses are not finite, or it can't be saved."""


class CheckpointError(TitansError):
    """A checkpoint is torn, of another run, or can't be written."""
