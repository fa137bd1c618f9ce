"""The error of everything that a user of data_prep can mend.

Every message says what was wrong, what was expected and what to do. The command-line programs print the message without
a traceback and leave with exit code 2.
"""

from __future__ import annotations


class DataPrepError(Exception):
    """A source, a setting or an output that cannot work."""
