"""The error of what a user of data_prep can mend in its settings and sources.

Damaged files are a `titans_ds.errors.DataError`, outputs that can't be written an `OutputError`.
"""

from __future__ import annotations

from titans_ds.errors import TitansError


class DataPrepError(TitansError):
    """A source or a setting that cannot work."""
