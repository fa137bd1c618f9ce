"""Token healing: a prompt that stops inside a token is taken back to where no token is cut, and regenerated from there.

CrossCodeEval's Python prompts stop right after a "."; a tokenizer that has ".get" never splits there, so that the
model is asked to go on from a place it never saw. Healing takes the last token off, and more where some token could
reach across their border, and lets the model write them again: each new token must spell what is still missing, or
begin with all of it and go on. What it writes beyond is the completion. The text of prompt and completion is the same
for any tokenizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .token_bytes import TokenBytes


@dataclass(frozen=True)
class HealedPrompt:
    """`kept` tokens go to the model; `removed` tokens, together the bytes `text`, are written again."""

    kept: list[int]
    removed: list[int]
    text: bytes


def heal(tokens: Sequence[int], vocabulary: TokenBytes) -> HealedPrompt:
    """Take off the last token, and as many before it as one token of the vocabulary could join with what follows.

    The first token always stays: the model needs something to read. Special tokens are never taken off.
    """
    count, text = 0, b""
    for number in range(1, len(tokens)):
        piece = vocabulary.of(tokens[-number])
        if piece is None or len(piece) + len(text) > vocabulary.longest:
            break
        text = piece + text
        if number == 1 or vocabulary.extends(text):
            count = number
    split = len(tokens) - count
    return HealedPrompt(list(tokens[:split]), list(tokens[split:]), vocabulary.join(tokens[split:]))


def still_missing(text: bytes, token: int, vocabulary: TokenBytes) -> bytes:
    """Return what must still be written of `text` after `token`, one of `vocabulary.spelling(text)`."""
    return text[len(vocabulary.of(token) or b"") :]
