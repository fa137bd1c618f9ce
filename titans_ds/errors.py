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


class OutputError(TitansError):
    """A file or folder can't be written, or its making broke off; what stood there before is as it was."""


class StateError(TitansError):
    """A memory state does not fit the model or the batch it is used with."""


class TrainingError(TitansError):
    """A run can't go on: its losses are not finite, it can't be saved, or no memory would be written in it."""


class CheckpointError(TitansError):
    """A checkpoint is torn, of another run, or can't be written."""


def reason_of(error: BaseException) -> str:
    """What an error of somebody else's says, in one line; its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
