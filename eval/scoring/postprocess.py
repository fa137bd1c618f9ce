"""From the model's raw completion to the text that is compared with the target.

Rules (`--postprocess`):
  parity      upstream's: statement truncation, then the regexes `#.*` and `//.*` on both sides, in every language
  strict      statement truncation, then comments removed by the language's grammar (a # in a string stays)
  none        no truncation, the two regexes on both sides
  first_line  the completion up to the end of its first non-blank line, then the two regexes

Statement truncation. Python: the shortest completion that ends before a newline and with which prompt + completion
parses; right-stripped; all of it where there is none. Java, TypeScript, C#: up to and with the first ; { or }.
Upstream keeps all of a completion that BEGINS with one of the three (its test is `if end_idx`, and the index is 0):
`parity` does the same, `strict` cuts there.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from ..data import grammars
from ..errors import EvalError

RULES = ("parity", "strict", "none", "first_line")

_PYTHON_COMMENT = re.compile(r"#.*")
_SLASH_COMMENT = re.compile(r"//.*")
_STATEMENT_END = re.compile(r"[;{}]")


class Pair(NamedTuple):
    """Prediction and target, ready for the metrics."""

    prediction: str
    target: str


def postprocess(rule: str, prompt: str, completion: str, target: str, language: str) -> Pair:
    """Return prediction and target after `rule` (see the module's text). EvalError for an unknown rule or language."""
    if rule not in RULES:
        raise EvalError(f"Unknown post-processing {rule!r}. Expected one of {', '.join(RULES)}.")
    grammars.check_language(language)
    cut = _truncate(rule, prompt, completion, language)
    if rule == "strict":
        return Pair(grammars.remove_comments(prompt, cut, language), grammars.remove_comments(prompt, target, language))
    return Pair(strip_comment_regexes(cut), strip_comment_regexes(target))


def _truncate(rule: str, prompt: str, completion: str, language: str) -> str:
    if rule == "none":
        return completion
    if rule == "first_line":
        return first_line(completion)
    return truncate_statement(prompt, completion, language, cut_at_start=rule == "strict")


def strip_comment_regexes(code: str) -> str:
    """Remove `#.*` and then `//.*`, whatever the language: upstream's rule, wrong for # in strings and // in Python."""
    return _SLASH_COMMENT.sub("", _PYTHON_COMMENT.sub("", code))


def first_line(completion: str) -> str:
    """Return the completion up to the end of its first non-blank line."""
    return completion[:end] if (end := _first_line_end(completion)) >= 0 else completion


def _first_line_end(completion: str) -> int:
    """Return the index of the newline after the first non-blank line, -1 where there is none yet."""
    return completion.find("\n", len(completion) - len(completion.lstrip()))


def truncate_statement(prompt: str, completion: str, language: str, cut_at_start: bool = False) -> str:
    """Return the first statement of `completion`.

    `cut_at_start`: cut also where its first character ends a statement.
    """
    if language == "python":
        end = python_statement_end(prompt, completion)
        return completion if end is None else completion[:end].rstrip()
    end = bracket_statement_end(completion, cut_at_start)
    return completion if end is None else completion[:end]


def python_statement_end(prompt: str, completion: str) -> int | None:
    """Return the first index of a newline, 1 or later, up to which prompt + completion parses; None if there is none.

    The same as growing the completion character by character and testing each: only what stands before a newline
    counts.
    """
    for index in range(1, len(completion)):
        if completion[index] == "\n" and grammars.parses(prompt + completion[:index], "python"):
            return index
    return None


def bracket_statement_end(completion: str, cut_at_start: bool = False) -> int | None:
    """Return the index after the first ; { or }.

    None if there is none, or if it is the first character (unless `cut_at_start`).
    """
    match = _STATEMENT_END.search(completion)
    if match is None or (match.start() == 0 and not cut_at_start):
        return None
    return match.end()


def is_settled(prompt: str, completion: str, language: str) -> bool:
    """Return whether more text after `completion` can change what parity, strict and first_line make of it.

    Generation may stop there (`--stop statement`); only the rule `none` would see a difference.
    """
    if _first_line_end(completion) < 0:
        return False
    if language == "python":
        return python_statement_end(prompt, completion) is not None
    return bracket_statement_end(completion) is not None
