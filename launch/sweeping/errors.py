"""The error of a sweep that its user can mend."""

from __future__ import annotations

from titans_ds.errors import TitansError


class SweepError(TitansError):
    """A space, a study folder or an executor can't work as it was given."""
