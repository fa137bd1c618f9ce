"""The errors of this folder: everything that a user of an evaluation can mend.

Every message says what was wrong, what was expected and what to do. `python -m eval.…` prints it without a traceback
and leaves with exit code 2.
"""

from __future__ import annotations

from titans_ds.errors import TitansError


class EvalError(TitansError):
    """A setting, a model or a folder that an evaluation cannot work with."""


class PredictionsError(EvalError):
    """A predictions file that is damaged, incomplete, or made for other tasks."""
