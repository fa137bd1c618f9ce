"""Text from data in Markdown reports: it shows as it is, and opens no tag, link, table cell or code block."""

from __future__ import annotations

import re

# Where Markdown or HTML would begin something; a lone "<" or "[" begins nothing.
_ACTIVE = re.compile(r"[\\`|]|<(?=[A-Za-z/!?])|(?<=\])\(")


def plain(text: str) -> str:
    """Return text for a paragraph, heading or table cell, on one line."""
    return _ACTIVE.sub(r"\\\g<0>", " ".join(text.splitlines()))


def code(text: str) -> str:
    """Return text as code on one line, line breaks shown as ⏎ and backticks as quotes."""
    return f"`{' ⏎ '.join(text.splitlines()).replace('`', chr(39))}`"


def fenced(text: str, language: str = "") -> str:
    """Return text as a block of code, in a fence that is longer than any row of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
