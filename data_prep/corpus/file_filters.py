"""Filters that look at one file alone. Each returns a reason, which is a key of the manifest's `rejected` counts."""

from __future__ import annotations

import ast
import re
import warnings

from ..licenses import license_allowed
from ..settings import CorpusSettings
from ..sources.base import SourceFile

# A line that says so within the first lines, as code generators write it.
_GENERATED = re.compile(
    r"\b(?:auto-?\s?generated|automatically generated|generated (?:by|from|with|automatically|file|code)"
    r"|do not (?:edit|modify)\b.*\b(?:by hand|manually|directly|this file)|this file (?:is|was) generated)",
    re.IGNORECASE,
)
_NUM_HEADER_CHARACTERS = 1_000
# The Stack's limits for data and minified code.
_MAX_LINE_CHARACTERS = 1_000
_MAX_MEAN_LINE_CHARACTERS = 100
_MIN_ALPHANUMERIC_SHARE = 0.25


def rejection(file: SourceFile, settings: CorpusSettings) -> str:
    """Return why a file is left out, "" where it stays. The content is decoded by the caller afterwards."""
    if file.problem:
        return file.problem
    try:
        f"{file.repo}{file.path}".encode()
    except UnicodeEncodeError:
        return "name_not_utf8"
    if file.content is None:
        return "unreadable"
    if len(file.content) > settings.max_file_bytes:
        return "too_large"
    if settings.licenses and not _license_fits(file.license, settings):
        return "license"
    return content_rejection(file.content, settings)


def _license_fits(expression: str, settings: CorpusSettings) -> bool:
    if not expression:
        return not settings.require_license
    return license_allowed(expression, settings.licenses)


def content_rejection(content: bytes, settings: CorpusSettings) -> str:
    """Return "nul_bytes", "not_utf8", "empty", "generated", "long_lines", "not_code", "does_not_parse" or ""."""
    if b"\0" in content:
        return "nul_bytes"
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "not_utf8"
    if not text.strip():
        return "empty"
    if not settings.keep_generated and (reason := _generated(text)):
        return reason
    if settings.require_parse and not parses(text):
        return "does_not_parse"
    return ""


def _generated(text: str) -> str:
    if _GENERATED.search(text, 0, _NUM_HEADER_CHARACTERS):
        return "generated"
    num_lines = text.count("\n") + 1
    if len(text) / num_lines > _MAX_MEAN_LINE_CHARACTERS or _longest_line(text) > _MAX_LINE_CHARACTERS:
        return "long_lines"
    if sum(map(str.isalnum, text)) < _MIN_ALPHANUMERIC_SHARE * len(text):
        return "not_code"
    return ""


def _longest_line(text: str) -> int:
    return max(map(len, text.split("\n")))


def parses(text: str) -> bool:
    """Tell whether Python can parse the text. Nothing is executed, and no warning is printed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True
